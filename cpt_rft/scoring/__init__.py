r"""Scores of one response. The reward of training and the numbers of evaluation come from these functions only.

``strict`` asks for the form that the prompt asked for. ``lenient`` looks through wrappers and accepts every reference.
How answers compare is one small file an answer kind (`kinds`); whose rules apply is a preset (`presets`). No torch
and no transformers here: the workers of other frameworks load this package. What a model wrote is data: it is never
evaluated in this process (`math_equality`).
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from cpt_rft.data.example import Kind
from cpt_rft.prompts import Style
from cpt_rft.scoring.errors import ScoringError
from cpt_rft.scoring.extract import follows_cot_format, follows_direct_format
from cpt_rft.scoring.kinds import KINDS, Question
from cpt_rft.scoring.presets import PRESETS

__all__ = ["KINDS", "PRESETS", "Score", "ScoringError", "Status", "reward", "score"]

Status = Literal["answered", "no_answer", "truncated", "undecodable"]
ACCURACY_WEIGHT = 0.9
FORMAT_WEIGHT = 0.1
_NOT_TEXT = re.compile("[\ud800-\udfff\ufffd]")


class Score(NamedTuple):
    """What one response is worth.

    Attributes:
        strict: How right the answer in the required form is, 0 to 1; in between for ``vqa`` only.
        lenient: How right the answer is in any form and by any reference, 0 to 1, at least `strict`.
        format: 1.0 iff the response keeps the form that its style asks for, right or wrong, else 0.0.
        extracted: The text that ``strict`` looked at; none where the required form holds no text.
        status: ``truncated`` if the length limit ended the response, else ``undecodable`` if it holds what is no text
            (lone surrogates, replacement characters), ``no_answer`` if no text of it can be an answer, else
            ``answered``. None of the first three is a plain wrong answer; the scores count what is there all the same.
    """

    strict: float
    lenient: float
    format: float
    extracted: str | None
    status: Status


def score(
    response: str,
    *,
    answer: str,
    references: Sequence[str],
    kind: Kind,
    style: Style,
    truncated: bool = False,
    options: Sequence[str] = (),
    preset: str = "official",
) -> Score:
    r"""Score a response against its label and the other accepted answers.

    Args:
        response: The text of a model; it may hold anything.
        answer: The label.
        references: Every accepted answer; for ``vqa`` one entry an annotator.
        kind: How answers compare, a key of `KINDS`.
        style: The form that the prompt asked for.
        truncated: Whether the length limit ended the response.
        options: The texts of a lettered question, A first.
        preset: Whose rules apply, a key of `PRESETS`.

    Raises:
        ScoringError: The kind or the preset is unknown, or mathematics must be compared without its libraries.

    >>> score("<think>a dog</think>\\boxed{B}", answer="B", references=["B", "dog"], kind="choice", style="cot")
    Score(strict=1.0, lenient=1.0, format=1.0, extracted='B', status='answered')
    >>> score("Dog.", answer="B", references=["B", "dog"], kind="choice", style="direct")
    Score(strict=0.0, lenient=1.0, format=1.0, extracted='Dog.', status='answered')
    """
    if preset not in PRESETS:
        raise ScoringError(f"Unknown scorer preset {preset!r}.", f"use one of {', '.join(PRESETS)}")
    if kind not in KINDS:
        raise ScoringError(f"Unknown answer kind {kind!r}.", f"use one of {', '.join(KINDS)}")
    graded = PRESETS[preset](response, Question(answer, references, options), KINDS[kind], style)
    format_kept = follows_cot_format(response) if style == "cot" else follows_direct_format(response)
    status: Status = "answered" if graded.extracted or graded.best_effort else "no_answer"
    if truncated:
        status = "truncated"
    elif not response.isascii() and _NOT_TEXT.search(response):
        status = "undecodable"
    return Score(graded.strict, graded.lenient, float(format_kept), graded.extracted or None, status)


def reward(score: Score, style: Style) -> float:
    """The reward of reinforcement learning, between 0 and 1.

    Source: RFTvsSFT@7d4f50e EasyR1/examples/reward_function/math.py; the no-CoT runs reward accuracy alone.

    >>> reward(Score(1.0, 1.0, 0.0, "B", "answered"), "cot")
    0.9
    """
    if style == "direct":
        return score.strict
    return ACCURACY_WEIGHT * score.strict + FORMAT_WEIGHT * score.format
