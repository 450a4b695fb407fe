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
