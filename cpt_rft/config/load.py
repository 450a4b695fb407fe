"""From an experiment file and the overrides of a command line to one checked `Experiment`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cpt_rft.config.document import Document, Keys
from cpt_rft.config.engine import ENGINES
from cpt_rft.config.methods import METHOD_KINDS
from cpt_rft.config.nearest import nearest
from cpt_rft.config.schema import Experiment
from cpt_rft.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)
REPOSITORY = Path(__file__).resolve().parents[2]


def load_experiment(path: Path, overrides: Sequence[str] = (), methods: Sequence[str] = ()) -> Experiment:
    """Read an experiment, the method and engine files that it names, and lay the overrides over them.

    Args:
        path: A YAML file, or the bare name of one in ``configs/experiments``.
        overrides: ``key.below=value`` with a YAML value. ``method.KEY`` means every selected method that has it,
            ``methods.NAME.KEY`` one of them.
        methods: The selected methods; all if empty.

    Raises:
        ConfigError: Something is unknown, missing, mistyped, repeated or against a rule; with file and line.
    """
    path = find_experiment(path)
    document = Document.read(path)
    parsed = [_parse_override(override) for override in overrides]
    for keys, change in parsed:
        if len(keys) == 1:
            document.put(keys, change)
    _expand_methods(document, path)
    for key in _engine_keys(document):
        _expand_engine(document, path, key)
    known = list(document.data["methods"])
    for name in methods:
        _known_or_refuse("method", name, known, "command line")
    for keys, change in parsed:
        if keys[0] == "method":
            _override_methods(document, keys, change, list(methods) or known)
        elif len(keys) > 1:
            if keys[0] == "methods":
                _known_or_refuse("method", str(keys[1]), known, change.place(()))
            document.put(keys, change)
    for name in known:
        validate(_method_class(document, name), document.sub(("methods", name)), ("methods", name))
    for key in _engine_keys(document):
        validate(_engine_class(document, key), document.sub((key,)), (key,))
    return validate(Experiment, document)


def find_experiment(path: Path) -> Path:
    """The file itself, or ``configs/experiments/NAME.yaml`` for a bare name."""
    if path.is_file():
        return path
    experiments = REPOSITORY / "configs" / "experiments"
    known = {file.stem: file for file in sorted(experiments.glob("*.yaml"))}
    if str(path) in known:
        return known[str(path)]
    hint = f"the nearest known one is {known[nearest(path.stem, known)]}" if known else "check the path"
    raise ConfigError(f"There is no experiment file {path}.", hint)


def find_directory(text: str) -> Path:
    """A directory named in a configuration: as given, or else below the repository."""
    path = Path(text).expanduser()
    return path if path.is_absolute() or path.exists() else REPOSITORY / path


def validate(model: type[Model], document: Document, prefix: Keys = ()) -> Model:
    """Turn plain data into a model.

    Raises:
        ConfigError: For the first thing that is wrong; ``prefix`` leads to this document, for the message.
    """
    try:
        # JSON mode: strict about types, but a YAML list may become a tuple.
        return model.model_validate_json(json.dumps(document.data))
    except ValidationError as error:
        raise _explain(error.errors(), model, document, prefix) from None


def _explain(errors: list[ErrorDetails], model: type[BaseModel], document: Document, prefix: Keys) -> ConfigError:
    # An unknown key explains a missing one, so it goes first.
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    inner = first.get("ctx", {}).get("error")
    keys: Keys = (*first["loc"], *getattr(inner, "at", ()))
    shown = ".".join(map(str, (*prefix, *keys)))
    place = document.place(keys)
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, keys[:-1])
        return ConfigError(
            f"{place}: unknown key {shown!r}, the nearest is {nearest(str(keys[-1]), known)!r}.",
            f"rename or remove it; the keys here are {', '.join(sorted(known))}",
        )
    if first["type"] == "missing":
        return ConfigError(f"{place}: the key {shown!r} is missing.", "add it")
    if inner is not None:
        return ConfigError(f"{place}: {shown}: {inner}.", "change the value")
    # The members of a union fail one by one at the same place.
    reasons = [
        error["msg"] for error in errors if document.place(error["loc"]) == place and error["loc"][:1] == keys[:1]
    ]
    reason = " or ".join(dict.fromkeys(reason.removeprefix("Input should be ") for reason in reasons))
    while keys and keys not in document.places:
        keys = keys[:-1]
    shown = ".".join(map(str, (*prefix, *keys)))
    return ConfigError(f"{place}: {shown} = {json.dumps(first['input'])} should be {reason}.", "change the value")


def _fields_at(model: type[BaseModel], keys: Keys) -> list[str]:
    for key in keys:
        annotation = model.model_fields[str(key)].annotation
        parts = get_args(annotation) or (annotation,)  # an optional object is a union with none
        model = next(part for part in parts if isinstance(part, type) and issubclass(part, BaseModel))
    return list(model.model_fields)


def _known_or_refuse(noun: str, name: str, known: Iterable[str], place: str) -> None:
    known = sorted(known)
    if name not in known:
        fix = f"use one of {', '.join(known)}"
        raise ConfigError(f"{place}: unknown {noun} {name!r}, the nearest is {nearest(name, known)!r}.", fix)


def _parse_override(text: str) -> tuple[Keys, Document]:
    dotted, equals, value = text.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ConfigError(f"command line: {text!r} is not KEY=VALUE.", "write for example method.lr=1e-6")
    return tuple(dotted.split(".")), Document.parse(value, f"command line ({text})", lines=False)


def _override_methods(document: Document, keys: Keys, change: Document, selected: Sequence[str]) -> None:
    fields = {name: list(_method_class(document, name).model_fields) for name in selected}
    owners = [name for name in selected if len(keys) == 2 and keys[1] in fields[name]]
    if not owners:
        known = sorted({key for names in fields.values() for key in names})
        near = nearest(str(keys[-1]), known)
        raise ConfigError(
            f"{change.place(())}: unknown key {'.'.join(map(str, keys))!r}, the nearest is 'method.{near}'.",
            f"the keys of a method are {', '.join(known)}",
        )
    for name in owners:
        document.put(("methods", name, keys[1]), change)


def _method_class(document: Document, name: str) -> type[BaseModel]:
    kind = document.data["methods"][name].get("kind")
    keys: Keys = ("methods", name, "kind")
    if not isinstance(kind, str):
        raise ConfigError(
            f"{document.place(keys)}: the key 'methods.{name}.kind' is missing.", "write kind: sft or grpo"
        )
    _known_or_refuse("kind", kind, METHOD_KINDS, document.place(keys))
    return METHOD_KINDS[kind]


def _engine_keys(document: Document) -> list[str]:
    """The keys of the engines; the second one may be absent or null."""
    return ["engine"] if document.data.get("rft_engine") is None else ["engine", "rft_engine"]


def _engine_class(document: Document, key: str) -> type[BaseModel]:
    name = str(document.data[key].get("name"))
    _known_or_refuse("engine", name, ENGINES, document.place((key, "name")))
    return ENGINES[name]


def _expand_methods(document: Document, path: Path) -> None:
    """Replace names of methods by the content of their files, with the experiment's changes laid over it."""
    written = document.data.get("methods")
    place = document.place(("methods",))
    if isinstance(written, list):
        for index, name in enumerate(written):
            if not isinstance(name, str):
                raise ConfigError(
                    f"{document.place(('methods', index))}: {name!r} is no name of a method.", "write a name"
                )
            if name in written[:index]:
                raise ConfigError(
                    f"{document.place(('methods', index))}: the method {name!r} is listed twice.", "keep one"
                )
        named = [(name, Document({}), document.place(("methods", i))) for i, name in enumerate(written)]
    elif isinstance(written, dict):
        named = [(name, document.sub(("methods", name)), document.place(("methods", name))) for name in written]
    else:
        raise ConfigError(f"{place}: 'methods' is missing or no list.", "list names of configs/methods/*.yaml")
    expanded = Document({}, {(): place})
    for name, changes, where in named:
        expanded.put((name,), _with_base("methods", name, changes, path, where))
        expanded.put((name, "name"), Document(name, {(): where}))
    document.put(("methods",), expanded)


def _expand_engine(document: Document, path: Path, key: str) -> None:
    written = document.data.get(key)
    place = document.place((key,))
    if isinstance(written, str):
        expanded = _with_base("engines", written, Document({}), path, place)
    elif isinstance(written, dict) and isinstance(written.get("name"), str):
        expanded = _with_base("engines", written["name"], document.sub((key,)), path, place)
    else:
        raise ConfigError(f"{place}: {key!r} is missing or has no name.", f"write '{key}: local'")
    document.put((key,), expanded)


def _with_base(folder: str, name: str, changes: Document, path: Path, place: str) -> Document:
    """The file ``configs/FOLDER/NAME.yaml`` (or the one that ``extends`` names) with changes laid over it."""
    noun = folder.removesuffix("s")
    if changes.data is None:
        changes = Document({})
    if not isinstance(changes.data, dict):
        raise ConfigError(f"{place}: the {noun} {name!r} is no mapping.", "write changes as 'key: value', or {}")
    files = _files(folder, path)
    base = changes.data.pop("extends", None)
    if base is None and name not in files and "kind" in changes.data:
        return changes
    base_name = name if base is None else str(base)
    _known_or_refuse(noun, base_name, files, place)
    document = Document.read(files[base_name])
    if folder == "methods" and "name" in document.data:
        raise ConfigError(f"{document.place(('name',))}: a method's name is that of its file.", "remove the key 'name'")
    if changes.data:
        document.update(changes)
    return document


def _files(folder: str, path: Path) -> Mapping[str, Path]:
    """Files that an experiment may name: the repository's, and over them those beside the experiment."""
    found: dict[str, Path] = {}
    for directory in (REPOSITORY / "configs" / folder, path.resolve().parent.parent / folder, path.parent / folder):
        found |= {file.stem: file for file in sorted(directory.glob("*.yaml"))}
    return found


def dump(model: BaseModel) -> dict[str, Any]:
    """A model as plain JSON data."""
    return model.model_dump(mode="json")
