"""Where a stage that was stopped goes on: the newest checkpoint of the framework that is whole, and nothing else.

The framework would take the newest one, whole or not, and without being asked; so it is always told.
"""

import json
import shutil
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cpt_rft.checkpoint import memory_name, verify_weights
from cpt_rft.engines.base import StepLog
from cpt_rft.engines.llamafactory.rows import WrittenRows
from cpt_rft.engines.llamafactory.watch import TRAINER_LOG, TRAINER_STATE, Follower
from cpt_rft.errors import CheckpointError
from cpt_rft.files import atomic_path, read_json, sha256_json, write_json_atomic

NOTE, ADAPTER = "told.json", "adapter_model.safetensors"


def open_out(out: Path, keys: Mapping[str, Any], processes: int, *, lora: bool) -> int:
    """Clear the output directory of all that does not belong to this stage as it is told now.

    Args:
        out: The framework's output directory.
        keys: All that decides what is trained; another one makes what is there useless.
        processes: Each leaves a file in a checkpoint.
        lora: Checkpoints hold adapters.

    Returns:
        The step of the one checkpoint that is left, 0 for none.
    """
    told = {"sha256": sha256_json(dict(keys))}
    note = out.with_name(NOTE)
    if read_json(note) != told:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(exist_ok=True)
    with atomic_path(note) as partial:
        partial.write_text(json.dumps(told), encoding="utf-8")
    steps = {int(path.name.rpartition("-")[2]): path for path in out.glob("checkpoint-*")}
    whole = [step for step, path in steps.items() if is_whole(path, step, processes, lora=lora)]
    step = max(whole, default=0)
    for path in sorted(out.iterdir()):
        if path != steps.get(step) and path.name != TRAINER_LOG:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _cut(out / TRAINER_LOG, step)
    return step


def is_whole(directory: Path, step: int, processes: int, *, lora: bool) -> bool:
    """Whether training can go on from a checkpoint: every file that it reads is there, and none is cut short."""
    state = read_json(directory / TRAINER_STATE)  # written last by the first process
    if state.get("global_step") != step:
        return False
    noise = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    sharded = directory / f"global_step{step}"
    binary = [directory / name for name in noise]
    if sharded.is_dir():
        binary += sorted(sharded.glob("*.pt"))
        if sum(path.name.endswith("_optim_states.pt") for path in binary) != processes:
            return False
    else:
        binary += [directory / "optimizer.pt", directory / "scheduler.pt"]
    if not all(zipfile.is_zipfile(path) for path in binary):
        return False
    try:
        if lora:
            with safe_open(directory / ADAPTER, framework="pt"):
                return True
        verify_weights(directory)
    except (CheckpointError, SafetensorError, OSError):
        return False
    return True


def make_loadable(directory: Path) -> None:
    """Give the weights of a resume point the names that they have in memory.

    The framework's trainer saves them under the released names, but when it goes on it looks for the others, and only
    warns of what it does not find: the decoder would be the parent's again. DeepSpeed and adapters keep files of their
    own, which it finds. A start that was stopped in here is taken up by the next one.
    Source: https://github.com/huggingface/transformers/issues/43701
    """
    for path in sorted(directory.glob("model*.safetensors")):
        _rename_weights(path)
    index = directory / "model.safetensors.index.json"
    if content := read_json(index):
        content["weight_map"] = {memory_name(name): file for name, file in content["weight_map"].items()}
        write_json_atomic(index, content)


def _rename_weights(path: Path) -> None:
    """Write a safetensors file anew with another header; the values are copied as they lie."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        renamed = {memory_name(name): entry for name, entry in header.items()}
        if renamed == header:
            return
        text = json.dumps(renamed).encode()
        text += b" " * (-len(text) % 8)  # the format asks for values at multiples of eight
        with atomic_path(path) as partial, partial.open("wb") as output:
            output.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(file, output)


def kept_lines(log: Path, steps: int, out: Path, written: WrittenRows) -> list[StepLog]:
    """Our log cut to the steps that are kept; the framework's fills in what a killed driver had not yet seen."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    whole = [line for line in lines[:steps] if line.endswith("}")]
    kept = [StepLog(steps=len(written.targets), **json.loads(line)) for line in whole]
    follower = Follower(out, written, 0)
    follower.tail.offset = 0
    return kept + list(follower.new_steps())[len(kept) : steps]


def _cut(log: Path, steps: int) -> None:
    if log.exists():
        lines = [line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in lines if "loss" in (entry := json.loads(line)) and entry["current_steps"] <= steps]
        with atomic_path(log) as partial:
            partial.write_text("".join(kept), encoding="utf-8")
