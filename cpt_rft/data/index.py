"""What is known of every prepared row without its pictures: for tables, plots and comparisons between tasks."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cpt_rft.data.checks import PictureFacts
from cpt_rft.data.overlap import Located
from cpt_rft.data.parts import RowFacts

INDEX_NAME = "index.parquet"
_PICTURE = pa.struct(
    [
        *((name, pa.string()) for name in ("fingerprint", "sha256")),
        *((name, pa.int32()) for name in ("width", "height")),
        ("changed", pa.bool_()),
    ]
)
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("split", "id", "content", "question", "answer")),
        *((name, pa.int64()) for name in ("tokens", "vision_tokens")),
        ("pictures", pa.list_(_PICTURE)),
    ]
)


def write_index(path: Path, rows: Iterable[tuple[str, RowFacts]]) -> None:
    """Write the facts of all rows with the split of each, in the order of the splits' rows."""
    records = [{"split": split, **facts._asdict()} for split, facts in rows]
    pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), path, compression="zstd")


def read_index(directory: Path) -> list[dict[str, Any]]:
    """The facts of every row of a prepared task."""
    return pq.read_table(directory / INDEX_NAME).to_pylist()


def locate_rows(directory: Path) -> dict[str, list[Located]]:
    """Every row of a prepared task by split, with its place in the split's files."""
    found: dict[str, list[Located]] = {}
    places: dict[str, Iterator[tuple[Path, int]]] = {}
    for record in read_index(directory):
        split = record.pop("split")
        facts = RowFacts(**record | {"pictures": tuple(PictureFacts(**picture) for picture in record["pictures"])})
        path, row = next(places.setdefault(split, _places(directory / split)))
        found.setdefault(split, []).append(Located(path, row, facts))
    return found


def _places(directory: Path) -> Iterator[tuple[Path, int]]:
    for path in sorted(directory.glob("*.parquet")):
        yield from ((path, row) for row in range(pq.read_metadata(path).num_rows))
