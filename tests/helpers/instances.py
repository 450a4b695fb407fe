"""A model that gets some rows right always, some at times and some never."""

from functools import cache
from pathlib import Path

from cpt_rft.data.example import Example
from cpt_rft.miniature.world import make_rows
from cpt_rft.scoring import score
from tests.helpers.engine import TASK, make_base, make_stage, run, sft

OTHER = "mini_superclevr"


@cache
def half_taught(root: Path) -> Path:
    """Its checkpoint; once a session. Briefly taught two thirds of the rows of two tasks, in the direct style."""
    folder = root / "half_taught"
    folder.mkdir()
    rows = [row for task in (TASK, OTHER) for row in make_rows(task, "train", 8, 0)]
    settings = sft(epochs=30, prompts_per_step=16, micro_batch=16)
    run(make_stage(folder / "stage", make_base(folder / "untaught"), settings, rows))
    return folder / "stage" / "checkpoint"


def is_right(row: Example, text: str) -> bool:
    """Whether a text is a right answer in the direct style."""
    graded = score(text, answer=row.answer, references=row.references, kind=row.kind, style="direct")
    return graded.strict >= 0.5
