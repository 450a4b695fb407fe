"""The answer kinds: for each, what is right in the required form and what is right in any form.

To add one: write a file with its comparison, add a line to `KINDS` and its name to `cpt_rft.data.example.Kind`, put
cases of the official function into ``tests/vectors`` and what differs into ``differences.yaml``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from cpt_rft.scoring import choice, latex, mmlu_pro, mmmu, number, sequence, short_text, vqa, yes_no
from cpt_rft.scoring.extract import without_wrappers


class Question(NamedTuple):
    """What a response is compared with: the label, every accepted answer, and the texts of lettered options."""

    answer: str
    references: Sequence[str]
    options: Sequence[str] = ()


class Rules(NamedTuple):
    """How answers of a kind compare.

    Attributes:
        strict: Score of the text that stands in the required form, 0 to 1.
        lenient: Score of a whole response and of the best-effort answer in it, if there is one.
    """

    strict: Callable[[str, Question], float]
    lenient: Callable[[str, str | None, Question], float]


def is_label(extracted: str, question: Question) -> float:
    """1 for the label itself, letter case included."""
    return float(extracted == question.answer.strip())


def _any_reference(matches: Callable[[str, Sequence[str]], bool]) -> Rules:
    """The label in the required form; in any form, whatever `matches` finds among the references."""

    def lenient(response: str, best_effort: str | None, question: Question) -> float:
        return float(best_effort is not None and matches(best_effort, question.references))

    return Rules(is_label, lenient)


def _choice(response: str, best_effort: str | None, question: Question) -> float:
    if best_effort is not None and choice.matches(best_effort, question.references):
        return 1.0
    if not question.options or choice.is_lettered(best_effort or ""):
        return 0.0
    return float(choice.infer(without_wrappers(response), question.options) == question.answer)


def _vqa_strict(extracted: str, question: Question) -> float:
    return vqa.accuracy(extracted, question.references)


def _vqa(response: str, best_effort: str | None, question: Question) -> float:
    return vqa.accuracy(best_effort or "", question.references)


def _mmmu_choice(response: str, best_effort: str | None, question: Question) -> float:
    return float(mmmu.parse_choice(response, question.options) == question.answer)


def _mmmu_open_strict(extracted: str, question: Question) -> float:
    return float(mmmu.equals(extracted, question.references))


def _mmmu_open(response: str, best_effort: str | None, question: Question) -> float:
    return float(mmmu.open_is_right(response, question.references))


def _mmlu_pro(response: str, best_effort: str | None, question: Question) -> float:
    return float(mmlu_pro.extract(response) == question.answer)


KINDS: Mapping[str, Rules] = {
    "choice": Rules(is_label, _choice),
    "latex": _any_reference(latex.matches),
    "mmlu_pro": Rules(is_label, _mmlu_pro),
    "mmmu_choice": Rules(is_label, _mmmu_choice),
    "mmmu_open": Rules(_mmmu_open_strict, _mmmu_open),
    "number": _any_reference(number.matches),
    "sequence": _any_reference(sequence.matches),
    "short_text": _any_reference(short_text.matches),
    "vqa": Rules(_vqa_strict, _vqa),
    "yes_no": _any_reference(yes_no.matches),
}
