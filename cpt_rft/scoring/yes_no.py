"""Yes or no (closed PathVQA, POPE): the accepted word, or a sentence that holds it and not its opposite.

Source: open-compass/VLMEvalKit@e8e78f05 vlmeval/dataset/utils/yorn.py ``YOrN_Extraction``; for its words
vlmeval/smp/misc.py ``process_punctuation``, which is what VQA accuracy does to punctuation.
Differs from: wrappings are removed first; a word that the row lists beside ``yes`` or ``no`` counts alone.
"""

from collections.abc import Sequence

from cpt_rft.scoring import short_text, vqa


def word(text: str) -> str | None:
    """``yes`` or ``no`` if exactly one of the two occurs as a word.

    >>> [word(text) for text in ("Yes, there is.", "NO", "yes or no", "nope", "not sure")]
    ['yes', 'no', None, None, None]
    """
    words = set(vqa.punctuation_removed(text.lower()).split())
    found = words & {"yes", "no"}
    return found.pop() if len(found) == 1 else None


def matches(candidate: str, references: Sequence[str]) -> bool:
    """Whether the candidate says what the references say.

    >>> [matches(text, ["yes", "true"]) for text in ("Yes!", "true", "no", "yes or no", "Yes, there is")]
    [True, True, False, False, True]
    """
    return short_text.matches(candidate, references) or word(candidate) in {text.strip().lower() for text in references}
