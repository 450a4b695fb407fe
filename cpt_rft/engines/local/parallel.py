"""Several processes for one stage: this process starts them, passes on what they report, and ends with them.

Each gets the stage on its standard input, which is a life line too: when the one who started them ends, however it
ends, it closes and they end as well.
"""

import json
import os
import pickle
import selectors
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO, Any

from cpt_rft import errors
from cpt_rft.engines.base import Stage, StepLog
from cpt_rft.errors import StageError, UserError

_HOST = "127.0.0.1"


def train_together(stage: Stage, size: int, report: Callable[[StepLog], None]) -> None:
    """Train a stage in ``size`` processes on this machine; see `cpt_rft.engines.base.Engine.train`.

    Raises:
        UserError: What went wrong in one of them.
    """
    with _started(stage, size) as processes, selectors.DefaultSelector() as selector:
        for process in processes:
            selector.register(_output(process), selectors.EVENT_READ, process)
        while selector.get_map():
            for key, _ in selector.select():
                line = key.fileobj.readline()  # type: ignore[union-attr]
                if not line:
                    selector.unregister(key.fileobj)
                    _refuse_failure(key.data)
                else:
                    _pass_on(json.loads(line), report)


@contextmanager
def _started(stage: Stage, size: int) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """The processes at work; none outlives this."""
    with socket.socket() as free:
        free.bind((_HOST, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cpt_rft.engines.local.parallel"]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": _HOST, "MASTER_PORT": str(port)}
    if sys.platform == "linux":
        common["GLOO_SOCKET_IFNAME"] = "lo"  # a machine's own name need not have an address
    if stage.engine.device == "cpu":  # accelerate and DeepSpeed ask the machine, and would take a GPU
        common |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    processes = []
    try:
        for rank in range(size):
            environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
            )
            processes.append(process)
            assert process.stdin is not None
            pickle.dump(stage, process.stdin)
            process.stdin.flush()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _output(process: "subprocess.Popen[bytes]") -> IO[bytes]:
    assert process.stdout is not None
    return process.stdout


def _refuse_failure(process: "subprocess.Popen[bytes]") -> None:
    if process.wait() != 0:
        fix = "see the log for its last words, and give the same command again: the stage goes on"
        raise StageError(f"A process of the stage ended with status {process.returncode}.", fix)


def _pass_on(event: dict[str, Any], report: Callable[[StepLog], None]) -> None:
    if "step" in event:
        report(StepLog(**event["step"]))
    else:
        kind: type[UserError] = getattr(errors, event["error"])
        raise kind(event["problem"], event["fix"])


def main() -> int:
    """Train one process's share of the stage on standard input; returns the exit status."""
    from cpt_rft.engines.local.train import train_stage
    from cpt_rft.engines.local.zero import join_team

    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    with open(0, "rb", buffering=0, closefd=False) as pipe:
        stage: Stage = pickle.load(pipe)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send(event: dict[str, Any]) -> None:
        reports.write(json.dumps(event) + "\n")
        reports.flush()

    try:
        team = join_team(stage)
        train_stage(stage, team, lambda line: send({"step": asdict(line)}))
        team.leave()
    except UserError as error:
        send({"error": type(error).__name__, "problem": error.problem, "fix": error.fix})
        return 1
    return 0


def _end_with_parent() -> None:
    with open(0, "rb", buffering=0, closefd=False) as pipe:
        while pipe.read(1):
            pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
