"""Keeps a framework's command: when whoever started it is gone, or it ends itself, nothing that it started is left.

Usage: python -I keeper.py MARK COMMAND...; only the standard library, so that it starts at once. Standard input is a
life line: it closes when the owner ends, however it ends. Frameworks start processes in sessions of their own, so
these are known by a variable in their environment, which every descendant inherits.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

VARIABLE = "CPT_RFT_MARK"


def marked(mark: str) -> list[int]:
    """Process ids, other than ours, whose environment carries the mark; none where there is no /proc."""
    wanted = f"{VARIABLE}={mark}".encode()
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if name.isdigit() and int(name) != os.getpid():
            with suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if wanted in file.read().split(b"\0"):
                    found.append(int(name))
    return found


def end_marked(mark: str, patience_s: float = 30.0) -> bool:
    """Kill every process with the mark until there is none; returns whether that worked."""
    deadline = time.monotonic() + patience_s
    while left := marked(mark):
        for process in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def main(mark: str, command: list[str]) -> int:
    """Run the command; returns its exit status, negative for a signal."""
    environment = {**os.environ, VARIABLE: mark}
    child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)

    def watch() -> None:
        with open(0, "rb", buffering=0, closefd=False) as life_line:
            while life_line.read(1):
                pass
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        end_marked(mark)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    status = child.wait()
    end_marked(mark)
    return status


if __name__ == "__main__":
    code = main(sys.argv[1], sys.argv[2:])
    # Unlike a shell's 128 + n this cannot be mistaken for the command's own status.
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)
