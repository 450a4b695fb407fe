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
