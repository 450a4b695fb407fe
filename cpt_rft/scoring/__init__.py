r"""Scores of one response. The reward of training and the numbers of evaluation come from these functions only.

``strict`` asks for the form that the prompt asked for and for the label itself, letter case included.
``lenient`` looks through wrappers and accepts every reference; how answers compare is one small file an answer
kind. No torch and no transformers here: the workers of other frameworks load this package.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from cpt_rft.data.example import Kind
from cpt_rft.prompts import Style
from cpt_rft.scoring import choice, latex, number, sequence, short_text, yes_no
from cpt_rft.scoring.extract import (
    answer_boxes,
    final_answer,
    follows_cot_format,
    follows_direct_format,
)

Status = Literal["answered", "no_answer", "truncated"]
ACCURACY_WEIGHT = 0.9
FORMAT_WEIGHT = 0.1
_MATCHES = {
    "choice": choice.matches,
    "latex": latex.matches,
    "number": number.matches,
    "sequence": sequence.matches,
    "short_text": short_text.matches,
    "yes_no": yes_no.matches,
}


class Score(NamedTuple):
    """What one response is worth.

    Attributes:
        strict: 1.0 iff the answer stands in the required form and equals the label, else 0.0.
        lenient: 1.0 iff the answer, in any form, is one of the references, else 0.0.
        format: 1.0 iff the response keeps the form that its style asks for, right or wrong, else 0.0.
        extracted: The text that ``strict`` looked at; none where the required form holds no text.
        status: ``truncated`` if the length limit ended the response, ``no_answer`` if no text of it can be an
            answer, else ``answered``. The scores of a truncated response count what is there.
    """

    strict: float
    lenient: float
    format: float
    extracted: str | None
    status: Status


def score(
    response: str, *, answer: str, references: Sequence[str], kind: Kind, style: Style, truncated: bool = False
) -> Score:
    r"""Score a response against its label and the other accepted answers.

    Source: RFTvsSFT@7d4f50e EasyR1/examples/reward_function/math.py (last balanced box, format).
    Differs from: (1) strict is exact string equality after ``strip``, where the source calls ``grade_answer``;
    (2) boxes that contradict each other answer nothing, so that boxing every option earns no more than a wrong
    answer. Boxes inside the thought are free, if one follows it.

    >>> score("<think>a dog</think>\\boxed{B}", answer="B", references=["B", "dog"], kind="choice", style="cot")
    Score(strict=1.0, lenient=1.0, format=1.0, extracted='B', status='answered')
    >>> score("Dog.", answer="B", references=["B", "dog"], kind="choice", style="direct")
    Score(strict=0.0, lenient=1.0, format=1.0, extracted='Dog.', status='answered')
    """
    if style == "cot":
        boxes = [box.strip() for box in answer_boxes(response)]
        extracted = boxes[-1] if boxes else ""
        committed = len(set(boxes)) == 1
        format_kept = follows_cot_format(response)
    else:
        extracted = response.strip()
        committed = True
        format_kept = follows_direct_format(response)
    best_effort = final_answer(response)
    strict = bool(extracted) and committed and extracted == answer.strip()
    lenient = strict or (best_effort is not None and _MATCHES[kind](best_effort, references))
    status: Status = "truncated" if truncated else "answered" if extracted or best_effort else "no_answer"
    return Score(float(strict), float(lenient), float(format_kept), extracted or None, status)


def reward(score: Score, style: Style) -> float:
    """The reward of reinforcement learning, between 0 and 1.

    Source: RFTvsSFT@7d4f50e EasyR1/examples/reward_function/math.py; the no-CoT runs reward accuracy alone.

    >>> reward(Score(1.0, 1.0, 0.0, "B", "answered"), "cot")
    0.9
    """
    if style == "direct":
        return score.strict
    return ACCURACY_WEIGHT * score.strict + FORMAT_WEIGHT * score.format
