"""Memory and energy of a stage: read where the machine tells, and none where it does not."""

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from cpt_rft.engines.local import usage
from cpt_rft.engines.local.usage import Usage, gpu_counters, package_counters

MIB = 2**20


def held(size: int) -> mmap.mmap:
    """Memory of the system itself, whatever this process keeps of what it has freed."""
    block = mmap.mmap(-1, size)
    numpy.frombuffer(block, numpy.uint8)[:] = 1
    return block


def test_the_peak_is_that_since_the_beginning() -> None:
    block = held(100 * MIB)
    first = Usage("cpu")
    before = first.memory_bytes()
    assert before > 100 * MIB
    block.close()
    held(300 * MIB).close()
    most = first.memory_bytes()
    assert 150 * MIB < most - before < 250 * MIB  # 300 more, when 100 had been let go
    if usage._CLEAR.exists():  # Linux: what an earlier stage of this process held is not laid on a later one
        assert Usage("cpu").memory_bytes() < most - 250 * MIB


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library keeps nothing")
def test_what_an_earlier_stage_freed_and_kept_is_not_laid_on_a_later_one() -> None:
    program = """
import torch
from cpt_rft.engines.local.runtime import keep_freed_memory
from cpt_rft.engines.local.usage import Usage
keep_freed_memory()
first = Usage("cpu")
torch.ones(300 * 2**20, dtype=torch.uint8)
print(first.memory_bytes() - Usage("cpu").memory_bytes())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 250 * MIB


def test_without_procfs_the_peak_is_that_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = usage.peak_bytes()
    monkeypatch.setattr(usage, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(usage, "_CLEAR", tmp_path)  # a directory: nothing can be written there
    assert Usage("cpu").memory_bytes() > known - MIB > 10 * MIB


def package(folder: Path, name: str, microjoules: int, most: int = 1_000_000_000) -> Path:
    """What the kernel shows of a processor package."""
    (folder / name).mkdir()
    (folder / name / "max_energy_range_uj").write_text(f"{most}\n")
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    return folder / name / "energy_uj"


def test_energy_is_that_of_all_packages_since_the_last_reading(tmp_path: Path) -> None:
    one, other = package(tmp_path, "intel-rapl:0", 5_000_000), package(tmp_path, "intel-rapl:1", 999_000_000)
    package(tmp_path, "intel-rapl:0:0", 77)  # the cores of the first, counted there already
    meter = Usage("cpu", tmp_path)
    one.write_text("7500000\n")
    other.write_text("1000000\n")  # it began again
    assert meter.energy_joules() == pytest.approx(2.5 + 2.0)
    assert meter.energy_joules() == 0.0


def test_a_counter_that_cannot_be_read_is_no_zero(tmp_path: Path) -> None:
    assert Usage("cpu", tmp_path / "nowhere").energy_joules() is None
    counter = package(tmp_path, "intel-rapl:0", 1)
    meter = Usage("cpu", tmp_path)
    counter.unlink()
    counter.mkdir()  # as good as forbidden, also for root
    assert meter.energy_joules() is None
    (tmp_path / "intel-rapl:0" / "max_energy_range_uj").write_text("")
    assert package_counters(tmp_path) == []


def test_without_a_gpu_no_gpu_is_counted() -> None:
    if not torch.cuda.is_available():
        assert gpu_counters("cuda:0") == []
