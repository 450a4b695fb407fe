"""Carry mixtures of methods at equal learning from a run on dev to a run on test (`cpt-rft match`).

What methods learned on the rows of dev chooses which mixtures of learning rates are compared; the run on test holds
them fixed, so that its rows choose nothing. Both runs must train and ask in the same way; seeds may differ.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from cpt_rft.config.load import dump
from cpt_rft.files import write_json_atomic
from eval.contract import differences
from eval.equal import matched
from eval.records import RecordError
from eval.results import open_builder
from eval.runs import MATCHING_NAME, Run

Json = dict[str, Any]
#: Keys that may differ: which rows are scored, how many, and what is measured besides.
_FREE = {
    "evaluation": ("split", "rows", "batch_size", "base_samples", "general", "drift", "fisher"),
    "data": ("dev", "test", "general"),
}


def match_on_dev(dev: Path, run: Path) -> Json:
    """Choose on `dev`, write ``matching.json`` into `run`, and return its content.

    Raises:
        IncompleteRunError: `dev` is not complete, or one of both is no run.
        RecordError: `dev` is not on dev or `run` not on test, both differ in what was learned, or no families meet.
    """
    builder, _ = open_builder(dev)
    chooser, target = builder.run, Run.open(run)
    for side, split in ((chooser, "dev"), (target, "test")):
        if side.experiment.evaluation.split != split:
            problem = f"{side.directory} is scored on {side.experiment.evaluation.split}, not on {split}."
            raise RecordError(problem, "name the run on dev first, then the run on test")
    chains = [chain for chain in builder.chains if not builder.joint(chain.method)]
    keys = ("first", "second", "level", "weights")
    pairs = [
        {key: entry[key] for key in keys}
        for entry in matched(chooser, chains, builder.values)
        if entry["on"] == "learned" and entry["weights"]
    ]
    if not pairs:
        raise RecordError(
            f"{dev} has no two families of learning rates that reach one accuracy.", "add learning rates between them"
        )
    _refuse_others(chooser, target, sorted({name for pair in pairs for part in pair["weights"] for name in part}))
    chosen: Json = {"chosen_by": chooser.experiment.name, "split": "dev", "pairs": pairs}
    write_json_atomic(run / MATCHING_NAME, chosen)
    return chosen


def _refuse_others(chooser: Run, target: Run, names: Iterable[str]) -> None:
    """Mixtures are of methods, so both runs must mean the same by their names."""
    sides = []
    for run in (chooser, target):
        whole = dump(run.experiment)
        kept = {key: {k: v for k, v in whole[key].items() if k not in free} for key, free in _FREE.items()}
        methods = {name: whole["methods"].get(name) for name in names}
        engines = {key: dump(engine) for key, engine in run.experiment.engines.items()}
        sides.append({**kept, "methods": methods, **engines, **{key: whole[key] for key in ("base_model", "tasks")}})
    found = differences(*sides)
    if found:
        problem = f"{chooser.directory} and {target.directory} learned differently: {'; '.join(found[:3])}."
        raise RecordError(problem, "choose on a run with the same settings but for its rows and seeds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``cpt-rft match``."""
    parser.add_argument("dev", type=Path, help="a run directory that was scored on dev")
    parser.add_argument("run", type=Path, help="the run directory on test whose report is to use what dev chose")


def main(arguments: argparse.Namespace) -> None:
    """Run ``cpt-rft match``."""
    console = Console(highlight=False, soft_wrap=True)
    for pair in match_on_dev(arguments.dev, arguments.run)["pairs"]:
        console.print(f"{pair['first']} against {pair['second']}: where both learned {pair['level']:.1f} on dev")
    console.print(f"written: {arguments.run / MATCHING_NAME}; 'cpt-rft report {arguments.run}' uses it")
