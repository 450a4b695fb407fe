"""Lettered choice: the letter, the text of the option, or both; the references list letter and text."""

import re
from collections.abc import Sequence

from cpt_rft.scoring import short_text

_LETTER = re.compile(r"\(?([A-Za-z])(?:\)[.:]?|[.:])?")
_LETTER_AND_TEXT = re.compile(r"\(?([A-Za-z])(?:\)[.:]?|[.:])\s+(\S.*)")


def matches(candidate: str, references: Sequence[str]) -> bool:
    """Whether the candidate names the right option and no other.

    >>> [matches(text, ["B", "dog"]) for text in ("b", "(B)", "B. dog", "dog", "B. cat", "A B")]
    [True, True, True, True, False, False]
    """
    accepted = {short_text.normalise(reference) for reference in references}
    if letter := _LETTER.fullmatch(candidate):
        return letter.group(1).casefold() in accepted
    if both := _LETTER_AND_TEXT.fullmatch(candidate):
        return both.group(1).casefold() in accepted and short_text.normalise(both.group(2)) in accepted
    return short_text.normalise(candidate) in accepted
