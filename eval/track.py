"""Training logs and results of a run for TensorBoard or Weights & Biases (`cpt-rft track`); nothing here needs either.

The logs of a run are the record; a tracker is a copy for who likes its pages, made during a run or after it, with any
engine. The extras ``tensorboard`` and ``wandb`` bring what writes them.
"""

import argparse
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from cpt_rft.errors import UserError, install_extra
from eval.runs import Chain, Run

#: Takes a name, a value and a step counted over the whole sequence.
Write = Callable[[str, float, int], None]


def points(run: Run, chain: Chain) -> Iterator[tuple[str, float, int]]:
    """Every number of every log line of a chain, the steps counted on from stage to stage."""
    done = 0
    for stage in chain.stages:
        lines = run.train_log(stage)
        for line in lines:
            for key, value in line.items():
                if key != "step" and isinstance(value, int | float):
                    yield f"train/{key}", float(value), done + int(line["step"])
        done += len(lines)


def _module(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed.", install_extra(extra)) from error


@contextmanager
def _tensorboard(out: Path, name: str, config: dict[str, Any]) -> Iterator[Write]:
    writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(out / name))
    try:
        yield lambda key, value, step: writer.add_scalar(key, value, step)
    finally:
        writer.close()


@contextmanager
def _wandb(out: Path, name: str, config: dict[str, Any]) -> Iterator[Write]:
    wandb = _module("wandb", "wandb")
    out.mkdir(parents=True, exist_ok=True)
    # The mode (online, offline) is the user's, from the variables of W&B itself.
    tracked = wandb.init(project=config["name"], name=name, dir=str(out), config=config, reinit=True)
    try:
        yield lambda key, value, step: tracked.log({key: value, "step": step})
    finally:
        tracked.finish()


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}


def track(directory: Path, tracker: str, out: Path) -> int:
    """Hand every chain of a run over; returns how many numbers were written.

    Raises:
        UserError: The tracker is not installed.
        IncompleteRunError: There is no run here.
    """
    run, count = Run.open(directory), 0
    config = run.experiment.model_dump(mode="json")
    for chain in run.chains:
        found = list(points(run, chain))
        if found:
            with TRACKERS[tracker](out, f"{chain.method}/order{chain.order_index}/seed{chain.seed}", config) as write:
                for key, value, step in found:
                    write(key, value, step)
            count += len(found)
    return count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``cpt-rft track``."""
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--to", choices=sorted(TRACKERS), required=True, help="which tracker")
    parser.add_argument("--out", type=Path, required=True, help="directory of the tracker's files")


def main(arguments: argparse.Namespace) -> None:
    """Run ``cpt-rft track``."""
    count = track(arguments.run, arguments.to, arguments.out)
    Console().print(f"{count} numbers written below {arguments.out}")
