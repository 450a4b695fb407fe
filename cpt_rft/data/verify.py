"""A prepared task read back: its files as the ledger recorded them, every row and every picture sound."""

from pathlib import Path

from cpt_rft.data.index import read_index
from cpt_rft.data.ledger import DROPS_NAME, read_ledger
from cpt_rft.data.lock import read_lock
from cpt_rft.data.parquet import stream_split
from cpt_rft.data.picture import load_picture, needs_no_change
from cpt_rft.errors import DataError, UserError
from cpt_rft.files import FileRecord, tree_problem

_FIX = "delete the task's directory and prepare it again"


def verify_files(out: Path, task: str) -> None:
    """Compare a prepared task with its ledger and the lock, without reading rows.

    Raises:
        DataError: A file is missing or was changed, or the lock says something else.
    """
    directory = out / task
    ledger = read_ledger(directory)
    locked = read_lock(out)["tasks"].get(task, {}).get("splits", {})
    for split, entry in ledger["splits"].items():
        problem = tree_problem(
            directory / split, {n: FileRecord(**file) for n, file in entry["files"].items()}, full=True
        )
        if problem:
            raise DataError(f"{problem}.", _FIX)
        if locked.get(split) != {"rows": entry["rows_used"], "sha256": entry["content_sha256"]}:
            raise DataError(f"{directory}: the ledger of {split} differs from the lock.", _FIX)


def verify_task(out: Path, task: str) -> dict[str, int]:
    """Read every row and decode every picture of a prepared task; returns the rows of each split.

    Raises:
        DataError: A file was changed, a row breaks the contract, or the counts do not add up.
    """
    verify_files(out, task)
    directory = out / task
    ledger = read_ledger(directory)
    index = read_index(directory)
    dropped = sum(1 for _ in (directory / DROPS_NAME).open(encoding="ascii"))
    if dropped != sum(sum(entry["drops"].values()) for entry in ledger["splits"].values()):
        raise DataError(f"{directory / DROPS_NAME} does not list the drops that the ledger counts.", _FIX)
    counts: dict[str, int] = {}
    for split, entry in ledger["splits"].items():
        ids = [row["id"] for row in index if row["split"] == split]
        found = []
        try:
            for row in stream_split(directory / split, decode=False):
                found.append(row.id)
                for data in row.images:
                    if not needs_no_change(load_picture(data, row.id)):
                        raise DataError(f"{row.id}: a picture is not in the canonical form.", _FIX)
        except (UserError, TypeError, ValueError, KeyError) as error:
            raise DataError(f"{directory / split}, row {len(found)}: {error}", _FIX) from error
        if found != ids or len(found) != entry["rows_used"]:
            raise DataError(f"{directory / split} does not hold the rows that the ledger counts.", _FIX)
        counts[split] = len(found)
    return counts
