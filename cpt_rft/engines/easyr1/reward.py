"""The reward that EasyR1 loads by the path of this file: the scorers of evaluation, a batch at a time.

A row is known by its JSON ground truth (`cpt_rft.data.export.ground_truth`). What a model wrote can neither end the
training nor hold it up: mathematics is compared in worker processes with limits, and a response whose scoring fails
for any other reason earns nothing, counts in ``failed`` and stands in the records with its error.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt_rft.prompts import Style
from cpt_rft.scoring import Score, reward, score

REWARD_NAME = "cpt-rft"
REWARD_TYPE = "batch"
_NOTHING = Score(0.0, 0.0, 0.0, None, "undecodable")


@dataclass
class _Records:
    """Where the records of this process go, and how many batches they hold."""

    calls: int = field(default=0)

    def append(self, path: Path, lines: Sequence[dict[str, Any]]) -> None:
        """One write a batch, so that a killed process leaves no more than a last line without its end."""
        self.calls += 1
        text = "".join(json.dumps({"call": self.calls, **line}, ensure_ascii=True) + "\n" for line in lines)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, text.encode("ascii"))
        finally:
            os.close(descriptor)


_RECORDS = _Records()


def compute_score(
    reward_inputs: Sequence[Mapping[str, Any]],
    *,
    style: Style,
    longest: int,
    preset: str = "official",
    records: str | None = None,
) -> list[dict[str, float]]:
    """Rewards of a batch of responses, in their order.

    Source: the calling convention of EasyR1@b44b311 verl/workers/reward/function.py.

    Args:
        reward_inputs: One {"response", "response_length", "ground_truth"} each.
        style: The form that the prompts asked for.
        longest: Most tokens of a response; one that has as many counts as truncated.
        preset: Whose rules apply.
        records: File to which one JSON line a response is appended; none for no records.

    Returns:
        The same keys for every response, all of them numbers; ``overall`` is the reward.
    """
    graded = [_graded(entry, style, longest, preset) for entry in reward_inputs]
    if records is not None:
        _RECORDS.append(Path(records), [record for _, record in graded])
    return [numbers for numbers, _ in graded]


def _graded(
    entry: Mapping[str, Any], style: Style, longest: int, preset: str
) -> tuple[dict[str, float], dict[str, Any]]:
    """The numbers of one response, and its record."""
    response, length = str(entry["response"]), int(entry["response_length"])
    record: dict[str, Any] = {"response": response, "length": length}
    failed = False
    try:
        row = json.loads(entry["ground_truth"])
        record |= {"id": row["id"], "task": row["task"]}
        result = score(
            response,
            answer=row["answer"],
            references=row["references"],
            kind=row["kind"],
            style=style,
            truncated=length >= longest,
            options=row.get("options", ()),
            preset=preset,
        )
    except Exception as error:
        # Anything that is raised here would end a training of days.
        result, failed = _NOTHING, True
        record["error"] = f"{type(error).__name__}: {error}"
    numbers = {
        "overall": reward(result, style),
        "accuracy": result.strict,
        "format": result.format,
        "lenient": result.lenient,
        "truncated": float(result.status == "truncated"),
        "no_answer": float(result.status == "no_answer"),
        "failed": float(failed),
    }
    return numbers, {**record, **numbers, "status": result.status, "extracted": result.extracted}
