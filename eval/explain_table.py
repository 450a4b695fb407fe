"""What explains forgetting as tables: drift and Fisher risk by stage, and what goes along with forgetting."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eval.explain import SIDES, UNITS
from eval.meters import PAIRS
from eval.table import Sheet
from eval.words import ARROW, MINUS, NONE, SCORE_NAMES, number, short

Json = dict[str, Any]
PAIR_NAMES = {pair: pair.replace("_to_", ARROW) for pair in PAIRS}
UNIT_NAMES = {"sequence": "an answer", "token": "a token"}
_LOG_NAMES = {
    "reward_variance": "reward variance a prompt",
    "zero_variance": "share of groups without a signal",
    "grad_norm": "gradient norm",
    "grad_norm_right": "gradient norm of all-right groups",
    "grad_norm_mixed": "gradient norm of mixed groups",
    "grad_norm_wrong": "gradient norm of all-wrong groups",
}
_FISHER_NAMES = {
    "risk": "Fisher risk of the update",
    "diagonal": "Fisher risk, diagonal",
    "per_norm": "Fisher risk a squared gradient norm",
}
EFFECT_NAMES = {"change": "change in the stage", "bwt": "change since learned"}
HOW = (
    "Drift and Fisher risk were not measured in this run. To add them, without scoring anything again: cpt-rft drift"
    " EXPERIMENT 'evaluation.drift={rows: 16, samples: 4}' 'evaluation.fisher={rows: 16, group: 8, scores: 64}'"
)


def cause_name(cause: str) -> str:
    """A cause in words.

    >>> cause_name("log.grad_norm"), cause_name("drift.base_to_model.new.token").isascii()
    ('gradient norm', False)
    """
    kind, *path = cause.split(".")
    if kind == "log":
        return _LOG_NAMES[path[0]]
    if kind == "fisher":
        return _FISHER_NAMES[path[1]]
    pair, side, unit = path
    return f"KL {PAIR_NAMES[pair]}, {side} prompts, {UNIT_NAMES[unit]}"


def small(value: float | None) -> str:
    """Three digits, whatever the size, with a true minus sign.

    >>> small(0.000123456), small(1234.5), small(None) == NONE
    ('0.000123', '1.23e+03', True)
    """
    return NONE if value is None else f"{value:.3g}".replace("-", MINUS)


def explain_sheets(results: Json) -> list[Sheet]:
    """All tables of this kind that there is something for."""
    found = [relation_sheet(results)] if results["explained"] else []
    if any(entry["drift"] for _, entries in _by_stage(results) for entry in entries):
        found += [drift_sheet(results, unit) for unit in UNITS]
    if any(entry["fisher"] for _, entries in _by_stage(results) for entry in entries):
        found += [risk_sheet(results), claim_sheet(results)]
    return found


def markdown(results: Json) -> str:
    """The tables for ``results/``, or how to get them."""
    found = explain_sheets(results)
    return "\n".join(sheet.markdown() for sheet in found) if found else f"{HOW}\n"


def relation_sheet(results: Json) -> Sheet:
    """Spearman's coefficient of everything measured against what was forgotten."""
    rows = []
    for entry in results["explained"]:
        cells = [_coefficient(entry[score]) for score in SCORE_NAMES]
        inside = "; ".join(f"{name} {small(rho)}" for name, rho in entry["strict"]["by_method"].items())
        counts = (str(entry["points"]), str(entry["sequences"]))
        rows.append((cause_name(entry["cause"]), EFFECT_NAMES[entry["effect"]], inside, *counts, *cells))
    heads = ("what", "against", "within a method, strict", "stages", "sequences", *SCORE_NAMES.values())
    note = (
        "Spearman's rank correlation over stages, methods and seeds: below zero, more of it goes along with more"
        " forgetting. Correlation only: stage number, method and prompt style move both sides. In brackets 95 %"
        " bootstrap intervals over whole sequences, where there are at least four."
    )
    return Sheet("What goes along with forgetting", heads, tuple(rows), 3, note)


def drift_sheet(results: Json, unit: str) -> Sheet:
    """KL in nats by method and stage."""
    rows = []
    for name, entries in _by_stage(results):
        if not (measured := [entry for entry in entries if entry["drift"]]):
            continue
        cells = [
            _spanned([e["drift"][pair][side][unit] for e in measured if side in e["drift"][pair]])
            for pair in PAIRS
            for side in SIDES
        ]
        rows.append((name, _stage_name(measured), str(len(measured)), _mean_change(measured), *cells))
    heads = ("method", "stage", "seeds", "change", *(f"{PAIR_NAMES[pair]}, {side}" for pair in PAIRS for side in SIDES))
    note = (
        "Nats, exact over the vocabulary at each position of sequences sampled from the first model of a pair, on dev"
        " prompts of the new task and of all old ones, in the prompt style of training; start: of the stage. In"
        " brackets 95 % intervals over prompts; values and ends are means over the seeds. Change: points of the old"
        " tasks in the stage, strict."
    )
    return Sheet(f"Drift {UNIT_NAMES[unit]}", heads, tuple(rows), 2, note)


def risk_sheet(results: Json) -> Sheet:
    """G'Fg of both kinds of update from each stage's start."""
    rows = []
    for name, entries in _by_stage(results):
        if not (measured := [entry for entry in entries if entry["fisher"]]):
            continue
        parts = {kind: [e["fisher"][kind] for e in measured if e["fisher"][kind]] for kind in ("sft", "rft", "grpo")}
        exact = [_spanned([part["risk"] for part in parts[kind]]) for kind in parts]
        rest = [
            _mean([part[key] for part in parts[kind]]) for key in ("diagonal", "per_norm") for kind in ("sft", "grpo")
        ]
        rows.append((name, _stage_name(measured), str(len(measured)), _mean_change(measured), *exact, *rest))
    names = ("g'Fg SFT", "g'Fg RFT, centred", "g'Fg GRPO")
    more = ("diagonal SFT", "diagonal GRPO", "g'Fg / g'g SFT", "g'Fg / g'g GRPO")
    note = (
        "What one update from the stage's start risks on the old tasks, both kinds on the same prompts in the prompt"
        " style of the method's training; F from answers that the start gives to dev prompts of the old tasks. In"
        " brackets 95 % intervals over these prompts. AdamW divides a gradient by its size, so the last two columns are"
        " nearer to what a step does."
    )
    return Sheet("Fisher risk", ("method", "stage", "seeds", "change", *names, *more), tuple(rows), 2, note)


def claim_sheet(results: Json) -> Sheet:
    """The claim of paper 1: the risk of RFT on a prompt is the reward variance times that of SFT."""
    rows = []
    for name, method in results["methods"].items():
        found = [e["fisher"]["claim"] for seed in method["seeds"].values() for e in seed["stages"] if e["fisher"]]
        found = [claim for claim in found if claim.get("sft")]
        if not found:
            continue
        measured = [claim["rft"] / claim["sft"] for claim in found]
        predicted = [claim["predicted"] / claim["sft"] for claim in found]
        variance = _mean([claim["reward_variance"] for claim in found])
        below = sum(value <= 0.25 for value in measured)
        spread = f"{small(float(np.median(measured)))}\n[{small(min(measured))}, {small(max(measured))}]"
        guess = f"{small(float(np.median(predicted)))}\n[{small(min(predicted))}, {small(max(predicted))}]"
        rows.append((name, str(len(found)), variance, spread, guess, f"{below} of {len(found)}"))
    heads = ("method", "stages", "reward variance", "risk RFT / SFT", "variance predicts", "at most 1/4")
    note = (
        "Paper 1: E[R(g of one sampled answer)] = Var[reward] R(g of the label), so at most a quarter. Mean over"
        " prompts, gradients of single answers summed over their tokens; median over stages and seeds, in brackets the"
        " least and the most."
    )
    return Sheet("The reward variance and the risk", heads, tuple(rows), 1, note)


def _by_stage(results: Json) -> list[tuple[str, list[Json]]]:
    """By method and number of the stage the entries of all seeds of the usual order."""
    found = []
    for name, method in results["methods"].items():
        seeds = [seed for seed in method["seeds"].values() if seed["order_index"] == 0]
        for place in range(max((len(seed["stages"]) for seed in seeds), default=0)):
            found.append((name, [seed["stages"][place] for seed in seeds]))
    return found


def _stage_name(entries: Sequence[Json]) -> str:
    tasks = entries[0]["tasks"]
    return f"{entries[0]['stage']} {short(tasks[0]) if len(tasks) == 1 else 'all tasks'}"


def _mean_change(entries: Sequence[Json]) -> str:
    values = [entry["change"]["strict"] for entry in entries if entry["change"]["strict"] is not None]
    return number(float(np.mean(values))) if values else NONE


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return small(float(np.mean(known))) if known else NONE


def _spanned(spans: Sequence[Sequence[float]], text: Callable[[float], str] = small) -> str:
    """Mean of values and of the ends of their intervals."""
    if not spans:
        return NONE
    value, low, high = np.mean(np.array(spans), axis=0).tolist()
    return f"{text(value)}\n[{text(low)}, {text(high)}]"


def _coefficient(found: Json) -> str:
    if found["rho"] is None:
        return NONE
    value = f"{found['rho']:+.2f}".replace("-", MINUS)
    if found["interval"] is None:
        return value
    low, high = (f"{end:.2f}".replace("-", MINUS) for end in found["interval"])
    return f"{value}\n[{low}, {high}]"
