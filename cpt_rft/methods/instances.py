"""Which rows a stage trains on, by how often rollouts got them right."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from cpt_rft.config.methods import MethodConfig
from cpt_rft.config.rollouts import Filter
from cpt_rft.data.example import Example
from cpt_rft.errors import ConfigError, DataError
from cpt_rft.files import read_json, read_json_lines
from cpt_rft.prompts import ROLLOUTS_OF
from cpt_rft.seeds import python_random

KEPT_NAME = "kept.json"
TRIES_NAME = "rollouts.jsonl"  # of the work directory; among the artefacts without its first line


class Tried(NamedTuple):
    """What came of the tries at one row.

    Attributes:
        correct: How many were right.
        response: The text of the first that was right and ended by itself; none if there is none.
    """

    correct: int
    response: str | None = None


def filtered(rows: Sequence[Example], tried: Mapping[str, Tried], settings: Filter, seed: int) -> list[Example]:
    """The rows of one task that a filter leaves, in their order.

    Source: rollout_filter.py at RFTvsSFT@7d4f50e, whose three sets have the size of the smaller of solvable and
    unsolvable. Differs from: the source bounds that size by 7,500 besides; a control here is no larger than what the
    rule keeps, which under ``drop_zero_correct`` is the same; the rule itself keeps every row that it allows.

    Args:
        rows: All rows of the task.
        tried: The tries at each row by its id.
        settings: Rule and control.
        seed: Of the draw of a control; with the same tries every method draws the same rows.
    """
    solvable = [row for row in rows if tried[row.id].correct > 0]
    unsolvable = [row for row in rows if tried[row.id].correct == 0]
    bound = settings.rollouts + (settings.rule == "drop_zero_correct")
    kept = [row for row in solvable if tried[row.id].correct < bound]
    if settings.control is None:
        return kept
    pool = {"solvable": solvable, "unsolvable": unsolvable, "random": list(rows)}[settings.control]
    size = min(len(kept), len(unsolvable))
    task = rows[0].task if rows else ""
    drawn = python_random("instances", seed, task, settings.control).sample(range(len(pool)), size)
    return [pool[place] for place in sorted(drawn)]


def answered(rows: Sequence[Example], tried: Mapping[str, Tried], source: str) -> list[Example]:
    """The rows that have a right response, which takes the place of their rationale.

    Args:
        rows: All rows of the task.
        tried: The tries at each row by its id.
        source: The checkpoint that wrote them.
    """
    responses = [(row, tried[row.id].response) for row in rows]
    return [
        replace(row, rationale=response, rationale_source=f"{ROLLOUTS_OF}{source}")
        for row, response in responses
        if response is not None
    ]


def read_kept(artefacts: Path) -> list[dict[str, Any]]:
    """Who tried and how many rows were kept, a round after the other; empty for a stage that trained on all rows."""
    return [
        {key: value for key, value in read_json(path).items() if key in ("source", "tasks")}
        for path in sorted(artefacts.rglob(KEPT_NAME), key=lambda path: (len(path.parent.name), path.parent.name))
    ]


def has_texts(artefacts: Path) -> bool:
    """Whether the texts of the tries are among what a stage left."""
    return any("texts" in line for line in read_json_lines(artefacts / TRIES_NAME)[:1])


def refuse_nothing(tasks: Sequence[str], kept: Sequence[Example], why: str, fix: str) -> None:
    """A stage must have something to train on.

    Raises:
        DataError: It has not.
    """
    if not kept:
        raise DataError(f"{' + '.join(tasks)}: {why}, so there is nothing to train on.", fix)


def refuse_no_filter(method: MethodConfig) -> None:
    """A method must have a filter to be tried ahead of its training.

    Raises:
        ConfigError: It has not.
    """
    if method.filter is None:
        raise ConfigError(
            f"The method {method.name} has no filter, so it trains on all rows.",
            f"name one that has, or give it one: methods.{method.name}.filter='{{rule: drop_zero_correct}}'",
        )
