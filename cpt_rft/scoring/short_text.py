"""Words: equal after lower-casing, with runs of white space as one space."""

from collections.abc import Sequence


def normalise(text: str) -> str:
    """Lower case, single spaces, no closing full stop.

    >>> normalise(" Dark  Red. ")
    'dark red'
    """
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def matches(candidate: str, references: Sequence[str]) -> bool:
    """Whether the candidate is one of the references; a number word is a digit only where both are listed."""
    return normalise(candidate) in {normalise(reference) for reference in references}
