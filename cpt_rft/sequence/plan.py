"""Which chains of stages an experiment asks for, and what each will cost."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from cpt_rft.config.methods import GrpoMethod, MethodConfig, SftMethod
from cpt_rft.config.nearest import nearest
from cpt_rft.config.schema import Experiment
from cpt_rft.errors import ConfigError
from cpt_rft.sequence.sizes import PROMPT_TOKENS, rows_and_tokens

JOINT_STAGE = "multitask"
# Estimates only; nothing depends on them but what `plan` prints and how far a progress bar moves.
LABEL_TOKENS = {"direct": 4, "cot": 24}
RECORD_BYTES = 600
ROW_BYTES = 4096
FISHER_FACTOR = 4  # gradients of single completions, one after the other


@dataclass(frozen=True)
class StagePlan:
    """One stage of a chain.

    Attributes:
        index: Position in the chain, from 1.
        name: The task, or ``multitask`` for a joint method's only stage.
        tasks: Tasks that it trains on.
        directory: Where it is published.
    """

    index: int
    name: str
    tasks: tuple[str, ...]
    directory: Path

    @property
    def partial(self) -> Path:
        """Where it is made before it is published."""
        return self.directory.with_name(f"{self.directory.name}.partial")


@dataclass(frozen=True)
class Chain:
    """One method, order and seed: stage after stage, each from the checkpoint of the one before."""

    experiment: Experiment
    run_dir: Path
    method: MethodConfig
    order_index: int
    seed: int

    @property
    def label(self) -> str:
        """How messages and bars name it."""
        return chain_label(self.method.name, self.order_index, self.seed)

    @property
    def directory(self) -> Path:
        """The directory of its stages."""
        return self.run_dir / self.method.name / f"order{self.order_index}" / f"seed{self.seed}"

    @cached_property
    def stages(self) -> tuple[StagePlan, ...]:
        """Its stages in order."""
        order = self.experiment.all_orders[self.order_index]
        parts = [(JOINT_STAGE, order)] if self.method.joint else [(task, (task,)) for task in order]
        return tuple(
            StagePlan(index, name, tasks, self.directory / f"{index}_{name}")
            for index, (name, tasks) in enumerate(parts, start=1)
        )

    @property
    def source(self) -> "Chain | None":
        """The chain of the same order and seed whose checkpoints write what this one learns from, if there is one."""
        name = self.method.learns_from
        return None if name is None else replace(self, method=self.experiment.methods[name])

    def stage(self, name: str) -> StagePlan:
        """The stage of a task.

        Raises:
            ConfigError: The chain has no such stage.
        """
        names = [stage.name for stage in self.stages]
        _refuse_unknown("task", name, names)
        return self.stages[names.index(name)]


@dataclass(frozen=True)
class Selection:
    """The part of an experiment that a command is about; empty means all."""

    methods: tuple[str, ...] = ()
    orders: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    task: str | None = None

    def chains(self, experiment: Experiment, run_dir: Path) -> tuple[Chain, ...]:
        """The selected chains; a joint method does not depend on the order, so it has order 0 only.

        Raises:
            ConfigError: A selected method, order, seed or task is not in the experiment.
        """
        _refuse_unknown("method", self.methods, list(experiment.methods))
        _refuse_unknown("order", self.orders, list(range(len(experiment.all_orders))))
        _refuse_unknown("seed", self.seeds, list(experiment.seeds))
        if self.task is not None:
            _refuse_unknown("task", self.task, [*experiment.tasks, JOINT_STAGE])
        return tuple(
            Chain(experiment, run_dir, method, order, seed)
            for name, method in experiment.methods.items()
            if name in (self.methods or experiment.methods)
            for order in self.orders or range(len(experiment.all_orders))
            if order == 0 or not method.joint
            for seed in self.seeds or experiment.seeds
        )


def chain_label(method: str, order: int, seed: int) -> str:
    """A short name of a chain; the usual order is not mentioned.

    >>> chain_label("sft", 0, 2), chain_label("grpo", 1, 0)
    ('sft seed2', 'grpo order1 seed0')
    """
    return f"{method} order{order} seed{seed}" if order else f"{method} seed{seed}"


def _refuse_unknown(noun: str, asked: Sequence[object] | str, known: Sequence[object]) -> None:
    for value in (asked,) if isinstance(asked, str) else asked:
        if value not in known:
            near = nearest(str(value), [str(name) for name in known])
            fix = f"use one of {', '.join(map(str, known))}"
            raise ConfigError(f"command line: unknown {noun} {value!r}, the nearest is {near!r}.", fix)


@dataclass(frozen=True)
class Cost:
    """What a stage or an evaluation takes, estimated.

    Attributes:
        rows: Rows trained on or scored.
        steps: Optimizer steps.
        read: Tokens processed in parallel (prompts and targets).
        written: Tokens generated one after the other.
    """

    rows: int
    steps: int
    read: int
    written: int

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.read + self.written

    @property
    def work(self) -> float:
        """Time in arbitrary units, for progress bars: training reads a token three times, generating costs more."""
        return (3.0 if self.steps else 1.0) * self.read + 2.0 * self.written


def training_cost(experiment: Experiment, method: MethodConfig, stage: StagePlan) -> Cost:
    """What training a stage takes; completions count in full length.

    Where rollouts choose the rows first, rows and steps are upper bounds.
    """
    rows, once = rows_and_tokens(experiment.data, stage.tasks, "train", experiment.data.train)
    rounds, tried = _tries(method, rows)
    epochs = method.epochs_of(stage.tasks)
    prompts, read = rows * epochs * rounds, once * epochs * rounds
    steps = math.ceil(rows * epochs / method.prompts_per_step) * rounds
    if method.replay is not None and stage.index > 1:
        extra = steps * method.replay.rows_per_step
        prompts, read = prompts + extra, read + extra * read // prompts
    if isinstance(method, GrpoMethod):
        group = method.group + (method.advantage == "remax") + (method.prefix is not None)
        ordered = rows * method.curriculum.rollouts if method.curriculum else 0
        completions = (prompts * group + ordered) * method.max_new_tokens
        return Cost(rows, steps, read + completions + once * bool(tried), completions + tried)
    return Cost(rows, steps, read + prompts * LABEL_TOKENS[method.style] + once * rounds * bool(tried), tried)


def _tries(method: MethodConfig, rows: int) -> tuple[int, int]:
    """The rounds of a stage, and the tokens of the tries at its rows before it trains; 1 and 0 where all are used."""
    if isinstance(method, SftMethod) and method.rollouts is not None:
        part = method.rollouts
        return part.rounds, rows * part.rounds * part.samples * part.max_new_tokens
    if method.filter is None:
        return 1, 0
    longest = method.max_new_tokens if isinstance(method, GrpoMethod) else method.filter.max_new_tokens
    return 1, rows * method.filter.rollouts * (longest or 0)


def evaluation_cost(experiment: Experiment, *, base: bool = False) -> Cost:
    """What scoring one checkpoint on everything takes; the base model is sampled too."""
    evaluation = experiment.evaluation
    there: int = getattr(experiment.data, evaluation.split)
    names = (*experiment.tasks, *evaluation.general)
    rows, read = rows_and_tokens(experiment.data, names, evaluation.split, min(evaluation.rows or there, there))
    rows, read = rows * len(evaluation.styles), read * len(evaluation.styles)
    written = sum(min(evaluation.max_new_tokens, LABEL_TOKENS[style]) for style in evaluation.styles)
    written = written * rows // len(evaluation.styles) * (1 + evaluation.base_samples * base)
    return Cost(rows, 0, read, written)


def measuring_cost(experiment: Experiment, chain: Chain, stage: StagePlan) -> Cost:
    """What the meters of a stage take."""
    drift, fisher = experiment.evaluation.drift, experiment.evaluation.fisher
    old = len({task for earlier in chain.stages[: stage.index - 1] for task in earlier.tasks})
    length = min(experiment.evaluation.max_new_tokens, LABEL_TOKENS[chain.method.style])
    rows = steps = read = written = 0
    if drift is not None:
        rows += drift.rows * (old + len(stage.tasks))
        sequences = rows * drift.samples
        written += 3 * sequences * length  # base, start and model each write
        read += 7 * (rows * PROMPT_TOKENS + sequences * length)  # and read what they and the others wrote
    if fisher is not None and old:
        answers = fisher.rows * (1 + fisher.group) + fisher.scores
        rows, steps = rows + fisher.rows + fisher.scores, answers
        read += FISHER_FACTOR * answers * (PROMPT_TOKENS + length)
    return Cost(rows, steps, read, written)


def disk_bytes(
    experiment: Experiment, chains: Sequence[Chain], checkpoint_bytes: int, workers: int, work_bytes: int | None = None
) -> int:
    """Peak size of a run directory: every checkpoint is kept; a stage in work holds weights and optimizer besides.

    Args:
        experiment: The study.
        chains: What is to be run.
        checkpoint_bytes: Size of a checkpoint.
        workers: Chains side by side.
        work_bytes: What a stage in work holds; none for four checkpoints, as in the local engine.
    """
    stages = sum(len(chain.stages) for chain in chains)
    left = sum(2 * len(chain.stages) for chain in chains if chain.method.ewc is not None)  # two numbers a weight
    data = experiment.data
    rows = len(experiment.tasks) * (data.train + data.dev + data.test) + len(experiment.evaluation.general) * (
        data.dev + data.test
    )
    records = (stages + 1 + experiment.evaluation.base_samples) * evaluation_cost(experiment).rows * RECORD_BYTES
    in_work = min(workers, len(chains)) * (4 * checkpoint_bytes if work_bytes is None else work_bytes)
    return (stages + left) * checkpoint_bytes + in_work + rows * ROW_BYTES + records


def describe(experiment: Experiment, chains: Sequence[Chain]) -> Iterator[tuple[str, str, str, int, int, int]]:
    """One row a stage for the table of ``plan``: chain, stage, parent, rows, steps, tokens."""
    base = evaluation_cost(experiment, base=True)
    yield "base", "evaluate", "-", base.rows, 0, base.tokens
    scoring = evaluation_cost(experiment).tokens
    for chain in chains:
        parent = "base"
        for stage in chain.stages:
            cost = training_cost(experiment, chain.method, stage)
            tokens = cost.tokens + scoring + measuring_cost(experiment, chain, stage).tokens
            yield chain.label, f"{stage.index}_{stage.name}", parent, cost.rows, cost.steps, tokens
            parent = f"{stage.index}_{stage.name}"
