"""A prepare in a process of its own, to be killed: ``python -m tests.helpers.prepare_child OUT PROCESSES``.

Prints a line for each part of the work that begins or ends, so that a killer can choose its moment.
"""

import sys
from dataclasses import replace
from pathlib import Path

from cpt_rft.data import parts, pipeline
from cpt_rft.data.config import Checks
from cpt_rft.data.pipeline import Settings, prepare_task
from tests.helpers.listed_task import ListedTask, row

ROWS = 120
PART_ROWS = 8


def task() -> ListedTask:
    """Rows with every fate: used, broken, twice in train, in train and in test."""
    train = [row(number) for number in range(ROWS)]
    train[7] = replace(train[7], images=(b"broken",))
    train[30] = replace(train[3], id="again")
    test = [row(number, "test") for number in (40, *range(200, 230))]
    return ListedTask({"train": train, "test": test}, {"train": ROWS, "test": 31})


def say(text: str) -> None:
    print(text, flush=True)


def main(out: Path, processes: int) -> None:
    parts.PART_ROWS = PART_ROWS
    for name in ("_write_split", "_write_drops", "write_index", "publish_directory", "publish_lock", "_clear"):
        _announce(name)
    settings = Settings(Checks(max_dropped=0.1), processes=processes)
    prepare_task(task(), out / "cache", out, settings, lambda label, rows, total: say(f"{label} {rows}"))
    say("end")


def _announce(name: str) -> None:
    step = getattr(pipeline, name)

    def announced(*arguments: object, **options: object) -> object:
        say(name)
        return step(*arguments, **options)

    setattr(pipeline, name, announced)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
