"""How far a run is: bars with the time left on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0


class Display(Protocol):
    """Shows shares of work done. Jobs are known by label; the overall share weighs each by its work."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, label: str, share: float, text: str, *, part: bool = False) -> None:
        """A job stands at a share between 0 and 1; ``part`` if a whole part of it was just finished."""
        ...

    def note(self, text: str) -> None:
        """Say something once."""
        ...


def make_display(work: Mapping[str, float], stream: TextIO | None = None) -> Display:
    """Bars if the stream is a terminal, else lines.

    Args:
        work: Work of each job, in any unit, by label.
        stream: Where to; standard error by default.
    """
    stream = stream or sys.stderr
    return BarDisplay(work, stream) if stream.isatty() else LineDisplay(work, stream)


class _Overall:
    """The share of all work that is done."""

    def __init__(self, work: Mapping[str, float]) -> None:
        self.work = dict(work)
        self.shares = dict.fromkeys(work, 0.0)

    def set(self, label: str, share: float) -> float:
        self.shares[label] = share
        return sum(self.work[name] * self.shares[name] for name in self.work) / (sum(self.work.values()) or 1.0)


class BarDisplay:
    """One bar a job and one for all."""

    def __init__(self, work: Mapping[str, float], stream: TextIO) -> None:
        self.overall = _Overall(work)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", style="dim"),
            console=Console(file=stream),
            speed_estimate_period=120.0,
        )
        self.all = self.progress.add_task("all", total=1.0, text="")
        self.bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def update(self, label: str, share: float, text: str, *, part: bool = False) -> None:
        """See `Display.update`."""
        if label not in self.bars:
            self.bars[label] = self.progress.add_task(label, total=1.0, text="")
        self.progress.update(self.bars[label], completed=share, text=text)
        self.progress.update(self.all, completed=self.overall.set(label, share))

    def note(self, text: str) -> None:
        """See `Display.note`."""
        self.progress.console.print(text, highlight=False, markup=False)


class LineDisplay:
    """A line when a part is finished, and now and then in between."""

    def __init__(self, work: Mapping[str, float], stream: TextIO) -> None:
        self.overall = _Overall(work)
        self.stream = stream
        self.started = time.monotonic()
        self.last: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.flush()

    def update(self, label: str, share: float, text: str, *, part: bool = False) -> None:
        """See `Display.update`."""
        now = time.monotonic()
        done = self.overall.set(label, share)
        if part or now - self.last.get(label, self.started) >= PLAIN_EVERY_S:
            self.last[label] = now
            spent = now - self.started
            left = f", {duration(spent * (1 - done) / done)} left" if done > 0.02 else ""
            self.note(f"{label}: {text} ({done:.0%} of all{left})")

    def note(self, text: str) -> None:
        """See `Display.note`."""
        print(f"[{time.strftime('%H:%M:%S')}] {text}", file=self.stream, flush=True)


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(42), duration(200), duration(7300)
    ('42 s', '3 min', '2 h 02 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
