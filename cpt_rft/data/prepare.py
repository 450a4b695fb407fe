"""From the data section of a configuration to checked parquet files and a lock of what they hold."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from cpt_rft.config.load import find_directory
from cpt_rft.config.schema import DataConfig
from cpt_rft.data.example import Example, Split
from cpt_rft.data.index import read_index
from cpt_rft.data.lock import LOCK_NAME, read_lock
from cpt_rft.data.parquet import rows_hash, stream_split, write_split
from cpt_rft.errors import DataError
from cpt_rft.files import write_text_atomic
from cpt_rft.manifest import differences
from cpt_rft.miniature.world import make_rows
from cpt_rft.seeds import derive_seed

__all__ = ["LOCK_NAME", "PreparedData", "check_prepared", "check_sources", "prepare", "wanted_splits"]
Json = dict[str, Any]


@dataclass(frozen=True)
class PreparedData:
    """Where the splits are and what they hold.

    Attributes:
        directory: Holds ``<task>/<split>.parquet`` and the lock.
        hashes: Content hash by ``<task>/<split>``.
        rows: Row count by ``<task>/<split>``.
    """

    directory: Path
    hashes: dict[str, str]
    rows: dict[str, int]

    def path(self, task: str, split: Split) -> Path:
        """The parquet file of one task and split."""
        return self.directory / task / f"{split}.parquet"


def prepare(
    config: DataConfig,
    tasks: Sequence[str],
    general: Sequence[str],
    directory: Path,
    progress: Callable[[str], None] = lambda name: None,
    splits: Sequence[Split] = get_args(Split),
) -> PreparedData:
    """Write what is missing, check what is there, and lock the content.

    Tasks get three splits, if not fewer are asked for; general abilities are never trained on. Rows are drawn, or
    chosen from those that ``cpt-rft data prepare`` left in a directory.

    Raises:
        DataError: A file that the lock lists was changed or does not read, the configuration asks for other data
            than the lock was made from, or the prepared rows are others than those it was made from.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock_path = directory / LOCK_NAME
    lock = json.loads(lock_path.read_text()) if lock_path.is_file() else {"config": {}, "splits": {}}
    asked = config.model_dump(mode="json")
    if lock["splits"] and lock["config"] != asked:
        raise DataError(
            f"{lock_path} was made from {lock['config']}, not from {asked}.",
            "use another output directory or put the data section back",
        )
    sources = hub_sources(config, tasks, general)
    check_sources(lock, config, tasks, general)
    wanted = wanted_splits(config, tasks, general, splits)
    for key in wanted:
        if key in lock["splits"]:
            continue
        progress(key)
        task, _, split = key.partition("/")
        count = config.general if task in general else getattr(config, split)
        path = directory / f"{key}.parquet"
        path.parent.mkdir(exist_ok=True)
        rows = choose_rows(config, key, count) if sources else make_rows(task, cast(Split, split), count, config.seed)
        write_split(path, rows)
        lock["splits"][key] = {"rows": len(rows), "sha256": rows_hash(stream_split(path))}
        lock["config"] = asked
    if sources:
        lock["sources"] = sources
    write_text_atomic(lock_path, json.dumps(lock, indent=2, sort_keys=True) + "\n")
    entries = {key: lock["splits"][key] for key in wanted}
    return PreparedData(
        directory,
        hashes={key: entry["sha256"] for key, entry in entries.items()},
        rows={key: entry["rows"] for key, entry in entries.items()},
    )


def wanted_splits(
    config: DataConfig, tasks: Sequence[str], general: Sequence[str], splits: Sequence[Split] = get_args(Split)
) -> list[str]:
    """``<task>/<split>`` of everything that is read of some splits; general abilities of the hub have only test."""
    tested = ("test",) if config.source == "hub" else ("dev", "test")
    return [
        *(f"{task}/{split}" for task in tasks for split in splits),
        *(f"{task}/{split}" for task in general for split in splits if split in tested),
    ]


def check_sources(lock: Json, config: DataConfig, tasks: Sequence[str], general: Sequence[str]) -> None:
    """Compare the prepared rows that a lock was made from with those that are there now, if they are still there.

    Raises:
        DataError: They differ.
    """
    stored = lock.get("sources")
    if not stored or not (find_directory(config.directory or "") / LOCK_NAME).is_file():
        return
    found = differences(stored, hub_sources(config, tasks, general))
    if found:
        raise DataError(
            f"{config.directory} holds other rows than this run was made from: {'; '.join(found[:3])}.",
            "prepare them again as they were, or give output=DIRECTORY to start a run of its own",
        )


def hub_sources(config: DataConfig, tasks: Sequence[str], general: Sequence[str]) -> Json:
    """Rows and hash of every split of the prepared tasks that an experiment uses; empty for drawn rows.

    Raises:
        DataError: A task is not prepared, or a general ability is to be trained on.
    """
    if config.source != "hub":
        return {}
    directory = find_directory(config.directory or "")
    prepared = read_lock(directory)["tasks"]
    for task in (*tasks, *general):
        if task not in prepared:
            fix = f"run 'cpt-rft data prepare {task} --out {config.directory}'"
            raise DataError(f"{directory} holds no prepared task {task!r}.", fix)
        if task in tasks and prepared[task]["asked"]["task"]["general"]:
            raise DataError(f"{task} is a general ability.", "list it under evaluation.general; it is never trained on")
    return {task: prepared[task]["splits"] for task in (*tasks, *general)}


def choose_rows(config: DataConfig, key: str, count: int) -> list[Example]:
    """The first ``count`` prepared rows of ``<task>/<split>`` by a seeded hash of the id, in the order of the file.

    Raises:
        DataError: There are fewer.
    """
    directory = find_directory(config.directory or "")
    task, _, split = key.partition("/")
    ids = [row["id"] for row in read_index(directory / task) if row["split"] == split]
    if len(ids) < count and not config.at_most:
        raise DataError(f"{key} has only {len(ids)} rows, not {count}.", f"ask for at most {len(ids)}")
    chosen = set(sorted(ids, key=lambda name: (derive_seed("rows", config.seed, name), name))[:count])
    return [row for row in stream_split(directory / key, decode=False) if row.id in chosen]


def check_prepared(data: PreparedData) -> None:
    """Read every split back and compare it with the lock.

    Raises:
        DataError: A file is missing, does not read, or holds other rows than when it was locked.
    """
    for key, expected in data.hashes.items():
        path = data.directory / f"{key}.parquet"
        found = rows_hash(stream_split(path))
        if found != expected:
            raise DataError(
                f"{path} holds other rows than {LOCK_NAME} says (sha256 {found[:12]}, locked {expected[:12]}).",
                "delete the data directory and prepare again",
            )
