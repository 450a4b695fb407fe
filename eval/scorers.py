"""Scoring a response under a preset by name: the one place where evaluation meets `cpt_rft.scoring`."""

from collections.abc import Sequence

from cpt_rft.config.contracts import Scorer
from cpt_rft.data.example import Kind
from cpt_rft.prompts import Style
from cpt_rft.scoring import Score, score


def score_under(
    scorer: Scorer,
    response: str,
    *,
    answer: str,
    references: Sequence[str],
    kind: Kind,
    style: Style,
    truncated: bool,
) -> Score:
    """The score of a response under a preset."""
    return score(
        response,
        answer=answer,
        references=references,
        kind=kind,
        style=style,
        truncated=truncated,
        preset=scorer,
    )
