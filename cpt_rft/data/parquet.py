"""The parquet contract: rows to disk and back, every column and every picture checked on the way in."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cpt_rft.data.example import Example
from cpt_rft.data.picture import decode_picture
from cpt_rft.errors import DataError, UserError
from cpt_rft.files import atomic_path

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("problem", pa.string()),
        ("answer", pa.string()),
        ("references", pa.list_(pa.string())),
        ("rationale", pa.string()),
        ("rationale_source", pa.string()),
        ("kind", pa.string()),
        ("meta", pa.string()),
    ]
)


def write_split(path: Path, rows: Sequence[Example]) -> None:
    """Write rows as one parquet file, whole or not at all."""
    table = pa.Table.from_pylist([to_record(row) for row in rows], schema=SCHEMA)
    with atomic_path(path) as partial:
        pq.write_table(table, partial)


def read_split(path: Path) -> list[Example]:
    """Read and check every row; see `stream_split`."""
    return list(stream_split(path))


def stream_split(path: Path, *, decode: bool = True) -> Iterator[Example]:
    """Read and check rows one by one; memory holds one row group.

    Args:
        path: A parquet file, or a directory of them.
        decode: Decode every picture.

    Raises:
        DataError: The file is missing, unreadable or lacks a column; a row has an empty answer, wrong types,
            a wrong number of pictures, a repeated id, or a picture that does not decode or is too small. The
            message names the file and the row.
    """
    ids: set[str] = set()
    paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    for path, index, record in ((file, *row) for file in paths for row in enumerate(_records(file))):
        try:
            row = from_record(record)
            if row.id in ids:
                raise DataError(f"the id {row.id} stands twice.", "make ids unique")
            for picture, name in zip(row.images, row.image_paths, strict=True):
                if decode:
                    decode_picture(picture, f"Picture {name}")
        except (UserError, TypeError, ValueError, KeyError, AttributeError) as error:
            problem, fix = (error.problem, error.fix) if isinstance(error, UserError) else (str(error), "mend the row")
            raise DataError(f"{path}, row {index} ({record.get('id')}): {problem}", fix) from error
        ids.add(row.id)
        yield row


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path} does not exist.", "run 'cpt-rft prepare EXPERIMENT.yaml'")
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in SCHEMA.names if name not in file.schema_arrow.names]
            if missing:
                problem = f"{path} has no column {', '.join(missing)}."
                raise DataError(problem, "export it with the columns of the contract")
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file ({error}).", "delete it and prepare again") from error


def rows_hash(rows: Iterable[Example]) -> str:
    """A hash of the content: decoded pixels and every text. It does not depend on encoders or file formats."""
    digest = hashlib.sha256()
    for row in rows:
        record = to_record(row)
        for image in record.pop("images"):
            picture = decode_picture(image["bytes"], f"Picture {image['path']}")
            digest.update(f"{image['path']} {picture.size}".encode())
            digest.update(picture.tobytes())
        digest.update(json.dumps(record, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


def to_record(row: Example) -> dict[str, Any]:
    """A row as cells of `SCHEMA`."""
    images = [{"bytes": b, "path": p} for b, p in zip(row.images, row.image_paths, strict=True)]
    return {
        "id": row.id,
        "task": row.task,
        "split": row.split,
        "images": images,
        "problem": row.problem,
        "answer": row.answer,
        "references": list(row.references),
        "rationale": row.rationale,
        "rationale_source": row.rationale_source,
        "kind": row.kind,
        "meta": json.dumps(row.meta, sort_keys=True),
    }


def from_record(record: dict[str, Any]) -> Example:
    """A row from cells of `SCHEMA`.

    Raises:
        DataError, TypeError, KeyError, ValueError: A cell breaks the contract.
    """
    if record["answer"] is None or record["references"] is None:
        raise DataError("the answer is empty.", "give the row an answer or drop it")
    return Example(
        id=record["id"],
        task=record["task"],
        split=record["split"],
        images=tuple(image["bytes"] for image in record["images"]),
        image_paths=tuple(image["path"] for image in record["images"]),
        problem=record["problem"],
        answer=record["answer"],
        references=tuple(record["references"]),
        kind=record["kind"],
        rationale=record["rationale"],
        rationale_source=record["rationale_source"],
        meta=json.loads(record["meta"] or "{}"),
    )
