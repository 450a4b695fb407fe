"""Fair comparisons of a run: what was lost of ability and what of form; methods at equal learning and at equal cost."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.costs import chain_tokens
from eval.matched import Match, Point, combined, match, rising
from eval.metrics import HEADLINE
from eval.records import RecordError
from eval.runs import MATCHING_NAME, Chain, Run
from eval.statistics import spread

Array = NDArray[np.float64]
Json = dict[str, Any]
#: Headline metrics of a chain in a style and score: on the data, and on all replicates.
Values = Callable[[Chain, str, str], tuple[dict[str, Array], dict[str, Array]]]
#: What two methods of a family may differ in.
SETTINGS = {"name", "lr", "epochs"}


def losses(chains: Sequence[Chain], style: str, values: Values) -> Json:
    """Backward transfer in two parts: what the model can do (any form), and the form that it keeps (the rest)."""
    found = {score: [values(chain, style, score) for chain in chains] for score in ("strict", "lenient")}
    points = {score: np.array([point["bwt"] for point, _ in pairs]) for score, pairs in found.items()}
    drawn = {score: np.mean([drawn["bwt"] for _, drawn in pairs], axis=0) for score, pairs in found.items()}
    form = (points["strict"] - points["lenient"]).tolist()
    return {
        "capability": spread(points["lenient"].tolist(), drawn["lenient"], "capability"),
        "form": spread(form, drawn["strict"] - drawn["lenient"], "form"),
    }


def families(run: Run, names: Sequence[str]) -> dict[str, list[str]]:
    """Methods that differ in nothing but learning rate and epochs, under what their names have in common.

    A method alone in its family keeps its name.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        settled = run.experiment.methods[name].model_dump(mode="json", exclude=SETTINGS)
        groups.setdefault(json.dumps(settled, sort_keys=True), []).append(name)
    found = {}
    for members in groups.values():
        label = _shared_name(members)
        found[label if label not in found else members[0]] = members
    return found


def _shared_name(names: Sequence[str]) -> str:
    """What names begin with, up to an underscore; the first of them if that is nothing.

    >>> _shared_name(["sft_5e-5", "sft_5e-4"]), _shared_name(["sft", "sft_slow"]), _shared_name(["slow", "fast"])
    ('sft', 'sft', 'slow')
    """
    label = names[0]
    while label and not all(name == label or name.startswith(f"{label}_") for name in names):
        label = label.rpartition("_")[0]
    return label or names[0]


def matched(run: Run, chains: Sequence[Chain], values: Values) -> list[Json]:
    """Every two families where both have several settings, at equal learning and at equal cost; RFT before SFT.

    A run on dev chooses its mixtures by its own values. A run on test takes those that a run on dev chose for it
    (`eval.matching`), or has none at equal learning: what it shows may not choose. Tokens are of training, so that
    equal cost reads no row.
    """
    names = list(dict.fromkeys(chain.method for chain in chains))
    of = {name: [chain for chain in chains if chain.method == name] for name in names}
    several = {label: members for label, members in families(run, names).items() if len(members) > 1}
    if len(several) < 2:
        return []
    found = {name: _values(run, of[name], values) for members in several.values() for name in members}
    places = {
        "learned": {name: float(point["learned"]) for name, (point, _) in found.items()},
        "tokens": {name: float(np.mean([chain_tokens(run, chain) for chain in of[name]])) for name in found},
    }
    carried, entries = carried_to(run), []
    for one, other in combinations(several, 2):
        kinds = [run.experiment.methods[several[label][0]].kind for label in (one, other)]
        first, second = (other, one) if kinds[0] == "sft" != kinds[1] else (one, other)
        for on, place in places.items():
            if on == "tokens" and not all(place.values()):
                continue  # not every log counts them
            curves = [_curve(run, several[label], place) for label in (first, second)]
            if on == "learned" and run.experiment.evaluation.split == "test":
                met = carried.get((first, second))
                chosen_on = None if met is None else "dev"
            else:
                met = match(*curves)
                chosen_on = None if on == "tokens" else run.experiment.evaluation.split
            entries.append(
                {"first": first, "second": second, "on": on, "chosen_on": chosen_on, **_entry(curves, met, found)}
            )
    return entries


def carried_to(run: Run) -> dict[tuple[str, str], Match]:
    """The mixtures that a run on dev chose for this one, by both families; none if `cpt-rft match` was not given.

    Raises:
        RecordError: The file was not written by it.
    """
    path = run.directory / MATCHING_NAME
    if not path.is_file():
        return {}
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))["pairs"]
        found = {(p["first"], p["second"]): Match(float(p["level"]), *map(dict, p["weights"])) for p in pairs}
        methods = {name for met in found.values() for name in met.weights}
    except (ValueError, TypeError, KeyError) as error:
        raise RecordError(f"{path} is broken ({error}).", "give 'cpt-rft match' again") from error
    if unknown := sorted(methods - run.experiment.methods.keys()):
        raise RecordError(f"{path}: this run has no method {unknown[0]}.", "give 'cpt-rft match' again")
    return found


def _values(run: Run, chains: Sequence[Chain], values: Values) -> tuple[dict[str, float], dict[str, Array]]:
    """Native, strict metrics of a method, mean over its seeds and orders: on the data and on all replicates."""
    style = run.experiment.methods[chains[0].method].style
    pairs = [values(chain, style, "strict") for chain in chains]
    points = {name: float(np.mean([point[name] for point, _ in pairs])) for name in HEADLINE}
    return points, {name: np.mean([drawn[name] for _, drawn in pairs], axis=0) for name in HEADLINE}


def _curve(run: Run, names: Sequence[str], place: Mapping[str, float]) -> list[Point]:
    return [Point(name, place[name], run.experiment.methods[name].lr) for name in names]


def _entry(
    curves: Sequence[Sequence[Point]],
    met: Match | None,
    found: Mapping[str, tuple[dict[str, float], dict[str, Array]]],
) -> Json:
    """The difference of two mixtures, and what each curve reaches; without mixtures, or a part of them, that alone."""
    reach = [[rising(curve)[0].place, rising(curve)[-1].place] for curve in curves]
    if met is None or not met.weights.keys() <= found.keys():
        return {"reach": reach, "level": None, "weights": None, "difference": None}
    difference = {
        name: spread(
            [float(combined(met.weights, {method: np.array(point[name]) for method, (point, _) in found.items()}))],
            combined(met.weights, {method: drawn[name] for method, (_, drawn) in found.items()}),
            f"difference of {name}",
        )
        for name in HEADLINE
    }
    return {"reach": reach, "level": met.level, "weights": [met.first, met.second], "difference": difference}
