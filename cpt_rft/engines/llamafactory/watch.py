"""Follows a run of LLaMA-Factory by what it writes, and checks that it does what it was told."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpt_rft.config.engine import DeepSpeed
from cpt_rft.engines.base import StepLog
from cpt_rft.engines.llamafactory.rows import WrittenRows, step_tokens
from cpt_rft.engines.outside import Tail, size_of
from cpt_rft.errors import TrainingError
from cpt_rft.files import atomic_path, read_json

TRAINER_LOG, TRAINER_STATE = "trainer_log.jsonl", "trainer_state.json"
_STARTED = re.compile(r"Num examples = ([\d,]+).*?Total train batch size [^=]*= ([\d,]+)", re.DOTALL)


class Follower:
    """Turns the framework's log into ours, one step after another.

    Args:
        out: The framework's output directory.
        written: The rows that were written for it.
        done: Steps of an earlier start that are kept.
    """

    def __init__(self, out: Path, written: WrittenRows, done: int) -> None:
        self.tail = Tail(out / TRAINER_LOG, size_of(out / TRAINER_LOG))
        self.written = written
        self.step = done
        self.last = time.monotonic()

    def new_steps(self) -> Iterator[StepLog]:
        """Steps that were logged since the last call.

        Raises:
            TrainingError: The framework went on from another step than it was told.
        """
        for line in self.tail.new_lines():
            entry = json.loads(line)
            if "loss" in entry:  # the last line sums up
                yield self._step(entry)

    def _step(self, entry: dict[str, Any]) -> StepLog:
        self.step += 1
        steps = len(self.written.targets)
        if (entry["current_steps"], entry["total_steps"]) != (self.step, steps):
            raise TrainingError(
                f"LLaMA-Factory is at step {entry['current_steps']} of {entry['total_steps']}; step {self.step} of"
                f" {steps} was expected, so it goes on from something else.",
                "give the same command again; if it stays so, delete the stage's .partial directory",
            )
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        tokens, length = step_tokens(self.written.targets[self.step - 1])
        return StepLog(
            step=self.step,
            steps=steps,
            loss=entry["loss"],
            lr=entry["lr"],
            grad_norm=None,
            skipped=0,
            seconds=seconds,
            tokens=tokens,
            length=length,
        )


def check_start(log: str, written: WrittenRows, step_rows: int) -> bool:
    """Whether training has begun, and with all the rows.

    Args:
        log: What the framework has printed in this start.
        written: The rows that were written for it.
        step_rows: Rows of one step over all processes.

    Raises:
        TrainingError: It dropped rows, trains on other batches, or goes on without the weights that it was given.
    """
    found = _STARTED.search(log)
    if found is None:
        return False
    rows, batch = (int(text.replace(",", "")) for text in found.groups())
    if rows != written.total:
        dropped = [line for line in log.splitlines() if "Dropped " in line]
        raise TrainingError(
            f"LLaMA-Factory trains on {rows} rows, {written.total} were written."
            + (f" It says: {dropped[0][:200]}" if dropped else ""),
            "mend or drop that row in the prepared data; every row must be used or counted",
        )
    if batch != step_rows:
        raise TrainingError(
            f"LLaMA-Factory takes {batch} rows a step instead of {step_rows}: not all processes have joined.",
            "check engine.processes, engine.nodes and, with several nodes, NODE_RANK and MASTER_ADDR",
        )
    if "There were unexpected keys in the checkpoint model loaded" in log:
        raise TrainingError(
            "LLaMA-Factory left out weights of the resume point, which its model calls by other names.",
            "delete the stage's .partial directory and give the same command again: it begins anew",
        )
    return True


def check_zero(log: str, wanted: DeepSpeed) -> None:
    """Whether DeepSpeed shards what it was asked to shard; on some machines its file is ignored without a word.

    Raises:
        TrainingError: It does not.
    """
    there = 3 if "Stage 3 initialize beginning" in log else 2 if "After initializing ZeRO optimizer" in log else 0
    asked = {"none": 0, "zero2": 2}.get(wanted, 3)
    if there != asked:
        found = f"ZeRO stage {there}" if there else "no ZeRO: every process holds the whole model"
        raise TrainingError(
            f"engine.deepspeed is {wanted}, but the framework's log shows {found}.",
            "DeepSpeed needs a GPU a process; without GPUs say engine.deepspeed=none",
        )


def merge_history(log: Path, out: Path, lines: list[StepLog]) -> None:
    """Write ``train/log.jsonl`` anew with what the framework only tells at the end: the norm of each gradient."""
    history = read_json(out / TRAINER_STATE).get("log_history", [])
    norms = {entry["step"]: entry.get("grad_norm") for entry in history if "loss" in entry}
    with atomic_path(log) as partial:
        partial.write_text(
            "".join(replace(line, grad_norm=norms.get(line.step)).line() + "\n" for line in lines), encoding="utf-8"
        )
