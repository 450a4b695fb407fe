"""The paper's claims beside what a run found: reproduced, direction only, or not.

A verdict needs the whole interval, the wider of that over examples and that over seeds, so that a lucky sample is no
reproduction. ``reproduced``: the sign is settled and the paper's number lies within the interval. ``direction only``:
the sign is settled and the paper's, the number is not. ``not``: anything else. Where the claim is that nothing
changes, ``reproduced`` needs the interval within `SMALL` points of zero, and ``direction only`` the number alone.
"""

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any, Literal

from eval.results import NATIVE
from eval.words import METRIC_NAMES, NONE, bounds, short, signed

Json = dict[str, Any]
Verdict = Literal["reproduced", "direction only", "not", "not run"]
#: What counts as no change, in points: as in eval.results, where arms learned about as much.
SMALL = 3.0


def paper_claims() -> list[Json]:
    """The claims as data: metric, methods, the paper's number in points, and its source."""
    text = (resources.files("eval.report") / "paper.json").read_text(encoding="utf-8")
    return [dict(claim) for claim in json.loads(text)]


def judge(value: float, ours: float, interval: Sequence[float], *, nothing: bool = False) -> Verdict:
    """The verdict on a number of the paper, given ours and its interval.

    >>> [judge(8.1, 3.0, span) for span in ((2.0, 9.0), (2.0, 5.0), (-1.0, 9.0))]
    ['reproduced', 'direction only', 'not']
    >>> [judge(0.5, ours, (ours - 2, ours + 2), nothing=True) for ours in (0.9, 2.0, 4.0)]
    ['reproduced', 'direction only', 'not']
    """
    low, high = interval
    if nothing:
        return "reproduced" if low >= -SMALL and high <= SMALL else "direction only" if abs(ours) <= SMALL else "not"
    if low <= 0 <= high or (low > 0) != (value > 0):
        return "not"
    return "reproduced" if low <= value <= high else "direction only"


def wider(part: Json) -> list[float]:
    """The union of the interval over examples and, with several seeds, that over seeds."""
    spans = [span for span in (part["examples"], part["seeds"]) if span is not None]
    return [min(span[0] for span in spans), max(span[1] for span in spans)]


def claims(results: Json) -> list[Json]:
    """Every claim of the paper with what this run has to say on it: native prompt style, strict score."""
    found = []
    for claim in paper_claims():
        ours = _ours(results, claim)
        entry = {**claim, "ours": None, "interval": None, "verdict": "not run"}
        if ours is not None:
            value, interval = ours
            verdict = judge(claim["value"], value, interval, nothing=bool(claim.get("none")))
            entry |= {"ours": value, "interval": interval, "verdict": verdict}
        found.append(entry)
    return found


def _ours(results: Json, claim: Json) -> tuple[float, list[float]] | None:
    """Our number and its interval; none if the run lacks the method, the pair or the ability."""
    metric, first, second = claim["metric"], claim["first"], claim["second"]
    if second is None:
        summary = results["methods"].get(first, {}).get("summary", {}).get(NATIVE, {}).get("strict", {})
        general = summary.get("general", {})
        part = general[metric]["change"] if metric in general else summary.get(metric)
        return None if part is None else (part["value"], wider(part))
    for entry in results["comparisons"]:
        if {entry["first"], entry["second"]} == {first, second}:
            part = entry["views"][NATIVE]["strict"][metric]
            low, high = wider(part)
            same = entry["first"] == first
            return (part["value"], [low, high]) if same else (-part["value"], [-high, -low])
    return None


def rows(results: Json) -> tuple[tuple[str, ...], ...]:
    """The claims as cells of a table."""
    return tuple(
        (
            claim["claim"],
            METRIC_NAMES.get(claim["metric"], short(claim["metric"])),
            claim["first"] + (f" against {claim['second']}" if claim["second"] else ""),
            signed(claim["value"]),
            f"{signed(claim['ours'])}\n{bounds(claim['interval'])}" if claim["ours"] is not None else NONE,
            claim["verdict"],
        )
        for claim in claims(results)
    )
