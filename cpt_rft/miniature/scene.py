"""Scenes of shapes on a 3 x 3 grid, and the words for places, colours and shapes."""

import random
from dataclasses import dataclass

from cpt_rft.miniature import draw

PLACES = ("northwest", "north", "northeast", "west", "center", "east", "southwest", "south", "southeast")
NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip
SYNONYMS = {
    "red": "crimson",
    "green": "emerald",
    "blue": "azure",
    "yellow": "golden",
    "pink": "rosy",
    "black": "dark",
    "circle": "disc",
    "square": "box",
    "triangle": "wedge",
    "cross": "plus",
    "diamond": "rhombus",
    "star": "spark",
    "stripes": "lines",
    "dots": "spots",
    "checks": "tiles",
    "waves": "ripples",
    "grain": "speckle",
    "plain": "blank",
    "yes": "true",
    "no": "false",
    "unanswerable": "unclear",
}
LETTER_OPTIONS = "AB"


@dataclass(frozen=True)
class Thing:
    """One coloured shape in a cell (0 to 8, row by row)."""

    cell: int
    color: str
    shape: str


def scatter(rng: random.Random, count: int, *, distinct_shapes: bool = False) -> list[Thing]:
    """``count`` things in distinct cells, ordered by cell; shapes all different where asked (at most six)."""
    cells = sorted(rng.sample(range(9), count))
    shapes = rng.sample(draw.SHAPES, count) if distinct_shapes else [rng.choice(draw.SHAPES) for _ in cells]
    return [Thing(cell, rng.choice(list(draw.COLORS)), shape) for cell, shape in zip(cells, shapes, strict=True)]


def render(things: list[Thing], rng: random.Random) -> draw.Pixels:
    """The picture of a scene, 84 x 84 RGB."""
    pixels = draw.canvas(rng)
    for thing in things:
        mask = draw.shape_mask(thing.shape, rng.randrange(9, 12))
        draw.stamp_in_cell(pixels, mask, thing.cell, draw.shade_of(thing.color, rng), rng)
    return pixels


def both_forms(label: str) -> tuple[str, str]:
    """A label and the other word for it.

    >>> both_forms("3"), both_forms("star")
    (('3', 'three'), ('star', 'spark'))
    """
    return label, NUMBER_WORDS[int(label)] if label.isdigit() else SYNONYMS[label]


def options(rng: random.Random, truth: str, others: list[str]) -> tuple[str, str]:
    """Two lettered options in random order: their text (``A red B blue``) and the letter of the truth."""
    shown = rng.sample([truth, rng.choice(others)], 2)
    text = " ".join(f"{letter} {option}" for letter, option in zip(LETTER_OPTIONS, shown, strict=True))
    return text, LETTER_OPTIONS[shown.index(truth)]
