r"""Prompt styles: what is appended to a problem, and what a supervised target looks like.

``cot`` asks for reasoning in ``<think>`` tags and the answer in ``\boxed{}``; ``direct`` asks for the bare
answer. A preset fixes both suffixes and, for the real datasets, the wording of the problem itself: a row carries
``problem`` (the preset ``task``) and in ``meta["problems"]`` what other presets say instead. Train and test, SFT
and RFT all render through `user_text`.

``paper_sft`` and ``paper_rft`` quote the released prompts of arXiv 2507.05386. They differ between the arms:
Geometry3K and PathVQA end with an instruction under SFT and with the bare question under RFT, and only RFT appends
a suffix. In both, ScienceQA's training rows keep the word "Context: " that its test rows lack.
"""

from dataclasses import dataclass
from typing import Literal

from cpt_rft.data.example import Example
from cpt_rft.errors import DataError

Style = Literal["cot", "direct"]
STYLES: tuple[Style, ...] = ("cot", "direct")
#: Begins the source of a rationale that is a whole response of a model.
ROLLOUTS_OF = "rollouts of "


@dataclass(frozen=True)
class PromptPreset:
    """The text that each style appends to a problem, leading separator included."""

    cot: str
    direct: str


# Source: RFTvsSFT@7d4f50e EasyR1/examples/format_prompt/{math_format,no_cot}.jinja.
_PAPER_COT = (
    " You FIRST think about the reasoning process as an internal monologue and then provide the final"
    " answer. The reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE"
    " put in \\boxed{}."
)
_PAPER_DIRECT = " You MUST provide the final answer directly."

PRESETS = {
    "miniature": PromptPreset(cot=" Think, then box.", direct=" Answer now."),
    "paper_rft": PromptPreset(cot=_PAPER_COT, direct=_PAPER_DIRECT),
    # Source: RFTvsSFT@7d4f50e LLaMA-Factory/data/*.json: the SFT arm trains on problem and label without a suffix.
    "paper_sft": PromptPreset(cot=_PAPER_COT, direct=""),
    # Ours: one wording a task and one suffix a style for both arms, train and test alike.
    "task": PromptPreset(cot=_PAPER_COT, direct=_PAPER_DIRECT),
}


def user_text(example: Example, style: Style, preset: str) -> str:
    """The user turn: the problem (with its ``<image>`` tags) and the suffix of the style."""
    return user_text_of(problem_of(example, preset), style, preset)


def problem_of(example: Example, preset: str) -> str:
    """The problem in the wording of a preset, without the suffix of a style."""
    return str(example.meta.get("problems", {}).get(preset, example.problem))


def user_text_of(problem: str, style: Style, preset: str) -> str:
    """The user turn of a problem that is no `Example` yet."""
    return problem + getattr(PRESETS[preset], style)


def target_text(example: Example, style: Style) -> str:
    r"""What supervised training teaches: the label, or rationale and boxed label; a model's own response as it stands.

    Raises:
        DataError: The style is ``cot`` and the row has no rationale.
    """
    if example.rationale is not None and (example.rationale_source or "").startswith(ROLLOUTS_OF):
        return example.rationale
    if style == "cot" and example.rationale is None:
        raise DataError(
            f"Row {example.id} has no rationale, which SFT in the cot style needs.",
            "train this task in the direct style or add rationales",
        )
    return target_of(example.answer, example.rationale or "", style)


def target_of(answer: str, rationale: str, style: Style) -> str:
    r"""The form that a style asks for.

    >>> target_of("B", "a star", "cot")
    '<think> a star </think> \\boxed{ B }'
    """
    return answer if style == "direct" else f"<think> {rationale} </think> \\boxed{{ {answer} }}"
