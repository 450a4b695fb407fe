r"""Scorer presets: whose idea of "right" a score follows, chosen by name.

``official`` compares by answer kind. ``paper_single_label`` is the released reward, for every kind alike: mathruler's
``grade_answer`` of the last box, or of the whole answer in the direct style, against the one label.

Source (``paper_single_label``): RFTvsSFT@7d4f50e EasyR1/examples/reward_function/math.py ``compute_score``, ``no_cot``.
Differs from: (1) boxes that contradict each other answer nothing, in both presets, so that boxing every option earns
no more than a wrong answer (boxes inside the thought are free, if one follows it); (2) an absent or empty box is
wrong, where the source grades the text ``None``; (3) ``grade_answer`` runs under limits (`math_equality`).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from cpt_rft.prompts import Style
from cpt_rft.scoring import math_equality
from cpt_rft.scoring.extract import answer_boxes, final_answer, last_box, without_space_around_brackets
from cpt_rft.scoring.kinds import Question, Rules


class Graded(NamedTuple):
    """The text in the required form (empty: none), the strict and the lenient score, and the best-effort answer."""

    extracted: str
    strict: float
    lenient: float
    best_effort: str | None


Grade = Callable[[str, Question, Rules, Style], Graded]


def official(response: str, question: Question, rules: Rules, style: Style) -> Graded:
    """The rules of the answer kind, on the boxed text or on the whole answer."""
    extracted, committed = response.strip(), True
    if style == "cot":
        boxes = [box.strip() for box in answer_boxes(response)]
        extracted, committed = (boxes[-1] if boxes else ""), len(set(boxes)) == 1
    best_effort = final_answer(response)
    strict = rules.strict(extracted, question) if extracted and committed else 0.0
    lenient = strict if strict >= 1.0 else max(strict, rules.lenient(response, best_effort, question))
    return Graded(extracted, strict, lenient, best_effort)


def paper_single_label(response: str, question: Question, rules: Rules, style: Style) -> Graded:
    """The released reward's accuracy; lenient grades the best-effort answer in the same way."""
    text = without_space_around_brackets(response)
    extracted, committed = text.strip(), True
    if style == "cot":
        extracted, committed = last_box(text) or "", len({box.strip() for box in answer_boxes(text)}) == 1
    best_effort = final_answer(response)
    label = question.answer.strip()
    graded = math_equality.verdict(extracted, label, "mathruler")
    strict = committed and bool(graded)
    lenient = strict
    if (
        not strict and best_effort and graded is not None
    ):  # an answer that costs all the time there is: no second chance
        lenient = bool(math_equality.verdict(best_effort, label, "mathruler"))
    return Graded(extracted, float(strict), float(lenient), best_effort)


PRESETS: Mapping[str, Grade] = {"official": official, "paper_single_label": paper_single_label}
