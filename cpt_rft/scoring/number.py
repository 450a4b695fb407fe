"""Numbers: equal in value; words such as ``three`` only where the references list them.

Source: none official; counts and sums of the miniature. Real mathematics is ``latex``.
"""

import re
from collections.abc import Sequence
from decimal import Decimal

from cpt_rft.scoring import short_text

_DECIMAL = re.compile(r"[+-]?[0-9]{1,40}(?:\.[0-9]{1,40})?")


def parse(text: str) -> Decimal | None:
    """The value of a plain decimal of at most 80 digits, else none.

    >>> parse("+3.0") == parse("3"), parse("3e9")
    (True, None)
    """
    return Decimal(text) if _DECIMAL.fullmatch(text) else None


def matches(candidate: str, references: Sequence[str]) -> bool:
    """Whether the candidate has the value of a reference or, where it is no decimal, the wording of one.

    >>> [matches(text, ["3", "three"]) for text in ("3.0", "Three", "-3", "3 4")]
    [True, True, False, False]
    """
    value = parse(candidate)
    if value is not None:
        return any(value == parse(reference.strip()) for reference in references)
    return short_text.matches(candidate, references)
