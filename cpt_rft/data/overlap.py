"""Rows that cannot stand beside each other: repeated ids, duplicates, contradictions, and what crosses splits.

Splits are gone through from the one that must stay unseen to the one that is trained on, so that a row found twice
stays in test and leaves train. Two pictures are the same if all their decoded pixels are: fingerprints say which
may be, and only those are decoded once more.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from cpt_rft.data.checks import PictureFacts, pixels_sha256
from cpt_rft.data.config import Checks
from cpt_rft.data.drop import Drop
from cpt_rft.data.example import Split
from cpt_rft.data.parts import RowFacts
from cpt_rft.data.reasons import Reason

PROTECTED_FIRST: tuple[Split, ...] = ("test", "dev", "train")


class Located(NamedTuple):
    """A row and where its pictures are: the row's number in a parquet file."""

    path: Path
    row: int
    facts: RowFacts


@dataclass
class Verdict:
    """What comparing rows found.

    Attributes:
        drops: By split and the place of the row in the list that was given.
        kept_anyway: Repeats that stay because their split keeps them, by split and reason.
        shared: By "train/test" and so on: rows of the first split whose pictures stand in the second too.
    """

    drops: dict[Split, dict[int, Drop]] = field(default_factory=dict)
    kept_anyway: dict[Split, Counter[str]] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)


class Identity:
    """Names of pictures: equal names, equal pixels."""

    def __init__(self, rows: Iterable[Located]) -> None:
        shas: dict[str, str] = {}  # the first file of each fingerprint
        candidates: set[str] = set()
        listed = list(rows)
        for located in listed:
            for facts in located.facts.pictures:
                if shas.setdefault(facts.fingerprint, facts.sha256) != facts.sha256:
                    candidates.add(facts.fingerprint)
        self._pixels = _decode_again(listed, candidates)

    def __call__(self, facts: PictureFacts) -> str:
        """The picture's name."""
        return self._pixels.get(facts.sha256, facts.fingerprint)

    def row(self, facts: RowFacts) -> tuple[str, ...]:
        """The names of a row's pictures."""
        return tuple(self(picture) for picture in facts.pictures)


def compare_rows(splits: Mapping[Split, Sequence[Located]], checks: Checks) -> Verdict:
    """Which rows must go because of other rows of the same task.

    Args:
        splits: All rows that are fine by themselves.
        checks: Which repeats are dropped and which only counted.
    """
    verdict = Verdict()
    identity = Identity(located for rows in splits.values() for located in rows)
    ids: set[str] = set()
    questions: dict[Split, dict[tuple[str, ...], str]] = {}
    pictures: dict[Split, set[str]] = {}
    for split in PROTECTED_FIRST:
        if split not in splits:
            continue
        verdict.drops[split], verdict.kept_anyway[split] = {}, Counter()
        questions[split], pictures[split] = {}, set()
        shared: Counter[str] = Counter()
        for number, located in enumerate(splits[split]):
            facts = located.facts
            names = identity.row(facts)
            key = (facts.question, *names)
            drop = _crossing(facts, split, key, names, questions, pictures, checks, shared)
            if facts.id in ids:
                drop = Drop(facts.id, split, Reason.ID_REPEATED, "an earlier row has it")
            elif drop is None and key in questions[split]:
                same = questions[split][key] == facts.answer
                reason = Reason.DUPLICATE if same else Reason.CONTRADICTION
                drop = Drop(facts.id, split, reason, f"answers {questions[split][key]!r} and {facts.answer!r}")
                if split not in checks.duplicates_dropped:
                    verdict.kept_anyway[split][reason] += 1
                    drop = None
            if drop is not None:
                verdict.drops[split][number] = drop
                continue
            ids.add(facts.id)
            questions[split].setdefault(key, facts.answer)
            pictures[split].update(names)
        verdict.shared |= {f"{split}/{other}": shared[other] for other in questions if other != split}
    return verdict


def _crossing(
    facts: RowFacts,
    split: Split,
    key: tuple[str, ...],
    names: tuple[str, ...],
    questions: Mapping[Split, Mapping[tuple[str, ...], str]],
    pictures: Mapping[Split, set[str]],
    checks: Checks,
    shared: Counter[str],
) -> Drop | None:
    """A drop if the row, or by the user's wish its picture, stands in a split that must stay unseen."""
    drop = None
    for other in questions:
        if other == split:
            continue
        if not pictures[other].isdisjoint(names):
            shared[other] += 1
            if checks.picture_overlap == "drop":
                drop = drop or Drop(facts.id, split, Reason.OVERLAP, f"its picture stands in {other}")
        if key in questions[other]:
            drop = Drop(facts.id, split, Reason.OVERLAP, f"its pictures and question stand in {other}")
    return drop


def crossings(sets: Mapping[str, Sequence[Located]]) -> list[tuple[str, str, int, int]]:
    """What tasks share with each other's unseen rows: seen set, unseen set, rows with a shared picture, same rows.

    Args:
        sets: Rows by ``<task>/<split>``. Trained and chosen on: train and dev; unseen: test, of another task.
    """
    identity = Identity(located for rows in sets.values() for located in rows)
    names = {key: [identity.row(located.facts) for located in rows] for key, rows in sets.items()}
    pictures = {key: {name for row in rows for name in row} for key, rows in names.items()}
    asked = {
        key: {(located.facts.question, *row) for located, row in zip(sets[key], names[key], strict=True)}
        for key in sets
    }
    found = []
    for seen in sorted(sets):
        for unseen in sorted(sets):
            same_task = seen.partition("/")[0] == unseen.partition("/")[0]
            if same_task or not unseen.endswith("/test") or seen.endswith("/test"):
                continue
            rows = sum(not pictures[unseen].isdisjoint(row) for row in names[seen])
            same = len(asked[seen] & asked[unseen])
            if rows or same:
                found.append((seen, unseen, rows, same))
    return found


def _decode_again(rows: Iterable[Located], candidates: set[str]) -> dict[str, str]:
    """The hash of all pixels of each candidate, by the sha256 of the file; every file is decoded once."""
    wanted: dict[Path, dict[tuple[int, int], str]] = defaultdict(dict)
    seen: set[str] = set()
    for located in rows:
        for place, facts in enumerate(located.facts.pictures):
            if facts.fingerprint in candidates and facts.sha256 not in seen:
                seen.add(facts.sha256)
                wanted[located.path][located.row, place] = facts.sha256
    hashes: dict[str, str] = {}
    for path, places in wanted.items():
        with pq.ParquetFile(path) as file:
            first = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                here = {key: sha for key, sha in places.items() if first <= key[0] < first + count}
                if here:
                    images = file.read_row_group(group, columns=["images"]).column("images")
                    for (row, place), sha in here.items():
                        hashes[sha] = pixels_sha256(images[row - first][place]["bytes"].as_py())
                first += count
    return hashes
