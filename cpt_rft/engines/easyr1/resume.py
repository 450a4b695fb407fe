"""Where a stage that was stopped goes on: the newest checkpoint of the framework that is whole, and nothing else.

At every start the framework empties its logs and would take up whatever its tracker names; so the logs are put aside
first, and it is always told where to go on.
"""

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpt_rft.config.methods import GrpoMethod
from cpt_rft.engines.base import StepLog
from cpt_rft.engines.easyr1.watch import FRAMEWORK_LOG, step_log
from cpt_rft.files import atomic_path, read_json, sha256_json

NOTE, LOGS, RECORDS = "told.json", "logs", "rewards.jsonl"
_PARTS = ("model", "optim", "extra_state")


def open_out(out: Path, keys: Mapping[str, Any], processes: int) -> int:
    """Clear the output directory of all that does not belong to this stage as it is told now.

    Args:
        out: The framework's output directory.
        keys: All that decides what is trained; another one makes what is there useless.
        processes: Each leaves its files in a checkpoint.

    Returns:
        The rollout after which the one checkpoint that is left was saved, 0 for none.
    """
    told = {"sha256": sha256_json(dict(keys))}
    note = out.with_name(NOTE)
    if read_json(note) != told:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name(LOGS), ignore_errors=True)
        out.with_name(RECORDS).unlink(missing_ok=True)
    out.mkdir(exist_ok=True)
    with atomic_path(note) as partial:
        partial.write_text(json.dumps(told), encoding="utf-8")
    archive_logs(out)
    logged = archived_entries(out.with_name(LOGS))
    steps = {int(path.name.rpartition("_")[2]): path for path in out.glob("global_step_*")}
    # The framework saves a step before it logs it: killed in between, the step is of no use, its numbers are lost.
    usable = (step for step, path in steps.items() if step in logged and is_whole(path, processes))
    step = max(usable, default=0)
    for path in sorted(out.iterdir()):
        if path != steps.get(step):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return step


def is_whole(directory: Path, processes: int) -> bool:
    """Whether training can go on from a checkpoint: the files of every process are there, and none is cut short."""
    actor = directory / "actor"
    files = [actor / shard_name(part, processes, rank) for part in _PARTS for rank in range(processes)]
    files.append(directory / "dataloader.pt")  # written last
    # The directory of a zip file, which torch.save makes, stands at its end.
    return all(zipfile.is_zipfile(path) for path in files) and (actor / "huggingface" / "config.json").is_file()


def shard_name(part: str, processes: int, rank: int) -> str:
    """The file of one process.

    >>> shard_name("model", 8, 3)
    'model_world_size_8_rank_3.pt'
    """
    return f"{part}_world_size_{processes}_rank_{rank}.pt"


def archive_logs(out: Path) -> None:
    """Put the logs of an earlier start aside, each start in a directory of its own."""
    there = [path for path in (out / FRAMEWORK_LOG, out / "generations.log", out.with_name(RECORDS)) if path.exists()]
    logs = out.with_name(LOGS)
    if not any(path.stat().st_size for path in there):
        return
    place = logs / str(sum(1 for _ in logs.iterdir()) + 1 if logs.exists() else 1)
    place.mkdir(parents=True)
    for path in there:
        path.rename(place / path.name)


def archived_entries(logs: Path) -> dict[int, dict[str, Any]]:
    """The entries of the archived logs by step; where two starts made a step, the later counts."""
    starts = sorted(logs.glob(f"*/{FRAMEWORK_LOG}"), key=lambda path: int(path.parent.name))
    entries: dict[int, dict[str, Any]] = {}
    for path in starts:
        text = path.read_text(encoding="utf-8")
        for line in text[: text.rfind("\n") + 1].splitlines():
            entry = json.loads(line)
            entries[entry["step"]] = entry
    return entries


def kept_lines(logs: Path, steps: int, rollouts: int, method: GrpoMethod) -> list[StepLog]:
    """Our log of the first steps, from the archived logs.

    Args:
        logs: The archive.
        steps: How many are kept.
        rollouts: Rollouts of the stage.
        method: What is trained.
    """
    entries = archived_entries(logs)
    return [step_log(entries[step], rollouts, method) for step in range(1, steps + 1)]
