"""Rows of the miniature world: the same seed gives the same rows, and no picture crosses a split.

The split of a row follows from its content alone: a hash of its pixels (of its question where it has no
picture) falls in one of ten buckets, one for test, one for dev, the rest for train. A draw in the wrong
bucket is thrown away and the next is made. So no seed, and no amount of pretraining on train rows, can ever
show a test picture.
"""

import hashlib
import io
import random
from collections.abc import Iterator

from PIL import Image

from cpt_rft.data.example import Example, Split
from cpt_rft.errors import ConfigError
from cpt_rft.miniature import draw
from cpt_rft.miniature.tasks import GENERAL, PRETRAINING, TASKS, Drawn
from cpt_rft.seeds import python_random

DRAWN = {**TASKS, **GENERAL, **PRETRAINING}
_BUCKETS = 10
_PATIENCE = 1000  # repeats in a row after which a task counts as exhausted


def split_of(drawn: Drawn) -> Split:
    """The split that a row's content belongs to, whatever seed drew it."""
    content = drawn.question.encode() if drawn.pixels is None else drawn.pixels.tobytes()
    bucket = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") % _BUCKETS
    return "test" if bucket == 0 else "dev" if bucket == 1 else "train"


def draw_rows(task: str, split: Split, rng: random.Random) -> Iterator[Drawn]:
    """An endless stream of rows of one task and split."""
    while True:
        drawn = DRAWN[task](rng)
        if split_of(drawn) == split:
            yield drawn


def make_rows(task: str, split: Split, count: int, seed: int) -> list[Example]:
    """``count`` rows without a repeated picture (or, without pictures, a repeated question).

    Raises:
        ConfigError: The task is unknown, or has fewer distinct rows than that.
    """
    if task not in DRAWN:
        raise ConfigError(f"Unknown miniature task {task!r}.", f"use one of {', '.join(DRAWN)}")
    rows: list[Example] = []
    seen: set[bytes] = set()
    repeats = 0
    stream = draw_rows(task, split, python_random("world", seed, task, split))
    while len(rows) < count:
        drawn = next(stream)
        content = drawn.question.encode() if drawn.pixels is None else drawn.pixels.tobytes()
        repeats = repeats + 1 if content in seen else 0
        if repeats == _PATIENCE:
            raise ConfigError(
                f"{task}/{split} has only {len(rows)} distinct rows, not {count}.",
                f"ask for at most {len(rows)} (data.{split}, or data.general for a general ability)",
            )
        if not repeats:
            seen.add(content)
            rows.append(to_example(drawn, task, split, len(rows)))
    return rows


def to_example(drawn: Drawn, task: str, split: Split, index: int) -> Example:
    """The row as every consumer sees it, its picture as PNG."""
    name = f"{task}/{split}/{index:05d}"
    return Example(
        id=name,
        task=task,
        split=split,
        images=() if drawn.pixels is None else (png_bytes(drawn.pixels),),
        image_paths=() if drawn.pixels is None else (f"{name}.png",),
        problem=drawn.problem,
        answer=drawn.references[0],
        references=drawn.references,
        kind=drawn.kind,
        rationale=drawn.rationale,
        rationale_source="drawn",
    )


def png_bytes(pixels: draw.Pixels) -> bytes:
    """The picture as PNG. Its pixels are the same everywhere; its bytes may differ with the zlib version."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
