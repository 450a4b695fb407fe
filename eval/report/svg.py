"""Small figures by hand: an SVG document with its text alternative, and linear scales with round ticks.

Colours are CSS classes of the page (``style.css``), so that a figure follows the light or the dark theme.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

LETTER_PX = 6.7  # width of a letter of a name, on average


@dataclass(frozen=True)
class Scale:
    """A linear map from data to user units."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a value."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 4) -> list[float]:
        """About ``count`` round values within the data range.

        >>> Scale(-23, 4, 0, 100).ticks()
        [-20.0, -10.0, 0.0]
        """
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(index * step, 10) + 0.0 for index in range(first, last + 1)]


def room(names: Iterable[str], least: float, most: float) -> float:
    """Where a plot begins, in pixels, so that the longest of the names fits to its left.

    >>> room(["sft"], 72, 140), round(room(["grpo_direct"], 72, 140), 1), room(["x" * 99], 72, 140)
    (72, 85.7, 140)
    """
    return min(max(12 + LETTER_PX * max(map(len, names), default=0), least), most)


def scale(values: Sequence[float], start: float, end: float, *, pad: float = 0.06) -> Scale:
    """A scale that holds all values with a margin; never empty."""
    low, high = min(values), max(values)
    margin = (high - low) * pad or 1.0
    return Scale(low - margin, high + margin, start, end)


class Svg:
    """An SVG drawing that grows line by line.

    Args:
        width: In user units, about CSS pixels on a phone.
        height: In user units.
        title: Name of the figure, read out first.
        text: What the figure shows, for who cannot see it.
    """

    def __init__(self, width: float, height: float, title: str, text: str) -> None:
        self.width, self.height = width, height
        self._parts = [f"<title>{escape(title)}</title><desc>{escape(text)}</desc>"]
        self._label = f"{title}. {text}"

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        """A straight line."""
        self._parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>')

    def rect(self, x: float, y: float, width: float, height: float, style: str, opacity: float | None = None) -> None:
        """A rectangle, with an opacity of its fill if one is given."""
        see = "" if opacity is None else f' fill-opacity="{opacity:.2f}"'
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{style}"{see}/>'
        )

    def path(self, points: Sequence[tuple[float, float]], style: str, *, closed: bool = False) -> None:
        """A line through points, or the area that they enclose."""
        way = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self._parts.append(f'<path d="M{way}{"Z" if closed else ""}" class="{style}"/>')

    def text(self, x: float, y: float, words: str, style: str = "", anchor: str = "start") -> None:
        """A line of text."""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{escape(words)}</text>'
        )

    def marker(self, x: float, y: float, shape: int, size: float, style: str, hint: str = "") -> None:
        """A point: shape 0 is a circle, 1 a square, 2 a triangle, 3 a diamond, so that colour is not all there is."""
        tip = f"<title>{escape(hint)}</title>" if hint else ""
        if shape % 4 == 0:
            self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" class="{style}">{tip}</circle>')
            return
        corners = {
            1: ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
            2: ((0, -1.15), (1.1, 0.85), (-1.1, 0.85)),
            3: ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
        }[shape % 4]
        way = "L".join(f"{x + size * dx:.1f} {y + size * dy:.1f}" for dx, dy in corners)
        self._parts.append(f'<path d="M{way}Z" class="{style}">{tip}</path>')

    def done(self) -> Markup:
        """The drawing as HTML; every text in it was escaped when it was added."""
        head = f'<svg viewBox="0 0 {self.width:.0f} {self.height:.0f}" role="img" aria-label="{escape(self._label)}">'
        return Markup(head + "".join(self._parts) + "</svg>")
