"""How long a whole matrix takes: seven checkpoints on seven tasks of the miniature, 500 rows each, in one prompt style.

Usage: python benchmarks/evaluation.py [--checkpoints DIR...] [--rows N] [--rounds N] [--out DIR]. Two processes at one
thread each share the checkpoints, as the jobs of a run do. Starting them, importing, loading and scoring count, drawing
the rows does not: a run has them. Seconds of two cores are half the processor time of all that takes part, which other
work on the machine disturbs least; the clock is told beside it. ``python benchmarks/table.py`` puts both into
docs/speed.md.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed import machine

from cpt_rft.config.schema import EvaluationConfig
from cpt_rft.data.parquet import write_split
from cpt_rft.miniature.tasks import TASKS
from cpt_rft.miniature.world import make_rows
from cpt_rft.prompts import STYLES
from eval.records import read_records, record_path

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "cpt_rft/miniature/base"
CORES = 2
#: The longest that a matrix of 7 x 7 x 500 may take, in seconds of two cores.
BOUND = 180.0


def draw(folder: Path, rows: int) -> dict[str, Path]:
    """The test rows of every task."""
    data = {task: folder / f"{task}.parquet" for task in TASKS}
    for task, path in data.items():
        write_split(path, make_rows(task, "test", rows, seed=0))
    return data


def config_of(style: str) -> EvaluationConfig:
    """As the miniature is evaluated, in one style."""
    return EvaluationConfig.model_validate({"styles": (style,), "max_new_tokens": 24})


def answer(checkpoint: str, data: Sequence[str], out: str, style: str) -> None:
    """One row of the matrix."""
    from eval.harness import evaluate_checkpoint

    files = {Path(path).stem: Path(path) for path in data}
    evaluate_checkpoint(Path(checkpoint), files, Path(out), config_of(style), "miniature")


def used() -> float:
    """Processor seconds of this process's children that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def matrix(checkpoints: Sequence[Path], data: dict[str, Path], out: Path, style: str) -> dict[str, float]:
    """Fill a matrix; returns seconds of two cores, seconds of the clock, answers and their tokens."""
    shares = [
        [(str(path), str(out / str(row))) for row, path in enumerate(checkpoints)][n::CORES] for n in range(CORES)
    ]
    parts = [part for part in shares if part]
    before, started = used(), time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--work", json.dumps([part, [str(path) for path in data.values()], style])],
            env=environment,
        )
        for part in parts
    ]
    if any([worker.wait() for worker in workers]):
        raise SystemExit("A worker failed; its words are above.")
    clock, seconds = time.monotonic() - started, (used() - before) / CORES
    cells = [read_records(record_path(Path(to), task, style)) for part in parts for _, to in part for task in data]
    answers = [record for cell in cells for record in cell]
    return {
        "seconds_of_two_cores": round(seconds, 2),
        "clock": round(clock, 2),
        "answers": len(answers),
        "tokens": sum(record.tokens for record in answers),
    }


def measure(checkpoints: Sequence[Path], rows: int, rounds: int) -> dict[str, Any]:
    """Both styles, in turn, so many times."""
    told: dict[str, list[dict[str, float]]] = {style: [] for style in STYLES}
    with tempfile.TemporaryDirectory() as folder:
        data = draw(Path(folder), rows)
        for number in range(rounds):
            for style in STYLES:
                told[style].append(matrix(checkpoints, data, Path(folder) / f"{style}{number}", style))
    middle = {style: statistics.median(each["seconds_of_two_cores"] for each in told[style]) for style in STYLES}
    whole = (len(checkpoints), rows) == (7, 500)
    return {
        "what": f"{len(checkpoints)} x {len(TASKS)} x {rows} answers",
        "command": f"python benchmarks/evaluation.py --rows {rows} --rounds {rounds}",
        "checkpoints": "the shipped base, once a row" if set(checkpoints) == {BASE} else "of a chain",
        "machine": machine("cpu"),
        "rounds": told,
        "seconds_of_two_cores": middle,
        "bound": BOUND if whole else None,
    }


def main() -> None:
    """Measure, keep and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, nargs="+", default=[BASE] * 7, help="one a row (default: the base)")
    parser.add_argument("--rows", type=int, default=500, help="rows a task (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks/evaluation")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        part, data, style = options.work
        for checkpoint, out in part:
            answer(checkpoint, data, out, style)
        return
    found = measure(options.checkpoints, options.rows, options.rounds)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "matrix.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: found[key] for key in ("what", "seconds_of_two_cores", "bound")}))


if __name__ == "__main__":
    main()
