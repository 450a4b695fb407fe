"""Is the miniature base model fit for the study? (`cpt-rft audit-base`)

Reinforcement must have something to reinforce, supervision something to teach, and there must be something to
forget. Everything is sampled at temperature 1 on dev, because a model with two equally likely answer forms jumps
between them under greedy decoding.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from cpt_rft.checkpoint import Policy, encode_prompts, load_policy
from cpt_rft.config.load import load_experiment
from cpt_rft.config.schema import Experiment
from cpt_rft.data.example import Example
from cpt_rft.data.parquet import read_split
from cpt_rft.data.prepare import PreparedData, prepare
from cpt_rft.engines.base import Stage, get_engine, resolve_engine
from cpt_rft.engines.local import runtime
from cpt_rft.engines.local.generate import generate
from cpt_rft.errors import CheckpointError
from cpt_rft.prompts import STYLES, Style, user_text
from cpt_rft.scoring import score
from cpt_rft.seeds import derive_seed

SAMPLES = 8
BATCH = 16  # prompts; larger batches leave the processor's caches
STRICT_RANGE = (20.0, 65.0)
SKILL_RANGE = (40.0, 80.0)
MIXED_AT_LEAST = 50.0
GENERAL_SKILL_AT_LEAST = 70.0
GAIN_AT_LEAST = 10.0
TASKS_GAINING = 3


class Cell(NamedTuple):
    """One task in one prompt style, in percent.

    Attributes:
        task: Its name.
        style: The prompt style.
        strict: Sampled strict accuracy.
        skill: Sampled accuracy in any accepted form.
        mixed: Share of prompts with 1 to 7 of 8 samples strictly right, those that reinforcement can learn from.
    """

    task: str
    style: Style
    strict: float
    skill: float
    mixed: float


def measure(policy: Policy, rows: Sequence[Example], style: Style, preset: str, max_new_tokens: int) -> Cell:
    """Sample every row eight times at temperature 1 and score the samples."""
    prompts = encode_prompts(policy, [(row.images, user_text(row, style, preset)) for row in rows])
    seeds = [derive_seed("audit", row.id, style) for row in rows]
    groups = generate(policy, prompts, group=SAMPLES, max_new_tokens=max_new_tokens, temperature=1.0, seeds=seeds)
    strict, skill, mixed = 0.0, 0.0, 0
    for row, group in zip(rows, groups, strict=True):
        scores = [
            score(
                policy.tokenizer.decode(completion.token_ids, skip_special_tokens=True),
                answer=row.answer,
                references=row.references,
                kind=row.kind,
                style=style,
                truncated=completion.finish == "length",
                options=row.options,
            )
            for completion in group
        ]
        right = sum(each.strict for each in scores)
        strict += right
        skill += sum(each.lenient for each in scores)
        mixed += 0 < right < SAMPLES
    count = len(rows)
    return Cell(rows[0].task, style, 100 * strict / count / SAMPLES, 100 * skill / count / SAMPLES, 100 * mixed / count)


def failures(tasks: Sequence[Cell], general: Sequence[Cell], joint: Sequence[Cell]) -> list[str]:
    """What a base model misses, one sentence each; nothing if it is fit.

    Args:
        tasks: The base on the tasks that are learned.
        general: The base on the held-out abilities.
        joint: The multi-task model on the same tasks, cell by cell.
    """
    found = []
    for cell in tasks:
        name = f"{cell.task} ({cell.style})"
        if not STRICT_RANGE[0] <= cell.strict <= STRICT_RANGE[1]:
            found.append(f"{name}: strict accuracy {cell.strict:.1f} is not within {STRICT_RANGE}")
        if not SKILL_RANGE[0] <= cell.skill <= SKILL_RANGE[1]:
            found.append(f"{name}: any-form skill {cell.skill:.1f} is not within {SKILL_RANGE}")
        if cell.mixed < MIXED_AT_LEAST:
            found.append(f"{name}: only {cell.mixed:.1f} % of prompts have 1 to 7 of 8 samples right")
    found += [
        f"{cell.task} ({cell.style}): general skill {cell.skill:.1f} is below {GENERAL_SKILL_AT_LEAST}"
        for cell in general
        if cell.skill < GENERAL_SKILL_AT_LEAST
    ]
    gaining = [name for name, gain in gains(tasks, joint).items() if gain >= GAIN_AT_LEAST]
    if len(gaining) < TASKS_GAINING:
        found.append(
            f"only {len(gaining)} tasks gain {GAIN_AT_LEAST:g} points of any-form skill under multitask training"
        )
    return found


def gains(tasks: Sequence[Cell], joint: Sequence[Cell]) -> dict[str, float]:
    """Points of any-form skill that multitask training adds to each task, in the style it trains."""
    base = {(cell.task, cell.style): cell.skill for cell in tasks}
    return {cell.task: cell.skill - base[cell.task, cell.style] for cell in joint}


def train_joint(experiment: Experiment, data: PreparedData, base: Path, directory: Path) -> Path:
    """Train the experiment's multitask method and give its checkpoint."""
    method = experiment.methods["multitask"]
    stage = Stage(
        directory=directory,
        parent=base,
        base=base,
        tasks=experiment.tasks,
        data=tuple(data.path(task, "train") for task in experiment.tasks),
        method=method,
        engine=resolve_engine(experiment.engine),
        prompt_preset=experiment.data.prompt_preset,
        seed=experiment.seeds[0],
        seed_path=("audit", method.name),
    )
    get_engine(experiment.engine).train(stage, lambda step: None)
    return directory / "checkpoint"


def audit(experiment: Experiment, checkpoint: Path, work: Path) -> tuple[list[Cell], list[Cell], list[Cell]]:
    """Measure the base on tasks and general abilities, and the multi-task model on the tasks."""
    general = experiment.evaluation.general
    data = prepare(experiment.data, experiment.tasks, general, work / "data")
    limit, preset = experiment.evaluation.max_new_tokens, experiment.data.prompt_preset
    rows = {task: read_split(data.path(task, "dev")) for task in (*experiment.tasks, *general)}
    runtime.prepare(experiment.engine)
    base = load_policy(checkpoint)
    tasks = [measure(base, rows[task], style, preset, limit) for task in experiment.tasks for style in STYLES]
    held_out = [measure(base, rows[task], style, preset, limit) for task in general for style in STYLES]
    joint = load_policy(train_joint(experiment, data, checkpoint, work / "multitask"))
    style = experiment.methods["multitask"].style
    return tasks, held_out, [measure(joint, rows[task], style, preset, limit) for task in experiment.tasks]


def show(tasks: Sequence[Cell], general: Sequence[Cell], joint: Sequence[Cell]) -> Table:
    """The audit as a table."""
    table = Table(
        title="Base model, 8 samples a dev row at temperature 1, percent",
        caption="mixed: prompts with 1 to 7 of 8 samples right; gain: any form, by multitask training",
    )
    for column in ("task", "style", "strict", "any form", "mixed", "gain"):
        table.add_column(column, justify="left" if column in ("task", "style") else "right")
    gained = {(cell.task, cell.style): gain for cell, gain in zip(joint, gains(tasks, joint).values(), strict=True)}
    for cell in (*tasks, *general):
        gain = gained.get((cell.task, cell.style))
        numbers = (f"{value:.1f}" for value in (cell.strict, cell.skill, cell.mixed))
        table.add_row(cell.task, cell.style, *numbers, "" if gain is None else f"{gain:+.1f}")
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``cpt-rft audit-base``."""
    parser.add_argument("checkpoint", type=Path, nargs="?", help="the base model (default: the experiment's)")
    parser.add_argument("--experiment", type=Path, default=Path("configs/experiments/miniature.yaml"))


def main(arguments: argparse.Namespace) -> None:
    """Run ``cpt-rft audit-base``.

    Raises:
        CheckpointError: The base is not fit; every reason was printed.
    """
    experiment = load_experiment(arguments.experiment)
    checkpoint = arguments.checkpoint or Path(experiment.base_model)
    with tempfile.TemporaryDirectory() as work:
        tasks, general, joint = audit(experiment, checkpoint, Path(work))
    console = Console()
    console.print(show(tasks, general, joint))
    found = failures(tasks, general, joint)
    for sentence in found:
        console.print(f"- {sentence}")
    if found:
        raise CheckpointError(
            f"{checkpoint} is not fit for the study ({len(found)} findings above).",
            "change configs/miniature_pretrain.yaml and pretrain again",
        )
    console.print("The base model is fit for the study.")
