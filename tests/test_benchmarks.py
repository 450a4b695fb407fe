"""The benchmarks run and print what they measured; how fast a machine is, is no test."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_scoring_benchmark_prints_its_figures():
    command = [sys.executable, str(ROOT / "benchmarks" / "scoring.py"), "--answers", "300", "--latex", "24"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["short_answers"] == 300
    assert min(told["seconds"], told["math_verify_pairs_a_second"], told["mathruler_pairs_a_second"]) >= 0
    assert told["mathruler_pairs_a_second"] > 1
