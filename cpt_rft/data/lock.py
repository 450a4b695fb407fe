"""``data.lock.json``: from what each task was prepared and which rows came out, written once and compared later."""

from pathlib import Path
from typing import Any

from cpt_rft.data.ledger import Json
from cpt_rft.errors import DataError
from cpt_rft.files import read_json, write_json_atomic
from cpt_rft.manifest import differences

LOCK_NAME = "data.lock.json"
_FIX = "prepare into another directory, or delete this task's directory and its entry in the lock to take the new state"


def read_lock(out: Path) -> Json:
    """The lock of a prepared directory; empty if there is none.

    Raises:
        DataError: It is damaged, or that of drawn rows.
    """
    path = out / LOCK_NAME
    if not path.is_file():
        return {"source": "hub", "tasks": {}}
    lock = read_json(path)
    if lock.get("source") != "hub" or not isinstance(lock.get("tasks"), dict):
        raise DataError(f"{path} is damaged or belongs to drawn rows.", "choose another directory with --out")
    return lock


def check_against_lock(out: Path, name: str, asked: Json, ledger: Json | None = None) -> None:
    """Compare what is asked for, and the rows that came out, with what was locked.

    Raises:
        DataError: They differ; both values are shown.
    """
    entry = read_lock(out)["tasks"].get(name)
    if entry is None:
        return
    found = differences(entry["asked"], asked)
    if not found and ledger is not None:
        found = differences(entry["splits"], _splits(ledger))
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise DataError(f"{out / LOCK_NAME}: {name} was locked otherwise: {'; '.join(found[:3])}{more}.", _FIX)


def publish_lock(out: Path, name: str, asked: Json, ledger: Json) -> None:
    """Add a prepared task, or check it if it is there.

    Raises:
        DataError: The task's directory was made from something else than the lock says.
    """
    lock = read_lock(out)
    entry: dict[str, Any] = {"asked": asked, "splits": _splits(ledger)}
    stored = lock["tasks"].setdefault(name, entry)
    if stored != entry:
        found = differences(stored, entry)
        raise DataError(f"{out / name} differs from {LOCK_NAME}: {'; '.join(found[:3])}.", _FIX)
    write_json_atomic(out / LOCK_NAME, lock)


def _splits(ledger: Json) -> Json:
    return {
        split: {"rows": entry["rows_used"], "sha256": entry["content_sha256"]}
        for split, entry in ledger["splits"].items()
    }
