"""Sequences, for example of patch numbers: the same items in the same order."""

import re
from collections.abc import Sequence

_SEPARATORS = re.compile(r"[\s,;]+")


def items(text: str) -> list[str]:
    """The items, parted by white space, commas or semicolons, without square brackets around them.

    >>> items("[3, 1; 2]")
    ['3', '1', '2']
    """
    inner = text.strip().removeprefix("[").removesuffix("]")
    return [item for item in _SEPARATORS.split(inner) if item]


def matches(candidate: str, references: Sequence[str]) -> bool:
    """Whether the candidate has exactly the items of a reference."""
    found = items(candidate)
    return bool(found) and any(found == items(reference) for reference in references)


def share_in_place(candidate: str, reference: str) -> float:
    r"""The share of the reference's items that stand at their place; 0.0 for a candidate of another length.

    Source: Jigsaw-R1@781ebd4a7e61 utils/reward.py, patch score.
    Differs from: square brackets around the items are allowed.

    >>> share_in_place("1 2\n4 3", "1 2\n3 4"), share_in_place("1 2 3", "1 2\n3 4")
    (0.5, 0.0)
    """
    found, expected = items(candidate), items(reference)
    if len(found) != len(expected) or not expected:
        return 0.0
    return sum(a == b for a, b in zip(found, expected, strict=True)) / len(expected)
