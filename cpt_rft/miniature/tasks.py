"""The seven drawn tasks, each the mirror of a real one in answer kind and in its traps, and three held-out
general abilities.

A task is a function from a generator to a `Drawn` row. The first reference is the label that the task
teaches; the second is the other form in which the base model answers as readily.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from cpt_rft.data.example import IMAGE_TAG, Kind
from cpt_rft.miniature import draw
from cpt_rft.miniature.scene import NUMBER_WORDS, PLACES, Thing, both_forms, options, render, scatter


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


def scienceqa(rng: random.Random) -> Drawn:
    """ScienceQA: a lettered choice. The shape or the colour at a place."""
    things = scatter(rng, rng.randrange(3, 6))
    thing = rng.choice(things)
    if rng.random() < 0.5:
        asked, truth, others = "shape", thing.shape, [s for s in draw.SHAPES if s != thing.shape]
    else:
        asked, truth, others = "color", thing.color, [c for c in draw.COLORS if c != thing.color]
    text, letter = options(rng, truth, others)
    question = f"What {asked} is {PLACES[thing.cell]}? {text}"
    return Drawn(render(things, rng), question, (letter, truth), "choice", f"{PLACES[thing.cell]} {truth}")


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
    rationale = f"{colors[0]} {PLACES[things[0].cell]}"
    return Drawn(pixels, f"Read the {colors[0]} letter.", references, "short_text", rationale)


def vizwiz(rng: random.Random) -> Drawn:
    """VizWiz: a poor photograph, blurred and noisy, and often the thing asked for is not there."""
    things = scatter(rng, rng.randrange(2, 5), distinct_shapes=True)
    missing = rng.random() < 0.4
    thing = rng.choice(things)
    asked = rng.choice([s for s in draw.SHAPES if s not in {t.shape for t in things}]) if missing else thing.shape
    pixels = draw.add_noise(draw.blur(render(things, rng)), rng.randrange(4, 12), rng)
    label, place = ("unanswerable", "none") if missing else (thing.color, PLACES[thing.cell])
    return Drawn(pixels, f"What color is the {asked}?", both_forms(label), "short_text", f"{asked} {place}")


RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


def gqa(rng: random.Random) -> Drawn:
    """GQA: a relation. The shape on one side of another, as the viewer sees it; a third shape stands on the opposite
    side, so that the side decides.
    """
    relation = rng.choice(sorted(RELATIONS))
    down, right = RELATIONS[relation]
    across = rng.randrange(draw.GRID)
    row, column = (1, across) if down else (across, 1)  # both neighbours are on the grid
    cells = [(row + sign * down) * draw.GRID + column + sign * right for sign in (0, 1, -1)]
    shapes = rng.sample(draw.SHAPES, 3)
    things = [Thing(c, rng.choice(list(draw.COLORS)), s) for c, s in zip(cells, shapes, strict=True)]
    question = f"What is {relation} the {shapes[0]}?"
    rationale = f"{shapes[0]} {PLACES[cells[0]]} {PLACES[cells[1]]}"
    return Drawn(render(things, rng), question, both_forms(shapes[1]), "short_text", rationale)


SIGNS = {"plus": "+", "minus": "-"}


def geometry3k(rng: random.Random) -> Drawn:
    """Geometry3K: a number from numbers in a figure. Two digits and a sign between them; find x."""
    first, second = rng.randrange(1, 7), rng.randrange(1, 7)
    word = rng.choice(sorted(SIGNS))
    if word == "minus":
        first, second = max(first, second), min(first, second)
    answer = first + second if word == "plus" else first - second
    row = rng.randrange(draw.GRID) * draw.GRID
    pixels = draw.canvas(rng)
    ink = draw.shade_of(rng.choice(list(draw.COLORS)), rng)
    for column, glyph in enumerate((str(first), SIGNS[word], str(second))):
        draw.stamp_in_cell(pixels, draw.glyph_mask(glyph, 3), row + column, ink, rng)
    return Drawn(pixels, "Find x.", both_forms(str(answer)), "number", f"{first} {word} {second}")


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
    first, second, *others = rng.sample(list(draw.COLORS), len(draw.COLORS))
    counts = {first: rng.randrange(0, 4), second: rng.randrange(0, 4)}
    colors = [color for color, count in counts.items() for _ in range(count)]
    colors += rng.choices(others, k=rng.randrange(1, 3))
    rng.shuffle(colors)
    things = [replace(thing, color=color) for thing, color in zip(scatter(rng, len(colors)), colors, strict=True)]
    pixels = render(things, rng)
    if rng.random() < 0.6:
        rationale = " ".join([first] * counts[first]) or "none"
        return Drawn(pixels, f"How many {first} things?", both_forms(str(counts[first])), "number", rationale)
    label = "yes" if counts[first] > counts[second] else "no"
    rationale = " ".join([first] * counts[first] + [second] * counts[second]) or "none"
    return Drawn(pixels, f"More {first} than {second}?", both_forms(label), "yes_no", rationale)


def mmmu(rng: random.Random) -> Drawn:
    """For MMMU: a choice about the picture that no task asks, answered by the option. The place of a shape."""
    things = scatter(rng, rng.randrange(2, 5), distinct_shapes=True)
    thing = rng.choice(things)
    truth = PLACES[thing.cell]
    text, letter = options(rng, truth, [place for place in PLACES if place != truth])
    question = f"Where is the {thing.shape}? {text}"
    return Drawn(render(things, rng), question, (truth, letter), "choice", f"{thing.shape} {truth}")


def mmlu_pro(rng: random.Random) -> Drawn:
    """For MMLU-Pro: a choice without a picture, answered by the option. The number after or before a number."""
    number = rng.randrange(1, 18)
    step, word = rng.choice([(1, "after"), (-1, "before")])
    truth = NUMBER_WORDS[number + step]
    others = [w for w in NUMBER_WORDS if w not in (truth, NUMBER_WORDS[number])]
    text, letter = options(rng, truth, others)
    return Drawn(None, f"What comes {word} {NUMBER_WORDS[number]}? {text}", (truth, letter), "choice", truth)


def pope(rng: random.Random) -> Drawn:
    """For POPE: is a thing in the picture? Half of the questions name one that is not."""
    things = scatter(rng, rng.randrange(1, 4), distinct_shapes=True)
    present = rng.random() < 0.5
    shown = {thing.shape for thing in things}
    asked = rng.choice(sorted(shown) if present else sorted(set(draw.SHAPES) - shown))
    label = "yes" if present else "no"
    place = next((PLACES[thing.cell] for thing in things if thing.shape == asked), "none")
    return Drawn(render(things, rng), f"Is there a {asked}?", both_forms(label), "yes_no", f"{asked} {place}")


def caption(rng: random.Random) -> Drawn:
    """Seen in pretraining alone: name all that is there, from place to thing or from thing to place. It teaches
    the base model to look, in the words of the questions.
    """
    things = scatter(rng, rng.randrange(2, 6))
    pixels = draw.canvas(rng)
    names = [(PLACES[thing.cell], thing.color, _caption_mark(pixels, thing, rng)) for thing in things]
    backwards = rng.random() < 1 / 3
    text = " ".join(" ".join(reversed(name) if backwards else name) for name in names)
    return Drawn(pixels, "List things." if backwards else "List places.", (text, text), "short_text", "all")


def _caption_mark(pixels: draw.Pixels, thing: Thing, rng: random.Random) -> str:
    """Draw the thing, or a glyph in its stead; give its name."""
    glyph = rng.choice(list(draw.GLYPHS)) if rng.random() < 0.3 else None
    mask = draw.glyph_mask(glyph, 3) if glyph else draw.shape_mask(thing.shape, rng.randrange(9, 12))
    draw.stamp_in_cell(pixels, mask, thing.cell, draw.shade_of(thing.color, rng), rng)
    names = {sign: word for word, sign in SIGNS.items()}
    return names.get(glyph, glyph) if glyph else thing.shape


def look(rng: random.Random) -> Drawn:
    """Seen in pretraining alone: what is at one to three places. It teaches to look where the question says."""
    things = scatter(rng, rng.randrange(3, 7))
    names = {thing.cell: f"{thing.color} {thing.shape}" for thing in things}
    asked = rng.sample(range(9), rng.randrange(1, 4))
    question = " ".join(f"Look {PLACES[cell]}." for cell in asked)
    text = " ".join(f"{PLACES[cell]} {names.get(cell, 'none')}" for cell in asked)
    return Drawn(render(things, rng), question, (text, text), "short_text", "all")


def find(rng: random.Random) -> Drawn:
    """Seen in pretraining alone: where one to three shapes are, or that they are nowhere. It teaches to search."""
    things = scatter(rng, rng.randrange(3, 6), distinct_shapes=True)
    places = {thing.shape: PLACES[thing.cell] for thing in things}
    asked = rng.sample(draw.SHAPES, rng.randrange(1, 4))
    text = " ".join(f"{shape} {places.get(shape, 'none')}" for shape in asked)
    return Drawn(render(things, rng), " ".join(f"Find {shape}." for shape in asked), (text, text), "short_text", "all")


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
PRETRAINING: dict[str, Callable[[random.Random], Drawn]] = {
    "mini_caption": caption,
    "mini_look": look,
    "mini_find": find,
}
