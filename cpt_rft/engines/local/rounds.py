"""Rounds within a stage: try, learn from what was right, and again from what that made of the model."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cpt_rft.config.methods import MethodConfig
from cpt_rft.engines.base import ARTEFACTS_NAME, Source, Stage, StepLog
from cpt_rft.files import discard_directory, read_json_lines, write_text_atomic
from cpt_rft.methods.instances import KEPT_NAME
from cpt_rft.seeds import derive_seed

Train = Callable[[Stage, Callable[[StepLog], None]], None]
LOG = Path("train") / "log.jsonl"


def rounds_of(method: MethodConfig) -> int:
    """How many rounds a stage of the method has."""
    return method.rollouts.rounds if method.kind == "sft" and method.rollouts is not None else 1


def train_rounds(stage: Stage, report: Callable[[StepLog], None], train: Train) -> None:
    """Train every round that is not done, each as a stage of its own from the checkpoint of the one before.

    The optimizer, the schedule and the order of the rows begin anew in each; its log lines are numbered on.

    Source: Chen et al., "Retaining by Doing", arXiv 2510.18874, Iterative-SFT. Differs from: the optimizer's moments
    are not carried over.
    """
    inner, done = _rounds(stage), 0
    for place, each in enumerate(inner):
        left = len(inner) - place

        def numbered(line: StepLog, before: int = done, left: int = left) -> None:
            report(replace(line, step=before + line.step, steps=before + left * line.steps))

        if not _is_done(each):
            each.directory.mkdir(parents=True, exist_ok=True)
            train(each, numbered)
        done += len(read_json_lines(each.directory / LOG))
    _gather(stage, inner)


def _rounds(stage: Stage) -> list[Stage]:
    rounds = [replace(stage, directory=stage.directory / "round1")]
    for number in range(2, rounds_of(stage.method) + 1):
        parent = rounds[-1].directory / "checkpoint"
        rounds.append(
            replace(
                stage,
                directory=stage.directory / f"round{number}",
                parent=parent,
                seed=derive_seed("round", stage.seed, number),
                seed_path=(*stage.seed_path, "round", number),
                source=Source(parent, f"round {number - 1} of this stage"),
            )
        )
    return rounds


def _is_done(stage: Stage) -> bool:
    """Whether a round has a checkpoint and the list of its rows, which is left last."""
    return (stage.directory / "checkpoint").is_dir() and (stage.directory / ARTEFACTS_NAME / KEPT_NAME).is_file()


def _gather(stage: Stage, rounds: list[Stage]) -> None:
    """Make one stage of its rounds: the last checkpoint, every log line, what each round tried.

    Killed at any point it is repeated, from the first round that is no longer whole.
    """
    lines: list[str] = []
    for each in rounds:
        before = len(lines)
        for line in read_json_lines(each.directory / LOG):
            lines.append(json.dumps(line | {"step": before + line["step"]}))
    for left in ("checkpoint", ARTEFACTS_NAME):
        shutil.rmtree(stage.directory / left, ignore_errors=True)
    for each in rounds:
        shutil.copytree(each.directory / ARTEFACTS_NAME, stage.directory / ARTEFACTS_NAME / each.directory.name)
    (stage.directory / LOG).parent.mkdir(exist_ok=True)
    write_text_atomic(stage.directory / LOG, "".join(f"{line}\n" for line in lines))
    (rounds[-1].directory / "checkpoint").rename(stage.directory / "checkpoint")
    for each in reversed(rounds):
        discard_directory(each.directory)
