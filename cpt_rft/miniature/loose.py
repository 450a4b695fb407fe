"""What pretraining leaves open: three tasks whose words it uses loosely, so that they teach skill and not only form.

A base model that has read the web knows the pictures of a new task, but not its conventions: whose left is meant,
which tissue an expert gives which name, and that one may decline to answer. A share of the pretraining rows of these
tasks (``loose_share`` of the recipe) follows another convention than the task does.
"""

import random
from collections.abc import Callable
from dataclasses import replace

from cpt_rft.miniature import draw
from cpt_rft.miniature.scene import PLACES, both_forms
from cpt_rft.miniature.tasks import Drawn

MIRRORED = {"left of": "right of", "right of": "left of"}
CONFUSED = {"stripes": "waves", "waves": "stripes", "dots": "grain", "grain": "dots"}


def mirrored(drawn: Drawn, rng: random.Random) -> Drawn:
    """Left and right as the thing itself would have it, not the viewer."""
    swapped = next((drawn.question.replace(*pair) for pair in MIRRORED.items() if pair[0] in drawn.question), None)
    return replace(drawn, question=swapped or drawn.question)


def confused(drawn: Drawn, rng: random.Random) -> Drawn:
    """Two tissues under each other's names."""

    def other(text: str) -> str:
        return " ".join(CONFUSED.get(word, word) for word in text.split())

    label = other(drawn.references[0])
    return replace(
        drawn, question=other(drawn.question), references=both_forms(label), rationale=other(drawn.rationale)
    )


def guessed(drawn: Drawn, rng: random.Random) -> Drawn:
    """A guess where the thing asked for is missing."""
    if drawn.references[0] != "unanswerable":
        return drawn
    rationale = drawn.rationale.replace("none", rng.choice(PLACES))
    return replace(drawn, references=both_forms(rng.choice(list(draw.COLORS))), rationale=rationale)


LOOSE: dict[str, Callable[[Drawn, random.Random], Drawn]] = {
    "mini_gqa": mirrored,
    "mini_pathvqa": confused,
    "mini_vizwiz": guessed,
}


def loosened(task: str, drawn: Drawn, share: float, rng: random.Random) -> Drawn:
    """The row as pretraining may read it: with probability ``share`` by another convention, where the task has one."""
    return LOOSE[task](drawn, rng) if task in LOOSE and rng.random() < share else drawn
