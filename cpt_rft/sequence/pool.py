"""Jobs side by side, each in a fresh interpreter; their reports, their errors, and their end."""

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cpt_rft.errors import UserError
from cpt_rft.progress import Display
from cpt_rft.sequence.job import Job

# What a worker of the miniature needs at its peak, with room; a bigger model has its weights on top.
WORKER_BYTES = 1 << 30


class WorkerBugError(Exception):
    """A worker failed with something that is nobody's fault but the code's; carries its traceback."""


@dataclass
class _Worker:
    """A worker process, the job that it is at, and what it has sent of an unfinished line."""

    process: "subprocess.Popen[bytes]"
    log: Path
    job: Job | None = None
    rest: bytes = b""

    @property
    def output(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def tell(self, order: dict[str, Any] | None) -> None:
        """Send an order, or the end."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it died; the closed output will say so
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()

    def events(self) -> list[dict[str, Any]] | None:
        """Whole lines that have arrived; none when the worker has closed its output."""
        chunk = os.read(self.output.fileno(), 65536)
        *lines, self.rest = (self.rest + chunk).split(b"\n")
        return [json.loads(line) for line in lines] if chunk else None


class Pool:
    """Runs jobs in worker processes.

    Args:
        directory: The run directory.
        threads: Threads of one worker.
        lock: Descriptor of the directory's lock, inherited so that it is held while any worker lives.
        debug: Show the traceback of a user's error too.
    """

    def __init__(self, directory: Path, threads: int, lock: int, *, debug: bool = False) -> None:
        self.directory = directory
        self.threads = threads
        self.lock = lock
        self.debug = debug
        self.running: list[_Worker] = []
        self.started = 0

    def run(self, jobs: Sequence[Job], workers: int, display: Display) -> None:
        """Do all jobs, the first first, but none before the one that it comes after.

        A failing chain does not stop the others, a full disk stops everything.

        Raises:
            UserError: What went wrong, the first of several.
            WorkerBugError: A worker had a bug.
        """
        waiting, errors = list(jobs), list[UserError]()
        with selectors.DefaultSelector() as selector, self._no_survivors():
            while waiting or self.running:
                while self._ready(waiting) is not None and len(self.running) < workers:
                    worker = self._start()
                    self._next(worker, waiting, display)
                    selector.register(worker.output, selectors.EVENT_READ, worker)
                for key, _ in selector.select():
                    worker = key.data
                    events = worker.events()
                    if events is None:
                        selector.unregister(worker.output)
                        errors += self._bury(worker)
                    for event in events or []:
                        errors += self._handle(worker, event, display)
                        if event["event"] in ("done", "error"):
                            self._next(worker, waiting, display)
        for error in errors[1:]:
            display.note(f"error: {error}")
        if errors:
            raise errors[0]

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Give one order to a worker of its own and return its answer.

        Raises:
            UserError, WorkerBugError: As `run`.
        """
        with self._no_survivors():
            worker = self._start()
            worker.job = Job("base")
            worker.tell({"directory": str(self.directory), **order})
            while (events := worker.events()) is not None:
                for event in events:
                    for error in self._handle(worker, event, None):
                        raise error
                    if event["event"] == "done":
                        worker.tell(None)
                        worker.process.wait()
                        return dict(event["answer"])
            raise next(iter(self._bury(worker)))

    def _start(self) -> _Worker:
        self.started += 1
        path = self.directory / "logs" / f"worker{self.started}.log"
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "cpt_rft.sequence.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=worker_environment(self.threads),
                pass_fds=(self.lock,),
                process_group=0,  # Ctrl-C is for the parent, which then ends the workers
            )
        self.running.append(_Worker(process, path))
        return self.running[-1]

    def _next(self, worker: _Worker, waiting: list[Job], display: Display) -> None:
        """Give a worker the next job that waits for no other, or send it home."""
        worker.job = None
        worker.job = self._ready(waiting)
        if worker.job is not None:
            waiting.remove(worker.job)
            display.update(worker.job.label, 0.0, "starting")
        order = {"directory": str(self.directory), "job": worker.job.as_json()} if worker.job else None
        worker.tell(order)

    def _ready(self, waiting: Sequence[Job]) -> Job | None:
        """The first job whose source, if it has one, is neither being made nor still to be made."""
        open_labels = {job.label for job in waiting} | {each.job.label for each in self.running if each.job}
        return next((job for job in waiting if job.after not in open_labels), None)

    def _handle(self, worker: _Worker, event: dict[str, Any], display: Display | None) -> list[UserError]:
        """Show progress; return an error that concerns this job, raise one that concerns all."""
        kind = event["event"]
        if kind == "bug":
            raise WorkerBugError(event["traceback"])
        if kind == "error":
            if self.debug:
                print(event["traceback"], file=sys.stderr)
            error = UserError(event["problem"], event["fix"])
            if event["everyone"]:
                raise error
            return [error]
        if kind in ("progress", "part") and display is not None and worker.job is not None:
            display.update(worker.job.label, event["share"], event["text"], part=kind == "part")
        return []

    def _bury(self, worker: _Worker) -> list[UserError]:
        """Take a worker that has ended off the list; an end in the middle of a job is an error."""
        self.running.remove(worker)
        code = worker.process.wait()
        if worker.job is None:
            return []
        if code < 0:
            fix = "if memory ran out, use fewer workers (workers=1); then give the same command again"
            return [UserError(f"The worker of {worker.job.label} was killed by signal {-code}.", fix)]
        tail = worker.log.read_text(errors="replace")[-2000:]
        raise WorkerBugError(f"The worker of {worker.job.label} ended with status {code}.\n{tail}")

    @contextmanager
    def _no_survivors(self) -> Iterator[None]:
        """Whatever happens, no worker outlives the block. Killing is safe: every write is whole or absent."""
        try:
            yield
        finally:
            for worker in self.running:
                worker.process.kill()
                worker.process.wait()
            self.running.clear()


def worker_environment(threads: int) -> dict[str, str]:
    """The environment of a worker: what must be set before torch is imported."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def worker_count(asked: int | str, jobs: int, threads: int, checkpoint_bytes: int) -> int:
    """How many workers to run: as asked, or what cores and free memory allow."""
    if isinstance(asked, int):
        return min(asked, jobs)
    memory = _available_bytes() // (WORKER_BYTES + 8 * checkpoint_bytes)
    return max(1, min(_cores() // threads, memory, jobs))


def _cores() -> int:
    """Cores that this process may use, a container's quota respected."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def _available_bytes() -> int:
    """Memory that is free or can be freed; where it cannot be told, enough for two workers."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2 * WORKER_BYTES
