"""Which rows make which step."""

import math
from collections.abc import Sequence
from typing import TypeVar

from cpt_rft.data.example import Example
from cpt_rft.data.parquet import read_split
from cpt_rft.engines.base import Stage
from cpt_rft.methods.replay import replayed
from cpt_rft.seeds import python_random

T = TypeVar("T")


def stage_batches(stage: Stage) -> list[list[Example]]:
    """The rows of each step of a stage: every row once an epoch, in an order that is the same for all methods.

    Rows that are replayed stand after the new ones.
    """
    by_task = dict(zip(stage.tasks, stage.data, strict=True))
    rows = [row for task in sorted(by_task) for row in read_split(by_task[task])]
    epochs = stage.method.epochs_of(stage.tasks)
    new = batches(rows, "+".join(sorted(by_task)), stage.seed, epochs, stage.method.prompts_per_step)
    if stage.method.replay is None:
        return new
    earlier = {
        task: read_split(path) for before in stage.history for task, path in zip(before.tasks, before.data, strict=True)
    }
    return replayed(new, earlier, stage.method.replay, stage.seed)


def batches(rows: Sequence[T], task: str, seed: int, epochs: int, size: int) -> list[list[T]]:
    """``epochs`` shuffled passes end to end, cut into batches of ``size``; only the last may be smaller."""
    random = python_random("batches", seed, task)
    stream: list[T] = []
    for _ in range(epochs):
        epoch = list(rows)
        random.shuffle(epoch)
        stream += epoch
    return [stream[index * size : (index + 1) * size] for index in range(math.ceil(len(stream) / size))]
