"""Do 95 % intervals hold the truth in 95 of 100 studies? Simulated studies, the intervals of every report."""

from collections.abc import Callable

import numpy as np
import pytest

from eval import statistics
from tests.helpers.studies import World, coverage

WORLDS = {
    "little forgotten": World(200),
    "nothing forgotten": World(200, forgets=(0.0, 0.0)),
    "much forgotten": World(200, forgets=(0.03, 0.06)),
    "four questions a picture": World(200, pictures=4),
}
HELD = ("accuracy", "avg_acc", "learned", "bwt", "difference")


@pytest.mark.full  # 20 s
def test_intervals_hold_the_truth_in_200_studies() -> None:
    found = coverage(WORLDS["little forgotten"], 200, seed=1)
    for name in HELD:
        assert 91 <= found[name]["coverage"] <= 98.5, found


@pytest.mark.full  # 30 s
def test_only_whole_pictures_hold_the_truth_where_questions_share_them() -> None:
    world = World(200, pictures=4, flips=0.05)
    assert coverage(world, 120, seed=2)["avg_acc"]["coverage"] >= 90
    assert coverage(world, 120, seed=2, clustered=False)["avg_acc"]["coverage"] <= 80


@pytest.mark.campaign(name="coverage")
@pytest.mark.parametrize("name", WORLDS)
def test_intervals_hold_the_truth_in_2000_studies(name: str, record_property: Callable[[str, object], None]) -> None:
    found = coverage(WORLDS[name], 2000, seed=3)
    record_property("studies", 2000)
    for statistic, figures in found.items():
        record_property(f"{statistic}: coverage, %", figures["coverage"])
        record_property(f"{statistic}: mean error, points", figures["bias"])
    for statistic in HELD:
        assert 93 <= found[statistic]["coverage"] <= 97, (statistic, found)


def test_the_interval_over_seeds_holds_the_truth() -> None:
    random = np.random.default_rng(4)
    held = 0
    for _ in range(2000):
        low, high = statistics.seed_interval(random.normal(-4.0, 2.0, 3).tolist()) or (0.0, 0.0)
        held += low <= -4.0 <= high
    assert 93 <= held / 20 <= 97
