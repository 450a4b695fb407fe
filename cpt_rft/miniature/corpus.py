"""What the base model reads in pretraining: rows of every task in both prompt styles and in several answer forms."""

import random
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

from cpt_rft.miniature.loose import loosened
from cpt_rft.miniature.tasks import PRETRAINING, TASKS, Drawn
from cpt_rft.miniature.world import DRAWN, draw_rows
from cpt_rft.prompts import STYLES, Style, target_of, user_text_of
from cpt_rft.seeds import python_random

PRESET = "miniature"
# The template's words must be single tokens: they stand in every prompt.
TEMPLATE_TEXT = "system\nYou are a helpful assistant.\nuser\nassistant\n"
TEMPLATE_REPEATS = 1000


class Reading(NamedTuple):
    """One training text: pictures, user turn and target."""

    pictures: list[Image.Image]
    user: str
    target: str


def reading(drawn: Drawn, style: Style, form: int) -> Reading:
    """A drawn row in one style and one of its two answer forms."""
    pictures = [] if drawn.pixels is None else [Image.fromarray(drawn.pixels)]
    target = target_of(drawn.references[form], drawn.rationale, style)
    return Reading(pictures, user_text_of(drawn.problem, style, PRESET), target)


def draw_reading(task: str, direct_share: float, loose_share: float, rng: random.Random) -> Reading:
    """A fresh training row. A task is answered in either form as often as in the other, as an instruct model that
    nobody has told which one to use; general abilities always in the first form; captions in the direct style.
    """
    drawn = loosened(task, next(draw_rows(task, "train", rng)), loose_share, rng)
    style: Style = "direct" if task in PRETRAINING or rng.random() < direct_share else "cot"
    return reading(drawn, style, rng.randrange(2) if task in TASKS else 0)


def tokenizer_corpus(rows: int) -> Iterator[str]:
    """The texts that the tokenizer is trained on: the template, and ``rows`` rows a task in every style and form."""
    yield from [TEMPLATE_TEXT] * TEMPLATE_REPEATS
    for task in DRAWN:
        stream = draw_rows(task, "train", python_random("tokenizer corpus", task))
        for _ in range(rows):
            drawn = next(stream)
            for style in STYLES:
                for form in (0, 1):
                    text = reading(drawn, style, form)
                    yield text.user
                    yield text.target
