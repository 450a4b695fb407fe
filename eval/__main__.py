"""``python -m eval``: evaluate any checkpoint on tasks by name or on any parquet of the data contract."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console
from rich.progress import Progress, TaskID

from cpt_rft.config.contracts import CONTRACTS, Scorer
from cpt_rft.config.schema import GENERAL_NAMES, TASK_NAMES, DataConfig, EvaluationConfig
from cpt_rft.data.parquet import read_split
from cpt_rft.data.prepare import prepare
from cpt_rft.errors import UserError
from cpt_rft.prompts import PRESETS, STYLES
from eval.backends import BACKENDS, Backend
from eval.backends.openai import OpenAi
from eval.backends.vllm import Vllm
from eval.foreign import refuse_unfit
from eval.harness import evaluate_checkpoint
from eval.records import accuracy, read_records, record_path
from eval.table import accuracy_table

#: Keys of the ``evaluation`` section that the contract may fill in.
LIMITS = {
    "max_new_tokens": "longest answer (default: the contract's, else 32)",
    "max_prompt_tokens": "longest prompt (default: the contract's, else none)",
    "min_pixels": "least area of a picture (default: the contract's, else the checkpoint's)",
    "max_pixels": "largest area of a picture (default: the contract's, else the checkpoint's)",
}

#: Rows a task, if none are named.
DRAWN_ROWS, EVERY_ROW = 200, 10**9


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval",
        description="Answer every row of the data with a checkpoint, score it, write one record a row.",
    )
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face directory")
    parser.add_argument("data", type=Path, nargs="*", help="parquet files of the data contract, one a task")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="tasks by name instead of files")
    parser.add_argument("--data-directory", help="of 'cpt-rft data prepare', for real tasks; without it drawn ones")
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="split of the tasks by name")
    parser.add_argument("--out", type=Path, required=True, help="directory for the records")
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=list(STYLES), help="prompt styles")
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), help="prompt preset (default: miniature; task with --data-directory)"
    )
    parser.add_argument("--rows", type=int, help=f"only so many rows a task (default: all; {DRAWN_ROWS} of drawn ones)")
    parser.add_argument("--batch-size", type=int, default=50, help="rows answered together")
    parser.add_argument("--contract", choices=list(CONTRACTS), default="greedy", help="how answers come about")
    parser.add_argument("--scorer", choices=get_args(Scorer), default="official", help="what counts as right")
    for key, text in LIMITS.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=int, help=text)
    parser.add_argument("--samples", type=int, default=0, help="also draw this many samples a row at temperature 1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--backend", choices=BACKENDS, default="local", help="who writes the answers")
    parser.add_argument("--engine-python", default=sys.executable, help="interpreter of an environment with vLLM")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that share the model (vllm)")
    parser.add_argument("--url", default="http://localhost:8000/v1", help="server (openai); $OPENAI_API_KEY is its key")
    parser.add_argument("--model", default="", help="name of the model there (default: the checkpoint's path)")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at once (openai)")
    parser.add_argument("--retries", type=int, default=4, help="further tries of a request that failed (openai)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for an answer (openai)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    console = Console()
    try:
        refuse_unfit(options.checkpoint, weights=options.backend != "openai")
        data, split = _named(options) if options.tasks else _tasks(options.data)
        limits = {key: value for key in LIMITS if (value := getattr(options, key)) is not None}
        if options.contract == "greedy":
            limits.setdefault("max_new_tokens", 32)
        config = EvaluationConfig(
            split=split,
            rows=options.rows,
            styles=tuple(options.styles),
            batch_size=options.batch_size,
            dtype=options.dtype,
            contract=options.contract,
            scorer=options.scorer,
            **limits,
        )
        options.out.mkdir(parents=True, exist_ok=True)
        with Progress(console=Console(stderr=True)) as bars:
            bar = bars.add_task("evaluating")
            evaluate_checkpoint(
                options.checkpoint,
                data,
                options.out,
                config,
                options.preset or ("task" if options.data_directory else "miniature"),
                samples=options.samples,
                device=options.device,
                backend=_backend(options),
                progress=lambda done, total, what: _show(bars, bar, done, total, what),
            )
        cells: dict[tuple[str, str], dict[str, Any]] = {
            (task, style): accuracy(read_records(record_path(options.out, task, style)))
            for task in data
            for style in config.styles
        }
        console.print(accuracy_table(cells))
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 2
    return 0


def _backend(options: argparse.Namespace) -> Backend | None:
    """The back end that was asked for; none for the local one."""
    if options.backend == "vllm":
        return Vllm(options.checkpoint, options.dtype, options.engine_python, options.tensor_parallel)
    if options.backend == "openai":
        return OpenAi(
            url=options.url.rstrip("/"),
            model=options.model or str(options.checkpoint),
            key=os.environ.get("OPENAI_API_KEY", ""),
            concurrency=options.concurrency,
            retries=options.retries,
            timeout_s=options.timeout,
        )
    return None


def _show(bars: Progress, bar: TaskID, done: int, total: int, what: str) -> None:
    bars.update(bar, completed=done, total=total, description=what)


def _named(options: argparse.Namespace) -> tuple[dict[str, Path], Literal["dev", "test"]]:
    """The files of tasks by name, drawn or taken from prepared rows into the directory of the records."""
    source: Literal["miniature", "hub"] = "hub" if options.data_directory else "miniature"
    if options.data:
        raise UserError("Files and --tasks were both given.", "give one of them")
    for name in options.tasks:
        if name not in (*TASK_NAMES[source], *GENERAL_NAMES[source]):
            fix = "use one of " + ", ".join((*TASK_NAMES[source], *GENERAL_NAMES[source]))
            raise UserError(f"There is no task {name} of the source '{source}'.", fix)
    hub = source == "hub"
    count = options.rows or (EVERY_ROW if hub else DRAWN_ROWS)
    config = DataConfig(
        source=source,
        directory=options.data_directory,
        train=1,
        dev=count,
        test=count,
        general=count,
        at_most=hub and options.rows is None,
    )
    # Of prepared tasks only test may be general, and nothing is trained here; drawn ones are general by name.
    general = [name for name in options.tasks if (options.split == "test" if hub else name not in TASK_NAMES[source])]
    tasks = [name for name in options.tasks if name not in general]
    prepared = prepare(config, tasks, general, options.out / "data", splits=(options.split,))
    return {name: prepared.path(name, options.split) for name in options.tasks}, options.split


def _tasks(paths: Sequence[Path]) -> tuple[dict[str, Path], Literal["dev", "test"]]:
    """The task of each file, and the one split of all."""
    data: dict[str, Path] = {}
    splits = set()
    if not paths:
        raise UserError("There is nothing to ask.", "name parquet files, or tasks with --tasks")
    for path in paths:
        rows = read_split(path)
        if not rows:
            raise UserError(f"{path} has no rows.", "name a file with rows")
        data[rows[0].task] = path
        splits.add(rows[0].split)
    split = splits.pop()
    if splits or split == "train" or len(data) < len(paths):
        raise UserError(
            f"The {len(paths)} files are not one file a task, all of dev or all of test.",
            "name files of one split, each of another task",
        )
    return data, split


if __name__ == "__main__":
    sys.exit(main())
