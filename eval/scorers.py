"""Scoring a response under a preset by name: the one place where evaluation meets `cpt_rft.scoring`."""

from cpt_rft.config.contracts import Scorer
from cpt_rft.data.example import Example
from cpt_rft.prompts import Style
from cpt_rft.scoring import Score, score
from eval.records import Record


def score_under(scorer: Scorer, response: str, row: Example | Record, *, style: Style, truncated: bool) -> Score:
    """The score of a response under a preset; a record holds all that the row of the data says about it."""
    return score(
        response,
        answer=row.answer,
        references=row.references,
        kind=row.kind,
        style=style,
        truncated=truncated,
        options=row.options,
        preset=scorer,
    )
