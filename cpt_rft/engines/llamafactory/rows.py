"""The rows of a stage as LLaMA-Factory's ShareGPT data, in the order in which the other engines take them.

Epochs are written out one after the other, each shuffled as in the local engine, and the framework is told to keep the
order: so both engines see the same rows in the same step.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt_rft.data.example import IMAGE_TAG, Example
from cpt_rft.data.export import sharegpt_record, write_info
from cpt_rft.data.parquet import stream_split
from cpt_rft.data.tokens import PromptCounter
from cpt_rft.engines.base import Stage
from cpt_rft.engines.local.batches import batches
from cpt_rft.engines.pictures import seen_pictures
from cpt_rft.errors import DataError
from cpt_rft.files import atomic_path, write_json_atomic
from cpt_rft.prompts import target_text, user_text
from cpt_rft.vision import VisionSpec

NAME = "rows"
# What the template writes after the target: <|im_end|> and a newline, both in the loss.
ENDING = "<|im_end|>\n"
CANARY_ROWS = 32


@dataclass(frozen=True)
class WrittenRows:
    """What was written.

    Attributes:
        rows: Distinct rows.
        targets: Tokens in the loss of every row, step by step.
    """

    rows: int
    targets: tuple[tuple[int, ...], ...]

    @property
    def total(self) -> int:
        """Rows in the data file: every row once an epoch."""
        return sum(map(len, self.targets))


@dataclass(frozen=True)
class _Row:
    record: dict[str, Any]
    targets: int


def write_rows(stage: Stage, start: Path, spec: VisionSpec, cutoff: int, target: Path) -> WrittenRows:
    """Write ``dataset_info.json``, the records and the pictures of a stage below ``target``.

    Args:
        stage: The stage.
        start: Checkpoint whose template and tokenizer count the tokens.
        spec: What the model sees of a picture.
        cutoff: Longest row in tokens.
        target: Directory of the data.

    Raises:
        DataError: A row is too long, has no target in the method's style, or a picture does not decode.
    """
    writer = _Writer(stage, PromptCounter(start), spec, cutoff, target)
    by_task = dict(zip(stage.tasks, stage.data, strict=True))
    rows = [writer.row(row) for task in sorted(by_task) for row in stream_split(by_task[task], decode=False)]
    method = stage.method
    steps = batches(rows, "+".join(sorted(by_task)), stage.seed, method.epochs_of(stage.tasks), method.prompts_per_step)
    with atomic_path(target / f"{NAME}.json") as path, path.open("w", encoding="utf-8") as file:
        file.write("[")
        for number, row in enumerate(row for step in steps for row in step):
            file.write(",\n" if number else "\n")
            file.write(json.dumps(row.record, ensure_ascii=False))
        file.write("\n]\n")
    write_info(target, NAME)
    return WrittenRows(len(rows), tuple(tuple(row.targets for row in step) for step in steps))


class _Writer:
    def __init__(self, stage: Stage, counter: PromptCounter, spec: VisionSpec, cutoff: int, target: Path) -> None:
        self.stage, self.counter, self.spec, self.cutoff, self.target = stage, counter, spec, cutoff, target
        target.mkdir(parents=True, exist_ok=True)

    def row(self, row: Example) -> _Row:
        """Write the pictures of a row; return its record and the tokens of its target."""
        style, preset = self.stage.method.style, self.stage.prompt_preset
        pictures, tokens = seen_pictures(row, self.spec)
        text = user_text(row, style, preset)
        prompt = self.counter(text, tokens)
        targets = self.counter.tokens(target_text(row, style) + ENDING)
        # At the limit itself the framework would stop before the target.
        if prompt + targets >= self.cutoff:
            raise DataError(
                f"Row {row.id} has {prompt + targets} tokens, {sum(tokens)} of them for pictures, and would be cut at"
                f" engine.cutoff_len = {self.cutoff}.",
                "raise engine.cutoff_len above that or lower engine.max_pixels",
            )
        return _Row(sharegpt_record(row, pictures, self.target, preset, style), targets)


def canary_prompts(data: Path) -> Path:
    """Write the first rows as a canary is asked them, beside the pictures; returns the file."""
    rows = json.loads((data / f"{NAME}.json").read_text(encoding="utf-8"))[:CANARY_ROWS]
    asked = [{"user": row["messages"][0]["content"].replace(IMAGE_TAG, ""), "images": row["images"]} for row in rows]
    write_json_atomic(data / "canary.json", asked)
    return data / "canary.json"


def step_tokens(targets: Sequence[int]) -> tuple[int, float]:
    """Tokens in the loss of a step, and their mean a row."""
    return sum(targets), sum(targets) / len(targets)
