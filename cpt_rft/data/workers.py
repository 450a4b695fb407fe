"""Other processes that call one function again and again.

Unlike those of multiprocessing they do not import the program that started them, which takes longer than preparing a
small set, and large arguments reach them as they are, through a pipe: ``python -m cpt_rft.data.workers``.
"""

import os
import pickle
import queue
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from cpt_rft.errors import DataError


@contextmanager
def run_in_processes(function: Callable[..., object], count: int) -> Iterator[Callable[..., None]]:
    """A function that has another process call ``function``; it waits until one of the processes is idle.

    When the block ends, all calls are done and no process is left. A process is started when it is first needed.

    Args:
        function: Can be pickled, and so can its arguments. Each process has its own copy.
        count: How many processes.

    Raises:
        Exception: What the function raised, at a later call or at the end of the block.
        DataError: A process died.
    """
    idle: list[_Worker] = []
    busy: list[_Worker] = []

    def await_one() -> None:
        over, _, _ = select.select(busy, [], [])
        for worker in over:
            worker.finish()
            busy.remove(worker)
            idle.append(worker)

    def call(*arguments: object) -> None:
        if len(busy) == count:
            await_one()
        worker = idle.pop() if idle else _Worker(function)
        busy.append(worker)
        worker.send(arguments)

    try:
        yield call
        while busy:
            await_one()
    finally:
        for worker in (*idle, *busy):
            worker.end()


class _Worker:
    """One process; it does one call at a time."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cpt_rft.data.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C is for the parent, which then ends the workers
        )
        assert self._process.stdin and self._process.stdout
        self._calls, self._answers = self._process.stdin, self._process.stdout
        self.send(pickle.dumps(function))

    def fileno(self) -> int:
        """What can be read from when the call is over."""
        return self._answers.fileno()

    def send(self, message: object) -> None:
        """Hand over the function or the arguments of a call."""
        try:
            pickle.dump(message, self._calls, pickle.HIGHEST_PROTOCOL)
            self._calls.flush()
        except BrokenPipeError:
            self._explain_end()

    def finish(self) -> None:
        """Wait for the end of a call; raises what the function raised."""
        try:
            error = pickle.load(self._answers)
        except EOFError:
            self._explain_end()
        if error is not None:
            raise error

    def end(self) -> None:
        """Kill the process, whatever it does."""
        self._process.kill()
        self._process.communicate()

    def _explain_end(self) -> NoReturn:
        status = self._process.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        fix = "if memory ran out, use fewer (--processes 1); then give the same command again"
        raise DataError(f"A process that prepares rows {how}.", fix) from None


def main() -> NoReturn:
    """Call the function with what comes on standard input, and answer each call with its error or None."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(messages,), daemon=True).start()
    function = pickle.loads(messages.get())
    while True:
        error = None
        try:
            function(*messages.get())
        except Exception as raised:
            error = raised
        pickle.dump(error, answers)
        answers.flush()


def _listen(messages: "queue.SimpleQueue[Any]") -> NoReturn:
    """A parent that is killed says nothing: its workers would wait for ever, or write beside its successor."""
    try:
        with open(0, "rb", closefd=False) as pipe:
            while True:
                messages.put(pickle.load(pipe))
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
