"""Simulated studies whose truth is known, for the coverage of intervals; vectorised over studies."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval import metrics, statistics
from eval.statistics import Resamples

Array = NDArray[np.float64]
TASKS = ("a", "b", "c", "d", "e", "f", "g")
CHUNK = 40  # studies held at once


@dataclass(frozen=True)
class World:
    """Two arms on the same rows.

    Attributes:
        rows: Rows a task.
        learned: True share of right answers right after learning.
        forgets: What each arm loses of it at every later stage.
        flips: Share of answers that are drawn anew at every stage.
        pictures: Rows a picture; the rows of one picture are equally hard.
    """

    rows: int
    learned: float = 0.7
    forgets: tuple[float, float] = (0.01, 0.03)
    flips: float = 0.2
    pictures: int = 1

    def truth(self, arm: int) -> Array:
        """The true matrix R in percent, (T+1, T)."""
        count = len(TASKS)
        stage, task = np.arange(count + 1)[:, None], np.arange(count)[None]
        fallen = self.learned - self.forgets[arm] * (stage - 1 - task)
        return np.asarray(100 * np.where(stage > task, fallen, 0.3))

    def draw(self, random: np.random.Generator, studies: int) -> list[dict[str, Array]]:
        """Scores of each arm by task, (studies * (T+1), rows), in percent."""
        arms: list[dict[str, Array]] = [{}, {}]
        for place, task in enumerate(TASKS):
            hardness = np.repeat(random.random((studies, 1, self.rows // self.pictures)), self.pictures, axis=-1)
            for arm, cells in enumerate(arms):
                level = self.truth(arm)[:, place][None, :, None] / 100
                shape = (studies, len(TASKS) + 1, self.rows)
                anew = random.random(shape) < self.flips
                right = np.where(anew, random.random(shape), hardness) < level
                cells[task] = 100.0 * right.reshape(-1, self.rows)
        return arms


def _metrics(matrices: Array) -> dict[str, Array]:
    values = {name: metric(matrices) for name, metric in metrics.HEADLINE.items()}
    return {**values, "accuracy": matrices[..., -1, 0]}


def coverage(world: World, studies: int, seed: int, *, clustered: bool = True) -> dict[str, dict[str, float]]:
    """How often the 95 % intervals hold the truth, in percent, and the mean error of the estimates, by statistic.

    ``accuracy`` is one cell, ``difference`` the paired difference of the arms in BWT; the others are the first arm's.
    Intervals come from the functions that make those of every report.
    """
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(world.rows // world.pictures), world.pictures).tolist()
    clusters = dict.fromkeys(TASKS, labels) if clustered else None
    resamples = Resamples.draw(dict.fromkeys(TASKS, world.rows), clusters=clusters)
    truths = [_metrics(world.truth(arm)) for arm in (0, 1)]
    truth = {**truths[0], "difference": truths[0]["bwt"] - truths[1]["bwt"]}
    found = {name: [] for name in truth}
    for count in _chunks(studies):
        points, drawn = zip(*(_estimates(resamples, cells, count) for cells in world.draw(random, count)), strict=True)
        estimate = {**points[0], "difference": points[0]["bwt"] - points[1]["bwt"]}
        replicates = {**drawn[0], "difference": drawn[0]["bwt"] - drawn[1]["bwt"]}
        for name, true in truth.items():
            ceiling = 0.0 if name == "fm" else None
            for study in range(count):
                value = float(estimate[name][study])
                low, high = statistics.interval(value, replicates[name][:, study], ceiling=ceiling)
                found[name].append((low - 1e-9 <= true <= high + 1e-9, value - true))
    return {
        name: {
            "coverage": round(100 * float(np.mean([held for held, _ in pairs])), 2),
            "bias": round(float(np.mean([error for _, error in pairs])), 3),
        }
        for name, pairs in found.items()
    }


def _estimates(resamples: Resamples, cells: dict[str, Array], count: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """The metrics of every study (studies,), and of all replicates (B, studies)."""
    shape = (count, len(TASKS) + 1, len(TASKS))
    point = np.stack([cells[task].mean(axis=1) for task in TASKS], axis=-1).reshape(shape)
    drawn = resamples.matrices(cells, TASKS)
    return _metrics(point), _metrics(drawn.reshape(len(drawn), *shape))


def _chunks(studies: int) -> Iterator[int]:
    while studies > 0:
        yield min(CHUNK, studies)
        studies -= CHUNK
