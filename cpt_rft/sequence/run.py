"""The verbs that change a run directory: prepare, run, filter, train, evaluate, report."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpt_rft.config.engine import EngineConfig, parse_engine
from cpt_rft.config.load import dump
from cpt_rft.config.schema import Experiment
from cpt_rft.data.prepare import PreparedData, check_prepared, prepare
from cpt_rft.engines.base import ARTEFACTS_NAME, check_environment
from cpt_rft.errors import StageError
from cpt_rft.files import DirectoryLock, discard_directory, explain_os_error, read_json, sha256_json, write_json_atomic
from cpt_rft.manifest import code_sha256
from cpt_rft.methods.instances import KEPT_NAME, has_texts, refuse_no_filter
from cpt_rft.progress import make_display
from cpt_rft.sequence.job import Job
from cpt_rft.sequence.lineage import StageState, first_problem, is_evaluated, survey
from cpt_rft.sequence.measure import refuse_no_meter
from cpt_rft.sequence.plan import Chain, Selection, StagePlan, evaluation_cost, measuring_cost, training_cost
from cpt_rft.sequence.pool import Pool, worker_count
from cpt_rft.sequence.rundir import Run, locked_data, make_directory, make_run
from eval.meters import METERS
from eval.runs import MATCHING_NAME

STAMP_NAME = ".report.json"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Session:
    """An open, locked run directory and the pool that works in it.

    Attributes:
        run: The run directory.
        asked: The experiment as the user gave it; the directory may hold more methods and seeds.
        pool: Starts workers.
        say: Prints a line for the user.
    """

    run: Run
    asked: Experiment
    pool: Pool
    say: Say

    def chains(self, selection: Selection) -> tuple[Chain, ...]:
        """The selected chains of what was asked for."""
        selection.chains(self.asked, self.run.directory)  # names are checked against what was asked for
        narrowed = Selection(
            methods=selection.methods or tuple(self.asked.methods),
            orders=selection.orders or tuple(range(len(self.asked.all_orders))),
            seeds=selection.seeds or self.asked.seeds,
            task=selection.task,
        )
        return narrowed.chains(self.run.experiment, self.run.directory)

    def execute(self, jobs: Sequence[Job]) -> None:
        """Do jobs, the longest first."""
        if not jobs:
            return
        for job in jobs:
            self._check_environment(job)
        work = {job.label: _work(self.run, job) for job in jobs}
        experiment = self.run.experiment
        size = sum(record.size for record in self.run.base.files.values())
        workers = worker_count(self.asked.asked_workers, len(jobs), experiment.cores, size)
        ordered = sorted(jobs, key=lambda job: -work[job.label])
        with make_display(work) as display:
            self.pool.run(ordered, workers, display)

    def _check_environment(self, job: Job) -> None:
        """Refuse to start what could not train when its time comes, after hours of scoring."""
        if job.kind == "chain" and job.train:
            chain = job.chain(self.run)
            if any(stage.name in job.stages and not stage.directory.exists() for stage in chain.stages):
                check_environment(self.run.experiment.engine_for(chain.method))


@contextmanager
def open_session(asked: Experiment, say: Say, *, debug: bool = False) -> Iterator[Session]:
    """Make or open the run directory, lock it, prepare its data.

    Raises:
        UserError: It is in use, cannot be written, was made with another configuration, or lacks base or data.
    """
    directory = Path(asked.output)
    try:
        make_directory(directory)
        with DirectoryLock(directory) as lock:
            pool = Pool(directory, asked.engine.threads, lock.descriptor, debug=debug)

            def preflight(experiment: Experiment, base: Path) -> dict[str, EngineConfig]:
                say(f"checking {base} and this machine")
                order = {"preflight": dump(experiment), "base": str(base)}
                return {key: parse_engine(engine) for key, engine in pool.ask(order).items()}

            run = make_run(directory, asked, preflight, lambda name: say(f"drawing {name}"))
            yield Session(run, asked, pool, say)
    except OSError as error:
        raise explain_os_error(error, directory) or error from error


def prepare_only(asked: Experiment, say: Say) -> PreparedData:
    """Write the rows of an experiment into its run directory and check them; no model is needed.

    Raises:
        UserError: The directory cannot be used, or holds other rows.
    """
    directory = Path(asked.output)
    try:
        make_directory(directory)
        with DirectoryLock(directory):
            locked_data(asked, directory / "data")  # names a damaged lock or a lost file
            data = prepare(
                asked.data,
                asked.tasks,
                asked.evaluation.general,
                directory / "data",
                lambda name: say(f"drawing {name}"),
            )
            check_prepared(data)
            return data
    except OSError as error:
        raise explain_os_error(error, directory) or error from error


def run_experiment(session: Session, selection: Selection, *, rerun_stale: bool = False) -> bool:
    """Do everything that is selected and not done; returns whether anything was left to do.

    Raises:
        UserError: Something that is there cannot be used, or a job failed.
    """
    run = session.run
    jobs = [] if _base_is_scored(run) else [Job("base")]
    for chain in session.chains(selection):
        states = survey(run, chain)
        if rerun_stale:
            _discard_from_first_stale(states, code_sha256(), session.say)
            states = survey(run, chain)
        problem = first_problem(states)
        if problem is not None:
            raise problem
        todo = [state for state in _until(states, selection.task) if state.word != "done"]
        if todo:
            jobs.append(Job.of(chain, todo))
    session.execute(jobs)
    return bool(jobs)


def train_one(session: Session, method: str, task: str, order: int, seed: int) -> StagePlan:
    """Train one stage whose parent is there; a stage that is there is left alone.

    Raises:
        UserError: Its parent is missing, or it cannot be trained.
    """
    chain, state = _find(session, method, task, order, seed)
    if state.manifest is None:
        session.execute([Job.of(chain, [state], evaluate=False, measure=False)])
    return state.stage


def filter_one(
    session: Session, method: str, task: str, order: int, seed: int, *, keep_text: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Try the rows of one stage whose parent is there, and nothing else; what a trained stage left is read.

    Returns:
        The directory of the tries, and what they left: who tried, counts by task, ids.

    Raises:
        UserError: Its method has no filter, its parent is missing, or the texts of a trained stage are asked for.
    """
    chain, state = _find(session, method, task, order, seed)
    refuse_no_filter(chain.method)
    if state.manifest is None:
        job = Job.of(chain, [state], train=False, evaluate=False, measure=False)
        session.execute([replace(job, tries="texts" if keep_text else "counts")])
        return state.stage.partial, read_json(state.stage.partial / KEPT_NAME)
    left = state.stage.directory / ARTEFACTS_NAME
    if keep_text and not has_texts(left):
        raise StageError(
            f"{state.stage.directory} is trained, and the texts of its tries were not kept.",
            f"ask for them before it is trained, or remove {state.stage.directory}",
        )
    return left, read_json(left / KEPT_NAME)


def evaluate_one(session: Session, method: str, task: str, order: int, seed: int) -> StagePlan:
    """Score one stage that is there.

    Raises:
        UserError: It is not there, or cannot be scored.
    """
    chain, state = _find(session, method, task, order, seed)
    if state.manifest is None:
        raise StageError(f"{state.stage.directory} is not trained.", f"cpt-rft train EXPERIMENT.yaml {method} {task}")
    if not state.evaluated:
        session.execute([Job.of(chain, [state], train=False, measure=False)])
    return state.stage


def measure_drift(session: Session, selection: Selection) -> bool:
    """Measure every selected stage that is trained and not measured; returns whether there was anything to do.

    Raises:
        UserError: No meter is on, no selected stage is trained, or something that is there cannot be used.
    """
    refuse_no_meter(session.run)
    jobs, trained = [], 0
    for chain in session.chains(selection):
        states = _until(survey(session.run, chain), selection.task)
        problem = first_problem(states)
        if problem is not None:
            raise problem
        there = [state for state in states if state.manifest is not None]
        trained += len(there)
        if todo := [state for state in there if not state.measured]:
            jobs.append(Job.of(chain, todo, train=False, evaluate=False))
    if not trained:
        raise StageError("No selected stage is trained yet.", "train with 'cpt-rft run EXPERIMENT.yaml' first")
    session.execute(jobs)
    return bool(jobs)


def evaluate_base(session: Session) -> None:
    """Score the base model, unless that is done."""
    if not _base_is_scored(session.run):
        session.execute([Job("base")])


def write_results(session: Session, *, force: bool = False) -> dict[str, Any]:
    """Bring ``results.json`` and ``report.html`` up to date with the records; nothing is done if they are.

    Raises:
        UserError: No chain is complete, or records are broken.
    """
    run = session.run
    stamp = sha256_json(_report_inputs(run))
    paths = [run.directory / "results.json", run.directory / "report.html"]
    whole = all(path.is_file() for path in paths) and read_json(run.directory / STAMP_NAME).get("stamp") == stamp
    if whole and not force:
        return read_json(paths[0])
    from eval import results as builder
    from eval.report import write_report

    results: dict[str, Any] = builder.write_results(run.directory, partial=True)
    write_report(run.directory, results)
    write_json_atomic(run.directory / STAMP_NAME, {"stamp": stamp})
    return results


def _report_inputs(run: Run) -> list[Any]:
    """What a report is made from, by the notes that say that it is complete."""
    notes = sorted(run.directory.glob("*/order*/seed*/*/eval/evaluation.json"))
    meters = sorted(run.directory.glob(f"*/order*/seed*/*/{METERS}/*.json"))
    return [
        *(read_json(path).get("key") for path in meters),
        dump(run.experiment),
        *(read_json(path) for path in [*notes, run.base_directory / "eval" / "evaluation.json"]),
        *(read_json(path) for path in run.directory.glob(MATCHING_NAME)),
    ]


def _find(session: Session, method: str, task: str, order: int, seed: int) -> tuple[Chain, StageState]:
    chain = session.chains(Selection((method,), (order,), (seed,), task))[0]
    stage = chain.stage(task)
    states = survey(session.run, chain)[: stage.index]
    problem = first_problem(states)
    if problem is not None:
        raise problem
    return chain, states[-1]


def _until(states: list[StageState], task: str | None) -> list[StageState]:
    """The stages up to a task; all of a chain that does not have it as a stage of its own."""
    names = [state.stage.name for state in states]
    return states[: names.index(task) + 1] if task in names else states


def _base_is_scored(run: Run) -> bool:
    return is_evaluated(run, run.base_directory / "eval", run.base.sha256)


def _discard_from_first_stale(states: list[StageState], code: str, say: Say) -> None:
    """Remove the first stage that other code made, and all after it, the last first so that no gap can arise."""
    first = next((place for place, state in enumerate(states) if state.is_stale(code)), len(states))
    for state in reversed(states[first:]):
        if state.stage.directory.exists():
            say(f"removing {state.stage.directory} (made by other code, or after a stage that was)")
            discard_directory(state.stage.directory)


def _work(run: Run, job: Job) -> float:
    if job.kind == "base":
        return evaluation_cost(run.experiment, base=True).work
    chain = job.chain(run)
    scoring = evaluation_cost(run.experiment).work * job.evaluate
    stages = [stage for stage in chain.stages if stage.name in job.stages]
    measuring = sum(measuring_cost(run.experiment, chain, stage).work for stage in stages) * job.measure
    training = sum(training_cost(run.experiment, chain.method, stage).work for stage in stages) * (
        job.train or job.tries != "no"
    )
    return scoring * len(stages) + training + measuring
