"""How a side of a benchmark is driven: one timed unit of work a line of its input, one line of figures back.

Needs nothing but the standard library and torch, so that every peer's environment can import it.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Gate:
    """The side's end of the pipe. What libraries print goes to standard error instead."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._started = (0.0, 0.0)

    def ready(self, **facts: Any) -> None:
        """Set-up is over."""
        self._say({"ready": True, **facts})

    def wait(self) -> bool:
        """Block until the next unit is asked for, and start its clock; false when there is none."""
        for line in sys.stdin:
            if line.strip() == "rate":
                self._say({"rate": matrix_rate()})
                continue
            if line.strip() != "go":
                break
            _reset_peak()
            self._started = (time.perf_counter(), time.process_time())
            return True
        return False

    def report(self, **facts: Any) -> None:
        """The unit is over: stop the clock and tell."""
        wall, cpu = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        self._say({"wall": wall, "cpu": cpu, "peak_mib": peak_mib(), **facts})

    def loop(self, unit: Callable[[], dict[str, Any] | None]) -> None:
        """Serve a unit of work that is a plain call."""
        while self.wait():
            facts = unit()
            self.report(**(facts or {}))

    def _say(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")


def settings() -> tuple[Path, dict[str, Any]]:
    """The case's folder and its content, from the command line; threads are set as the case says."""
    import torch

    folder = Path(sys.argv[1])
    case = json.loads((folder / "case.json").read_text(encoding="utf-8")) | json.loads(sys.argv[2])
    torch.set_num_threads(case["threads"])
    return folder, case


def callback(gate: Gate, base: type) -> Any:
    """A transformers callback that makes each training step one unit: from the end of a step to the end of the next."""

    class Served(base):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            gate.ready(**versions("torch", "transformers", "trl", "accelerate", "llamafactory"))
            if not gate.wait():
                raise SystemExit

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronise(args.device)
            gate.report()
            if not gate.wait():
                os._exit(0)  # no evaluation, no model card, no save

    return Served()


def synchronise(device: Any) -> None:
    """Wait for a GPU; on a CPU nothing is pending."""
    if str(device).startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def versions(*packages: str) -> dict[str, str]:
    """Versions of those that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def matrix_rate() -> dict[str, float]:
    """Operations a second of large matrix products, in billions: the best of several, so that noise does not count."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    rates = {}
    for name in ("float32", "bfloat16"):
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, name)) for _ in range(2))
        best = float("inf")
        for _ in range(9):
            started = time.perf_counter() if device == "cuda" else time.process_time()
            a @ b
            synchronise(device)
            best = min(best, (time.perf_counter() if device == "cuda" else time.process_time()) - started)
        rates[name] = 2 * size**3 / best / 1e9
    return rates


def peak_mib() -> float:
    """The most memory held since the unit began."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
