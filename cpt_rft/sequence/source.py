"""The stage of another method whose rollouts a stage learns from: it must be there, whole, and stay what it was."""

from pathlib import Path

from cpt_rft.engines.base import Source
from cpt_rft.errors import CheckpointError, UserError
from cpt_rft.manifest import Manifest, check_checkpoint, read_manifest
from cpt_rft.sequence.history import anew
from cpt_rft.sequence.plan import Chain, StagePlan
from cpt_rft.sequence.rundir import Run

SOURCE_KEY = "source_sha256"


def source_stage(chain: Chain, stage: StagePlan) -> StagePlan | None:
    """The stage of the same task, order and seed of the method that a chain learns from, if it learns from one."""
    return None if chain.source is None else chain.source.stage(stage.name)


def source_of(run: Run, chain: Chain, stage: StagePlan, parent: Path, parent_sha256: str) -> tuple[Source, str | None]:
    """Who tries the rows of a stage: the checkpoint that it starts from, or that of another method, every byte checked.

    Returns:
        The checkpoint, and its hash if it is another method's.

    Raises:
        CheckpointError: It is not there or not what was published.
    """
    other = source_stage(chain, stage)
    if other is None:
        inside = parent.is_relative_to(run.directory)
        name = parent.parent.relative_to(run.directory).as_posix() if inside else "base"
        return Source(parent, f"{name} {parent_sha256[:12]}"), None
    name = other.directory.relative_to(run.directory).as_posix()
    if not other.directory.is_dir():
        order = f" --order {chain.order_index}" if chain.order_index else ""
        command = f"cpt-rft train EXPERIMENT.yaml {chain.method.learns_from} {other.name} --seed {chain.seed}{order}"
        problem = f"{chain.method.name} learns from {name}, which is not trained yet"
        raise CheckpointError(f"{problem}.", f"'{command}', or run both methods together")
    manifest = read_manifest(other.directory)
    check_checkpoint(other.directory / "checkpoint", manifest.files, full=True, fix=anew(other))
    weights = manifest.checkpoint_sha256
    return Source(other.directory / "checkpoint", f"{name} {weights[:12]}"), weights


def source_changed(chain: Chain, stage: StagePlan, manifest: Manifest) -> bool:
    """Whether a published stage learned from other weights than its source has now, if that is there."""
    other = source_stage(chain, stage)
    if other is None or not other.directory.is_dir():
        return False
    try:
        now = read_manifest(other.directory).checkpoint_sha256
    except UserError:  # its own chain says what is wrong with it
        return False
    return bool(manifest.provenance.get(SOURCE_KEY) != now)
