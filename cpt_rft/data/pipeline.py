"""A real dataset from its source to checked parquet files, a ledger and a lock.

Rows stream through in parts (`cpt_rft.data.parts`); then the rows that passed are compared with each other, without
their pictures (`cpt_rft.data.overlap`); then the parts become the files of their split, those that lose rows are
written again, and the task's directory gets its name by one rename. Killed anywhere, the next run goes on and ends
in the same bytes.
"""

import functools
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cpt_rft import __version__
from cpt_rft.data.checks import RowChecker
from cpt_rft.data.config import Checks
from cpt_rft.data.drop import Drop
from cpt_rft.data.example import Split
from cpt_rft.data.index import INDEX_NAME, write_index
from cpt_rft.data.ledger import (
    DROPS_NAME,
    LEDGER_NAME,
    Json,
    add_official_counts,
    check_counts,
    read_ledger,
    split_entry,
)
from cpt_rft.data.lock import check_against_lock, publish_lock
from cpt_rft.data.overlap import Located, Verdict, compare_rows
from cpt_rft.data.parts import PartFacts, make_parts, read_parts, write_table
from cpt_rft.data.source import Source
from cpt_rft.data.tokens import PromptCounter
from cpt_rft.errors import DataError
from cpt_rft.files import FileRecord, publish_directory, sha256_file, sha256_json, write_json_atomic
from cpt_rft.tasks.base import Task

Progress = Callable[[str, int, int | None], None]
"""Told a label, the rows so far and, where it is known, how many there will be."""
# What a task file says for people; it does not change a row.
_WORDS = {"licence", "homepage", "note", "official", "expected_drops"}


@dataclass(frozen=True)
class Settings:
    """How to prepare.

    Attributes:
        checks: What rows must fulfil.
        model: A checkpoint whose tokenizer counts the text of prompts; none counts bytes as an upper bound.
        limit: Take only so many rows of each split, for a first look; none takes all.
        processes: How many decode pictures.
    """

    checks: Checks
    model: Path | None = None
    limit: int | None = None
    processes: int = 1


def prepare_task(
    task: Task, cache: Path, out: Path, settings: Settings, progress: Progress = lambda label, rows, total: None
) -> Json:
    """Prepare one task below ``out``, or verify that it is there; returns its ledger.

    Raises:
        DataError: The source cannot be had, too many rows are broken, or ``data.lock.json`` was made from something
            else or holds other rows.
    """
    out.mkdir(parents=True, exist_ok=True)
    source = task.source(cache)
    asked = what_is_asked(task, source, settings)
    name = task.config.name
    final = out / name
    check_against_lock(out, name, asked)
    if (final / LEDGER_NAME).is_file():
        ledger = read_ledger(final)
        if ledger["asked_sha256"] != sha256_json(asked):
            raise DataError(f"{final} was made from something else and has no lock.", f"delete {final}")
        publish_lock(out, name, asked, ledger)
        _clear(out, name)
        return ledger
    if final.exists():
        raise DataError(f"{final} exists and is no prepared task.", "choose another directory with --out")
    work = out / f".{name}.parts-{sha256_json(asked | {'code': _code_sha256()})[:12]}"
    _clear(out, name, keep=work)
    counter = PromptCounter(settings.model) if settings.model else None
    checker = RowChecker(settings.checks, counter)
    for split in task.splits:
        total = _total(task, split, source, settings)
        rows = itertools.islice(task.rows(split, source), settings.limit)
        make_parts(
            rows,
            work / split,
            checker,
            settings.processes,
            functools.partial(_tell, progress, f"{name}/{split}", total),
        )
    partial = out / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    ledger = _assemble(task, source, settings, work, partial, asked)
    try:
        check_against_lock(out, name, asked, ledger)
    except DataError:
        _clear(out, name)  # the parts came from rows that must not be there: do not go on with them
        raise
    publish_directory(partial, final)
    publish_lock(out, name, asked, ledger)
    _clear(out, name)
    return ledger


def _tell(progress: Progress, label: str, total: int | None, count: int) -> None:
    progress(label, count, total)


def what_is_asked(task: Task, source: Source, settings: Settings) -> Json:
    """Everything that decides which rows come out; equal on two machines, equal rows."""
    config = task.config.model_dump(mode="json", exclude=_WORDS)
    checks = settings.checks.model_dump(mode="json", exclude={"max_dropped", "processor_sample"})
    tokenizer = sha256_file(settings.model / "tokenizer.json") if settings.model else None
    limit = settings.limit
    return {"task": config, "source": source.record(), "checks": checks, "tokenizer": tokenizer, "limit": limit}


def _assemble(task: Task, source: Source, settings: Settings, work: Path, partial: Path, asked: Json) -> Json:
    """Compare rows with each other, then write splits, drops, index and ledger."""
    parts = {split: list(read_parts(work / split)) for split in task.splits}
    located = {split: list(_locate(parts[split])) for split in task.splits}
    verdict = compare_rows(located, settings.checks)
    splits: dict[Split, Json] = {}
    for split in task.splits:
        dropped = verdict.drops[split]
        drops = Counter(str(drop.reason) for part in parts[split] for drop in part.drops)
        drops.update(str(drop.reason) for drop in dropped.values())
        rows_in = sum(part.rows_in for part in parts[split])
        kept = len(located[split]) - len(dropped)
        splits[split] = split_entry(rows_in, kept, drops) | _measures(located[split], dropped, settings)
        splits[split]["kept_anyway"] = dict(sorted(verdict.kept_anyway[split].items()))
    if settings.limit is None:
        add_official_counts(splits, task)
        check_counts(splits, task, source, settings.checks.max_dropped)
    else:
        check_counts(splits, task, Source(None, None, None, ()), settings.checks.max_dropped)
    for split in task.splits:
        splits[split] |= _write_split(partial / split, parts[split], verdict.drops[split])
    _write_drops(partial / DROPS_NAME, parts, verdict)
    stay = (
        (split, row.facts)
        for split, rows in located.items()
        for number, row in enumerate(rows)
        if number not in verdict.drops[split]
    )
    write_index(partial / INDEX_NAME, stay)
    ledger: Json = {
        "task": task.config.model_dump(mode="json"),
        "source": source.record(),
        "checks": settings.checks.model_dump(mode="json"),
        "text_counted": settings.model is not None,
        "limit": settings.limit,
        "asked_sha256": sha256_json(asked),
        "splits": splits,
        "shared_pictures": dict(sorted(verdict.shared.items())),
        "made_by": {"cpt_rft": __version__, "pyarrow": pa.__version__},
    }
    if settings.model is not None:
        from cpt_rft.data.sample import ask_processor

        ledger["processor_sample"] = ask_processor(partial, ledger, settings.model)
    write_json_atomic(partial / LEDGER_NAME, ledger)
    return ledger


def _locate(parts: Sequence[PartFacts]) -> Iterator[Located]:
    for part in parts:
        for row, facts in enumerate(part.kept):
            yield Located(part.path, row, facts)


def _measures(rows: Sequence[Located], dropped: Mapping[int, Drop], settings: Settings) -> Json:
    kept = [located.facts for number, located in enumerate(rows) if number not in dropped]
    pictures = [facts for row in kept for facts in row.pictures]
    limit = settings.checks.max_prompt_tokens
    return {
        "pictures": len(pictures),
        "picture_files": len({facts.sha256 for facts in pictures}),
        "pictures_stored_anew": sum(facts.changed for facts in pictures),
        "max_tokens": max((row.tokens for row in kept), default=0),
        "unproved": sum(row.tokens > limit for row in kept),
    }


def _write_split(directory: Path, parts: Sequence[PartFacts], dropped: Mapping[int, Drop]) -> Json:
    """Give the parts of a split their place; only those that lose rows are written again."""
    directory.mkdir()
    digest = hashlib.sha256()
    files: dict[str, FileRecord] = {}
    first = 0
    for part in parts:
        stays = [first + row not in dropped for row in range(len(part.kept))]
        first += len(part.kept)
        for facts in itertools.compress(part.kept, stays):
            digest.update(facts.content.encode())
        if not any(stays):
            continue
        path = directory / f"{len(files):05d}.parquet"
        if all(stays):
            _link(part.path, path)
            files[path.name] = part.file
        else:
            files[path.name] = write_table(path, pq.read_table(part.path).filter(pa.array(stays)))
    return {"files": {name: file._asdict() for name, file in files.items()}, "content_sha256": digest.hexdigest()}


def _link(source: Path, target: Path) -> None:
    """A second name of a file; a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_drops(path: Path, parts: Mapping[Split, Sequence[PartFacts]], verdict: Verdict) -> None:
    with path.open("w", encoding="ascii") as file:  # ids may hold anything; JSON escapes it
        for split, listed in parts.items():
            drops = [drop for part in listed for drop in part.drops]
            for drop in itertools.chain(drops, verdict.drops[split].values()):
                file.write(json.dumps(drop._asdict()) + "\n")


def _total(task: Task, split: Split, source: Source, settings: Settings) -> int | None:
    shared = any(rule.from_split == split or name == split for name, rule in task.config.carve.items())
    total = None if shared else source.rows.get(task.source_split(split))
    return total if settings.limit is None or total is None else min(total, settings.limit)


def _clear(out: Path, name: str, keep: Path | None = None) -> None:
    """Remove parts of an earlier attempt."""
    for path in out.glob(f".{name}.parts-*"):
        if path != keep:
            shutil.rmtree(path)


def _code_sha256() -> str:
    """A hash of the code that turns raw rows into parts."""
    package = Path(__file__).resolve().parents[1]
    paths = [*(package / "tasks").glob("*.py"), *(package / "data").glob("*.py")]
    paths += [package / "prompts.py", package / "vision.py"]
    return sha256_json({path.relative_to(package).as_posix(): sha256_file(path) for path in paths})
