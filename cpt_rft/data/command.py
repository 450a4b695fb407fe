"""``cpt-rft data``: prepare, check, show and export real datasets."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt_rft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from cpt_rft.data.ledger import Json
    from cpt_rft.data.pipeline import Settings
    from cpt_rft.tasks.base import Task

_HELP = """
A directory of prepared rows holds data.lock.json and, for each task, its splits as parquet, ledger.json (source,
licence, counts, drops by reason), drops.jsonl (the id of every dropped row) and index.parquet (facts of every row).

  cpt-rft data prepare scienceqa geometry3k --out data      download, check, write; killed, it goes on
  cpt-rft data check scienceqa --out data                   read everything back, compare with the ledger
  cpt-rft data show scienceqa --out data                    the table of counts and drops, and a few rows
  cpt-rft data export scienceqa --out data --engine easyr1  the rows for another engine

HF_ENDPOINT names a mirror of the hub, HF_TOKEN a token for gated sets, HF_HOME the hub's cache.
"""


_TASK_HELP = {
    True: "a name of configs/tasks, the path of a file of that form, or 'all' of configs/tasks",
    False: "the name of a prepared task, or 'all' of them",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    parser.epilog = _HELP
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    prepare = _action(actions, "prepare", _prepare, "download, check and write tasks")
    prepare.add_argument("--cache", type=Path, default=Path("data/cache"), help="downloads (default: data/cache)")
    prepare.add_argument("--limit", type=_positive, help="only the first N rows of a split, for a look")
    prepare.add_argument("--offline", action="store_true", help="use only what was downloaded before")
    prepare.add_argument("--checks", type=Path, help="what rows must fulfil (default: configs/data.yaml)")
    prepare.add_argument("--model", type=Path, help="checkpoint whose tokenizer and processor measure the prompts")
    prepare.add_argument("--processes", type=_positive, help="how many decode pictures (default: one a core)")
    _action(actions, "check", _check, "read everything back and compare it with the ledger")
    show = _action(actions, "show", _show, "print counts, drops and a few rows")
    show.add_argument("--rows", type=int, default=3, help="rows of each split to print (default: 3)")
    export = _action(actions, "export", _export, "write tasks in the form of another engine")
    export.add_argument("--engine", choices=("easyr1", "llamafactory"), required=True)
    export.add_argument("--to", type=Path, help="directory (default: OUT/exports/ENGINE)")
    export.add_argument("--preset", default="task", help="wording of the problems (default: task)")
    export.add_argument("--style", choices=("cot", "direct"), default="direct", help="prompt style (default: direct)")


def main(options: argparse.Namespace) -> int | None:
    """Run the chosen action under the lock of its directory."""
    from cpt_rft.files import DirectoryLock, explain_os_error

    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with DirectoryLock(options.out):
            return int(options.action(options) or 0)
    except OSError as error:
        raise explain_os_error(error, options.out) or error from error


def _action(actions: Any, name: str, run: Callable[..., object], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("tasks", nargs="+", metavar="TASK", help=_TASK_HELP[name == "prepare"])
    parser.add_argument("--out", type=Path, default=Path("data"), help="prepared rows (default: data)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(action=run)
    return parser


def _prepare(options: argparse.Namespace) -> None:
    if options.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported
    from cpt_rft.data.config import CHECKS_FILE, load_checks
    from cpt_rft.data.ledger import ledger_notes, ledger_table, read_ledger
    from cpt_rft.data.lock import read_lock
    from cpt_rft.data.pipeline import Settings
    from cpt_rft.tasks.base import load_task

    checks = load_checks(options.checks or CHECKS_FILE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = Settings(checks, options.model, options.limit, options.processes or cores)
    tasks = [load_task(name) for name in _names(options.tasks)]
    try:
        prepare_tasks(tasks, options.cache, options.out, settings)
    finally:
        done = read_lock(options.out)["tasks"]
        for ledger in (read_ledger(options.out / task.config.name) for task in tasks if task.config.name in done):
            _print(ledger_table(ledger), *ledger_notes(ledger))
    _tell_crossings(options.out)


def prepare_tasks(tasks: "Sequence[Task]", cache: Path, out: Path, settings: "Settings") -> "list[Json]":
    """Prepare tasks one after the other, with progress on the way; returns their ledgers.

    A task that cannot be prepared, such as one of a gated set, does not keep the others waiting.

    Raises:
        DataError: As `cpt_rft.data.pipeline.prepare_task`, after the last task.
    """
    from cpt_rft.data.pipeline import prepare_task
    from cpt_rft.progress import make_display

    work = {f"{task.config.name}/{split}": 1.0 for task in tasks for split in task.splits}
    ledgers = []
    errors: list[DataError] = []
    with make_display(work) as display:

        def progress(label: str, rows: int, total: int | None) -> None:
            share = rows / total if total else 0.0
            display.update(label, share, f"{rows} of {total} rows" if total else f"{rows} rows", part=rows == total)

        for task in tasks:
            display.note(f"{task.config.name}: looking for its files")
            try:
                ledgers.append(prepare_task(task, cache, out, settings, progress))
                outcome = "done"
            except DataError as error:
                errors.append(error)
                outcome = "failed"
            for split in task.splits:
                display.update(f"{task.config.name}/{split}", 1.0, outcome)
    if len(errors) > 1:
        fixes = " ".join(f"{error.problem} Fix: {error.fix}." for error in errors)
        raise DataError(
            f"{len(errors)} of {len(tasks)} tasks are not prepared. {fixes}", "mend these, the rest is there"
        )
    if errors:
        raise errors[0]
    return ledgers


def _tell_crossings(out: Path) -> None:
    from cpt_rft.data.index import locate_rows
    from cpt_rft.data.lock import read_lock
    from cpt_rft.data.overlap import crossings

    tasks = sorted(read_lock(out)["tasks"])
    sets = {f"{task}/{split}": rows for task in tasks for split, rows in locate_rows(out / task).items()}
    for seen, unseen, rows, same in crossings(sets):
        same_text = f", {same} with the same question" if same else ""
        _print(f"{rows} rows of {seen} show a picture of {unseen}{same_text}.")


def _check(options: argparse.Namespace) -> int:
    from cpt_rft.data.verify import verify_task

    for task in _prepared(options):
        rows = verify_task(options.out, task)
        _print(f"{task}: {', '.join(f'{count} rows of {split}' for split, count in rows.items())}, all as recorded")
    _tell_crossings(options.out)
    return 0


def _show(options: argparse.Namespace) -> None:
    from itertools import islice

    from cpt_rft.data.ledger import ledger_notes, ledger_table, read_ledger
    from cpt_rft.data.parquet import stream_split

    for task in _prepared(options):
        ledger = read_ledger(options.out / task)
        _print(ledger_table(ledger), *ledger_notes(ledger))
        for split in ledger["splits"]:
            for row in islice(stream_split(options.out / task / split, decode=False), options.rows):
                _print(f"\n{row.id} ({row.kind}, {len(row.images)} pictures)", row.problem, f"-> {row.answer}")


def _export(options: argparse.Namespace) -> None:
    from cpt_rft.data.export import export_task
    from cpt_rft.prompts import PRESETS

    if options.preset not in PRESETS:
        raise ConfigError(f"Unknown preset {options.preset!r}.", f"use one of {', '.join(PRESETS)}")
    target = options.to or options.out / "exports" / options.engine
    for task in _prepared(options):
        place = export_task(options.out, task, options.engine, target, options.preset, options.style)
        _print(f"{task}: {place}")


def _prepared(options: argparse.Namespace) -> list[str]:
    """The asked tasks among those that the lock lists."""
    from cpt_rft.config.nearest import nearest
    from cpt_rft.data.lock import read_lock

    known = sorted(read_lock(options.out)["tasks"])
    if not known:
        raise DataError(f"{options.out} holds no prepared task.", "run 'cpt-rft data prepare TASK' first")
    asked: Sequence[str] = known if options.tasks == ["all"] else options.tasks
    for task in asked:
        if task not in known:
            near = nearest(task, known)
            raise DataError(f"{options.out} holds no task {task!r}, the nearest is {near!r}.", "prepare it first")
    return list(asked)


def _names(asked: Sequence[str]) -> list[str]:
    from cpt_rft.tasks.base import task_names

    return task_names() if list(asked) == ["all"] else list(asked)


def _print(*renderables: object) -> None:
    import sys

    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False, soft_wrap=True)
    for renderable in renderables:
        console.print(renderable)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("a positive number is needed")
    return number
