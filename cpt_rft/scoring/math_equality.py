"""Mathematical equality of two texts, decided by official libraries in processes that can do nothing else.

A model's text is data, and these libraries evaluate it. So this process never touches it: cheap comparisons are
decided here, the rest goes to a pool of workers (`math_worker`) under limits of time and memory. A worker that
gives up, dies or is too slow means "not equal" and is counted.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import re
import secrets
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cpt_rft.errors import install_extra
from cpt_rft.scoring.errors import ScoringError

JudgeName = Literal["math_verify", "mathruler"]
Pair = tuple[str, str]
WORKERS = 2
PAIRS_A_MESSAGE = 16
WALL_SECONDS = 20.0  # for one pair, if its own limits of processor time, half a second, did not end the fork before
START_SECONDS = 120.0
MAX_CHARACTERS = 500  # of either text; a longer one equals nothing
CACHED_PAIRS = 8192
CACHED_CHARACTERS = 200
_WORKER = Path(__file__).with_name("math_worker.py")
NEEDED = ("math_verify", "mathruler", "pylatexenc")
# What mathruler compares letter by letter: words without its units and number words, of too many letters to evaluate.
_WORDS = re.compile(r"[A-Za-z]+(?: [A-Za-z]+)*")
_UNITS = re.compile(
    r"degree|cm|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard|illion|frac|sqrt| or | and ",
    re.IGNORECASE,
)
_UNKNOWN_LETTERS = 2
# Decimals that both libraries read exactly; up to five decimals, because math-verify rounds to six.
_DECIMAL = re.compile(r"-?[0-9]{1,9}(?:\.[0-9]{1,5})?")


class Counts(NamedTuple):
    """What became of the pairs asked so far: most are `cheap` or `cached`, the others went to a worker.

    `too_long` and `gave_up` (time, memory, death) count as not equal.
    """

    cheap: int = 0
    cached: int = 0
    computed: int = 0
    too_long: int = 0
    gave_up: int = 0


def verdict(candidate: str, reference: str, judge: JudgeName) -> bool | None:
    """Whether two texts are equal to a library; see `verdicts`."""
    return verdicts([(candidate, reference)], judge)[0]


def verdicts(pairs: Sequence[Pair], judge: JudgeName) -> list[bool | None]:
    """For each pair of candidate and reference, whether the library holds them equal; none where it gave up.

    Many pairs at once keep all workers busy, and what was decided is remembered: ask for a batch before scoring it.

    Source: math-verify 0.9.0 ``verify(parse("$reference$"), parse("$candidate$"))``; mathruler 0.1.0 grader.py
    ``grade_answer``.
    Differs from: equal texts are equal; limits of length, time and memory.

    Raises:
        ScoringError: The libraries are not installed, or no worker starts.
    """
    return _POOL.verdicts(pairs, judge)


def counts() -> Counts:
    """The counts of this process."""
    return _POOL.counts


def close() -> None:
    """End the workers; the next question starts new ones."""
    _POOL.close()


def cheap_verdict(candidate: str, reference: str, judge: JudgeName) -> bool | None:
    """The verdict of the library where it can be known without the library, else none.

    >>> [cheap_verdict(text, "5", "math_verify") for text in (" 5", "5.0", "6", "five", "")]
    [True, True, False, None, False]
    >>> [cheap_verdict(text, "Dark red", "mathruler") for text in ("darkred", "green", "dark red inches")]
    [True, False, None]
    """
    one, other = candidate.strip(), reference.strip()
    if one == other or not one or not other:
        return one == other != ""
    if _DECIMAL.fullmatch(one) and _DECIMAL.fullmatch(other):
        return Decimal(one) == Decimal(other)
    if judge == "mathruler" and all(_WORDS.fullmatch(text) and not _UNITS.search(text) for text in (one, other)):
        one, other = (text.lower().replace(" ", "") for text in (one, other))
        if one == other or len(set(one + other)) > _UNKNOWN_LETTERS:
            return one == other
    return None


class _GaveUpError(Exception):
    """The worker was too slow for the pair at hand, or is gone."""


class _ForkDiedError(Exception):
    """The fork died over the pair at hand; its successor has announced itself."""


class _Worker:
    """One worker process; its fork of the hour is known by its process id."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", str(_WORKER)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt at the keyboard is for its parent
            bufsize=0,
        )
        assert self.process.stdin and self.process.stdout
        self.input, self.output = self.process.stdin, self.process.stdout
        self.fork, self.buffer = 0, b""
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.output, selectors.EVENT_READ)
        try:
            self._await_fork()
        except _GaveUpError:
            self.close()
            raise ScoringError(
                "The worker that compares mathematics does not start.", f"run {' '.join(command)} and read its error"
            ) from None

    def ask(self, pairs: Sequence[Pair], judge: JudgeName) -> list[bool | None]:
        """A verdict a pair; none where the worker gave up, which costs that pair only.

        Raises:
            _GaveUpError: The worker cannot be used any more.
        """
        verdicts: list[bool | None] = []
        while len(verdicts) < len(pairs):
            # An unforeseeable name: what an evaluated text might write, or a dead fork left, is no reply.
            name = secrets.token_hex(8)
            self._drain()
            self._send({"id": name, "judge": judge, "pairs": pairs[len(verdicts) :]})
            try:
                while len(verdicts) < len(pairs):
                    verdicts.append(self._reply(name))
                if self._reply(name) == "leave":
                    self._await_fork()
            except _GaveUpError:
                verdicts.append(None)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.fork, signal.SIGKILL)
                self._await_fork()
            except _ForkDiedError:
                verdicts.append(None)
        return verdicts[: len(pairs)]

    def _reply(self, name: str) -> Any:
        deadline = time.monotonic() + WALL_SECONDS
        while True:
            line = self._line(deadline)
            if self._announced(line):
                raise _ForkDiedError
            if line.startswith(f'["{name}", '):
                return json.loads(line)[1]

    def _await_fork(self) -> None:
        """Read on until a fork announces itself; what a dead one left is dropped."""
        deadline = time.monotonic() + START_SECONDS
        while not self._announced(self._line(deadline)):
            pass

    def _announced(self, line: str) -> bool:
        if announced := line.startswith("{"):
            self.fork = int(json.loads(line)["ready"])
        return announced

    def _send(self, message: object) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while data:
                data = data[self.input.write(data) or 0 :]
        except BrokenPipeError:
            raise _GaveUpError from None

    def _drain(self) -> None:
        """Note a fork that took over while nothing was asked, after somebody else had ended the one before."""
        while self.buffer or self.selector.select(0):
            self._announced(self._line(time.monotonic() + WALL_SECONDS))

    def _line(self, deadline: float) -> str:
        while b"\n" not in self.buffer:
            ready = self.selector.select(max(0.0, deadline - time.monotonic()))
            part = self.output.read(1 << 16) if ready else b""
            if not part:
                raise _GaveUpError
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.decode()

    def close(self) -> None:
        """End the process and its fork."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.forget()

    def forget(self) -> None:
        """Drop a worker that is the parent's: its pipes are closed here, the process is left alone."""
        self.selector.close()
        self.input.close()
        self.output.close()
        self.process.returncode = 0


class _Pool:
    """Up to `WORKERS` workers, started when needed and reused; safe to use from threads."""

    def __init__(self) -> None:
        self.idle: list[_Worker] = []
        self.started: weakref.WeakSet[_Worker] = weakref.WeakSet()
        self.reset()

    def reset(self) -> None:
        """As new; in a fork of this process the workers belong to the parent."""
        for worker in self.started:
            worker.forget()
        self.idle.clear()
        self.started.clear()
        self.free = threading.Semaphore(WORKERS)
        self.lock = threading.Lock()
        self.cache: dict[tuple[JudgeName, Pair], bool] = {}
        self.counts = Counts()

    def verdicts(self, pairs: Sequence[Pair], judge: JudgeName) -> list[bool | None]:
        known: dict[Pair, bool | None] = {pair: cheap_verdict(*pair, judge) for pair in pairs}
        open_pairs = [pair for pair, verdict in known.items() if verdict is None]
        with self.lock:
            cached = {pair: self.cache[judge, pair] for pair in open_pairs if (judge, pair) in self.cache}
        known |= cached
        too_long = [pair for pair in open_pairs if max(map(len, pair)) > MAX_CHARACTERS]
        todo = [pair for pair in open_pairs if known[pair] is None and max(map(len, pair)) <= MAX_CHARACTERS]
        computed = self._compute(todo, judge) if todo else []
        known |= dict(zip(todo, computed, strict=True))
        with self.lock:
            self._remember(judge, todo, computed)
            self.counts = Counts(
                cheap=self.counts.cheap + len(known) - len(open_pairs),
                cached=self.counts.cached + len(cached),
                computed=self.counts.computed + len(todo),
                too_long=self.counts.too_long + len(too_long),
                gave_up=self.counts.gave_up + sum(verdict is None for verdict in computed),
            )
        return [known[pair] for pair in pairs]

    def _compute(self, pairs: list[Pair], judge: JudgeName) -> list[bool | None]:
        if not all(importlib.util.find_spec(name) for name in NEEDED):
            raise ScoringError(
                "Comparing mathematics needs the packages " + ", ".join(NEEDED) + ".", install_extra("math")
            )
        parts = [pairs[start : start + PAIRS_A_MESSAGE] for start in range(0, len(pairs), PAIRS_A_MESSAGE)]
        if len(parts) == 1:
            return self._ask(parts[0], judge)
        with ThreadPoolExecutor(WORKERS) as threads:
            answers = threads.map(lambda part: self._ask(part, judge), parts)
            return [verdict for part in answers for verdict in part]

    def _ask(self, pairs: list[Pair], judge: JudgeName) -> list[bool | None]:
        with self.free:
            with self.lock:
                worker = self.idle.pop() if self.idle else None
            if worker is None:
                worker = _Worker()
                self.started.add(worker)
            try:
                verdicts = worker.ask(pairs, judge)
            except _GaveUpError:
                worker.close()
                return [None] * len(pairs)
            except BaseException:  # an interrupt in the middle of a line: nobody can use that worker again
                worker.close()
                raise
            with self.lock:
                self.idle.append(worker)
            return verdicts

    def _remember(self, judge: JudgeName, pairs: Sequence[Pair], verdicts: Sequence[bool | None]) -> None:
        """Keep what is short and was decided; when the store is full it starts anew."""
        for pair, verdict in zip(pairs, verdicts, strict=True):
            if verdict is not None and sum(map(len, pair)) <= CACHED_CHARACTERS:
                if len(self.cache) >= CACHED_PAIRS:
                    self.cache.clear()
                self.cache[judge, pair] = verdict

    def close(self) -> None:
        with self.lock:
            while self.idle:
                worker = self.idle.pop()
                self.started.discard(worker)
                worker.close()


_POOL = _Pool()
atexit.register(close)
os.register_at_fork(after_in_child=_POOL.reset)
