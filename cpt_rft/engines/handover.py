"""From a framework's output to a checkpoint that every consumer loads: its weights, the parent's other files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from cpt_rft.checkpoint import fresh_directory, is_weight_file, verify_weights
from cpt_rft.engines import canary
from cpt_rft.engines.environment import environment_variables
from cpt_rft.errors import CheckpointError
from cpt_rft.files import read_json, write_json_atomic
from cpt_rft.vision import NEW_FILE, OLD_FILE, VisionSpec

CANARY_ROWS = 32


def start_checkpoint(parent: Path, spec: VisionSpec, directory: Path) -> Path:
    """The checkpoint to train from: the parent, or where its pixel budget is another one, the parent with that budget.

    Weights are linked, not copied; both forms of the image processor's files state the budget.
    """
    if VisionSpec.read(parent) == spec:
        return parent
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for path in sorted(parent.iterdir()):
        if is_weight_file(path):
            (directory / path.name).symlink_to(path.resolve())
        elif path.is_file():
            shutil.copyfile(path, directory / path.name)
    size = {"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels}
    for name in (OLD_FILE, NEW_FILE):
        content = read_json(directory / name)
        section = content if name == OLD_FILE else content.get("image_processor")
        if section:
            section |= {"size": size}
            limits = {"min_pixels": spec.min_pixels, "max_pixels": spec.max_pixels}
            section |= {key: value for key, value in limits.items() if section.get(key) is not None}
            write_json_atomic(directory / name, content)
    if VisionSpec.read(directory) != spec:
        raise CheckpointError(f"The pixel budget of {parent} could not be changed.", "change its processor files")
    return directory


def assemble(out: Path, start: Path, checkpoint: Path) -> None:
    """Make the checkpoint: weights from the framework, every other file from where training began, byte for byte.

    Raises:
        CheckpointError: A shard is missing or truncated, a weight is missing, unknown or misshapen, or a shard is left
            over from another run.
    """
    shutil.rmtree(checkpoint, ignore_errors=True)  # left by a process that was killed at this very point
    with fresh_directory(checkpoint) as partial:
        for path in sorted(start.iterdir()):
            if path.is_file() and not is_weight_file(path):
                shutil.copyfile(path, partial / path.name)
        for path in sorted(out.iterdir()):
            if path.name.startswith("model") and is_weight_file(path):
                os.link(path, partial / path.name)
        verify_weights(partial)
        index = partial / "model.safetensors.index.json"
        named = set(read_json(index).get("weight_map", {}).values()) or {"model.safetensors"}
        surplus = sorted({path.name for path in partial.glob("*.safetensors")} - named)
        if surplus:
            raise CheckpointError(f"{out / surplus[0]} belongs to no index.", "give the same command again")


def sing(framework: str, environment: Path, checkpoint: Path, prompts: Path, directory: Path) -> None:
    """Ask the checkpoint a few rows in the framework's environment and in this one.

    Args:
        framework: Name of the framework.
        environment: Its environment.
        checkpoint: Who is asked.
        prompts: A list of {"user", "images"} with picture files beside it.
        directory: Gets the answers and what was printed.

    Raises:
        CheckpointError: It does not load, or the two do not agree.
    """
    answers = {}
    running = []
    for name, python in (("framework", environment / "bin" / "python"), ("ours", Path(sys.executable))):
        out = directory / f"canary_{name}.json"
        variables = environment_variables(environment) if name == "framework" else dict(os.environ)
        command = [str(python), "-I", canary.__file__, str(checkpoint), str(prompts), str(out)]
        with (directory / f"canary_{name}.log").open("wb") as output:
            running.append((name, out, subprocess.Popen(command, env=variables, stdout=output, stderr=output)))
    for name, out, process in running:
        if process.wait():
            lines = (directory / f"canary_{name}.log").read_text(errors="replace").strip().splitlines()
            raise CheckpointError(
                f"{checkpoint} does not answer in the {name} environment ({(lines or ['no message'])[-1]}).",
                f"see {directory / f'canary_{name}.log'}",
            )
        answers[name] = read_json(out)
    problem = canary.difference(answers["framework"], answers["ours"])
    if problem is not None:
        raise CheckpointError(
            f"{checkpoint}: {problem} between {framework}'s environment and this one.",
            "use versions of transformers that agree ('scripts/check_base.sh DIRECTORY' compares them)",
        )
