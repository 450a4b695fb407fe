"""The benchmarks run and print what they measured; how fast a machine is, is a campaign."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def scoring(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / "scoring.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.campaign(name="speed_scoring")
def test_scoring_is_fast_enough(record_property: Callable[[str, object], None]) -> None:
    told = scoring("--answers", 100_000, "--latex", 3_000, "--rounds", 3)
    record_property("scoring", told)
    assert told["seconds"] <= 10
    assert told["math_verify_pairs_a_second_of_two_cores"] >= 300
    assert told["mathruler_pairs_a_second_of_two_cores"] >= 300


@pytest.mark.full  # 30 s
def test_a_matrix_of_evaluation_is_fast_enough(tmp_path: Path) -> None:
    """A seventh of the checkpoints on a fifth of the rows, so a thirty-fifth of what may take three minutes."""
    command = [sys.executable, str(ROOT / "benchmarks" / "evaluation.py"), "--rows", "100", "--rounds", "1"]
    base = str(ROOT / "cpt_rft/miniature/base")
    subprocess.run([*command, "--checkpoints", base, "--out", str(tmp_path)], check=True, capture_output=True)
    told = json.loads((tmp_path / "matrix.json").read_text())
    for style, seconds in told["seconds_of_two_cores"].items():
        [found] = told["rounds"][style]
        assert (found["answers"], found["tokens"] >= 700) == (700, True)
        assert 0 < seconds <= 180 / 35
    assert told["bound"] is None


def test_the_scoring_benchmark_prints_its_figures():
    told = scoring("--answers", 300, "--latex", 24)
    assert told["short_answers"] == 300
    assert min(told["seconds"], told["math_verify_pairs_a_second"], told["mathruler_pairs_a_second"]) >= 0
    assert told["mathruler_pairs_a_second"] > 1
