"""The rows of a stage as EasyR1 reads them, in the order in which the other engines take them.

Epochs are written out one after the other, each shuffled as in the local engine, and the framework neither shuffles
nor filters. It leaves out a last rollout that is not full: so the rows are filled up from the beginning, and every row
is seen. Pictures are files, each of them once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cpt_rft.checkpoint import VISION_TOKENS
from cpt_rft.config.methods import GrpoMethod
from cpt_rft.data.example import IMAGE_TAG, Example
from cpt_rft.data.export import ground_truth, write_picture
from cpt_rft.data.tokens import PromptCounter
from cpt_rft.engines.base import Stage
from cpt_rft.engines.local.batches import batches
from cpt_rft.engines.pictures import seen_pictures
from cpt_rft.errors import DataError
from cpt_rft.files import atomic_path, write_json_atomic, write_text_atomic
from cpt_rft.prompts import PRESETS, problem_of, user_text
from cpt_rft.vision import VisionSpec

TRAIN, TEMPLATE, CANARY = "train.parquet", "prompt.jinja", "canary.json"
CANARY_ROWS = 32
_SCHEMA = pa.schema([("images", pa.list_(pa.string())), ("problem", pa.string()), ("answer", pa.string())])


@dataclass(frozen=True)
class WrittenRows:
    """What was written.

    Attributes:
        rows: Distinct rows.
        rollouts: Rollouts of the stage: the framework's steps.
        repeated: Rows at the end that fill up the last rollout.
    """

    rows: int
    rollouts: int
    repeated: int


def write_rows(
    stage: Stage, method: GrpoMethod, chosen: Mapping[str, Sequence[Example]], start: Path, spec: VisionSpec, data: Path
) -> WrittenRows:
    """Write the rows, their pictures, the prompt template and the canary's prompts below ``data``.

    Args:
        stage: The stage.
        method: Its method.
        chosen: The rows that it trains on, by task.
        start: Checkpoint whose template and tokenizer count the tokens.
        spec: What the model sees of a picture.
        data: Directory of the data.

    Raises:
        DataError: A prompt is too long, holds a reserved token or has not one tag a picture, or a picture does not
            decode.
    """
    data.mkdir(parents=True, exist_ok=True)
    counter = PromptCounter(start)
    rows = [row for task in sorted(chosen) for row in chosen[task]]
    by_id = {row.id: _record(row, stage, method, counter, spec, data) for row in rows}
    size = method.prompts_per_step * method.rollout_steps
    epochs = method.epochs_of(stage.tasks)
    stream = [
        row.id
        for step in batches(rows, "+".join(sorted(chosen)), stage.seed, epochs, method.prompts_per_step)
        for row in step
    ]
    rollouts = math.ceil(len(stream) / size)
    repeated = rollouts * size - len(stream)
    filled = [stream[place % len(stream)] for place in range(rollouts * size)]
    with atomic_path(data / TRAIN) as path:
        pq.write_table(pa.Table.from_pylist([by_id[name] for name in filled], schema=_SCHEMA), path)
    suffix = getattr(PRESETS[stage.prompt_preset], method.style)
    write_text_atomic(data / TEMPLATE, "{{ content }}" + suffix)
    canaries = [
        {
            "user": user_text(row, method.style, stage.prompt_preset).replace(IMAGE_TAG, ""),
            "images": by_id[row.id]["images"],
        }
        for row in rows[:CANARY_ROWS]
    ]
    write_json_atomic(data / CANARY, [each | {"user": each["user"].replace(IMAGE_TAG, "")} for each in canaries])
    return WrittenRows(len(rows), rollouts, repeated)


def _record(
    row: Example, stage: Stage, method: GrpoMethod, counter: PromptCounter, spec: VisionSpec, data: Path
) -> dict[str, Any]:
    """A row as a record of the file; its pictures are written."""
    problem = problem_of(row, stage.prompt_preset)
    reserved = next((token for token in VISION_TOKENS if token in problem), None)
    if reserved is not None:
        raise DataError(f"Row {row.id}: the text holds the reserved token {reserved}.", "remove it from the text")
    if problem.count(IMAGE_TAG) != len(row.images):
        raise DataError(
            f"Row {row.id}: {problem.count(IMAGE_TAG)} {IMAGE_TAG} tags for {len(row.images)} pictures.", "pair them"
        )
    pictures, tokens = seen_pictures(row, spec)
    prompt = counter(user_text(row, method.style, stage.prompt_preset), tokens)
    limit = method.max_prompt_tokens
    if limit is not None and prompt > limit:
        raise DataError(
            f"Row {row.id}: its prompt has {prompt} tokens, {sum(tokens)} of them for pictures, more than"
            f" max_prompt_tokens = {limit}.",
            "raise the limit, drop the row, or lower engine.max_pixels",
        )
    return {
        "images": [write_picture(picture, data) for picture in pictures],
        "problem": problem,
        "answer": ground_truth(row),
    }
