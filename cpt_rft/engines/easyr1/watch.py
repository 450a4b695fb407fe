"""Follows a run of EasyR1 by what it writes, and checks that it does what it was told."""

import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpt_rft.config.methods import GrpoMethod
from cpt_rft.engines.base import StepLog
from cpt_rft.engines.easyr1.rows import WrittenRows
from cpt_rft.engines.outside import Tail, size_of
from cpt_rft.errors import TrainingError

FRAMEWORK_LOG = "experiment_log.jsonl"
SILENCE_S = 3600
"""A run that has written nothing for so long is taken for hung; the longest silence of a 7B model is its loading."""
_TOTAL = re.compile(r"Total training steps: (\d+)")


class Follower:
    """Turns the framework's log into ours, one rollout after another.

    Args:
        out: The framework's output directory.
        written: The rows that were written for it.
        method: What is trained.
        done: Rollouts of an earlier start that are kept.
    """

    def __init__(self, out: Path, written: WrittenRows, method: GrpoMethod, done: int) -> None:
        self.tail = Tail(out / FRAMEWORK_LOG)
        self.written, self.method = written, method
        self.step = done

    def new_steps(self) -> Iterator[StepLog]:
        """Rollouts that were logged since the last call.

        Raises:
            TrainingError: The framework went on from another step than it was told.
        """
        for line in self.tail.new_lines():
            yield self._step(json.loads(line))

    def _step(self, entry: dict[str, Any]) -> StepLog:
        self.step += 1
        if entry["step"] != self.step:
            raise TrainingError(
                f"EasyR1 is at step {entry['step']}; step {self.step} of {self.written.rollouts} was expected, so it"
                " goes on from something else.",
                "give the same command again; if it stays so, delete the stage's .partial directory",
            )
        return step_log(entry, self.written.rollouts, self.method)


def step_log(entry: dict[str, Any], steps: int, method: GrpoMethod) -> StepLog:
    """One line of the framework's log in our terms; a step is a rollout with all optimizer steps made from it.

    Args:
        entry: The line.
        steps: Rollouts of the stage.
        method: What is trained.
    """
    actor, reward, ours = (entry.get(key, {}) for key in ("actor", "reward", "cpt_rft"))
    length = entry["response_length"]["mean"]
    completions = method.prompts_per_step * method.rollout_steps * method.group
    failed = reward.get("failed", 0.0)
    return StepLog(
        step=entry["step"],
        steps=steps,
        loss=_finite(actor.get("pg_loss")),
        lr=actor["lr"],
        grad_norm=_finite(actor.get("grad_norm")),
        skipped=0,
        seconds=entry["timing_s"]["step"],
        tokens=round(length * completions),
        length=length,
        reward=reward["overall"],
        accuracy=reward["accuracy"],
        format=reward["format"],
        kl=_finite(actor.get("kl_loss", actor.get("kl_penalty"))),
        truncated=reward["truncated"],
        zero_variance=ours.get("zero_variance"),
        entropy=actor.get("entropy_loss"),
        rounded_groups=ours.get("rounded_groups"),
        reward_variance=ours.get("reward_variance"),
        unscored=round(failed * completions) or None,
    )


def _finite(value: float | None) -> float | None:
    """JSON has no infinity and no not-a-number; the framework writes them all the same."""
    return value if value is not None and math.isfinite(value) else None


def check_start(log: str, written: WrittenRows) -> bool:
    """Whether training has begun, and with all the rows.

    Args:
        log: What the framework has printed in this start.
        written: The rows that were written for it.

    Raises:
        TrainingError: It makes another number of rollouts.
    """
    found = _TOTAL.search(log)
    if found is None:
        return False
    if int(found.group(1)) != written.rollouts:
        raise TrainingError(
            f"EasyR1 will make {found.group(1)} rollouts, {written.rollouts} were written: it has dropped rows.",
            "look for its messages about the data in the log",
        )
    return True


class Heartbeat:
    """Notices that a run has stopped writing, as it does when Ray waits for processors that are not there."""

    def __init__(self, *files: Path) -> None:
        self.files = files
        self.seen: tuple[int, ...] = ()
        self.since = time.monotonic()

    def check(self, log: Path, patience_s: float = SILENCE_S) -> None:
        """Look at the sizes of the files.

        Raises:
            TrainingError: None has changed for the time of the patience.
        """
        sizes = tuple(map(size_of, self.files))
        if sizes != self.seen:
            self.seen, self.since = sizes, time.monotonic()
        elif time.monotonic() - self.since > patience_s:
            raise TrainingError(
                f"EasyR1 has written nothing for {patience_s / 60:.0f} minutes, so it was ended.",
                f"see {log}; 'cpt-rft doctor' compares the cluster with what is asked of it; the same command goes on",
            )
