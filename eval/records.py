"""Evaluation records: one JSON line an evaluated example, in files that are absent or whole.

A directory of records holds ``<task>.<style>.jsonl``, ``<task>.<style>.sampled.jsonl`` (several samples a row at
temperature 1, base model only) and ``contracts.json``, which spells out every fingerprint the records carry. The form
is described in docs/records.md; every record states its version, and a reader takes no other.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from cpt_rft.data.example import Example, Kind
from cpt_rft.errors import UserError
from cpt_rft.files import write_json_atomic, write_text_atomic
from cpt_rft.prompts import STYLES, Style
from cpt_rft.scoring import Score
from eval.contract import Contract, differences, fingerprint

CONTRACTS_FILE = "contracts.json"
_SURROGATE = re.compile("[\ud800-\udfff]")
#: Version of the record schema; raised by hand whenever a key is added, removed or given another meaning.
VERSION = 3
#: Responses that are counted apart, besides those that were ``answered``.
COUNTED_APART = ("truncated", "no_answer", "undecodable")
_LISTS = ("references", "options")
_CHOICES: dict[str, tuple[str, ...]] = {
    "style": STYLES,
    "finish": ("stop", "length"),
    "status": ("answered", *COUNTED_APART),
    "kind": get_args(Kind),
}


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
        status: ``answered``, or one of `COUNTED_APART`.
        answer: The label of the row.
        references: Every accepted answer. They stand here, and not only in the data, so that a directory of records
            can be scored again by itself, by exactly what it was scored by.
        options: The texts of a lettered question, A first; empty where the row has none.
        kind: Answer kind of the row.
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
    references: tuple[str, ...]
    options: tuple[str, ...]
    kind: Kind
    contract: str


_PLAIN: dict[str, tuple[type, ...]] = {field.name: (str,) for field in fields(Record)}
_PLAIN |= {"extracted": (str, NoneType), "sample": (int,), "tokens": (int,)}
_PLAIN |= dict.fromkeys(_LISTS, (tuple,))
_PLAIN |= dict.fromkeys(("strict", "lenient", "format"), (int, float))


def record_of(
    row: Example,
    result: Score,
    *,
    style: Style,
    sample: int,
    response: str,
    tokens: int,
    finish: str,
    contract: str,
) -> Record:
    """The record of a response to a row and of its score, whose fields have the same names in both."""
    return Record(
        id=row.id,
        task=row.task,
        style=style,
        sample=sample,
        response=response,
        tokens=tokens,
        finish=finish,
        **result._asdict(),
        answer=row.answer,
        references=row.references,
        options=row.options,
        kind=row.kind,
        contract=contract,
    )


def record_path(directory: Path, task: str, style: str, *, sampled: bool = False) -> Path:
    """Where the records of a task in a style live."""
    return directory / f"{task}.{style}{'.sampled' if sampled else ''}.jsonl"


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, records_text(records))


def records_text(records: Iterable[Record]) -> str:
    """Records as they stand in a file, one line each."""
    return "".join(_line(record) for record in records)


def _line(record: Record) -> str:
    text = json.dumps({"version": VERSION, **asdict(record)}, ensure_ascii=False)
    # Half a surrogate pair is no character of UTF-8, but JSON can name it.
    return _SURROGATE.sub(lambda half: f"\\u{ord(half.group()):04x}", text) + "\n"


def read_records(path: Path) -> list[Record]:
    """All records of a file, in order.

    Raises:
        RecordError: The file is missing, a line is broken or of another version, lacks a key, has an unknown one or
            one of another type, a row comes twice, or fingerprints are mixed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} cannot be read ({error}).", "evaluate this checkpoint again") from error
    # Split at newlines only: `splitlines` would also cut at the separators that a response may hold.
    lines = text.split("\n")
    records = [_parse(path, number, line) for number, line in enumerate(lines[:-1], start=1)]
    if not records or lines[-1]:
        raise RecordError(f"{path} is empty or cut short.", "delete it and evaluate again")
    if len({(record.id, record.sample) for record in records}) < len(records):
        raise RecordError(f"{path} holds a row twice.", "delete it and evaluate again")
    if len({record.contract for record in records}) > 1:
        refuse_mixed({f"{path}, row {record.id}": (record.contract, path.parent) for record in records})
    return records


def _parse(path: Path, number: int, line: str) -> Record:
    try:
        raw = json.loads(line)
        if not isinstance(raw, dict):
            raise ValueError("no JSON object")
        version = raw.pop("version", 1)
        if version != VERSION:
            raise RecordError(
                f"{path}, line {number} is of record version {version}; this program reads version {VERSION}.",
                "evaluate this checkpoint again, or read it with the program that wrote it",
            )
        return _checked(raw)
    except ValueError as error:
        raise RecordError(
            f"{path}, line {number} is no record of version {VERSION} ({error}).", "delete the file and evaluate again"
        ) from error


def _checked(raw: dict[str, Any]) -> Record:
    """A record from its JSON; what is not as documented is a ValueError."""
    for what, names in (("no", _PLAIN.keys() - raw.keys()), ("unknown key", raw.keys() - _PLAIN.keys())):
        if names:
            raise ValueError(f"{what} {', '.join(sorted(names))}")
    for name in _LISTS:
        if isinstance(raw[name], list):
            raw[name] = tuple(raw[name])
    for name, value in raw.items():
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"{name} is {value!r}")
        if isinstance(value, bool) or not isinstance(value, _PLAIN[name]):
            raise ValueError(f"{name} is {value!r}")
    if not all(0 <= raw[name] <= 1 for name in ("strict", "lenient", "format")):
        raise ValueError("a score is not within 0 and 1")
    return Record(**raw)


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
    """Mean strict and lenient score in percent and the counts of rows and of responses counted apart."""
    count = len(records)
    return {
        "rows": count,
        "strict": 100.0 * sum(record.strict for record in records) / count,
        "lenient": 100.0 * sum(record.lenient for record in records) / count,
        **counts(records),
    }


def counts(records: Sequence[Record]) -> dict[str, int]:
    """How many responses of each sort are counted apart."""
    return {status: sum(record.status == status for record in records) for status in COUNTED_APART}
