"""Two methods held against each other where they are equal in something: what they learned, or what they cost.

A family is one method at several settings; its settings are points on a curve. Where one family reaches a level between
two of its settings, the two are mixed linearly. Mixtures are chosen once, from point estimates (on dev); a difference
of mixtures is then a fixed linear combination of the methods' values, so that the paired bootstrap holds for it as it
does for any difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """One setting of a family.

    Attributes:
        name: The method.
        place: What is to be equal: accuracy right after learning, or cost.
        order: Where the setting stands in its family: the learning rate.
    """

    name: str
    place: float
    order: float


@dataclass(frozen=True)
class Match:
    """Where two families are equal.

    Attributes:
        level: The place.
        first: Weights of the first family's methods, which sum to 1.
        second: Those of the second's.
    """

    level: float
    first: dict[str, float]
    second: dict[str, float]

    @property
    def weights(self) -> dict[str, float]:
        """First minus second as one linear combination."""
        return {**self.first, **{name: -weight for name, weight in self.second.items()}}


def rising(points: Sequence[Point]) -> list[Point]:
    """The part of a curve that is worth having: by setting, each point that lies above all before it.

    A learning rate that is so high that less is learned than at a lower one has no place here.
    """
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: point.order):
        if not kept or point.place > kept[-1].place:
            kept.append(point)
    return kept


def mixture(points: Sequence[Point], level: float) -> dict[str, float] | None:
    """Weights of the two neighbours of a level on a rising curve, one of them if it is met; none outside the curve.

    >>> mixture([Point("low", 10.0, 1), Point("high", 20.0, 2)], 12.5)
    {'low': 0.75, 'high': 0.25}
    """
    for below, above in pairwise(points):
        if below.place <= level <= above.place:
            share = (level - below.place) / (above.place - below.place)
            parts = {below.name: 1 - share, above.name: share}
            return {name: weight for name, weight in parts.items() if weight}
    return {points[0].name: 1.0} if len(points) == 1 and points[0].place == level else None


def match(first: Sequence[Point], second: Sequence[Point]) -> Match | None:
    """The middle of what both curves reach, and who reaches it there; none if they reach nothing in common."""
    one, other = rising(first), rising(second)
    low, high = max(one[0].place, other[0].place), min(one[-1].place, other[-1].place)
    if low > high:
        return None
    level = (low + high) / 2
    mine, theirs = mixture(one, level), mixture(other, level)
    return Match(level, mine, theirs) if mine and theirs else None


def combined(weights: Mapping[str, float], values: Mapping[str, Array]) -> Array:
    """The linear combination of arrays of one shape."""
    return np.asarray(sum(weight * values[name] for name, weight in weights.items()))
