"""Runs a framework's command in its own environment, with a log, and never leaves a process of it behind."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from cpt_rft.engines import keeper
from cpt_rft.errors import StageError


def mark_of(directory: Path) -> str:
    """What the processes that work in a directory are known by."""
    return hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:24]


def end_leftovers(directory: Path) -> None:
    """End what an earlier start, killed with its keeper, left working in a directory.

    Raises:
        StageError: It does not end.
    """
    mark = mark_of(directory)
    if not keeper.end_marked(mark):
        raise StageError(
            f"Processes {keeper.marked(mark)} still work in {directory} and do not end.", "end them by hand"
        )


@contextmanager
def running(
    command: Sequence[str], directory: Path, environment: Mapping[str, str], log: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """A command at work in a directory; on leaving, however that happens, it and all that it started have ended.

    Args:
        command: The command and its arguments.
        directory: Where it works; by this its processes are known.
        environment: All of its environment.
        log: Standard output and error are appended to this file.
    """
    keep = [sys.executable, "-I", keeper.__file__, mark_of(directory), *command]
    with log.open("ab") as output:
        process = subprocess.Popen(
            keep, cwd=directory, env=dict(environment), stdin=subprocess.PIPE, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        end_leftovers(directory)


class Tail:
    """The whole lines that are added to a file, which need not be there yet.

    Args:
        path: The file.
        offset: Where to begin, in bytes.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path, self.offset = path, offset

    def new_lines(self) -> list[bytes]:
        """Those since the last call, without their ends; what has no end yet waits."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.offset += len(whole + newline)
        return whole.splitlines()


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if it is not there."""
    return path.stat().st_size if path.exists() else 0


def said_since(log: Path, offset: int) -> str:
    """What was printed after so many bytes."""
    with log.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")


def status_within(process: "subprocess.Popen[bytes]", seconds: float) -> int | None:
    """The exit status of a process that ends within so many seconds, else none."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
