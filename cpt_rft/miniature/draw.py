"""Integer drawing on small RGB arrays: shapes, glyphs, textures, noise and blur.

Only integer arithmetic and the given generator are used, so that the same seed gives the same pixels on
every machine and library version.
"""

import random

import numpy as np
from numpy.typing import NDArray

CELL = 28
GRID = 3
SIDE = CELL * GRID
Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Rgb = tuple[int, int, int]

COLORS: dict[str, Rgb] = {
    "red": (212, 40, 40),
    "green": (36, 158, 64),
    "blue": (44, 76, 214),
    "yellow": (226, 198, 34),
    "pink": (232, 112, 184),
    "black": (28, 28, 28),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "star")
TEXTURES = ("stripes", "dots", "checks", "waves", "grain", "plain")

# A 5 x 7 dot-matrix glyph is seven rows of five bits, the highest bit on the left.
GLYPHS: dict[str, tuple[int, ...]] = {
    "0": (14, 17, 19, 21, 25, 17, 14),
    "1": (4, 12, 4, 4, 4, 4, 14),
    "2": (14, 17, 1, 2, 4, 8, 31),
    "3": (31, 2, 4, 2, 1, 17, 14),
    "4": (2, 6, 10, 18, 31, 2, 2),
    "5": (31, 16, 30, 1, 1, 17, 14),
    "6": (6, 8, 16, 30, 17, 17, 14),
    "7": (31, 1, 2, 4, 8, 8, 8),
    "8": (14, 17, 17, 14, 17, 17, 14),
    "9": (14, 17, 17, 15, 1, 2, 12),
    "+": (0, 4, 4, 31, 4, 4, 0),
    "-": (0, 0, 0, 31, 0, 0, 0),
    "a": (14, 17, 17, 31, 17, 17, 17),
    "b": (30, 17, 17, 30, 17, 17, 30),
    "e": (31, 16, 16, 30, 16, 16, 31),
    "h": (17, 17, 17, 31, 17, 17, 17),
    "k": (17, 18, 20, 24, 20, 18, 17),
    "m": (17, 27, 21, 21, 17, 17, 17),
    "t": (31, 4, 4, 4, 4, 4, 4),
    "z": (31, 1, 2, 4, 8, 16, 31),
}
LETTERS = tuple(glyph for glyph in GLYPHS if glyph.isalpha())


def canvas(rng: random.Random) -> Pixels:
    """A light, nearly grey background of 84 x 84 pixels."""
    shade = rng.randrange(196, 244)
    tint = [shade + rng.randrange(-8, 9) for _ in range(3)]
    return np.tile(np.array(tint, dtype=np.uint8), (SIDE, SIDE, 1))


def shade_of(color: str, rng: random.Random) -> Rgb:
    """The named colour, a little lighter or darker."""
    red, green, blue = (max(0, min(255, channel + rng.randrange(-18, 19))) for channel in COLORS[color])
    return red, green, blue


def shape_mask(shape: str, radius: int) -> Mask:
    """A ``(2 radius + 1)`` square mask of the shape, in pixels."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    away_x, away_y = np.abs(x), np.abs(y)
    if shape == "circle":
        return x * x + y * y <= radius * radius
    if shape == "square":
        return (away_x <= radius - 1) & (away_y <= radius - 1)
    if shape == "triangle":
        return 2 * away_x <= y + radius
    if shape == "cross":
        return (away_x <= radius // 3) | (away_y <= radius // 3)
    if shape == "diamond":
        return away_x + away_y <= radius
    if shape == "star":
        # Two slim diamonds crossed: four long points around a hollow waist.
        return (3 * away_x + away_y <= radius) | (away_x + 3 * away_y <= radius) | (away_x + away_y <= radius // 2)
    raise ValueError(f"unknown shape {shape!r}")


def glyph_mask(glyph: str, scale: int) -> Mask:
    """A ``7 scale x 5 scale`` mask of the glyph."""
    rows = np.array([[bits >> (4 - column) & 1 for column in range(5)] for bits in GLYPHS[glyph]], dtype=bool)
    return np.kron(rows, np.ones((scale, scale), dtype=bool))


def texture_mask(texture: str, height: int, width: int, rng: random.Random) -> Mask:
    """Where the darker of a texture's two tones goes; period and phase are drawn."""
    y, x = np.mgrid[0:height, 0:width]
    period = rng.randrange(7, 11)
    shift = rng.randrange(period)
    half = period // 2
    if texture == "stripes":
        return (x + shift) % period < half
    if texture == "dots":
        along, down = (x + shift) % period - half, (y + shift) % period - half
        return along * along + down * down <= 5
    if texture == "checks":
        return ((x + shift) // half + (y + shift) // half) % 2 == 0
    if texture == "waves":
        ramp = np.abs((x + shift) % (2 * half) - half)
        return (y + ramp) % period < half
    if texture == "grain":
        noise = np.frombuffer(rng.randbytes(height * width), dtype=np.uint8).reshape(height, width)
        return noise < 90
    if texture == "plain":
        return np.zeros((height, width), dtype=bool)
    raise ValueError(f"unknown texture {texture!r}")


def stamp(pixels: Pixels, mask: Mask, top: int, left: int, color: Rgb) -> None:
    """Paint ``color`` through ``mask`` with its corner at ``(top, left)``, in place."""
    height, width = mask.shape
    pixels[top : top + height, left : left + width][mask] = color


def stamp_in_cell(pixels: Pixels, mask: Mask, cell: int, color: Rgb, rng: random.Random) -> None:
    """Paint the mask near the middle of a cell (0 to 8, row by row), jittered by what room there is."""
    height, width = mask.shape
    row, column = divmod(cell, GRID)
    jitter_y, jitter_x = ((CELL - size) // 2 for size in (height, width))
    top = row * CELL + jitter_y + rng.randrange(-min(2, jitter_y), min(2, jitter_y) + 1)
    left = column * CELL + jitter_x + rng.randrange(-min(2, jitter_x), min(2, jitter_x) + 1)
    stamp(pixels, mask, top, left, color)


def blur(pixels: Pixels) -> Pixels:
    """A 3 x 3 box blur in integers, edges repeated."""
    padded = np.pad(pixels.astype(np.uint16), ((1, 1), (1, 1), (0, 0)), mode="edge")
    total = np.zeros(pixels.shape, dtype=np.uint16)
    for down in range(3):
        for right in range(3):
            total += padded[down : down + pixels.shape[0], right : right + pixels.shape[1]]
    return (total // 9).astype(np.uint8)


def add_noise(pixels: Pixels, strength: int, rng: random.Random) -> Pixels:
    """Uniform integer noise of at most ``strength`` a channel, clipped to 0..255."""
    drawn = np.frombuffer(rng.randbytes(pixels.size), dtype=np.uint8).astype(np.int16).reshape(pixels.shape)
    noisy = pixels.astype(np.int16) + drawn % (2 * strength + 1) - strength
    return np.clip(noisy, 0, 255).astype(np.uint8)
