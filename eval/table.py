"""The results as tables: rich for the terminal, Markdown for ``results/``, rows for the page."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eval.records import COUNTED_APART
from eval.results import NATIVE, SCORES
from eval.words import ARROW, METRIC_NAMES, MINUS, NONE, SCORE_NAMES, bounds, number, seeds_text, short, signed, verdict

Json = dict[str, Any]


@dataclass(frozen=True)
class Sheet:
    """A table without a medium.

    Attributes:
        title: What it shows.
        heads: One a column.
        rows: Cells as text; a line break parts a value from its interval.
        names: So many columns from the left hold names and are not numbers.
        note: How to read it.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int
    note: str = ""

    def rich(self) -> RenderableType:
        """For the terminal; a name that repeats the one above is left out."""
        table = Table(title=self.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
        for place, head in enumerate(self.heads):
            name = place < self.names
            table.add_column(head, justify="left" if name else "right", no_wrap=not name)
        above = ""
        for row in self.rows:
            if above and row[0] != above:
                table.add_section()
            table.add_row("" if row[0] == above else row[0], *row[1:])
            above = row[0]
        return Group(table, Text(self.note, style="dim"), Text())

    def markdown(self) -> str:
        """For ``results/``."""
        lines = [f"### {self.title}", "", _line(self.heads)]
        lines.append(_line(["---"] * self.names + ["---:"] * (len(self.heads) - self.names)))
        lines += [_line([cell.replace("\n", " ").replace("|", "\\|") for cell in row]) for row in self.rows]
        return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])

    def csv(self) -> str:
        """For other programs: ASCII signs, a value and its interval in one cell."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([_plain(cell) for cell in line] for line in (self.heads, *self.rows))
        return stream.getvalue()

    def latex(self) -> str:
        """A ``tabular`` that needs no package."""
        lines = [" & ".join(_escaped(cell) for cell in line) + r" \\" for line in (self.heads, *self.rows)]
        columns = "l" * self.names + "r" * (len(self.heads) - self.names)
        body = [r"\hline", lines[0], r"\hline", *lines[1:], r"\hline"]
        note = f"% {self.title}. {_plain(self.note)}".rstrip()
        return "\n".join([note, rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}", ""])


_SIGNS = {MINUS: "-", NONE: "", ARROW: "->", "\n": " "}
_LATEX = {MINUS: "$-$", NONE: "--", ARROW: r"$\to$", "\n": " ", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
_LATEX |= {"^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", **{sign: f"\\{sign}" for sign in "&%$#_{}"}}


def _plain(text: str) -> str:
    return "".join(_SIGNS.get(letter, letter) for letter in text)


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def sheets(results: Json) -> list[Sheet]:
    """All tables of a run, the comparisons first."""
    parts = [comparison_sheet(entry) for entry in results["comparisons"]]
    general = [general_sheet(results)] if results["general"] else []
    return [*parts, arms_sheet(results), *kept_sheets(results), *general, apart_sheet(results)]


def comparison_sheet(entry: Json) -> Sheet:
    """The paired difference of two arms, natively and in each fixed style."""
    rows = []
    for view, scores in entry["views"].items():
        for score in SCORES:
            parts = scores[score]
            bwt, *cells = (f"{signed(parts[m]['value'])}\n{bounds(parts[m]['examples'])}" for m in METRIC_NAMES)
            rows.append((view, SCORE_NAMES[score], bwt, bounds(parts["bwt"]["seeds"]), *cells))
    note = (
        f"Points; in brackets 95 % intervals, paired over examples; beside BWT that over {seeds_text(entry['seeds'])}."
    )
    if not entry["comparable"]:
        note += " The arms learned unequally (over 3 points apart): read the curve, not this point."
    bwt_name, *names = METRIC_NAMES.values()
    heads = ("prompt style", "score", bwt_name, "over seeds", *names)
    return Sheet(f"{entry['first']} {MINUS} {entry['second']}", heads, tuple(rows), 2, note)


def arms_sheet(results: Json) -> Sheet:
    """Every method in both fixed styles, its native one first, strict and any form."""
    rows = []
    for name, method in results["methods"].items():
        native = method["train_style"]
        for style in sorted(results["styles"], key=lambda style: style != native):
            for score in SCORES:
                part = method["summary"][style][score]
                label = f"{style}, native" if style == native else style
                rows.append((_shown(name, method), label, SCORE_NAMES[score], *_arm_cells(part)))
    heads = ("method", "prompt style", "score", "BWT", "over seeds", "FM", "FM null", "learned", "AvgAcc")
    note = (
        "Percent; in brackets 95 % intervals over examples, beside BWT that over seeds. Noise alone pulls FM down;"
        " FM null is what it would be if nothing were forgotten."
    )
    if any("task_id_oracle" in method for method in results["methods"].values()):
        note += " A task-id oracle is told which task a question is from: an upper bound, compared with no other."
    return Sheet("Methods", heads, tuple(rows), 3, note)


def _shown(name: str, method: Json) -> str:
    """A method's name in a table, with what a reader must know before comparing it."""
    return f"{name} (task-id oracle)" if method.get("task_id_oracle") else name


def _arm_cells(part: Json) -> list[str]:
    bwt, fm, learned, avg_acc = (
        f"{number(part[name]['value'])}\n{bounds(part[name]['examples'])}" if name in part else NONE
        for name in METRIC_NAMES
    )
    seeds, null = (bounds(part["bwt"]["seeds"]), number(part["fm"]["null"]["mean"])) if "fm" in part else (NONE, NONE)
    return [bwt, seeds, fm, null, learned, avg_acc]


def kept_sheets(results: Json) -> list[Sheet]:
    """The share of a task's rows that rollouts left to train on; no sheet if every method used all."""
    rows = []
    for name, method in results["methods"].items():
        seeds = [seed["kept"] for seed in method["seeds"].values() if "kept" in seed]
        if not seeds:
            continue
        cells = []
        for task in results["tasks"]:
            rounds = zip(*([entry["share"] for entry in seed[task]] for seed in seeds), strict=True)
            cells.append(f" {ARROW} ".join(number(100 * sum(shares) / len(shares)) for shares in rounds))
        rows.append((_shown(name, method), *cells))
    heads = ("method", *(short(task) for task in results["tasks"]))
    note = "Percent of a task's training rows, mean over seeds, in each round; the other methods train on all."
    return [Sheet("Rows kept by rollouts", heads, tuple(rows), 1, note)] if rows else []


def general_sheet(results: Json) -> Sheet:
    """Held-out abilities before and after, in the native style."""
    rows = []
    for name, method in results["methods"].items():
        for score in SCORES:
            table = method["summary"][NATIVE][score]["general"]
            cells = [f"{number(row['before'])} {ARROW} {number(row['after'])}" for row in table.values()]
            change = table["mean"]["change"]
            span = f"{signed(change['value'])}\n{bounds(change['examples'])}"
            rows.append((_shown(name, method), f"{method['train_style']}, native", SCORE_NAMES[score], *cells, span))
    heads = ("method", "prompt style", "score", *(short(name) for name in results["general"]), "mean", "change")
    note = "Percent, before the first task and after the last; never trained on."
    return Sheet("General abilities", heads, tuple(rows), 3, note)


def apart_sheet(results: Json) -> Sheet:
    """Responses that are counted apart, of each method at the end of its sequence."""
    rows = []
    for name, method in results["methods"].items():
        for style in results["styles"]:
            ends = [
                [seed["by_style"][style][status][-1] for status in COUNTED_APART] for seed in method["seeds"].values()
            ]
            shares = [
                sum(sum(end[place]) / len(end[place]) for end in ends) / len(ends) for place in range(len(ends[0]))
            ]
            rows.append((_shown(name, method), style, *(number(share) for share in shares)))
    heads = ("method", "prompt style", *(status.replace("_", " ") for status in COUNTED_APART))
    note = "Percent of the responses after the last task, mean over tasks and seeds; they are scored like all others."
    return Sheet("Responses counted apart", heads, tuple(rows), 2, note)


def terminal(results: Json) -> RenderableType:
    """Everything for the terminal."""
    found = verdict(results)
    lines = [
        Text(found.answer, style="bold"),
        *(Text(detail) for detail in found.details),
        Text(about(results)),
        Text(),
    ]
    return Group(*lines, *(sheet.rich() for sheet in sheets(results)))


def markdown(results: Json) -> str:
    """Everything as Markdown."""
    found = verdict(results)
    lead = [f"**{found.answer}**", "", *(f"- {detail}" for detail in (*found.details, about(results))), ""]
    return "\n".join([*lead, *(sheet.markdown() for sheet in sheets(results))])


def about(results: Json) -> str:
    """Size, split and contract of a run."""
    counts = sorted({results["rows"][task] for task in results["tasks"]})
    size = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    fingerprint = results["contract"]["fingerprint"][:12]
    return f"{len(results['tasks'])} tasks, {size} {results['split']} rows each, evaluation contract {fingerprint}."


def accuracy_table(cells: Mapping[tuple[str, str], Json]) -> RenderableType:
    """Accuracy of one checkpoint by (task, style)."""
    keys = (*SCORES, *COUNTED_APART)
    rows = tuple(
        (task, style, str(cell["rows"]), *(number(cell[key]) if key in SCORES else str(cell[key]) for key in keys))
        for (task, style), cell in cells.items()
    )
    apart = tuple(status.replace("_", " ") for status in COUNTED_APART)
    heads = ("task", "style", "rows", "strict %", "any form %", *apart)
    return Sheet("Accuracy", heads, rows, 2).rich()
