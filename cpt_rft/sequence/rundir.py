"""A run directory: its configuration, the base checkpoint and the data that it was made with."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cpt_rft.config.engine import ENGINES, EngineConfig
from cpt_rft.config.load import dump, find_directory
from cpt_rft.config.schema import METER_KEYS, Experiment
from cpt_rft.data.prepare import LOCK_NAME, PreparedData, check_sources, prepare, wanted_splits
from cpt_rft.errors import CheckpointError, DataError, StageError
from cpt_rft.files import FileRecord, hash_tree, tree_sha256, write_json_atomic, write_text_atomic
from cpt_rft.manifest import check_checkpoint, differences

CONFIG_NAME = "config.json"
# These can change between two starts of one run: they decide where and how fast, not what.
_FREE = frozenset({"output", "workers", "base_model"}) | {
    f"{place}.{key}" for place in ("engine", "rft_engine") for engine in ENGINES.values() for key in engine.FREE
}


@dataclass(frozen=True)
class Base:
    """The base checkpoint as it was when the run directory was made."""

    directory: Path
    files: dict[str, FileRecord]

    @property
    def sha256(self) -> str:
        """One hash for the whole checkpoint."""
        return tree_sha256(self.files)

    def check(self, *, full: bool) -> None:
        """Compare the directory with the record.

        Raises:
            CheckpointError: It is not the base that the run was made with.
        """
        _refuse_missing_base(self.directory)
        fix = "restore the base model, or give output=DIRECTORY to start a run of its own with this one"
        check_checkpoint(self.directory, self.files, full=full, fix=fix)


@dataclass(frozen=True)
class Run:
    """An open run directory.

    Attributes:
        directory: The directory.
        experiment: What its ``config.json`` says, engine resolved.
        base: The base checkpoint.
        data: The prepared rows.
    """

    directory: Path
    experiment: Experiment
    base: Base
    data: PreparedData

    @property
    def base_directory(self) -> Path:
        """Where records about the base model are."""
        return self.directory / "base"


def read_config(directory: Path) -> Experiment:
    """The configuration of a run directory.

    Raises:
        StageError: There is none, or it was damaged.
    """
    path = directory / CONFIG_NAME
    try:
        return Experiment.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StageError(f"{directory} holds no run yet.", "start it with 'cpt-rft run EXPERIMENT.yaml'") from error
    except (ValidationError, UnicodeDecodeError) as error:
        fix = f"restore it, or delete it and give the 'run' command again: {CONFIG_NAME} is then written anew"
        raise StageError(f"{path} was edited by hand or damaged.", fix) from error


def read_run(directory: Path, experiment: Experiment | None = None) -> Run:
    """Open a run directory that was made before, changing nothing.

    Args:
        directory: The run directory.
        experiment: What to do there now, if it may differ from the stored configuration where that is free.

    Raises:
        StageError, CheckpointError, DataError: The directory is no run, or its base or data are gone.
    """
    stored = read_config(directory)
    merged = stored if experiment is None else merge(stored, experiment, directory)
    base_path = directory / "base" / "checkpoint.json"
    try:
        record = json.loads(base_path.read_text(encoding="utf-8"))
        files = {name: FileRecord(*entry) for name, entry in record["files"].items()}
        base = Base(find_directory(merged.base_model), files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fix = f"delete {directory / CONFIG_NAME} and give the 'run' command again: both are then written anew"
        raise StageError(f"{base_path} is missing or damaged.", fix) from error
    data = locked_data(merged, directory / "data")
    if data is None:
        raise DataError(f"{directory / 'data'} is not prepared.", "run 'cpt-rft prepare EXPERIMENT.yaml'")
    return Run(directory, merged, base, data)


def make_run(
    directory: Path,
    asked: Experiment,
    preflight: Callable[[Experiment, Path], Mapping[str, EngineConfig]],
    progress: Callable[[str], None],
) -> Run:
    """Open a run directory for writing: make what is missing, refuse what differs.

    Args:
        directory: The run directory; it exists and is locked.
        asked: The experiment as the user gave it.
        preflight: Checks the base checkpoint and resolves ``auto`` values of the engines; called only for a new run.
        progress: Told the name of every split that is being drawn.

    Raises:
        StageError: The directory was made with another configuration.
        CheckpointError, DataError: The base or the data cannot be used.
    """
    base_path = directory / "base" / "checkpoint.json"
    if (directory / CONFIG_NAME).exists():
        merged = merge(read_config(directory), asked, directory)
    else:
        base = find_directory(asked.base_model)
        _refuse_missing_base(base)
        merged = asked.model_copy(update=dict(preflight(asked, base)))
        base_path.parent.mkdir(exist_ok=True)
        write_json_atomic(base_path, {"directory": asked.base_model, "files": hash_tree(base)})
    text = json.dumps(dump(merged), indent=2) + "\n"
    path = directory / CONFIG_NAME
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text_atomic(path, text)
    if locked_data(merged, directory / "data") is None:
        prepare(merged.data, merged.tasks, merged.evaluation.general, directory / "data", progress)
    run = read_run(directory)
    run.base.check(full=False)
    return run


def merge(stored: Experiment, asked: Experiment, directory: Path) -> Experiment:
    """What a run directory is about once ``asked`` is run in it too: more methods, seeds and orders are welcome.

    Raises:
        StageError: Anything else differs; both values are shown.
    """
    there, new = dump(stored), dump(asked)
    for place in asked.engines:
        resolved = there.get(place, {})
        for key, value in new[place].items():
            if value == "auto" and key in resolved:  # it was resolved when the directory was made
                new[place][key] = resolved[key]
    grown: dict[str, Any] = {
        "methods": {**there["methods"], **new["methods"]},
        "seeds": [*there["seeds"], *(seed for seed in new["seeds"] if seed not in there["seeds"])],
        "orders": max(there["orders"], new["orders"], key=len),
    }
    common = set(there["methods"]) & set(new["methods"])
    shared = [{name: side["methods"][name] for name in sorted(common)} for side in (there, new)]
    length = min(len(there["orders"]), len(new["orders"]))
    old, wanted = (
        {**side, "methods": methods, "seeds": None, "orders": side["orders"][:length]}
        for side, methods in zip((there, new), shared, strict=True)
    )
    # Which meters are on decides no score and no weight.
    old, wanted = ({**side, "evaluation": without_meters(side["evaluation"])} for side in (old, wanted))
    found = differences(old, wanted, _FREE)
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise StageError(
            f"{directory} was made with another configuration: {'; '.join(found[:3])}{more}.",
            "put the values back, or give output=DIRECTORY to start a run of its own",
        )
    return Experiment.model_validate_json(json.dumps({**new, **grown}))


def without_meters(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The section ``evaluation``, less what adds measurements and changes no score."""
    return {key: value for key, value in evaluation.items() if key not in METER_KEYS}


def locked_data(experiment: Experiment, directory: Path) -> PreparedData | None:
    """The prepared data if every split that the experiment needs is locked, else none.

    Raises:
        DataError: The lock is damaged or lists a file that is gone.
    """
    path = directory / LOCK_NAME
    if not path.is_file():
        return None
    fix = f"delete {directory} and give the same command again; the same rows are drawn"
    try:
        lock = json.loads(path.read_text(encoding="utf-8"))
        splits = {key: (str(entry["sha256"]), int(entry["rows"])) for key, entry in lock["splits"].items()}
        config = lock["config"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} was edited by hand or damaged.", fix) from error
    tasks, general = experiment.tasks, experiment.evaluation.general
    wanted = wanted_splits(experiment.data, tasks, general)
    if config != dump(experiment.data) or not set(wanted) <= set(splits):
        return None
    check_sources(lock, experiment.data, tasks, general)
    for key in wanted:
        if not (directory / f"{key}.parquet").is_file():
            raise DataError(f"{directory / key}.parquet is missing, though {LOCK_NAME} lists it.", fix)
    return PreparedData(
        directory, hashes={key: splits[key][0] for key in wanted}, rows={key: splits[key][1] for key in wanted}
    )


def make_directory(directory: Path) -> None:
    """Make a run directory.

    Raises:
        StageError: The place is not a directory, or is read-only.
    """
    if directory.exists() and not directory.is_dir():
        raise StageError(f"{directory} is not a directory.", "choose another with output=DIRECTORY")
    directory.mkdir(parents=True, exist_ok=True)


def _refuse_missing_base(directory: Path) -> None:
    if not directory.is_dir():
        fix = "download it there (the miniature's: 'cpt-rft pretrain'), or name another with base_model=DIRECTORY"
        raise CheckpointError(f"The base model {directory} is missing.", fix)
