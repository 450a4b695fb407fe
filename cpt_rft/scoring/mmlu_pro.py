"""MMLU-Pro: one of up to ten letters out of a chain of thought.

Source: TIGER-AI-Lab/MMLU-Pro@f418b116 evaluate_from_local.py ``extract_answer``, ``extract_again``, ``extract_final``.
Differs from: wrappings are removed first; where nothing is found the answer is wrong, not drawn at random.
"""

import re

from cpt_rft.scoring.extract import without_wrappers

_SENTENCE = re.compile(r"answer is \(?([A-J])")
_LABEL = re.compile(r"[aA]nswer:\s*(?=([A-J]))")
_ALONE = re.compile(r"\b[A-J]\b")


def extract(response: str) -> str | None:
    """The first "answer is X"; else the last "Answer: X" of the first line that has one; else the last lone letter.

    >>> [extract(text) for text in ("The answer is (C), not D", "Answer: A, no, answer: B", "I take B", "(b)")]
    ['C', 'B', 'B', None]
    """
    text = without_wrappers(response)
    if sentence := _SENTENCE.search(text):
        return sentence.group(1)
    return _labelled(text) or _last_alone(text)


def _labelled(text: str) -> str | None:
    first = _LABEL.search(text)
    if first is None:
        return None
    letter, line_end = first.group(1), text.find("\n", first.start())
    for label in _LABEL.finditer(text, first.end()):
        if 0 <= line_end < label.start():
            break
        letter = label.group(1)
    return letter


def _last_alone(text: str) -> str | None:
    letter = None
    for alone in _ALONE.finditer(text):
        letter = alone.group()
    return letter
