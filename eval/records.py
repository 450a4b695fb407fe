"""Evaluation records: one JSON line an evaluated example, in files that are absent or whole.

A directory of records holds ``<task>.<style>.jsonl`` (greedy), ``<task>.<style>.sampled.jsonl`` (several samples a
row, base model only) and ``contracts.json``, which spells out every fingerprint the records carry.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cpt_rft.errors import UserError
from cpt_rft.files import write_json_atomic, write_text_atomic
from eval.contract import Contract, differences, fingerprint

CONTRACTS_FILE = "contracts.json"


class RecordError(UserError):
    """A record file is broken, or files that may not be mixed were asked for together."""


@dataclass(frozen=True, slots=True)
class Record:
    """One scored response.

    Attributes:
        id: Row of the data.
        task: Task or general ability.
        style: Prompt style, ``cot`` or ``direct``.
        sample: Number of the sample of this row, 0 under greedy decoding.
        response: The generated text without its end token.
        tokens: Number of generated tokens, end token included.
        finish: ``stop`` or ``length``.
        extracted: What strict scoring looked at, or none.
        strict: Score in the required form, 0 to 1.
        lenient: Score in any accepted form, 0 to 1.
        format: Whether the required form was kept, 0 to 1.
        status: ``answered``, ``no_answer`` or ``truncated``.
        answer: The label of the row.
        contract: Fingerprint of the evaluation contract.
    """

    id: str
    task: str
    style: str
    sample: int
    response: str
    tokens: int
    finish: str
    extracted: str | None
    strict: float
    lenient: float
    format: float
    status: str
    answer: str
    contract: str


_KEYS = frozenset(field.name for field in fields(Record))


def record_path(directory: Path, task: str, style: str, *, sampled: bool = False) -> Path:
    """Where the records of a task in a style live."""
    return directory / f"{task}.{style}{'.sampled' if sampled else ''}.jsonl"


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records))


def read_records(path: Path) -> list[Record]:
    """All records of a file, in order.

    Raises:
        RecordError: The file is missing, a line is broken, lacks a key or comes twice, or fingerprints are mixed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} cannot be read ({error}).", "evaluate this checkpoint again") from error
    records = [_parse(path, number, line) for number, line in enumerate(text.splitlines(), start=1)]
    if not records or not text.endswith("\n"):
        raise RecordError(f"{path} is empty or cut short.", "delete it and evaluate again")
    if len({(record.id, record.sample) for record in records}) < len(records):
        raise RecordError(f"{path} holds a row twice.", "delete it and evaluate again")
    if len({record.contract for record in records}) > 1:
        refuse_mixed({f"{path}, row {record.id}": (record.contract, path.parent) for record in records})
    return records


def _parse(path: Path, number: int, line: str) -> Record:
    try:
        raw = json.loads(line)
        missing = _KEYS - raw.keys()
        if missing:
            raise KeyError(f"no {', '.join(sorted(missing))}")
        return Record(**{key: raw[key] for key in _KEYS})
    except (ValueError, KeyError, AttributeError) as error:
        raise RecordError(f"{path}, line {number} is no record ({error}).", "delete it and evaluate again") from error


def read_contracts(directory: Path) -> dict[str, Contract]:
    """The contracts by fingerprint; empty when none are known."""
    path = directory / CONTRACTS_FILE
    if not path.is_file():
        return {}
    try:
        contracts = dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise RecordError(f"{path} is broken ({error}).", "delete it; the next evaluation writes it again") from error
    for name, contract in contracts.items():
        if fingerprint(contract) != name:
            raise RecordError(f"{path}: contract {name[:12]} was edited by hand.", "delete it and evaluate again")
    return contracts


def write_contract(directory: Path, contract: Contract) -> str:
    """Add a contract to the directory's list and return its fingerprint."""
    known, name = read_contracts(directory), fingerprint(contract)
    if name not in known:
        directory.mkdir(parents=True, exist_ok=True)
        write_json_atomic(directory / CONTRACTS_FILE, {**known, name: contract})
    return name


def refuse_mixed(sources: Mapping[str, tuple[str, Path]], also: Mapping[str, Contract] | None = None) -> None:
    """Refuse sources of different fingerprints.

    Args:
        sources: For each source's name its fingerprint and the directory whose ``contracts.json`` explains it.
        also: Contracts by fingerprint that no directory holds yet.

    Raises:
        RecordError: Two fingerprints differ; both, their sources and the differing keys are named.
    """
    first: tuple[str, str, Path] | None = None
    for name, (print_, directory) in sources.items():
        if first is None:
            first = (name, print_, directory)
        elif print_ != first[1]:
            contracts = {**read_contracts(first[2]), **read_contracts(directory), **(also or {})}
            one, other = contracts.get(first[1]), contracts.get(print_)
            known = one is not None and other is not None
            what = "; ".join(differences(one or {}, other or {})) if known else "their contracts.json is missing"
            raise RecordError(
                f"Two evaluation contracts: {first[1][:12]} ({first[0]}) and {print_[:12]} ({name}): {what}.",
                "evaluate all checkpoints under one contract",
            )


def accuracy(records: Sequence[Record]) -> dict[str, Any]:
    """Mean strict and lenient score in percent and the counts of rows, cut-short and answerless responses."""
    count = len(records)
    return {
        "rows": count,
        "strict": 100.0 * sum(record.strict for record in records) / count,
        "lenient": 100.0 * sum(record.lenient for record in records) / count,
        "truncated": sum(record.status == "truncated" for record in records),
        "no_answer": sum(record.status == "no_answer" for record in records),
    }
