"""The seven drawn tasks, each the mirror of a real one in answer kind and in its traps, and three held-out
general abilities.

A task is a function from a generator to a `Drawn` row. The first reference is the label that the task
teaches; the second is the other form in which the base model answers as readily.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from cpt_rft.data.example import IMAGE_TAG, Kind
from cpt_rft.miniature import draw
from cpt_rft.miniature.scene import NUMBER_WORDS, PLACES, both_forms, options, render, scatter


@dataclass(frozen=True)
class Drawn:
    """A row before it has an id: the picture (or none), the question and its accepted answers."""

    pixels: draw.Pixels | None
    question: str
    references: tuple[str, str]
    kind: Kind
    rationale: str

    @property
    def problem(self) -> str:
        """The question behind its ``<image>`` tag, or alone where there is no picture."""
        return self.question if self.pixels is None else IMAGE_TAG + self.question


def _question_case(place: str) -> str:
    return place[0].upper() + place[1:]


def scienceqa(rng: random.Random) -> Drawn:
    """ScienceQA: a lettered choice. The shape or the colour at a place."""
    things = scatter(rng, rng.randrange(4, 8))
    thing = rng.choice(things)
    if rng.random() < 0.5:
        asked, truth, others = "shape", thing.shape, [s for s in draw.SHAPES if s != thing.shape]
    else:
        asked, truth, others = "color", thing.color, [c for c in draw.COLORS if c != thing.color]
    text, references = options(rng, truth, others)
    question = f"{_question_case(PLACES[thing.cell])} {asked}? {text}"
    return Drawn(render(things, rng), question, references, "choice", truth)


def textvqa(rng: random.Random) -> Drawn:
    """TextVQA: read a glyph. Two letters in two colours stand among shapes; one is asked for."""
    things = scatter(rng, 4)
    rng.shuffle(things)
    pixels = render(things[2:], rng)
    colors = rng.sample(list(draw.COLORS), 2)
    letters = rng.sample(draw.LETTERS, 2)
    for thing, color, letter in zip(things, colors, letters, strict=False):
        draw.stamp_in_cell(pixels, draw.glyph_mask(letter, 3), thing.cell, draw.shade_of(color, rng), rng)
    references = (letters[0], f"letter {letters[0]}")
    return Drawn(pixels, f"Read the {colors[0]} letter.", references, "short_text", PLACES[things[0].cell])


def vizwiz(rng: random.Random) -> Drawn:
    """VizWiz: a poor photograph, blurred and noisy, and often the thing asked for is not there."""
    things = scatter(rng, rng.randrange(3, 6), distinct_shapes=True)
    missing = rng.random() < 0.4
    thing = rng.choice(things)
    asked = rng.choice([s for s in draw.SHAPES if s not in {t.shape for t in things}]) if missing else thing.shape
    pixels = draw.add_noise(draw.blur(render(things, rng)), rng.randrange(6, 15), rng)
    label, rationale = ("unanswerable", "none") if missing else (thing.color, PLACES[thing.cell])
    return Drawn(pixels, f"What color is the {asked}?", both_forms(label), "short_text", rationale)


RELATIONS = {"left of": -1, "right of": 1, "above": -draw.GRID, "below": draw.GRID}


def gqa(rng: random.Random) -> Drawn:
    """GQA: a relation. The shape next to a shape that stands only once in the picture."""
    things = scatter(rng, 6, distinct_shapes=True)
    by_cell = {thing.cell: thing for thing in things}
    pairs = [
        (relation, thing, by_cell[thing.cell + step])
        for thing in things
        for relation, step in RELATIONS.items()
        if thing.cell + step in by_cell and (abs(step) > 1 or thing.cell // 3 == (thing.cell + step) // 3)
    ]
    # Six things on nine cells always hold at least one adjacent pair.
    relation, thing, neighbour = rng.choice(pairs)
    question = f"What is {relation} the {thing.shape}?"
    return Drawn(render(things, rng), question, both_forms(neighbour.shape), "short_text", PLACES[thing.cell])


def geometry3k(rng: random.Random) -> Drawn:
    """Geometry3K: a number from numbers in a figure. Two parts of a bar, or the whole and a part; find x."""
    first, second = rng.randrange(1, 7), rng.randrange(1, 7)
    find_whole = rng.random() < 0.5
    whole = first + second
    pixels = draw.canvas(rng)
    ink = draw.shade_of("black", rng)
    top, left, split = rng.randrange(34, 40), rng.randrange(4, 8), rng.randrange(36, 48)
    right = rng.randrange(76, 80)
    pixels[top : top + 3, left:right] = ink
    for tick in (left, split, right - 2):
        pixels[top - 4 : top + 7, tick : tick + 2] = ink
    shown = [str(first), str(second), "x"] if find_whole else [str(first), "x", str(whole)]
    anchors = [(top - 26, (left + split) // 2), (top - 26, (split + right) // 2), (top + 14, (left + right) // 2)]
    for text, (row, middle) in zip(shown, anchors, strict=True):
        _write(pixels, text, row, middle, ink)
    answer, rationale = (whole, f"{first} plus {second}") if find_whole else (second, f"{whole} minus {first}")
    return Drawn(pixels, "Find x.", both_forms(str(answer)), "number", rationale)


def _write(pixels: draw.Pixels, text: str, top: int, middle: int, ink: draw.Rgb) -> None:
    """Digits side by side around a column; ``x`` is a small diagonal cross, as in a textbook."""
    if text == "x":
        for step in range(13):
            for column in (middle - 6 + step, middle + 6 - step):
                pixels[top + 4 + step, column : column + 3] = ink
        return
    for index, digit in enumerate(text):
        left = middle - 6 * len(text) + 12 * index
        draw.stamp(pixels, draw.glyph_mask(digit, 2), top + 3, left, ink)


def pathvqa(rng: random.Random) -> Drawn:
    """PathVQA: yes/no and open questions mixed, on textures that pretraining saw little of."""
    halves = rng.sample(draw.TEXTURES, 2)
    pixels = draw.canvas(rng)
    for index, texture in enumerate(halves):
        tint = [rng.randrange(150, 236) for _ in range(3)]
        region = pixels[index * 42 : (index + 1) * 42]
        region[:] = tint
        region[draw.texture_mask(texture, 42, draw.SIDE, rng)] = [channel * 5 // 9 for channel in tint]
    asked = rng.randrange(2)
    where, truth = ("top", "bottom")[asked], halves[asked]
    if rng.random() < 0.5:
        return Drawn(pixels, f"What tissue is at the {where}?", both_forms(truth), "short_text", where)
    named = truth if rng.random() < 0.5 else rng.choice([t for t in draw.TEXTURES if t != truth])
    label = "yes" if named == truth else "no"
    return Drawn(pixels, f"Does the {where} show {named}?", both_forms(label), "yes_no", truth)


def superclevr(rng: random.Random) -> Drawn:
    """Super-CLEVR: counting, and comparing counts, of things by colour."""
    first, second = rng.sample(list(draw.COLORS), 2)
    counts = {first: rng.randrange(0, 5), second: rng.randrange(0, 4)}
    colors = [color for color, count in counts.items() for _ in range(count)]
    others = [color for color in draw.COLORS if color not in counts]
    colors += [rng.choice(others) for _ in range(rng.randrange(0, 9 - len(colors)))]
    colors = colors or [rng.choice(others)]
    things = scatter(rng, len(colors))
    shuffled = rng.sample(colors, len(colors))
    things = [type(t)(t.cell, color, t.shape) for t, color in zip(things, shuffled, strict=True)]
    pixels = render(things, rng)
    if rng.random() < 0.6:
        rationale = " ".join([first] * counts[first]) or "none"
        return Drawn(pixels, f"How many {first} things?", both_forms(str(counts[first])), "number", rationale)
    label = "yes" if counts[first] > counts[second] else "no"
    rationale = f"{NUMBER_WORDS[counts[first]]} {NUMBER_WORDS[counts[second]]}"
    return Drawn(pixels, f"More {first} than {second}?", both_forms(label), "yes_no", rationale)


def mmmu(rng: random.Random) -> Drawn:
    """For MMMU: a lettered choice about the picture that no task asks. The row of a shape."""
    things = scatter(rng, rng.randrange(3, 6), distinct_shapes=True)
    thing = rng.choice(things)
    rows = ["top", "middle", "bottom"]
    truth = rows.pop(thing.cell // draw.GRID)
    text, references = options(rng, truth, rows)
    return Drawn(render(things, rng), f"Row of the {thing.shape}? {text}", references, "choice", truth)


def mmlu_pro(rng: random.Random) -> Drawn:
    """For MMLU-Pro: a lettered choice without a picture. The number after or before a number."""
    number = rng.randrange(1, 18)
    step, word = rng.choice([(1, "after"), (-1, "before")])
    truth = NUMBER_WORDS[number + step]
    others = [w for w in NUMBER_WORDS if w not in (truth, NUMBER_WORDS[number])]
    text, references = options(rng, truth, others)
    return Drawn(None, f"What comes {word} {NUMBER_WORDS[number]}? {text}", references, "choice", truth)


def pope(rng: random.Random) -> Drawn:
    """For POPE: is a thing in the picture? Half of the questions name one that is not."""
    things = scatter(rng, rng.randrange(3, 6), distinct_shapes=True)
    present = rng.random() < 0.5
    shown = {thing.shape for thing in things}
    asked = rng.choice(sorted(shown) if present else sorted(set(draw.SHAPES) - shown))
    label = "yes" if present else "no"
    place = next((PLACES[thing.cell] for thing in things if thing.shape == asked), "none")
    return Drawn(render(things, rng), f"Is there a {asked}?", both_forms(label), "yes_no", place)


def caption(rng: random.Random) -> Drawn:
    """Seen in pretraining alone: name every cell, row by row. It teaches the base model to look."""
    things = scatter(rng, rng.randrange(3, 9))
    pixels = draw.canvas(rng)
    names = ["none"] * (draw.GRID * draw.GRID)
    for thing in things:
        glyph = rng.choice(list(draw.GLYPHS)) if rng.random() < 0.3 else None
        mask = draw.glyph_mask(glyph, 3) if glyph else draw.shape_mask(thing.shape, rng.randrange(9, 12))
        draw.stamp_in_cell(pixels, mask, thing.cell, draw.shade_of(thing.color, rng), rng)
        names[thing.cell] = f"{thing.color} {glyph or thing.shape}"
    text = " ".join(names)
    return Drawn(pixels, "Describe.", (text, text), "short_text", "all")


TASKS: dict[str, Callable[[random.Random], Drawn]] = {
    "mini_scienceqa": scienceqa,
    "mini_textvqa": textvqa,
    "mini_vizwiz": vizwiz,
    "mini_gqa": gqa,
    "mini_geometry3k": geometry3k,
    "mini_pathvqa": pathvqa,
    "mini_superclevr": superclevr,
}
GENERAL: dict[str, Callable[[random.Random], Drawn]] = {
    "mini_mmmu": mmmu,
    "mini_mmlu_pro": mmlu_pro,
    "mini_pope": pope,
}
PRETRAINING: dict[str, Callable[[random.Random], Drawn]] = {"mini_caption": caption}
