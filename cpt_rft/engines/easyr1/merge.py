"""From the shards of the framework to one set of weights, by its own script, which is not taken at its word.

With a shard missing the script of this release writes a wrong model and exits with 0.
"""

import subprocess
import zipfile
from pathlib import Path
from typing import Any

from cpt_rft.engines.easyr1.resume import shard_name
from cpt_rft.engines.environment import REPOSITORY, environment_variables
from cpt_rft.errors import CheckpointError
from cpt_rft.files import read_json

SCRIPT = REPOSITORY / "EasyR1" / "scripts" / "model_merger.py"
_MISSED = "Cannot find key"
_ANEW = "give the same command again: the stage goes on from its newest whole checkpoint"


def merge(environment: Path, actor: Path, processes: int, parent: Path, log: Path) -> Path:
    """Merge the shards of a checkpoint; returns the directory of the weights.

    Args:
        environment: The framework's environment.
        actor: The ``actor`` directory of a checkpoint.
        processes: How many shards there must be.
        parent: The checkpoint from which the stage started.
        log: What the script prints is appended to this file.

    Raises:
        CheckpointError: A shard is missing, surplus or cut short, or the script failed, said that it missed a weight,
            or wrote another generation configuration than the parent's.
    """
    check_shards(actor, processes)
    command = [str(environment / "bin" / "python"), str(SCRIPT), "--local_dir", str(actor)]
    variables = {**environment_variables(environment), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(done.stdout + done.stderr)
    missed = next((line for line in done.stdout.splitlines() if _MISSED in line), None)
    if done.returncode or missed:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise CheckpointError(f"{actor} could not be merged ({missed or said[-1]}).", f"{_ANEW}; log: {log}")
    merged = actor / "huggingface"
    check_generation(merged, parent)
    return merged


def check_shards(actor: Path, processes: int) -> None:
    """Refuse anything but the shards of all processes, each whole.

    Raises:
        CheckpointError: It names the first that is not.
    """
    wanted = {shard_name("model", processes, rank) for rank in range(processes)}
    for name in sorted(wanted):
        path = actor / name
        if not zipfile.is_zipfile(path):
            what = "is cut short" if path.exists() else "is not there"
            raise CheckpointError(f"{path} {what}.", _ANEW)
        with zipfile.ZipFile(path) as file:
            saved_as = file.namelist()[0].partition("/")[0]  # torch.save writes the name of the file into it
        if saved_as != path.stem:
            raise CheckpointError(f"{path} was saved as {saved_as}{path.suffix}.", f"rename it back; or {_ANEW}")
    surplus = sorted({path.name for path in actor.glob("model_world_size_*.pt")} - wanted)
    if surplus:
        raise CheckpointError(f"{actor / surplus[0]} is of another number of processes than {processes}.", _ANEW)


def check_generation(merged: Path, parent: Path) -> None:
    """Refuse weights beside another generation configuration than the one that training began with.

    The end tokens stand in it: without them the next task of a chain would mask its responses wrongly. Files may leave
    out what is a default, but no token.

    Raises:
        CheckpointError: They differ.
    """
    one, other = (_generation(directory) for directory in (merged, parent))
    looked_at = {*one, *(key for key in other if key.endswith("token_id"))}
    differ = sorted(key for key in looked_at if one.get(key) != other.get(key))
    if differ:
        raise CheckpointError(
            f"{merged / 'generation_config.json'}: {differ[0]} is {one.get(differ[0])!r}, the parent has"
            f" {other.get(differ[0])!r}.",
            "use the pinned EasyR1: 'bash scripts/setup_easyr1.sh'",
        )


def _generation(directory: Path) -> dict[str, Any]:
    content = read_json(directory / "generation_config.json")
    return {key: value for key, value in content.items() if key not in ("transformers_version", "_from_model_config")}
