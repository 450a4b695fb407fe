"""What a stage takes of the machine: its largest memory, and energy where a counter can be read."""

import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cpt_rft.engines.local.runtime import give_back_freed_memory

_POWERCAP = Path("/sys/class/powercap")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Usage:
    """Memory and energy from now on.

    Energy is of the whole device or processor package, so of whatever else runs on it too; memory is of this process.

    Attributes:
        device: Where the model is.
    """

    def __init__(self, device: str, powercap: Path = _POWERCAP) -> None:
        self.device = device
        self._counters = gpu_counters(device) if device.startswith("cuda") else package_counters(powercap)
        self._last = self._read()
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
        else:
            give_back_freed_memory()
            forget_peak()

    def memory_bytes(self) -> int:
        """The most that was held since the beginning: of the GPU's memory, else of the machine's."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.startswith("cuda") else peak_bytes()

    def energy_joules(self) -> float | None:
        """Since the last reading; none where no counter can be read."""
        before, self._last = self._last, self._read()
        if before is None or self._last is None:
            return None
        pairs = zip(before, self._last, self._counters, strict=True)
        return sum((now - then) % counter.wraps_at for then, now, counter in pairs)

    def _read(self) -> list[float] | None:
        try:
            return [counter.read() for counter in self._counters] or None
        except (OSError, ValueError):
            return None


class Counter:
    """A counter of joules that begins again at `wraps_at`."""

    def __init__(self, read: Callable[[], float], wraps_at: float = float("inf")) -> None:
        self.read, self.wraps_at = read, wraps_at


def package_counters(powercap: Path) -> Sequence[Counter]:
    """The processor packages whose energy the kernel counts (RAPL); most kernels let only root read them."""
    found = []
    for package in sorted(powercap.glob("intel-rapl:*")):
        if package.name.count(":") == 1:  # with two colons it is a part of a package
            try:
                wraps_at = int((package / "max_energy_range_uj").read_text()) / 1e6
            except (OSError, ValueError):
                continue
            found.append(Counter(lambda file=package / "energy_uj": int(file.read_text()) / 1e6, wraps_at))  # type: ignore[misc]
    return found


def gpu_counters(device: str) -> Sequence[Counter]:
    """The energy of one GPU, where pynvml is installed and the GPU counts it."""
    try:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no package, no driver, an older GPU: there is no counter, and training goes on without
        return []
    return [Counter(lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3)]


def forget_peak() -> None:
    """Let the peak begin at what is held now, where the kernel can (Linux); else it is that of the process's life."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """The largest resident memory of this process."""
    try:
        [line] = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
