"""What one worker does: check and resolve, score the base model, or take a chain from stage to stage."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cpt_rft.config.load import dump
from cpt_rft.config.schema import Experiment
from cpt_rft.engines.base import StepLog
from cpt_rft.errors import CheckpointError, ConfigError
from cpt_rft.manifest import check_checkpoint
from cpt_rft.sequence.history import anew, judges_of
from cpt_rft.sequence.lineage import StageState, first_problem, survey
from cpt_rft.sequence.plan import (
    Chain,
    Cost,
    Selection,
    chain_label,
    evaluation_cost,
    measuring_cost,
    training_cost,
)
from cpt_rft.sequence.rundir import Run, read_run

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """A piece of work for one worker.

    Attributes:
        kind: ``base`` scores the base model, ``chain`` trains and scores a chain.
        method: Method of the chain.
        order: Order of the chain.
        seed: Seed of the chain.
        stages: Names of the stages to do.
        train: Whether to train what is missing.
        evaluate: Whether to score what is not scored.
        measure: Whether to make the measurements that the experiment asks for.
        tries: Whether to make only the tries of a filter: for their counts, or with all texts.
        after: Label of the job that must end before this one starts, if it is to be done at all.
    """

    kind: Literal["base", "chain"]
    method: str = ""
    order: int = 0
    seed: int = 0
    stages: tuple[str, ...] = ()
    train: bool = True
    evaluate: bool = True
    measure: bool = True
    tries: Literal["no", "counts", "texts"] = "no"
    after: str = ""

    @classmethod
    def of(
        cls,
        chain: Chain,
        states: list[StageState],
        *,
        train: bool = True,
        evaluate: bool = True,
        measure: bool = True,
    ) -> "Job":
        """The job of doing some stages of a chain."""
        names = tuple(state.stage.name for state in states)
        after = chain.source.label if train and chain.source is not None else ""
        return cls(
            "chain", chain.method.name, chain.order_index, chain.seed, names, train, evaluate, measure, after=after
        )

    @property
    def label(self) -> str:
        """How messages and bars name it."""
        return "base" if self.kind == "base" else chain_label(self.method, self.order, self.seed)

    def chain(self, run: Run) -> Chain:
        """The chain of the job."""
        selection = Selection(methods=(self.method,), orders=(self.order,), seeds=(self.seed,))
        return selection.chains(run.experiment, run.directory)[0]

    def as_json(self) -> dict[str, Any]:
        """Plain data for the worker's first line."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Job":
        """The inverse of `as_json`."""
        return cls(**{**data, "stages": tuple(data["stages"])})


class Meter:
    """Turns steps and batches into the share of a job that is done, and reports it at a bearable rate."""

    def __init__(self, emit: Emit, parts: list[Cost]) -> None:
        self.emit = emit
        self.total = sum(part.work for part in parts) or 1.0
        self.before = 0.0
        self.last = 0.0

    def at(self, cost: Cost, done: int, total: int, text: str) -> None:
        """Report that ``done`` of ``total`` of a part are done."""
        now = time.monotonic()
        if done == total or now - self.last > 0.2:
            self.last = now
            share = (self.before + cost.work * done / max(total, 1)) / self.total
            self.emit({"event": "progress", "share": share, "text": text})

    def finish(self, cost: Cost, text: str) -> None:
        """A part is done."""
        self.before += cost.work
        self.emit({"event": "part", "share": self.before / self.total, "text": text})


def preflight(experiment: Experiment, base: Path) -> dict[str, Any]:
    """Check the base checkpoint; return each engine's configuration with ``auto`` replaced by what is there.

    Raises:
        ConfigError: Pictures would be scored in other sizes than they are trained in.
        CheckpointError: The base is not whole.
    """
    from cpt_rft.checkpoint import verify_checkpoint
    from cpt_rft.engines.base import resolve_engine
    from cpt_rft.vision import VisionSpec, spec_differences
    from eval.contract import asked_vision

    verify_checkpoint(base)
    scored = asked_vision(base, experiment.evaluation)
    for key, engine in experiment.engines.items():
        trained = VisionSpec.read(base).with_limits(*engine.pixel_limits)
        if trained != scored:
            limits = f"{key}.min_pixels={scored.min_pixels} {key}.max_pixels={scored.max_pixels}"
            raise ConfigError(
                f"{key} trains on pictures of other sizes than are scored:"
                f" {'; '.join(spec_differences(trained, scored))}.",
                "set evaluation.min_pixels and evaluation.max_pixels to what every engine trains on (null: the base's)"
                + (f", or give {limits}" if engine.name != "local" else ""),
            )
    return {key: dump(resolve_engine(engine)) for key, engine in experiment.engines.items()}


def do_job(directory: Path, job: Job, emit: Emit) -> None:
    """Do a job in this process.

    Raises:
        UserError: It cannot be done here and now.
    """
    run = read_run(directory)
    if job.kind == "base":
        _do_base(run, emit)
        return
    chain = job.chain(run)
    states = survey(run, chain)
    problem = first_problem(states)
    if problem is not None:
        raise problem
    _do_chain(run, chain, job, [state for state in states if state.stage.name in job.stages], emit)


def _do_base(run: Run, emit: Emit) -> None:
    from cpt_rft.sequence.stages import evaluate_stage

    cost = evaluation_cost(run.experiment, base=True)
    meter = Meter(emit, [cost])
    run.base.check(full=True)
    evaluate_stage(
        run,
        dict.fromkeys((*run.experiment.tasks, *run.experiment.evaluation.general), run.base.directory),
        run.base_directory / "eval",
        run.base.sha256,
        lambda done, total, what: meter.at(cost, done, total, f"scoring {what}"),
        samples=run.experiment.evaluation.base_samples,
    )
    meter.finish(cost, "scored")


def _do_chain(run: Run, chain: Chain, job: Job, todo: list[StageState], emit: Emit) -> None:
    from cpt_rft.sequence.measure import measure_stage
    from cpt_rft.sequence.stages import evaluate_stage, train_stage

    if job.tries != "no":
        _do_tries(run, chain, job, todo, emit)
        return
    training = {state.stage.name: training_cost(run.experiment, chain.method, state.stage) for state in todo}
    scoring = evaluation_cost(run.experiment)
    parts = [training[state.stage.name] for state in todo if job.train and state.manifest is None]
    parts += [scoring for state in todo if job.evaluate and not state.evaluated]
    measuring = {state.stage.name: measuring_cost(run.experiment, chain, state.stage) for state in todo}
    parts += [measuring[state.stage.name] for state in todo if job.measure and not state.measured]
    meter = Meter(emit, parts)
    for state in todo:
        stage, manifest = state.stage, state.manifest
        where = f"{stage.index}/{len(chain.stages)} {stage.name}"
        if manifest is None and job.train:
            cost = training[stage.name]

            def report(line: StepLog, cost: Cost = cost, where: str = where) -> None:
                meter.at(cost, line.step, line.steps, f"{where} step {line.step}/{line.steps} {_gist(line)}")

            def tick(done: int, total: int, cost: Cost = cost, where: str = where) -> None:
                meter.at(cost, 0, 1, f"{where} trying row {done}/{total}")

            manifest = train_stage(run, chain, stage, state.identity, report, tick)
            meter.finish(cost, f"{where} trained")
        if job.evaluate and not state.evaluated:
            if manifest is None:
                raise CheckpointError(f"{stage.directory} is not there.", f"train {stage.name} first")
            judges, weights = judges_of(run, chain, stage)

            def progress(done: int, total: int, what: str, where: str = where) -> None:
                meter.at(scoring, done, total, f"{where} scoring {what}")

            evaluate_stage(run, judges, stage.directory / "eval", weights, progress)
            meter.finish(scoring, f"{where} scored")
        if job.measure and not state.measured and manifest is not None and measuring[stage.name].rows:
            cost = measuring[stage.name]
            check_checkpoint(stage.directory / "checkpoint", manifest.files, full=True, fix=anew(stage))

            def measured(done: int, total: int, what: str, cost: Cost = cost, where: str = where) -> None:
                meter.at(cost, done, total, f"{where} measuring {what}")

            measure_stage(run, chain, stage, manifest, measured)
            meter.finish(cost, f"{where} measured")


def _do_tries(run: Run, chain: Chain, job: Job, todo: list[StageState], emit: Emit) -> None:
    from cpt_rft.sequence.stages import filter_stage

    for state in todo:
        cost = training_cost(run.experiment, chain.method, state.stage)
        meter = Meter(emit, [cost])

        def tick(done: int, total: int, cost: Cost = cost, meter: Meter = meter) -> None:
            meter.at(cost, done, total, f"trying row {done}/{total}")

        filter_stage(run, chain, state.stage, state.identity, tick, keep_text=job.tries == "texts")
        meter.finish(cost, "tried")


def _gist(line: StepLog) -> str:
    """How a step went, the most telling first, since a narrow terminal cuts the end."""
    parts = {"reward": (line.reward, ".2f"), "loss": (line.loss if line.reward is None else None, ".3f")}
    parts |= {"accuracy": (line.accuracy, ".2f"), "KL": (line.kl, ".3f"), "length": (line.length, ".0f")}
    words = [f"{name} {value:{form}}" for name, (value, form) in parts.items() if value is not None]
    if line.loss is None and line.reward is None:
        words.insert(0, "skipped")
    if line.seconds > 0:
        words.append(f"{line.tokens / line.seconds:,.0f} tokens/s")
    return ", ".join(words)
