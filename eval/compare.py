"""Two run directories side by side (`cpt-rft compare`): what differs in their settings, and in what they found."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from cpt_rft.config.load import dump
from eval.contract import differences
from eval.records import RecordError, refuse_mixed
from eval.results import SCORES, open_builder
from eval.runs import Chain, Run
from eval.statistics import spread
from eval.table import Sheet
from eval.words import METRIC_NAMES, NONE, SCORE_NAMES, bounds, number, signed

Json = dict[str, Any]


def compare(first: Path, second: Path) -> list[Sheet]:
    """The tables: keys of the configuration that differ, and every method that both hold, second minus first.

    Rows are the same in both runs, so the difference is paired over examples, and over the seeds and orders that both
    hold.

    Raises:
        RecordError: The runs are of different evaluation contracts or of different rows, or share no complete method.
    """
    builders = [open_builder(directory, partial=True)[0] for directory in (first, second)]
    runs = [builder.run for builder in builders]
    contracts = {str(run.directory): (run.contract(), run.base_eval) for run in runs}
    refuse_mixed(contracts)
    _refuse_other_rows(runs)
    rows: list[tuple[str, ...]] = []
    for name in (name for name in builders[0].methods if name in builders[1].methods):
        if not builders[0].joint(name):
            pairs = _pairs(*(builder.of(name) for builder in builders))
            rows += _rows(name, pairs, builders) if pairs else []
    if not rows:
        raise RecordError(f"{first} and {second} share no complete sequence of one method.", "finish both runs")
    heads = ("method", "score", "metric", "first", "second", "difference", "over seeds")
    note = "Second minus first, native prompt style; 95 % intervals, paired over examples. First: {}; second: {}."
    found = Sheet("Two runs", heads, tuple(rows), 3, note.format(first.name, second.name))
    return [settings_sheet(*runs), found]


def settings_sheet(first: Run, second: Run) -> Sheet:
    """Keys of the configurations that differ, output and name left out."""
    configs = [
        {k: v for k, v in dump(run.experiment).items() if k not in ("output", "name")} for run in (first, second)
    ]
    lines = (line.split(": ", 1) for line in differences(*configs))
    rows = tuple((key, *both.split(" against ", 1)) for key, both in lines)
    return Sheet("What differs in the settings", ("key", "first", "second"), rows, 3, "" if rows else "Nothing.")


def _refuse_other_rows(runs: Sequence[Run]) -> None:
    one, other = runs
    for task, style in one.wanted():
        if (task, style) not in set(other.wanted()):
            raise RecordError(
                f"{other.directory} was not asked about {task} ({style}).", "compare runs of the same tasks"
            )
        if one.cell(one.base_eval, task, style).ids != other.cell(other.base_eval, task, style).ids:
            raise RecordError(f"{other.directory} holds other rows of {task}.", "compare runs on the same data")


def _pairs(mine: Sequence[Chain], theirs: Sequence[Chain]) -> list[tuple[Chain, Chain]]:
    """Chains of the same order and seed."""
    by_key = {(chain.order, chain.seed): chain for chain in theirs}
    return [(chain, by_key[chain.order, chain.seed]) for chain in mine if (chain.order, chain.seed) in by_key]


def _rows(name: str, pairs: Sequence[tuple[Chain, Chain]], builders: Sequence[Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    styles = [builder.run.experiment.methods[name].style for builder in builders]
    for score in SCORES:
        found = [
            [builder.values(chain, style, score) for builder, style, chain in zip(builders, styles, pair, strict=True)]
            for pair in pairs
        ]
        for metric, label in METRIC_NAMES.items():
            values = np.array([[float(points[metric]) for points, _ in sides] for sides in found])
            drawn = np.mean([sides[1][1][metric] - sides[0][1][metric] for sides in found], axis=0)
            part = spread((values[:, 1] - values[:, 0]).tolist(), drawn, f"difference of {metric}")
            shown = f"{signed(part['value'])}\n{bounds(part['examples'])}"
            first, second = (number(float(value)) for value in values.mean(axis=0))
            over = bounds(part["seeds"]) if part["seeds"] else NONE
            rows.append((name, SCORE_NAMES[score], label, first, second, shown, over))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``cpt-rft compare``."""
    parser.add_argument("first", type=Path, help="a run directory")
    parser.add_argument("second", type=Path, help="another, under the same contract and on the same rows")


def main(arguments: argparse.Namespace) -> None:
    """Run ``cpt-rft compare``."""
    for sheet in compare(arguments.first, arguments.second):
        Console().print(sheet.rich())
