"""Limits on the wall clock that hold on a busy machine too."""

import time
from collections.abc import Callable
from typing import TypeVar

SPIN_SECONDS = 0.05
ATTEMPTS = 5
Answer = TypeVar("Answer")


def stretch() -> float:
    """How long a second of processor time takes on the wall just now; 1 where nothing else runs."""
    wall, processor = time.monotonic(), time.process_time()
    while (spent := time.process_time() - processor) < SPIN_SECONDS:
        pass
    return max(1.0, (time.monotonic() - wall) / spent)


def timed(ask: Callable[[], Answer], enough: float) -> tuple[float, Answer]:
    """The seconds that a call takes where nothing else runs, and its answer.

    A call that takes longer than `enough` is made again, and its time on the wall is weighed with what processor time
    costs around it.
    """
    best = float("inf")
    for _ in range(ATTEMPTS):
        started = time.monotonic()
        answer = ask()
        seconds = time.monotonic() - started
        best = min(best, seconds if seconds <= enough else seconds / stretch())
        if best <= enough:
            break
    return best, answer
