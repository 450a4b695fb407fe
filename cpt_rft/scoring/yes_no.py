"""Yes or no: one word, in any letter case, with or without closing punctuation."""

from collections.abc import Sequence

from cpt_rft.scoring import short_text


def matches(candidate: str, references: Sequence[str]) -> bool:
    """Whether the candidate is an accepted word and nothing more.

    >>> [matches(text, ["yes", "true"]) for text in ("Yes!", "true", "no", "yes or no")]
    [True, True, False, False]
    """
    return short_text.matches(candidate.rstrip("!,"), references)
