"""Hostile strings: each answered within a second, and nothing outside the process touched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAST, FULL, CAMPAIGN = 150, 2_000, 100_000
GROWTH_MIB = 40.0  # the store of compared pairs fills up; a leak of one response in a hundred would be more


@pytest.mark.parametrize(
    "count",
    [
        FAST,
        pytest.param(FULL, marks=pytest.mark.full),
        pytest.param(CAMPAIGN, marks=pytest.mark.campaign(name="fuzz_scoring")),
    ],
)
def test_hostile_strings_cost_a_second_at_most_and_touch_nothing(count, tmp_path, record_property):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.helpers.fuzz_scoring", str(count), str(count)]
    told = json.loads(subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True).stdout)
    record_property("seed", count)
    record_property("told", told)
    assert told["count"] == count == sum(told["statuses"].values())
    assert told["worst_seconds"] <= 1.0, told["worst_of"]
    assert told["touched"] == {}
    assert told["left_behind"] == [] == list(tmp_path.iterdir())
    assert told["growth_mib"] <= GROWTH_MIB
    assert set(told["statuses"]) >= {"answered", "no_answer", "undecodable"}
    assert told["mathematics"]["computed"] > 0 < told["mathematics"]["too_long"]
