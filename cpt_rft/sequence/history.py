"""What a stage may know of the stages before it: their rows and what they left, checked at every hand-over."""

from collections.abc import Mapping
from pathlib import Path

from cpt_rft.data.parquet import read_split, rows_hash
from cpt_rft.engines.base import ARTEFACTS_NAME, EarlierStage
from cpt_rft.errors import DataError
from cpt_rft.files import FileRecord, sha256_json
from cpt_rft.manifest import Manifest, check_checkpoint, read_manifest
from cpt_rft.sequence.plan import Chain, StagePlan
from cpt_rft.sequence.rundir import Run


def history_of(run: Run, chain: Chain, stage: StagePlan) -> tuple[EarlierStage, ...]:
    """The stages before one, in order; every byte of what they left is checked, and their rows if they are replayed.

    Raises:
        CheckpointError: Something that an earlier stage left is missing or was changed.
        DataError: Rows to replay are not those that were prepared.
    """
    history = []
    for earlier in chain.stages[: stage.index - 1]:
        check_artefacts(earlier.directory, read_manifest(earlier.directory), full=True, fix=anew(earlier))
        if chain.method.replay is not None:
            for task in earlier.tasks:
                check_rows(run, task)
        data = tuple(run.data.path(task, "train") for task in earlier.tasks)
        history.append(EarlierStage(earlier.tasks, data, earlier.directory / ARTEFACTS_NAME))
    return tuple(history)


def judged_weights(chain: Chain, learned: Mapping[str, str], own: str) -> str:
    """A hash of all weights that answer when a stage is scored.

    Args:
        chain: The chain.
        learned: Hash of the checkpoint of each stage so far, by its name.
        own: Hash of the stage's own checkpoint.
    """
    return sha256_json(dict(learned)) if chain.method.adapter_per_task else own


def judges_of(run: Run, chain: Chain, stage: StagePlan) -> tuple[dict[str, Path], str]:
    """Which checkpoint answers which task when a stage is scored, and the hash of all of them, every byte checked.

    With an adapter a task the one of the task answers, and the base where there is none: whoever is asked is told
    which task the question is from. Else the stage's own checkpoint answers everything.

    Raises:
        CheckpointError: A checkpoint is missing or not what was published.
    """
    names = (*run.experiment.tasks, *run.experiment.evaluation.general)
    asked = chain.stages[: stage.index] if chain.method.adapter_per_task else (stage,)
    learned = {each.name: _checked(each) for each in asked}
    if not chain.method.adapter_per_task:
        return dict.fromkeys(names, stage.directory / "checkpoint"), learned[stage.name]
    run.base.check(full=True)
    places = dict.fromkeys(names, run.base.directory)
    places |= {each.name: each.directory / "checkpoint" for each in asked}
    return places, judged_weights(chain, learned, learned[stage.name])


def _checked(stage: StagePlan) -> str:
    """The hash of a published checkpoint, every byte checked."""
    manifest = read_manifest(stage.directory)
    check_checkpoint(stage.directory / "checkpoint", manifest.files, full=True, fix=anew(stage))
    return manifest.checkpoint_sha256


def artefacts_of(manifest: Manifest) -> dict[str, FileRecord]:
    """What the stage left for later ones beside its checkpoint; most methods leave nothing."""
    return {name: FileRecord(*record) for name, record in manifest.provenance.get(ARTEFACTS_NAME, {}).items()}


def check_artefacts(directory: Path, manifest: Manifest, *, full: bool, fix: str) -> None:
    """Compare what a stage left with its record.

    Raises:
        CheckpointError: A file is missing, truncated, changed (with ``full``) or surplus.
    """
    records = artefacts_of(manifest)
    if records or (directory / ARTEFACTS_NAME).exists():
        check_checkpoint(directory / ARTEFACTS_NAME, records, full=full, fix=fix)


def check_rows(run: Run, task: str) -> None:
    """Compare the training rows of a task with what was prepared.

    Raises:
        DataError: They are others.
    """
    path = run.data.path(task, "train")
    if rows_hash(read_split(path)) != run.data.hashes[f"{task}/train"]:
        fix = f"delete {run.data.directory} and give the same command again; the same rows are drawn"
        raise DataError(f"{path} holds other rows than were prepared.", fix)


def anew(stage: StagePlan) -> str:
    """How to make a stage again."""
    return f"delete {stage.directory} and give the same command again to make the stage anew"
