"""Where every stage of a chain stands: what it should be, what is there, and whether the two agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cpt_rft.config.load import dump
from cpt_rft.errors import StageError, UserError
from cpt_rft.files import FileRecord, read_json, sha256_json, tree_problem
from cpt_rft.manifest import Manifest, check_checkpoint, differences, read_manifest
from cpt_rft.sequence.history import anew, check_artefacts, judged_weights
from cpt_rft.sequence.measure import is_measured
from cpt_rft.sequence.plan import Chain, StagePlan
from cpt_rft.sequence.rundir import Run, without_meters
from cpt_rft.sequence.source import source_changed
from eval.contract import scorer_terms
from eval.records import VERSION

EVALUATION_NAME = "evaluation.json"
Word = Literal["done", "scored", "trained", "in work", "missing", "broken"]


@dataclass(frozen=True)
class StageState:
    """One stage as it should be and as it is.

    Attributes:
        stage: Its place in the plan.
        identity: What it must be.
        manifest: What was published, if anything readable was.
        evaluated: Whether its records are complete.
        measured: Whether every measurement that the experiment asks for is there.
        problem: Why what is there cannot be used, if it cannot.
    """

    stage: StagePlan
    identity: dict[str, Any]
    manifest: Manifest | None = None
    evaluated: bool = False
    measured: bool = False
    problem: UserError | None = None

    @property
    def word(self) -> Word:
        """The state in one or two words."""
        if self.problem is not None:
            return "broken"
        if self.manifest is not None:
            return ("done" if self.measured else "scored") if self.evaluated else "trained"
        return "in work" if self.stage.partial.exists() else "missing"

    def is_stale(self, code: str) -> bool:
        """Whether other code than this made the stage."""
        return self.manifest is not None and self.manifest.provenance["code"] != code


def survey(run: Run, chain: Chain, *, full: bool = False) -> list[StageState]:
    """The state of every stage of a chain, in order.

    Args:
        run: The run directory.
        chain: The chain.
        full: Hash every file; otherwise names and sizes only.
    """
    states = []
    identities = _identities(run, chain)
    learned: dict[str, str] = {}
    parent_weights = run.base.sha256
    for stage in chain.stages:
        state = StageState(stage, identities[stage.name])
        if stage.directory.exists():
            state = _inspect(run, chain, state, parent_weights, learned, full=full)
        states.append(state)
        learned[stage.name] = state.manifest.checkpoint_sha256 if state.manifest else ""
        if not chain.method.adapter_per_task:
            # Where the parent is to be made anew, its weights will be the same: the identity says so.
            parent_weights = learned[stage.name]
    return states


def _identities(run: Run, chain: Chain) -> dict[str, dict[str, Any]]:
    """The identity of every stage of a chain, by its name; it needs nothing that is trained."""
    sources = {} if chain.source is None else _identities(run, chain.source)
    found: dict[str, dict[str, Any]] = {}
    parent = run.base.sha256
    for stage in chain.stages:
        source = sha256_json(sources[stage.name]) if sources else None
        found[stage.name] = stage_identity(run, chain, stage, parent, source)
        parent = sha256_json(found[stage.name])
    return found


def stage_identity(run: Run, chain: Chain, stage: StagePlan, parent: str, source: str | None = None) -> dict[str, Any]:
    """All that decides a stage's weights, as plain JSON.

    Args:
        run: The run directory.
        chain: The chain.
        stage: The stage.
        parent: Hash of the identity of the stage before it, or of the base.
        source: Hash of the identity of the stage of another method that it learns from.
    """
    experiment = run.experiment
    return {
        "format": 1,
        "parent": parent,
        **({} if source is None else {"source": source}),
        "base": run.base.sha256,
        "tasks": [earlier.name for earlier in chain.stages[: stage.index]],
        "data": {task: run.data.hashes[f"{task}/train"] for task in stage.tasks},
        "method": dump(chain.method),
        "engine": experiment.engine_for(chain.method).identity(),
        "prompt_preset": experiment.data.prompt_preset,
        "seed": chain.seed,
        "seed_path": [experiment.name, chain.method.name, chain.seed, stage.name],
    }


def _inspect(
    run: Run, chain: Chain, state: StageState, parent_weights: str, learned: Mapping[str, str], *, full: bool
) -> StageState:
    stage = state.stage
    fix = anew(stage)
    try:
        manifest = read_manifest(stage.directory)
        found = differences(manifest.identity, state.identity)
        if found:
            raise StageError(f"{stage.directory} is another stage: {'; '.join(found[:3])}.", fix)
        if parent_weights and manifest.provenance["parent_sha256"] != parent_weights:
            raise StageError(f"{stage.directory} was trained from other weights than its parent has now.", fix)
        if source_changed(chain, stage, manifest):
            raise StageError(f"{stage.directory} learned from other weights than its source has now.", fix)
        check_checkpoint(stage.directory / "checkpoint", manifest.files, full=full, fix=fix)
        check_artefacts(stage.directory, manifest, full=full, fix=fix)
    except UserError as error:
        return StageState(stage, state.identity, problem=error)
    own = manifest.checkpoint_sha256
    judged = judged_weights(chain, {**learned, stage.name: own}, own)
    evaluated = is_evaluated(run, stage.directory / "eval", judged, full=full)
    return StageState(stage, state.identity, manifest, evaluated, is_measured(run, chain, stage, manifest))


def first_problem(states: Sequence[StageState]) -> UserError | None:
    """The first problem along a chain."""
    return next((state.problem for state in states if state.problem is not None), None)


def evaluation_key(run: Run, weights: str) -> str:
    """A hash of all that decides the records of a checkpoint."""
    experiment = run.experiment
    names = (*experiment.tasks, *experiment.evaluation.general)
    split = experiment.evaluation.split
    return sha256_json(
        {
            "weights": weights,
            "records": VERSION,
            "scorer": scorer_terms(experiment.evaluation.scorer),
            "evaluation": without_meters(dump(experiment.evaluation)),
            "prompt_preset": experiment.data.prompt_preset,
            "data": {name: run.data.hashes[f"{name}/{split}"] for name in names},
        }
    )


def is_evaluated(run: Run, directory: Path, weights: str, *, full: bool = False) -> bool:
    """Whether a directory of records is complete, and of these weights."""
    note = read_json(directory / EVALUATION_NAME)
    if note.get("key") != evaluation_key(run, weights) or not note.get("files"):
        return False
    files = {name: FileRecord(*record) for name, record in note["files"].items()}
    return tree_problem(directory, files, full=full) is None
