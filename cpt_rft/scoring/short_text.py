"""Words: equal once letter case and punctuation are gone (GQA, open PathVQA, Super-CLEVR).

Source: EvolvingLMMs-Lab/lmms-eval@75571cfe lmms_eval/api/metrics.py ``exact_match_hf_evaluate`` with
``ignore_case`` and ``ignore_punctuation``.
Differs from: (1) every reference counts; (2) runs of white space are one space; (3) what holds punctuation only
matches nothing.
"""

import string
from collections.abc import Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, single spaces.

    >>> normalise(" Dark  Red. "), normalise("t-shirt")
    ('dark red', 'tshirt')
    """
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def matches(candidate: str, references: Sequence[str]) -> bool:
    """Whether the candidate is one of the references; a number word is a digit only where both are listed."""
    given = normalise(candidate)
    return bool(given) and given in {normalise(reference) for reference in references}
