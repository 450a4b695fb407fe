"""A whole experiment that takes seconds: two tasks, a few rows, the real engine, a small untrained base."""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cpt_rft import cli
from cpt_rft.config.engine import EngineConfig, parse_engine
from cpt_rft.config.load import load_experiment
from cpt_rft.config.schema import Experiment
from cpt_rft.files import sha256_file
from cpt_rft.sequence.job import Job, do_job, preflight
from cpt_rft.sequence.plan import Selection
from cpt_rft.sequence.rundir import make_run, read_config
from tests.helpers.engine import make_base

TASKS = ("mini_gqa", "mini_superclevr")
TEXT = """\
name: tiny
base_model: {base}
output: {output}
tasks: [mini_gqa, mini_superclevr]
methods:
  joint: {{extends: multitask, lr: 2e-4, schedule: constant, epochs: 1, prompts_per_step: 4, micro_batch: 4}}
  sft: {{lr: 2e-4, prompts_per_step: 4, micro_batch: 2}}
  grpo: {{lr: 2e-4, prompts_per_step: 4, micro_batch: 4, group: 2, max_new_tokens: 4}}
engine: {{name: local, dtype: float32, device: cpu, save_every: 1}}
data: {{train: 12, dev: 4, test: 4, general: 4}}
evaluation: {{batch_size: 4, max_new_tokens: 4, general: [mini_pope], base_samples: 1}}
"""


@dataclass(frozen=True)
class Tiny:
    """An experiment file and its run directory.

    Attributes:
        file: The YAML file.
        directory: The run directory.
        base: The base checkpoint.
    """

    file: Path
    directory: Path
    base: Path

    @classmethod
    def write(cls, folder: Path, base: Path, text: str = TEXT) -> "Tiny":
        """Write the experiment file; its run directory is beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "tiny.yaml"
        file.write_text(text.format(base=base, output=folder / "run"))
        return cls(file, folder / "run", base)

    def copy(self, folder: Path) -> "Tiny":
        """The same run in another place, with a base of its own."""
        shutil.copytree(self.base, folder / "base")
        copied = Tiny.write(folder, folder / "base")
        shutil.copytree(self.directory, copied.directory, dirs_exist_ok=True)
        with edited(copied.directory / "config.json") as config:
            config |= {"base_model": str(copied.base), "output": str(copied.directory)}
        return copied

    def experiment(self, *overrides: str) -> Experiment:
        return load_experiment(self.file, overrides)

    def prepare(self) -> None:
        """Make the run directory in this process."""
        self.directory.mkdir(exist_ok=True)

        def resolve(experiment: Experiment, base: Path) -> dict[str, EngineConfig]:
            return {key: parse_engine(engine) for key, engine in preflight(experiment, base).items()}

        make_run(self.directory, self.experiment(), resolve, lambda name: None)

    def jobs(self) -> list[Job]:
        """Every job of the run."""
        chains = Selection().chains(read_config(self.directory), self.directory)
        names = [tuple(stage.name for stage in chain.stages) for chain in chains]
        return [Job("base"), *(Job("chain", c.method.name, 0, c.seed, n) for c, n in zip(chains, names, strict=True))]

    def finish(self, *methods: str) -> None:
        """Do every job, or those of some methods, in this process."""
        for job in self.jobs():
            if not methods or job.method in methods:
                do_job(self.directory, job, lambda event: None)

    def command(self, verb: str, *arguments: str) -> tuple[int, str, str]:
        """Run the command line in this process: exit status, standard output and standard error."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main([verb, str(self.file), *arguments])
        return status, out.getvalue(), err.getvalue()


def make_tiny_base(directory: Path) -> Path:
    """An untrained base with opinions, so that its answers are not all alike."""
    return make_base(directory, scale=3.0)


def content(directory: Path) -> dict[str, str]:
    """A fingerprint of every result in a run directory, times left out. Leftovers of any kind show up too."""
    prints = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_dir() or name in (".lock", ".report.json", "report.html") or name.startswith("logs/"):
            continue
        if path.name == "log.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            prints[name] = json.dumps([unmeasured(line) for line in lines])
        elif path.name == "manifest.json":
            manifest = json.loads(path.read_text())
            weights = [manifest["provenance"][key] for key in ("parent_sha256", "files")]
            prints[name] = json.dumps([manifest["identity_sha256"], weights])
        elif name == "config.json":
            free = ("output", "base_model", "workers")
            prints[name] = json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in free})
        elif path.stem == "costs":
            prints[name] = ""  # seconds
        elif path.name == "results.json":
            prints[name] = json.dumps(_without_times(json.loads(path.read_text())))
        else:
            prints[name] = sha256_file(path)
    return prints


def unmeasured(line: dict[str, Any]) -> dict[str, Any]:
    """A line of a training log without what a second run does not repeat."""
    return {key: value for key, value in line.items() if key not in ("seconds", "memory_bytes", "energy_joules")}


def _without_times(value: Any) -> Any:
    from eval.results import without_times

    return without_times(value)


def one_line_error(result: tuple[int, str, str]) -> str:
    """The error of a refused command, after checking that it is one line with a fix and that no other says more."""
    status, _, err = result
    *news, line = err.splitlines()
    assert status == 2 and line.startswith("error: ") and " Fix: " in line, (status, err)
    assert all(other.startswith("drawing ") for other in news), err
    return line


def flip_last_byte(path: Path) -> None:
    """Change a file but not its size."""
    body = path.read_bytes()
    path.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))


def in_child(work: Callable[[], None]) -> int:
    """Run something in a fork of this process, which may be killed; its exit status, negative for a signal."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_write(number: int, below: Path) -> None:
    """From now on this process ends by SIGKILL just before its so-manyth change of the file system below a folder."""
    left = number

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if is_change(event, arguments, below):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def is_change(event: str, arguments: Sequence[object], below: Path) -> bool:
    """Whether an audit event is a change of a file or folder below ``below``."""
    if event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"):
        return False
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        return False
    return str(arguments[0]).startswith(str(below))


@contextlib.contextmanager
def edited(path: Path) -> Iterator[Any]:
    """Change a JSON file by hand."""
    value = json.loads(path.read_text())
    yield value
    path.write_text(json.dumps(value, indent=2))


@cache
def prepared(root: Path) -> Tiny:
    """A run directory with data and configuration and nothing else; once a session, to be copied."""
    folder = root / "prepared"
    folder.mkdir()
    tiny = Tiny.write(folder, make_tiny_base(folder / "base"))
    tiny.prepare()
    return tiny


@cache
def reference(root: Path) -> Tiny:
    """A whole run made without a stop in one process; once a session, to be looked at or copied."""
    tiny = prepared(root).copy(root / "reference")
    tiny.finish()
    status, _, err = tiny.command("report")
    assert status == 0, err
    return tiny
