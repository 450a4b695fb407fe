"""Prepared rows in the forms that the other engines read. Every engine gets the same rows, and the same pictures.

Names in an export are made here, from the task, the split and the content of a picture; no name of a source is used.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cpt_rft.data.example import Example
from cpt_rft.data.index import read_index
from cpt_rft.data.ledger import read_ledger
from cpt_rft.data.parquet import SCHEMA, stream_split
from cpt_rft.data.parts import PARQUET_OPTIONS
from cpt_rft.errors import DataError
from cpt_rft.files import atomic_path, discard_directory, publish_directory, read_json, write_json_atomic
from cpt_rft.prompts import PRESETS, Style, problem_of, target_text, user_text

Engine = Literal["easyr1", "llamafactory"]
# What `datasets` takes for the name of a split in a file name.
_EASYR1_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_EASYR1_SCHEMA = pa.schema([("images", SCHEMA.field("images").type), ("problem", pa.string()), ("answer", pa.string())])
_EASYR1_ROWS = 64  # written together
_SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp"}
_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
_MEDIA = "media"


def export_task(prepared: Path, task: str, engine: Engine, target: Path, preset: str, style: Style) -> Path:
    """Export every split of a prepared task and read the ids back.

    Args:
        prepared: Holds the directories of prepared tasks.
        task: One of them.
        engine: Whose form.
        target: Below it, EasyR1 gets a directory a task; LLaMA-Factory reads it as a whole, with all its tasks.
        preset: Wording of the problems.
        style: Whose suffix is appended and which target is taught. EasyR1 appends suffixes itself, by the template
            that is written beside the tasks.

    Returns:
        What the engine is to be pointed at.

    Raises:
        DataError: The task is not prepared, a row has no target in this style, or the target is a link.
    """
    ledger = read_ledger(prepared / task)
    _refuse_links(target, target / _MEDIA, target / task)
    target.mkdir(parents=True, exist_ok=True)
    writers: Mapping[Engine, Callable[..., Path]] = {"easyr1": _easyr1, "llamafactory": _llamafactory}
    place = writers[engine](prepared / task, list(ledger["splits"]), target, preset, style)
    index = read_index(prepared / task)
    for split in ledger["splits"]:
        expected = [row["id"] for row in index if row["split"] == split]
        if exported_ids(engine, target, task, split) != expected:
            raise DataError(f"{place}: {task}/{split} holds other rows than were prepared.", "export it again")
    return place


def ground_truth(row: Example) -> str:
    """All that a reward sees of a row, as JSON.

    >>> ground_truth(Example("a/test/1", "a", "test", (), (), "1+1?", "2", ("2", "two"), "number"))
    '{"answer": "2", "id": "a/test/1", "kind": "number", "references": ["2", "two"], "task": "a"}'

    The texts of lettered options stand beside it where a row has them.
    """
    known = {"id": row.id, "task": row.task, "kind": row.kind, "answer": row.answer, "references": row.references}
    known |= {"options": row.options} if row.options else {}
    return json.dumps(known, sort_keys=True, ensure_ascii=False)


def exported_ids(engine: Engine, target: Path, task: str, split: str) -> list[str]:
    """The ids of an exported split, in its order."""
    if engine == "easyr1":
        table = pq.read_table(_easyr1_file(target / task, split), columns=["answer"])
        return [json.loads(text)["id"] for text in table.column("answer").to_pylist()]
    rows = json.loads((target / f"{task}_{split}.json").read_text(encoding="utf-8"))
    return [row["id"] for row in rows]


def _easyr1(prepared: Path, splits: Sequence[str], target: Path, preset: str, style: Style) -> Path:
    """A directory of nothing but parquet files: EasyR1 takes the type of all from the first name that it finds."""
    final, partial = target / prepared.name, target / f".{prepared.name}.partial"
    discard_directory(partial)
    partial.mkdir()
    for split in splits:
        with pq.ParquetWriter(_easyr1_file(partial, split), _EASYR1_SCHEMA, **PARQUET_OPTIONS) as writer:
            rows = stream_split(prepared / split, decode=False)
            while batch := list(itertools.islice(rows, _EASYR1_ROWS)):
                writer.write_table(_easyr1_table(batch, preset))
    discard_directory(final)
    publish_directory(partial, final)
    template = target / f"{preset}_{style}.jinja"
    with atomic_path(template) as path:
        path.write_text("{{ content }}" + getattr(PRESETS[preset], style), encoding="utf-8")
    return final


def _easyr1_table(rows: Sequence[Example], preset: str) -> pa.Table:
    records = [
        {
            "images": [{"bytes": data, "path": name} for data, name in zip(row.images, row.image_paths, strict=True)],
            "problem": problem_of(row, preset),
            "answer": ground_truth(row),
        }
        for row in rows
    ]
    return pa.Table.from_pylist(records, schema=_EASYR1_SCHEMA)


def _easyr1_file(directory: Path, split: str) -> Path:
    return directory / f"{_EASYR1_SPLITS[split]}-00000-of-00001.parquet"


def _llamafactory(prepared: Path, splits: Sequence[str], target: Path, preset: str, style: Style) -> Path:
    """ShareGPT records in a JSON list a split; every picture once, under the hash of its bytes."""
    for split in splits:
        name = f"{prepared.name}_{split}"
        with atomic_path(target / f"{name}.json") as path, path.open("w", encoding="utf-8") as file:
            file.write("[")
            for number, row in enumerate(stream_split(prepared / split, decode=False)):
                file.write(",\n" if number else "\n")
                record = sharegpt_record(row, row.images, target, preset, style)
                file.write(json.dumps(record, ensure_ascii=False))
            file.write("\n]\n")
        write_info(target, name)
    return target


def write_info(target: Path, name: str) -> None:
    """Enter ``NAME.json``, a list of ShareGPT records, into LLaMA-Factory's ``dataset_info.json``."""
    columns = {"messages": "messages", "images": "images"}
    # With tags given, those left out are none, not their defaults: no row has a system turn.
    entry = {"file_name": f"{name}.json", "formatting": "sharegpt", "columns": columns, "tags": _TAGS}
    write_json_atomic(target / "dataset_info.json", {**read_json(target / "dataset_info.json"), name: entry})


def sharegpt_record(row: Example, pictures: Sequence[bytes], target: Path, preset: str, style: Style) -> dict[str, Any]:
    """A row as LLaMA-Factory reads it; its pictures are written below ``target`` unless they are there."""
    question = {"role": "user", "content": user_text(row, style, preset)}
    answer = {"role": "assistant", "content": target_text(row, style)}
    return {"id": row.id, "messages": [question, answer], "images": [write_picture(data, target) for data in pictures]}


def write_picture(data: bytes, target: Path) -> str:
    """Write a picture, unless it is there; returns its name below the target."""
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"{_MEDIA}/{sha256[:2]}/{sha256}{_SUFFIXES.get(data[:2], '.bin')}"
    path = target / name
    if not path.is_file() or path.is_symlink() or path.stat().st_size != len(data):
        _refuse_links(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)  # never through a link
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(partial, path)
    return name


def _refuse_links(*paths: Path) -> None:
    for path in paths:
        if path.is_symlink():
            raise DataError(f"{path} is a link; an export writes only below its own directory.", "remove the link")
