"""POPE over all its rows: accuracy, precision, recall, F1 and the share of yes among the answers.

Source: EvolvingLMMs-Lab/lmms-eval@75571cfe lmms_eval/tasks/pope/utils.py ``pope_aggregate_*``;
open-compass/VLMEvalKit@e8e78f05 vlmeval/dataset/utils/yorn.py ``POPE_rating``.
Differs from: (1) the answer is read by `yes_no.word`, where lmms-eval wants the bare word; (2) an answer that is
neither word misses an object that is there, as in VLMEvalKit, where the recall of lmms-eval leaves it out; (3) the
share of yes is that of the model's answers, where ``pope_yes_ratio`` of lmms-eval counts the ground truth, a constant.
"""

from collections.abc import Iterable
from typing import NamedTuple

from cpt_rft.scoring import yes_no
from cpt_rft.scoring.extract import without_wrappers


class Pope(NamedTuple):
    """Rates between 0 and 1; a rate without rows to count is 0."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_share: float


def prediction(response: str) -> str | None:
    """What a response says: ``yes``, ``no`` or neither.

    >>> prediction("<answer>Yes.</answer>")
    'yes'
    """
    return yes_no.word(without_wrappers(response))


def aggregate(pairs: Iterable[tuple[str | None, str]]) -> Pope:
    """The rates of (prediction, label) pairs, labels ``yes`` or ``no``.

    >>> aggregate([("yes", "yes"), ("yes", "no"), (None, "yes")]).recall
    0.5
    """
    rows = list(pairs)
    said_yes = sum(given == "yes" for given, _ in rows)
    truly_yes = sum(label == "yes" for _, label in rows)
    hits = sum(given == label == "yes" for given, label in rows)
    precision, recall = _share(hits, said_yes), _share(hits, truly_yes)
    return Pope(
        accuracy=_share(sum(given == label for given, label in rows), len(rows)),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if hits else 0.0,
        yes_share=_share(said_yes, len(rows)),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
