"""Lettered choice (ScienceQA): the letter, the text of the option, or both; the references list letter and text.

Source: EvolvingLMMs-Lab/lmms-eval@75571cfe lmms_eval/tasks/scienceqa/utils.py ``sqa_process_results`` (`matches`);
open-compass/VLMEvalKit@e8e78f05 vlmeval/utils/matching_util.py ``can_infer`` (`infer`).
Differs from: `matches` also reads ``(B)``, ``B)``, ``b.`` and the text of the option, and where the references list
that text, a letter with the text of another option is wrong. `infer` gives none where the source gives ``Z`` or
leaves the row to a judge.
"""

import re
import string
from collections.abc import Sequence

from cpt_rft.scoring import short_text

_LETTER = re.compile(r"\(?([A-Za-z])(?:\)[.:]?|[.:])?")
_LETTER_AND_TEXT = re.compile(r"\(?([A-Za-z])(?:\)[.:]?|[.:])\s+(\S.*)", re.DOTALL)
_LETTER_AND_STOP = re.compile(r"([A-Z])\.(.*)", re.DOTALL)
_TO_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_PHRASE = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_FROM_THE_END = 5


def matches(candidate: str, references: Sequence[str]) -> bool:
    """Whether the candidate names the right option and no other.

    >>> [matches(text, ["B", "dog"]) for text in ("b", "(B)", "B. dog", "dog", "B. cat", "A B")]
    [True, True, True, True, False, False]
    >>> matches("B. dog", ["B"])
    True
    """
    accepted = {short_text.normalise(reference) for reference in references} - {""}
    if letter := _LETTER.fullmatch(candidate):
        return letter.group(1).lower() in accepted
    if both := _LETTER_AND_TEXT.fullmatch(candidate) or _LETTER_AND_STOP.fullmatch(candidate):
        texts = {text for text in accepted if len(text) > 1}
        return both.group(1).lower() in accepted and (not texts or short_text.normalise(both.group(2)) in texts)
    return short_text.normalise(candidate) in accepted


def is_lettered(candidate: str) -> bool:
    """Whether the candidate is a letter or starts with one, as options do; `matches` alone decides then."""
    return any(form.fullmatch(candidate) for form in (_LETTER, _LETTER_AND_TEXT, _LETTER_AND_STOP))


def letters(options: Sequence[str]) -> str:
    """The letters of the options: ``ABCD`` for four."""
    return string.ascii_uppercase[: len(options)]


def infer(response: str, options: Sequence[str]) -> str | None:
    """The letter that a free answer stands for, if it can be told without a judge.

    A single option letter among the last words decides; else "the answer is X"; else the only option whose text occurs.

    >>> [infer(text, ["cat", "dog"]) for text in ("It is B.", "a dog", "A or B", "the answer is b, a dog")]
    ['B', 'B', None, 'B']
    """
    if any(refusal in response for refusal in _REFUSALS):
        return None
    words = response.translate(_TO_SPACES).split()
    named = [letter for letter in letters(options) if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - _FROM_THE_END:
        return named[0]
    if not named and "Z" in words:
        return None
    phrase = _PHRASE.search(response)
    if phrase and phrase.group(1).upper() in letters(options):
        return phrase.group(1).upper()
    if len(response) > 2 * sum(map(len, options)):
        return None
    lowered = response.lower()
    found = [letter for letter, text in zip(letters(options), options, strict=False) if text.lower() in lowered]
    return found[0] if len(found) == 1 else None
