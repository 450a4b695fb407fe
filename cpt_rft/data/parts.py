"""A split in parts: each is checked by one process and is whole on disk, or absent and made again.

Where a part ends depends on the rows alone, so a prepare that was killed goes on with the same parts.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cpt_rft.data.checks import CheckedRow, PictureFacts, RowChecker
from cpt_rft.data.drop import Drop
from cpt_rft.data.example import Example
from cpt_rft.data.parquet import SCHEMA, to_record
from cpt_rft.data.workers import run_in_processes
from cpt_rft.files import FileRecord, atomic_path, read_json, sha256_file, write_text_atomic

PART_ROWS = 512
PART_BYTES = 8 * 2**20  # of pictures: what one process holds at once, a few times over
# Pictures are compressed already, and nobody searches these files by value.
PARQUET_OPTIONS = {"compression": "none", "write_statistics": False, "use_dictionary": False}
DONE_NAME = "complete.json"


class RowFacts(NamedTuple):
    """What is remembered of a row that is fine by itself, so that rows can be compared without their pictures.

    Attributes:
        id: Its id.
        content: A hash of its cells, with the sha256 of each picture as it came: not of who encodes PNG or parquet.
        question: A hash of its problem.
        answer: Its label.
        tokens, vision_tokens: See `cpt_rft.data.checks.CheckedRow`.
        pictures: In the order of their tags.
    """

    id: str
    content: str
    question: str
    answer: str
    tokens: int
    vision_tokens: int
    pictures: tuple[PictureFacts, ...]


class PartFacts(NamedTuple):
    """One part as it lies on disk.

    Attributes:
        path: The parquet file; it holds exactly the rows of `kept`, in order.
        file: Its size and hash.
        rows_in: Rows that came in.
        kept: The rows that passed.
        drops: The others.
    """

    path: Path
    file: FileRecord
    rows_in: int
    kept: tuple[RowFacts, ...]
    drops: tuple[Drop, ...]


def make_parts(
    rows: Iterable[Example | Drop],
    directory: Path,
    checker: RowChecker,
    processes: int,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Check every row of a split and write what passed, part by part; parts that are there are not made again.

    Args:
        rows: In a fixed order.
        directory: Of this split; its parts must come from the same rows and checks.
        checker: Copied to every process.
        processes: With one, everything happens in this process.
        progress: Told the number of rows read so far, now and then.
    """
    done = directory / DONE_NAME
    if done.exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    count = number = 0
    with _runner(checker, processes) as run:
        for number, part in enumerate(_cut(rows), 1):
            path = _path(directory, number - 1)
            if not path.with_suffix(".json").exists():
                run(part, path)
            count += len(part)
            progress(count)
    write_text_atomic(done, json.dumps({"parts": number}))


def read_parts(directory: Path) -> Iterator[PartFacts]:
    """Every part of a split whose parts are all made, in order."""
    for number in range(read_json(directory / DONE_NAME)["parts"]):
        path = _path(directory, number)
        stored = read_json(path.with_suffix(".json"))
        kept = [(*row[:-1], tuple(PictureFacts(*facts) for facts in row[-1])) for row in stored["kept"]]
        file, drops = FileRecord(*stored["file"]), tuple(Drop(*drop) for drop in stored["drops"])
        yield PartFacts(path, file, stored["rows_in"], tuple(map(RowFacts._make, kept)), drops)


def write_table(path: Path, table: pa.Table) -> FileRecord:
    """Write rows as one parquet file, whole or not at all."""
    with atomic_path(path) as partial:
        pq.write_table(table, partial, **PARQUET_OPTIONS)
        return FileRecord(partial.stat().st_size, sha256_file(partial))


def _cut(rows: Iterable[Example | Drop]) -> Iterator[list[Example | Drop]]:
    part: list[Example | Drop] = []
    size = 0
    for row in rows:
        part.append(row)
        if isinstance(row, Example):
            size += sum(len(data) for data in row.images if isinstance(data, bytes))
        if len(part) == PART_ROWS or size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


@contextlib.contextmanager
def _runner(checker: RowChecker, processes: int) -> Iterator[Callable[[list[Example | Drop], Path], None]]:
    """A function that makes a part now or soon; all are made, or an error is raised, when the block ends."""
    here = functools.partial(make_part, checker)
    if processes <= 1:
        yield here
        return
    first = True
    with run_in_processes(here, processes) as there:

        def run(part: list[Example | Drop], path: Path) -> None:
            nonlocal first
            if first:  # most small splits are one part: no process is started for them
                first = False
                here(part, path)
            else:
                there(part, path)

        yield run


def make_part(checker: RowChecker, rows: Iterable[Example | Drop], path: Path) -> None:
    """Check rows and write those that pass; the facts are written last and say that the part is whole."""
    outcomes = checker(rows)
    kept = [outcome for outcome in outcomes if isinstance(outcome, CheckedRow)]
    drops = [outcome for outcome in outcomes if isinstance(outcome, Drop)]
    records = [to_record(row.example) for row in kept]
    file = write_table(path, pa.Table.from_pylist(records, schema=SCHEMA))
    facts = [_facts(row, record) for row, record in zip(kept, records, strict=True)]
    stored: dict[str, Any] = {"rows_in": len(outcomes), "file": file, "kept": facts, "drops": drops}
    write_text_atomic(path.with_suffix(".json"), json.dumps(stored))  # ASCII: ids may hold anything


def _facts(row: CheckedRow, record: dict[str, Any]) -> list[Any]:
    example = row.example
    cells = record | {"images": [picture.sha256 for picture in row.pictures]}
    content, question = _hash(json.dumps(cells, sort_keys=True)), _hash(example.problem)
    return [example.id, content, question, example.answer, row.tokens, row.vision_tokens, list(row.pictures)]


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def _path(directory: Path, number: int) -> Path:
    return directory / f"{number:06d}.parquet"
