"""Pictures of prepared data for a notebook: distributions of a task, and some of its rows."""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from cpt_rft.data.example import IMAGE_TAG, Example
from cpt_rft.data.index import read_index
from cpt_rft.data.ledger import read_ledger
from cpt_rft.data.parquet import stream_split

COLOURS = {"train": "tab:blue", "dev": "tab:orange", "test": "tab:green"}
TOP_ANSWERS = 15
Splits = Mapping[str, Sequence[dict[str, Any]]]


def overview(directory: Path) -> Figure:
    """Answers, picture sizes and prompt lengths of a prepared task."""
    ledger = read_ledger(directory)
    rows = read_index(directory)
    by_split: Splits = {split: [row for row in rows if row["split"] == split] for split in ledger["splits"]}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    plot_answers(left, by_split)
    plot_sizes(middle, by_split)
    plot_tokens(right, by_split, ledger["checks"]["max_prompt_tokens"], counted=ledger["text_counted"])
    figure.suptitle(ledger["task"]["name"])
    return figure


def plot_answers(axes: Axes, by_split: Splits) -> None:
    """Shares of the most frequent answers of all splits together, in each of them."""
    counts = {split: Counter(row["answer"] for row in rows) for split, rows in by_split.items()}
    total: Counter[str] = sum(counts.values(), Counter())
    top = [answer for answer, _ in sorted(total.items(), key=lambda pair: (-pair[1], pair[0]))[:TOP_ANSWERS]]
    height = 0.8 / len(by_split)
    for number, (split, count) in enumerate(counts.items()):
        places = [place + number * height for place in range(len(top))]
        shares = [100 * count[answer] / max(count.total(), 1) for answer in top]
        axes.barh(places, shares, height, color=COLOURS[split], label=split)
    axes.set_yticks(range(len(top)), [_plain(answer, 24) for answer in top])
    axes.invert_yaxis()
    axes.set(xlabel="% of the split", title=f"answers ({len(total)} distinct)")
    axes.legend()


def plot_sizes(axes: Axes, by_split: Splits) -> None:
    """Width and height of every picture."""
    number = 0
    for split, rows in by_split.items():
        sizes = {(picture["width"], picture["height"]) for row in rows for picture in row["pictures"]}
        number += len(sizes)
        widths, heights = [width for width, _ in sizes], [height for _, height in sizes]
        axes.scatter(widths, heights, s=6, alpha=0.5, color=COLOURS[split])
    title = f"picture sizes ({number} distinct)" if number else "no pictures"
    axes.set(xlabel="width (px)", ylabel="height (px)", title=title)


def plot_tokens(axes: Axes, by_split: Splits, limit: int, *, counted: bool) -> None:
    """Length of the longest prompt of every row, pictures expanded; beside it the vision tokens alone."""
    top = max((row["tokens"] for rows in by_split.values() for row in rows), default=1)
    bins = [top * step / 40 for step in range(41)]
    for split, rows in by_split.items():
        axes.hist([row["tokens"] for row in rows], bins, histtype="step", color=COLOURS[split], label=split)
        axes.hist([row["vision_tokens"] for row in rows], bins, histtype="step", color=COLOURS[split], linestyle=":")
    if limit < 1.5 * top:
        axes.axvline(limit, color="black", linewidth=1)
    kind = "tokens" if counted else "tokens at most (text in bytes)"
    axes.set(xlabel=f"{kind}; dotted: vision tokens", ylabel="rows", title="prompt lengths")
    axes.set_yscale("log")


def nine_rows(directory: Path, split: str = "test") -> Figure:
    """The first nine rows of a split: pictures, problem and answer."""
    figure, grid = plt.subplots(3, 3, figsize=(15, 15), layout="constrained")
    rows = list(islice(stream_split(directory / split), 9))
    for axes, row in zip(grid.flat, [*rows, *[None] * (9 - len(rows))], strict=True):
        axes.axis("off")
        if row is not None:
            _draw_row(axes, row)
    figure.suptitle(f"{directory.name}/{split}")
    return figure


def _draw_row(axes: Axes, row: Example) -> None:
    if row.images:
        axes.imshow(_side_by_side([Image.open(BytesIO(data)).convert("RGB") for data in row.images]))
    text = _plain(row.problem.replace(IMAGE_TAG, "[picture]"), 400)
    axes.set_title("\n".join([*textwrap.wrap(text, 60), f"→ {_plain(row.answer, 60)}"]), fontsize=8, loc="left")


def _side_by_side(pictures: Sequence[Image.Image], height: int = 240) -> Image.Image:
    scaled = [picture.resize((max(1, picture.width * height // picture.height), height)) for picture in pictures]
    row = Image.new("RGB", (sum(picture.width for picture in scaled), height), "white")
    left = 0
    for picture in scaled:
        row.paste(picture, (left, 0))
        left += picture.width
    return row


def _plain(text: str, length: int) -> str:
    """Text on one line, cut, and without marks that the plotting library takes for mathematics."""
    line = " ".join(text.split()).replace("$", r"\$")
    return line if len(line) <= length else f"{line[:length]}…"
