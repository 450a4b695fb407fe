"""State within a stage: written whole every few steps, so that a killed process loses little and changes nothing."""

import pickle
from typing import Any, NamedTuple

import torch

from cpt_rft.config.engine import LocalConfig
from cpt_rft.engines.base import Stage, StepLog
from cpt_rft.files import atomic_path, fsync_file, sha256_file, sha256_json


class Progress(NamedTuple):
    """Where a stage stands: steps done, and the optimiser's state after them."""

    step: int
    optimiser: dict[str, Any]


class Journal:
    """The log and the resume point of one stage.

    Args:
        stage: The stage; its directory holds both.
        fingerprint: Of everything the result depends on; a resume point with another one is not used.
    """

    def __init__(self, stage: Stage, fingerprint: str) -> None:
        self.log = stage.directory / "train" / "log.jsonl"
        self.state = stage.directory / "resume" / "state.pt"
        self.fingerprint = fingerprint
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.state.parent.mkdir(parents=True, exist_ok=True)

    def open(self) -> Progress | None:
        """The resume point, with the log cut to the same step; none, with an empty log, to start from the beginning."""
        progress = self.load()
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
        if progress is None or len(lines) < progress.step:
            self.log.write_text("")
            return None
        with atomic_path(self.log) as partial:
            partial.write_text("".join(lines[: progress.step]))
        return progress

    def write(self, line: StepLog) -> None:
        """Append one step to the log."""
        with self.log.open("a") as file:
            file.write(line.line() + "\n")

    def save(self, progress: Progress) -> None:
        """Replace the resume point; the log up to it is on disk before."""
        fsync_file(self.log)
        # A file object, because only Python's own writes say that a disk is full.
        with atomic_path(self.state) as partial, partial.open("wb") as file:
            torch.save({"fingerprint": self.fingerprint, **progress._asdict()}, file)

    def close(self) -> None:
        """Remove the resume point of a finished stage."""
        self.state.unlink(missing_ok=True)
        self.state.parent.rmdir()

    def load(self) -> Progress | None:
        """The resume point, if it is whole and of this very stage."""
        if not self.state.exists():
            return None
        try:
            saved = torch.load(self.state, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
            return None  # damaged from outside: the beginning gives the same bits, only later
        if saved.get("fingerprint") != self.fingerprint:
            return None
        return Progress(saved["step"], saved["optimiser"])


def stage_fingerprint(stage: Stage, dtype: torch.dtype) -> str:
    """A hash of what decides the bits of a stage: settings, seeds, weights at its start, its rows, what came before."""
    files = {str(index): sha256_file(path) for index, path in enumerate(stage.data)}
    for place, earlier in enumerate(stage.history):
        left = sorted(path for path in earlier.artefacts.rglob("*") if path.is_file())
        files |= {f"{place}/{path.name}": sha256_file(path) for path in [*earlier.data, *left]}
    checkpoints = {"parent": stage.parent, "base": stage.base}
    if stage.source is not None:
        checkpoints["source"] = stage.source.checkpoint
    for name, checkpoint in checkpoints.items():
        files |= {f"{name}/{path.name}": sha256_file(path) for path in sorted(checkpoint.glob("*.safetensors"))}
    own = stage.engine.deepspeed if isinstance(stage.engine, LocalConfig) else "none"
    sharded = {} if own == "none" else {"deepspeed": own}
    return sha256_json(
        {
            "dtype": str(dtype),
            "files": files,
            "method": stage.method.model_dump(mode="json"),
            "preset": stage.prompt_preset,
            "seed": [stage.seed, *stage.seed_path],
            "tasks": list(stage.tasks),
            "processes": stage.engine.processes,
            "threads": stage.engine.threads,
        }
        | sharded
    )
