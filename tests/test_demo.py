"""The demo on a copy of the project as a clone has it: its own environment, its time, its memory, its second start."""

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from eval.results import without_times
from tests.helpers.tree import copy_tree

pytestmark = pytest.mark.full
FIRST_START_SECONDS, SECOND_START_SECONDS, PEAK_BYTES = 600, 30, 3 * 10**9


class MemoryMeter:
    """The highest sum of memory over the processes of a session, from Linux's own accounts, twice a second."""

    def __init__(self, session: int) -> None:
        self.session = session
        self.peak_bytes = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.stop.wait(0.5):
            self.peak_bytes = max(self.peak_bytes, sum(map(self._share, Path("/proc").glob("[0-9]*"))))

    def _share(self, process: Path) -> int:
        try:
            if int((process / "stat").read_text().rpartition(")")[2].split()[3]) != self.session:
                return 0
            lines = (process / "smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def start(clone: Path) -> tuple[str, float, int]:
    """Run the demo; its output, seconds and peak bytes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CPT_RFT_", "PYTHON"))}
    before = time.monotonic()
    with subprocess.Popen(
        ["bash", str(clone / "scripts/demo.sh")],
        cwd=clone.parent,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        meter = MemoryMeter(process.pid)
        output, _ = process.communicate()
        meter.stop.set()
    assert process.returncode == 0, output[-4000:]
    return output, time.monotonic() - before, meter.peak_bytes


def test_the_demo_on_a_fresh_clone(tmp_path):
    clone = tmp_path / "clone"
    copy_tree(clone)
    output, seconds, peak = start(clone)
    print(f"first start: {seconds:.0f} s, peak {peak / 1e9:.2f} GB")
    run = clone / "runs/miniature"
    assert str(run / "report.html") in output or "runs/miniature/report.html" in output
    assert (run / "report.html").stat().st_size > 10_000
    assert seconds < FIRST_START_SECONDS
    assert 0 < peak < PEAK_BYTES

    results = json.loads((run / "results.json").read_text())
    _, seconds, _ = start(clone)
    print(f"second start: {seconds:.1f} s")
    assert seconds < SECOND_START_SECONDS
    assert without_times(json.loads((run / "results.json").read_text())) == without_times(results)
