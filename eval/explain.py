"""What explains forgetting: by stage what was forgotten, beside what the meters and the training log say of it.

A stage's *change* is that of the accuracy on the tasks learned before it, from its start to its end; *bwt* is the
change of each since right after it was learned. Both are in points, below zero where something was forgotten, in the
prompt style of training. What stands beside them are the drift (`eval.drift`), the Fisher risk of the update that the
method makes (`eval.fisher`) and means of the training log. A relation is Spearman's coefficient over stages:
correlation only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cpt_rft.files import read_json
from cpt_rft.manifest import read_manifest
from eval.meters import METERS, PAIRS, UPDATES, drift_path, fisher_path
from eval.runs import Chain, Run
from eval.statistics import LEVEL, generator

Json = dict[str, Any]
Array = NDArray[np.float64]
Effect = Literal["change", "bwt"]
#: Below so many points a coefficient says nothing, below so many sequences its interval.
MIN_POINTS, MIN_CHAINS = 5, 4
RESAMPLES = 499
DIGITS = 6
UNITS = ("sequence", "token")
SIDES = ("new", "old")
#: Means over a stage's steps, where a method logs them.
LOGGED = (
    *("reward_variance", "zero_variance", "grad_norm"),
    *("grad_norm_right", "grad_norm_mixed", "grad_norm_wrong"),
)


@dataclass(frozen=True)
class Cause:
    """Something that may go along with forgetting.

    Attributes:
        key: Path in a stage's entry.
        effect: What it is set against: drift from the base against ``bwt``, all else against the stage's ``change``.
    """

    key: tuple[str, ...]
    effect: Effect = "change"

    def of(self, stage: Json) -> float | None:
        """Its value at a stage, if it was measured."""
        value: Any = stage
        for part in self.key:
            value = value.get(part) if isinstance(value, Mapping) else None
        return value[0] if isinstance(value, list | tuple) else value


CAUSES = (
    *(
        Cause(("drift", pair, side, unit), "bwt" if "base" in pair else "change")
        for unit in UNITS
        for pair in (*PAIRS[2:], *PAIRS[:2])
        for side in SIDES
    ),
    Cause(("fisher", "own", "risk")),
    Cause(("fisher", "own", "diagonal")),
    Cause(("fisher", "own", "per_norm")),
    *(Cause(("log", key)) for key in LOGGED),
)


def stages(run: Run, chain: Chain, matrices: Mapping[str, Array], *, joint: bool) -> list[Json]:
    """One entry a stage of a chain.

    Args:
        run: The run.
        chain: The chain.
        matrices: R in the prompt style of training by ``strict`` and ``lenient``.
        joint: Whether all tasks are learned at once, so that none is old.
    """
    entries = []
    kind = run.experiment.methods[chain.method].kind
    for index, directory in enumerate(chain.stages, start=1):
        old = () if joint else chain.order[: index - 1]
        new = chain.order if joint else chain.order[index - 1 : index]
        entry = {
            "stage": index,
            "tasks": list(new),
            "change": {score: _change(matrix, index, since_learned=False) for score, matrix in matrices.items()},
            "bwt": {score: _change(matrix, index, since_learned=True) for score, matrix in matrices.items()},
            "drift": _drift(directory, new, old),
            "fisher": _fisher(directory, "sft" if kind == "sft" else "grpo"),
            "log": _logged(run.train_log(directory)),
        }
        entries.append(_rounded(entry))
    return entries


def _rounded(value: Any) -> Any:
    """Every number to as many digits as a JSON of results has."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _change(matrix: Array, index: int, *, since_learned: bool) -> float | None:
    """Mean change of the tasks before the ``index``-th (from 1) at its end; none for the first."""
    old = np.arange(index - 1)
    if not len(old):
        return None
    before = matrix[old + 1, old] if since_learned else matrix[index - 1, old]
    return float((matrix[index, old] - before).mean())


def _drift(stage: Path, new: Sequence[str], old: Sequence[str]) -> Json | None:
    """Drift by pair, on the prompts of the new and of all old tasks, a token and an answer; none if not measured."""
    found = {task: read_json(drift_path(stage / METERS, task)) for task in (*new, *old)}
    if not all(_is_of(each, stage) for each in found.values()):
        return None
    from eval.drift import estimates  # torch is needed only where there is something to estimate

    drift: Json = {}
    for pair in PAIRS:
        drift[pair] = {}
        for side, tasks in (("new", new), ("old", old)):
            if tasks:
                token, sequence = estimates([found[task][pair] for task in tasks])
                drift[pair][side] = {"token": [*vars(token).values()], "sequence": [*vars(sequence).values()]}
    return drift


def _is_of(found: Json, stage: Path) -> bool:
    """Whether a measurement is of the weights that the stage has now."""
    return bool(found) and found["terms"]["models"]["model"] == read_manifest(stage).checkpoint_sha256


def _fisher(stage: Path, own: str) -> Json | None:
    """The risk of each update, of the one that the method makes (``own``), and the paper's claim; none if not there."""
    found = read_json(fisher_path(stage / METERS))
    if not found or found["terms"]["start"] != read_manifest(stage).provenance["parent_sha256"]:
        return None
    updates = {name: _update(found["updates"][name]) for name in UPDATES}
    variance, sft, rft = (found["prompts"][key] for key in ("reward_variance", "sft", "rft"))
    claim: Json = {"reward_variance": float(np.mean(variance)), "rft": float(np.mean(rft))}
    if sft is not None:
        claim |= {"sft": float(np.mean(sft)), "predicted": float(np.mean(np.multiply(variance, sft)))}
    return {**updates, "own": updates[own], "claim": claim}


def _update(found: Json | None) -> Json | None:
    """An update's risk, also by the squared length of its gradient, which AdamW's steps do not depend on."""
    if found is None:
        return None
    norm = found["squared_norm"]
    per_norm = found["risk"][0] / norm if norm else None
    return {key: found[key] for key in ("risk", "diagonal", "squared_norm")} | {"per_norm": per_norm}


def _logged(lines: Sequence[Json]) -> Json:
    series = {key: [float(line[key]) for line in lines if line.get(key) is not None] for key in LOGGED}
    return {key: float(np.mean(values)) for key, values in series.items() if values}


def relations(methods: Mapping[str, Json]) -> list[Json]:
    """Every cause that was measured against what was forgotten, strict and in any form, over all stages but the first.

    The interval resamples whole sequences, since stages of one sequence are not independent.
    """
    found = []
    for cause in CAUSES:
        entry: Json = {"cause": ".".join(cause.key), "effect": cause.effect}
        for score in ("strict", "lenient"):
            chains = _pairs(methods, cause, score)
            merged = [pair for _, pairs in chains for pair in pairs]
            if len(merged) < MIN_POINTS:
                break
            by_method = {
                name: spearman([pair for other, pairs in chains if other == name for pair in pairs])
                for name in dict.fromkeys(name for name, _ in chains)
            }
            entry |= {"points": len(merged), "sequences": len(chains)}
            entry[score] = {
                "rho": spearman(merged),
                "interval": interval([pairs for _, pairs in chains], *cause.key, score),
                "by_method": by_method,
            }
        else:
            found.append(entry)
    return found


def _pairs(methods: Mapping[str, Json], cause: Cause, score: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """By sequence its method and its (cause, effect) at every stage where both are known."""
    chains = []
    for name, method in methods.items():
        for seed in method["seeds"].values():
            values = [(cause.of(stage), stage[cause.effect][score]) for stage in seed["stages"]]
            if pairs := [(x, y) for x, y in values if x is not None and y is not None]:
                chains.append((name, pairs))
    return chains


def spearman(pairs: Sequence[tuple[float, float]] | Array) -> float | None:
    """Spearman's rank correlation; none for few points, or where one side is all alike.

    >>> spearman([(1, 5), (2, 4), (3, 3), (4, 2), (5, 0)])
    -1.0
    """
    if len(pairs) < MIN_POINTS:
        return None
    ranks = stats.rankdata(pairs, axis=0)
    centred = ranks - ranks.mean(axis=0)
    x, y = np.sqrt((centred**2).sum(axis=0))
    return round(float(centred[:, 0] @ centred[:, 1] / (x * y)), 12) if x and y else None


def interval(chains: Sequence[Sequence[tuple[float, float]]], *path: str) -> list[float] | None:
    """Percentile bootstrap of the coefficient over whole sequences; none for few of them.

    Args:
        chains: The pairs of each sequence.
        path: Seed path.
    """
    if len(chains) < MIN_CHAINS:
        return None

    arrays = [np.array(pairs) for pairs in chains]

    def statistic(places: NDArray[np.int_]) -> float:
        value = spearman(np.concatenate([arrays[place] for place in places]))
        return 0.0 if value is None else value

    found = stats.bootstrap(
        (np.arange(len(chains)),),
        statistic,
        vectorized=False,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=generator("spearman", *path),
    ).confidence_interval
    return [float(found.low), float(found.high)]
