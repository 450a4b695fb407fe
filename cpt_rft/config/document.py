"""YAML read strictly, with the place of every key remembered, so that an error can name its file and line."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from cpt_rft.errors import ConfigError

Keys = tuple[str | int, ...]


class _Yaml12Loader(yaml.SafeLoader):
    """YAML 1.2's core scalars: ``1e-6`` is a number, ``yes``, ``on`` and dates are strings."""


_Yaml12Loader.yaml_implicit_resolvers = {}
# The first pattern that fits decides, so integers stand before floats.
for _kind, _pattern, _first in (
    ("null", r"^(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$", list("-+.0123456789")),
):
    _Yaml12Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), _first)


@dataclass
class Document:
    """Plain data and where each part of it was written.

    Attributes:
        data: Mappings, lists and scalars.
        places: ``file:line`` (or ``command line``) by the keys that lead to a value.
    """

    data: Any
    places: dict[Keys, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a YAML file whose top level is a mapping.

        Raises:
            ConfigError: The file is missing, is not YAML, or writes a key twice.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}).", "check the path") from error
        document = cls.parse(text, str(path))
        if not isinstance(document.data, dict):
            raise ConfigError(f"{path}:1: this is not a mapping of keys to values.", "write lines like 'name: value'")
        return document

    @classmethod
    def parse(cls, text: str, name: str, *, lines: bool = True) -> Self:
        """Read YAML text; ``name`` stands for the file in messages."""
        loader = _Yaml12Loader(text)
        try:
            node = loader.get_single_node()
            document = cls(None)
            if node is not None:
                document.data = document._convert(loader, node, (), name, lines)
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark and lines else ""
            raise ConfigError(f"{name}{line}: not valid YAML ({error.problem}).", "mend the line") from error
        finally:
            loader.dispose()
        return document

    def _convert(self, loader: _Yaml12Loader, node: yaml.Node, keys: Keys, name: str, lines: bool) -> Any:
        self.places.setdefault(keys, f"{name}:{node.start_mark.line + 1}" if lines else name)
        if isinstance(node, yaml.SequenceNode):
            return [self._convert(loader, child, (*keys, i), name, lines) for i, child in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return loader.construct_object(node)
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            place = f"{name}:{key_node.start_mark.line + 1}" if lines else name
            if key in mapping:
                first = self.places[(*keys, key)]
                raise ConfigError(f"{place}: the key {key!r} was already written at {first}.", "keep one of the two")
            self.places[(*keys, key)] = place
            mapping[key] = self._convert(loader, value_node, (*keys, key), name, lines)
        return mapping

    def place(self, keys: Keys) -> str:
        """Where a value was written; for one that was not, where the nearest object around it was."""
        while keys and keys not in self.places:
            keys = keys[:-1]
        return self.places.get(keys, "configuration")

    def sub(self, keys: Keys) -> "Document":
        """The part below ``keys`` as a document of its own."""
        data = self.data
        for key in keys:
            data = data[key]
        places = {path[len(keys) :]: place for path, place in self.places.items() if path[: len(keys)] == keys}
        return Document(data, places)

    def put(self, keys: Keys, other: "Document") -> None:
        """Replace (or add) what stands at ``keys``; mappings on the way are made.

        Raises:
            ConfigError: Something on the way is not a mapping.
        """
        target = self.data
        for depth, key in enumerate(keys[:-1]):
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                dotted = ".".join(map(str, keys[: depth + 1]))
                raise ConfigError(f"{other.place(())}: {dotted!r} has no keys below it.", "override it as a whole")
        target[keys[-1]] = other.data
        self.places = {path: place for path, place in self.places.items() if path[: len(keys)] != keys}
        self.places |= {(*keys, *path): place for path, place in other.places.items()}

    def update(self, changes: "Document") -> None:
        """Lay the leaves of ``changes`` over this document."""
        for keys in changes.leaves():
            self.put(keys, changes.sub(keys))

    def leaves(self) -> Iterator[Keys]:
        """The keys of every value that is not a non-empty mapping."""
        pending: list[tuple[Keys, Any]] = [((), self.data)]
        while pending:
            keys, value = pending.pop(0)
            if isinstance(value, dict) and (value or not keys):
                pending += [((*keys, key), child) for key, child in value.items()]
            else:
                yield keys
