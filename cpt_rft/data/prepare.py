"""From the data section of a configuration to checked parquet files and a lock of what they hold."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from cpt_rft.config.schema import DataConfig
from cpt_rft.data.example import Split
from cpt_rft.data.parquet import read_split, rows_hash, write_split
from cpt_rft.errors import DataError
from cpt_rft.files import write_text_atomic
from cpt_rft.miniature.world import make_rows

LOCK_NAME = "data.lock.json"


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

    Tasks get three splits, if not fewer are asked for; general abilities are never trained on and get dev and test.

    Raises:
        DataError: A file that the lock lists was changed or does not read, or the configuration asks for other
            data than the lock was made from.
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
    wanted: list[tuple[str, Split]] = [(task, split) for task in tasks for split in splits]
    wanted += [(task, split) for task in general for split in splits if split != "train"]
    for task, split in wanted:
        key = f"{task}/{split}"
        if key in lock["splits"]:
            continue
        progress(key)
        count = config.general if task in general else getattr(config, split)
        rows = make_rows(task, split, count, config.seed)
        path = directory / task / f"{split}.parquet"
        path.parent.mkdir(exist_ok=True)
        write_split(path, rows)
        lock["splits"][key] = {"rows": len(rows), "sha256": rows_hash(read_split(path))}
        lock["config"] = asked
    write_text_atomic(lock_path, json.dumps(lock, indent=2, sort_keys=True) + "\n")
    entries = {f"{task}/{split}": lock["splits"][f"{task}/{split}"] for task, split in wanted}
    return PreparedData(
        directory,
        hashes={key: entry["sha256"] for key, entry in entries.items()},
        rows={key: entry["rows"] for key, entry in entries.items()},
    )


def check_prepared(data: PreparedData) -> None:
    """Read every split back and compare it with the lock.

    Raises:
        DataError: A file is missing, does not read, or holds other rows than when it was locked.
    """
    for key, expected in data.hashes.items():
        path = data.directory / f"{key}.parquet"
        found = rows_hash(read_split(path))
        if found != expected:
            raise DataError(
                f"{path} holds other rows than {LOCK_NAME} says (sha256 {found[:12]}, locked {expected[:12]}).",
                "delete the data directory and prepare again",
            )
