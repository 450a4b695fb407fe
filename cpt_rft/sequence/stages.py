"""One stage: train in a work directory, verify, publish by one rename; then score what was published."""

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cpt_rft.checkpoint import verify_checkpoint
from cpt_rft.engines.base import ARTEFACTS_NAME, EarlierStage, Source, Stage, StepLog, get_engine
from cpt_rft.errors import CheckpointError, UserError
from cpt_rft.files import hash_tree, publish_directory, read_json, read_json_lines, sha256_json, write_json_atomic
from cpt_rft.manifest import (
    MANIFEST_NAME,
    Manifest,
    check_checkpoint,
    code_sha256,
    make_provenance,
    read_manifest,
    write_manifest,
)
from cpt_rft.methods.instances import read_kept
from cpt_rft.sequence.history import anew, check_artefacts, check_rows, history_of
from cpt_rft.sequence.lineage import EVALUATION_NAME, evaluation_key
from cpt_rft.sequence.plan import Chain, StagePlan
from cpt_rft.sequence.rundir import Run
from cpt_rft.sequence.source import source_of
from cpt_rft.sequence.tries import try_rows
from eval.harness import evaluate_checkpoint

BEGUN_NAME = "begun.json"


def train_stage(
    run: Run,
    chain: Chain,
    stage: StagePlan,
    identity: dict[str, Any],
    report: Callable[[StepLog], None],
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Train a stage, or go on with it, and publish it.

    Args:
        run: The run directory.
        chain: The chain.
        stage: The stage.
        identity: What decides its weights.
        report: Told every step.
        tick: Told the rows that are tried before training, and how many there are.

    Raises:
        CheckpointError: Its parent is not there or not what was published.
        DataError: Its rows are not those that were prepared.
        TrainingError: Training cannot go on.
    """
    parent, parent_sha256 = parent_of(run, chain, stage)
    history = history_of(run, chain, stage)
    source, source_sha256 = source_of(run, chain, stage, parent, parent_sha256)
    if not _is_ready(stage.partial, identity):
        begun = _begin(stage.partial, identity)
        work = _work(run, chain, stage, identity, parent, history, source)
        if work.method.filter is not None and (work.engine.name != "local" or work.engine.processes == 1):
            try_rows(work, tick)
        get_engine(work.engine).train(work, report)
        verify_checkpoint(stage.partial / "checkpoint")
        provenance = make_provenance(
            stage.partial / "checkpoint",
            artefacts=stage.partial / ARTEFACTS_NAME,
            code=begun["code"],
            started=begun["started"],
            train_seconds=sum(line["seconds"] for line in read_json_lines(stage.partial / "train" / "log.jsonl")),
            parent_sha256=parent_sha256,
            source_sha256=source_sha256,
            kept=read_kept(stage.partial / ARTEFACTS_NAME),
        )
        write_manifest(stage.partial, Manifest(identity, provenance))
    (stage.partial / BEGUN_NAME).unlink(missing_ok=True)
    publish_directory(stage.partial, stage.directory)
    return read_manifest(stage.directory)


def filter_stage(
    run: Run,
    chain: Chain,
    stage: StagePlan,
    identity: dict[str, Any],
    progress: Callable[[int, int], None],
    *,
    keep_text: bool,
) -> None:
    """Make the tries of a stage, or go on with them, and nothing else: `train_stage` then goes on from there.

    Raises:
        CheckpointError: Its parent is not there or not what was published.
        DataError: Its rows are not those that were prepared, or the tries leave none of them.
    """
    parent, parent_sha256 = parent_of(run, chain, stage)
    source, _ = source_of(run, chain, stage, parent, parent_sha256)
    _begin(stage.partial, identity)
    work = _work(run, chain, stage, identity, parent, history_of(run, chain, stage), source)
    try_rows(work, progress, keep_text=keep_text)


def _work(
    run: Run,
    chain: Chain,
    stage: StagePlan,
    identity: dict[str, Any],
    parent: Path,
    history: tuple[EarlierStage, ...],
    source: Source | None,
) -> Stage:
    """The stage as an engine takes it, its rows checked."""
    for task in stage.tasks:
        check_rows(run, task)
    return Stage(
        directory=stage.partial,
        parent=parent,
        base=run.base.directory,
        tasks=stage.tasks,
        data=tuple(run.data.path(task, "train") for task in stage.tasks),
        method=chain.method,
        engine=run.experiment.engine_for(chain.method),
        prompt_preset=run.experiment.data.prompt_preset,
        seed=chain.seed,
        seed_path=tuple(identity["seed_path"]),
        history=history,
        source=None if chain.method.knows_its_rows else source,
    )


def evaluate_stage(
    run: Run,
    judges: Mapping[str, Path],
    out: Path,
    weights: str,
    progress: Callable[[int, int, str], None],
    *,
    samples: int = 0,
) -> None:
    """Score a stage on every task and general ability, and note that the records are complete.

    Args:
        run: The run directory.
        judges: The checkpoint that answers, by task and general ability; their files were checked.
        out: Directory of the records.
        weights: Hash of all that answer.
        progress: Told rows done, rows in all and what is being answered.
        samples: Answers a row at temperature 1 besides the greedy one.
    """
    experiment = run.experiment
    config = experiment.evaluation
    key = evaluation_key(run, weights)
    # Records of other weights would be taken for these.
    if read_json(out / EVALUATION_NAME).get("key", key) != key:
        shutil.rmtree(out)
    out.mkdir(exist_ok=True)
    write_json_atomic(out / EVALUATION_NAME, {"key": key, "files": None})
    finished = 0
    for checkpoint in dict.fromkeys(judges.values()):
        names = [name for name, judge in judges.items() if judge == checkpoint]

        def part(done: int, total: int, what: str, before: int = finished, share: int = len(names)) -> None:
            progress(before * total + share * done, len(judges) * total, what)

        evaluate_checkpoint(
            checkpoint,
            {name: run.data.path(name, config.split) for name in names},
            out,
            config,
            experiment.data.prompt_preset,
            samples=samples,
            device=experiment.engine.device,
            progress=part,
        )
        finished += len(names)
    files = {name: list(record) for name, record in hash_tree(out).items() if name != EVALUATION_NAME}
    write_json_atomic(out / EVALUATION_NAME, {"key": key, "files": files})


def parent_of(run: Run, chain: Chain, stage: StagePlan) -> tuple[Path, str]:
    """The checkpoint to start from and its hash, every byte checked."""
    if stage.index == 1 or chain.method.adapter_per_task:
        run.base.check(full=True)
        return run.base.directory, run.base.sha256
    before = chain.stages[stage.index - 2]
    if not before.directory.is_dir():
        raise CheckpointError(f"The parent stage {before.directory} is not there.", f"train {before.name} first")
    manifest = read_manifest(before.directory)
    check_checkpoint(before.directory / "checkpoint", manifest.files, full=True, fix=anew(before))
    return before.directory / "checkpoint", manifest.checkpoint_sha256


def _begin(partial: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Make or take up a work directory; one of another identity is of no use to anyone and goes."""
    begun = read_json(partial / BEGUN_NAME)
    if partial.exists() and begun.get("identity_sha256") != sha256_json(identity):
        shutil.rmtree(partial)
    if not partial.exists():
        partial.mkdir(parents=True)
        begun = {"identity_sha256": sha256_json(identity), "code": code_sha256(), "started": time.time()}
        write_json_atomic(partial / BEGUN_NAME, begun)
    return begun


def _is_ready(partial: Path, identity: dict[str, Any]) -> bool:
    """Whether a killed process had come as far as the manifest, so that only the rename is left."""
    if not (partial / MANIFEST_NAME).exists():
        return False
    try:
        manifest = read_manifest(partial)
        check_checkpoint(partial / "checkpoint", manifest.files, full=True, fix="")
        check_artefacts(partial, manifest, full=True, fix="")
    except UserError:
        return False
    return manifest.identity == identity
