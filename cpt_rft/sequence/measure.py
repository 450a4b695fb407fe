"""The meters of forgetting along a chain: which measurements a stage has, which are missing, and making them."""

from collections.abc import Callable
from pathlib import Path

from cpt_rft.data.example import Split
from cpt_rft.data.parquet import read_split, rows_hash
from cpt_rft.errors import ConfigError, DataError
from cpt_rft.manifest import Manifest
from cpt_rft.sequence.plan import Chain, StagePlan
from cpt_rft.sequence.rundir import Run
from eval.meters import METERS, Asking, Json, drift_path, drift_terms, finished, fisher_path, fisher_terms


def asking(run: Run, chain: Chain) -> Asking:
    """How a chain's models are asked: in the style that they are trained in."""
    config = run.experiment.evaluation
    samples = config.drift.samples if config.drift else 1
    return Asking(
        style=chain.method.style,
        preset=run.experiment.data.prompt_preset,
        max_new_tokens=config.max_new_tokens,
        dtype=config.dtype,
        batch=max(1, config.batch_size // samples),
        device=run.experiment.engine.device,
    )


def learned(chain: Chain, stage: StagePlan) -> tuple[str, ...]:
    """The tasks learned before a stage."""
    return tuple(task for earlier in chain.stages[: stage.index - 1] for task in earlier.tasks)


def wanted(run: Run, chain: Chain, stage: StagePlan, manifest: Manifest) -> dict[Path, Json]:
    """The terms of every measurement that the experiment asks for at a stage, by file."""
    config, terms = run.experiment.evaluation, asking(run, chain)
    directory, old = stage.directory / METERS, learned(chain, stage)
    start, hashes = manifest.provenance["parent_sha256"], run.data.hashes
    found: dict[Path, Json] = {}
    if config.drift:
        models = {"base": run.base.sha256, "start": start, "model": manifest.checkpoint_sha256}
        for task in (*old, *stage.tasks):
            found[drift_path(directory, task)] = drift_terms(task, hashes[f"{task}/dev"], models, config.drift, terms)
    if config.fisher and old:
        new_hashes = {task: hashes[f"{task}/train"] for task in stage.tasks}
        old_hashes = {task: hashes[f"{task}/dev"] for task in old}
        found[fisher_path(directory)] = fisher_terms(new_hashes, old_hashes, start, config.fisher, terms)
    return found


def is_measured(run: Run, chain: Chain, stage: StagePlan, manifest: Manifest) -> bool:
    """Whether nothing that the experiment asks to be measured at a stage is missing."""
    return all(finished(path, terms) is not None for path, terms in wanted(run, chain, stage, manifest).items())


def measure_stage(
    run: Run, chain: Chain, stage: StagePlan, manifest: Manifest, progress: Callable[[int, int, str], None]
) -> None:
    """Make the missing measurements of a published stage, whose own files were checked.

    Raises:
        CheckpointError: The base or the stage's start is missing, or not what it was.
        DataError: The rows are not those that were prepared.
    """
    from cpt_rft.sequence.stages import parent_of
    from eval.asked import Model
    from eval.drift import measure_drift
    from eval.fisher import measure_fisher

    config, terms, old = run.experiment.evaluation, asking(run, chain), learned(chain, stage)
    run.base.check(full=True)
    parent, parent_sha256 = parent_of(run, chain, stage)
    models = {
        "base": Model(run.base.directory, run.base.sha256, terms),
        "start": Model(parent, parent_sha256, terms),
        "model": Model(stage.directory / "checkpoint", manifest.checkpoint_sha256, terms),
    }
    directory, dev = stage.directory / METERS, {task: _rows(run, task, "dev") for task in (*old, *stage.tasks)}
    if config.drift:
        measure_drift(models, dev, directory, config.drift, progress=progress)
    if config.fisher and old:
        train = {task: _rows(run, task, "train") for task in stage.tasks}
        measure_fisher(models["start"], train, {task: dev[task] for task in old}, directory, config.fisher)


def refuse_no_meter(run: Run) -> None:
    """Measuring was asked for, so something must be switched on.

    Raises:
        ConfigError: Nothing is.
    """
    config = run.experiment.evaluation
    if not (config.drift or config.fisher):
        raise ConfigError(
            "evaluation.drift and evaluation.fisher are both off, so there is nothing to measure.",
            "give 'evaluation.drift={rows: 16, samples: 4}' or 'evaluation.fisher={rows: 16, group: 8, scores: 64}'",
        )


def _rows(run: Run, task: str, split: Split) -> tuple[Path, str]:
    """A file of rows and their hash, after checking that they are those that were prepared."""
    path, locked = run.data.path(task, split), run.data.hashes[f"{task}/{split}"]
    if rows_hash(read_split(path)) != locked:
        fix = f"delete {run.data.directory} and give the same command again; the same rows are drawn"
        raise DataError(f"{path} holds other rows than were prepared.", fix)
    return path, locked
