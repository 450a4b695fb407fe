"""What all figures share: how a method is drawn, what a figure is, and the mean matrix."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from eval.table import Sheet

Json = dict[str, Any]
Array = NDArray[np.float64]
#: Width of a drawing in user units: about the CSS pixels that a phone has for it.
WIDTH = 380.0


@dataclass(frozen=True)
class Series:
    """How a method is drawn everywhere on the page.

    Attributes:
        name: The method.
        style: CSS class of its colour.
        shape: Number of its marker.
        joint: Whether it learns all tasks at once.
    """

    name: str
    style: str
    shape: int
    joint: bool


@dataclass(frozen=True)
class Figure:
    """A drawing, its caption, and its numbers.

    Attributes:
        drawings: SVG documents side by side.
        caption: What to see.
        sheet: The numbers.
    """

    drawings: tuple[Markup, ...]
    caption: str
    sheet: Sheet


def series(results: Json) -> list[Series]:
    """A colour and a marker for every method: one family for supervised arms, one for reinforcement, grey for joint."""
    counts = {"sft": 0, "grpo": 0, "joint": 0}
    found = []
    for place, (name, method) in enumerate(results["methods"].items()):
        family = "joint" if method["joint"] else "sft" if method["kind"] == "sft" else "grpo"
        found.append(Series(name, f"{family}{counts[family] % 3}", place, method["joint"]))
        counts[family] += 1
    return found


def mean_matrix(method: Json, style: str, score: str) -> Array | None:
    """R averaged over the seeds of the first order; none for a joint method."""
    entries = [entry for entry in method["seeds"].values() if entry["order_index"] == 0]
    if method["joint"] or not entries:
        return None
    blocks = [entry["by_style"][style] for entry in entries]
    return np.mean([block["matrix"] if score == "strict" else block["lenient"]["matrix"] for block in blocks], axis=0)


def native(results: Json, arm: Series) -> str:
    """The prompt style in which a method was trained."""
    return str(results["methods"][arm.name]["train_style"])
