"""Figures of what was forgotten: intervals, the matrix R, and each task over the sequence."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from eval.report.drawn import WIDTH, Figure, Json, Series, mean_matrix, native
from eval.report.svg import Scale, Svg, room, scale
from eval.results import NATIVE
from eval.table import Sheet
from eval.words import MINUS, NONE, SCORE_NAMES, bounds, number, short, signed


def forest(results: Json, arms: Sequence[Series]) -> Figure | None:
    """BWT of every sequential method with its intervals, strict and in any form."""
    rows = [
        (arm, score, results["methods"][arm.name]["summary"][NATIVE][score]["bwt"])
        for arm in arms
        if not arm.joint and "bwt" in results["methods"][arm.name]["summary"][NATIVE]["strict"]
        for score in SCORE_NAMES
    ]
    if not rows:
        return None
    drawn = [(a.style, a.shape, f"{a.name}, {SCORE_NAMES[s]}", p) for a, s, p in rows]
    return Figure(
        (_intervals("Backward transfer, points", drawn),),
        "Backward transfer of each method in its native prompt style: how much the score on a task changed from right"
        " after it was learned to the end. Bar: 95 % interval over examples. Small marks: single seeds.",
        Sheet(
            "Backward transfer",
            ("method", "score", "BWT", "over examples", "over seeds"),
            tuple(
                (a.name, SCORE_NAMES[s], number(p["value"]), bounds(p["examples"]), bounds(p["seeds"]))
                for a, s, p in rows
            ),
            2,
        ),
    )


def differences(entry: Json) -> Figure:
    """Difference of BWT between two methods in every view."""
    rows = [(view, score, entry["views"][view][score]["bwt"]) for view in entry["views"] for score in SCORE_NAMES]
    name = f"{entry['first']} {MINUS} {entry['second']}"
    return Figure(
        (_intervals(f"BWT of {name}, points", [("neutral", 3, f"{v}, {SCORE_NAMES[s]}", p) for v, s, p in rows]),),
        f"The paired difference of backward transfer, {name}: right of zero, {entry['first']} forgets less. The same"
        " rows are compared, each method in its native prompt style, then both in the same style.",
        Sheet(
            f"Difference of BWT, {name}",
            ("prompt style", "score", "difference", "over examples", "over seeds"),
            tuple(
                (v, SCORE_NAMES[s], signed(p["value"]), bounds(p["examples"]), bounds(p["seeds"])) for v, s, p in rows
            ),
            2,
        ),
    )


def _intervals(title: str, rows: Sequence[tuple[str, int, str, Json]]) -> Markup:
    """Points with bars; a row is (colour class, marker, label, value with its intervals)."""
    left, row_height, top = room((label for _, _, label, _ in rows), 124.0, WIDTH / 2), 30.0, 8.0
    bottom = top + row_height * len(rows)
    told = "; ".join(f"{label} {number(part['value'])} {bounds(part['examples'])}" for *_, label, part in rows)
    svg = Svg(WIDTH, bottom + 38, title, told)
    reach = [0.0, *(bound for *_, part in rows for bound in (*part["examples"], *part["values"]))]
    x = scale(reach, left, WIDTH - 14)
    for tick in x.ticks():
        svg.line(x(tick), top, x(tick), bottom, "zero" if tick == 0 else "grid")
        svg.text(x(tick), bottom + 14, number(tick).removesuffix(".0"), "", "middle")
    svg.text((left + WIDTH - 14) / 2, bottom + 32, title, "", "middle")
    for place, (style, shape, label, part) in enumerate(rows):
        y = top + row_height * (place + 0.5)
        svg.text(left - 10, y + 4, label, "name", "end")
        svg.line(x(part["examples"][0]), y, x(part["examples"][1]), y, f"bar {style}")
        for value in part["values"] if len(part["values"]) > 1 else ():
            svg.line(x(value), y + 6, x(value), y + 11, f"seed {style}")
        svg.marker(x(part["value"]), y, shape, 5, f"point {style}", f"{label}: {number(part['value'])}")
    return svg.done()


def heat_map(results: Json, arm: Series, score: str) -> Figure | None:
    """R of one method in its native style, mean over its seeds."""
    method = results["methods"][arm.name]
    matrix = mean_matrix(method, method["train_style"], score)
    if matrix is None:
        return None
    tasks = [short(task) for task in results["tasks"]]
    stages = ["base", *(f"{place} {task}" for place, task in enumerate(tasks, start=1))]
    left, top, cell = 92.0, 22.0, (WIDTH - 92) / len(tasks)
    height = 27.0
    lost = "; ".join(
        f"{task} {number(matrix[j + 1, j])} then {number(matrix[-1, j])}" for j, task in enumerate(tasks[:-1])
    )
    title = f"Accuracy matrix of {arm.name} ({method['train_style']}, {SCORE_NAMES[score]})"
    svg = Svg(WIDTH, top + height * len(stages) + 4, title, f"Right after learning, then at the end: {lost}.")
    for j in range(len(tasks)):
        svg.text(left + cell * (j + 0.5), top - 7, str(j + 1), "", "middle")
    for i, stage in enumerate(stages):
        y = top + height * i
        svg.text(left - 8, y + height / 2 + 4, stage, "name", "end")
        for j in range(len(tasks)):
            value = float(matrix[i, j])
            svg.rect(left + cell * j + 1, y + 1, cell - 2, height - 2, "heat", 0.02 + 0.6 * (value / 100) ** 1.3)
            ink = "unseen" if i <= j else "name"
            svg.text(left + cell * (j + 0.5), y + height / 2 + 4, f"{value:.0f}", ink, "middle")
            if i == j + 1:
                svg.rect(left + cell * j + 1, y + 1, cell - 2, height - 2, "learned")
    sheet = Sheet(
        title,
        ("after", *(f"{place} {task}" for place, task in enumerate(tasks, start=1))),
        tuple((stage, *(number(value) for value in matrix[i])) for i, stage in enumerate(stages)),
        1,
    )
    return Figure((svg.done(),), f"{arm.name}, trained and scored in the {method['train_style']} style", sheet)


def task_lines(results: Json, arms: Sequence[Series], score: str) -> Figure:
    """Accuracy of each task along the sequence, one small panel a task."""
    tasks, drawings, rows = results["tasks"], [], []
    matrices = {arm: mean_matrix(results["methods"][arm.name], native(results, arm), score) for arm in arms}
    for j, task in enumerate(tasks):
        told = []
        width, height = 180.0, 122.0
        x, y = Scale(0, len(tasks), 26, width - 8), Scale(0, 100, height - 20, 22)
        lines: list[tuple[Series, list[tuple[float, float]], str]] = []
        for arm, matrix in matrices.items():
            if matrix is None:
                value = _joint_value(results, arm, task, score)
                lines.append((arm, [(x(0), y(value)), (x(len(tasks)), y(value))], "joint-line"))
                rows.append((short(task), arm.name, *[NONE] * len(tasks), number(value)))
            else:
                lines.append((arm, [(x(i), y(float(v))) for i, v in enumerate(matrix[:, j])], "curve"))
                rows.append((short(task), arm.name, *(number(v) for v in matrix[:, j])))
            told.append(f"{arm.name}: {', '.join(value for value in rows[-1][2:] if value != NONE)}")
        svg = Svg(width, height, f"Accuracy on {short(task)} over the sequence", "; ".join(told))
        for tick in (0, 50, 100):
            svg.line(x(0), y(tick), x(len(tasks)), y(tick), "grid")
            svg.text(21, y(tick) + 3.5, str(tick), "", "end")
        svg.rect(x(j + 1), y(100), x(len(tasks)) - x(j + 1), y(0) - y(100), "after")
        for i in range(len(tasks) + 1):
            svg.text(x(i), height - 6, str(i), "here" if i == j + 1 else "", "middle")
        svg.text(26, 13, f"{j + 1} {short(task)}", "panel")
        for arm, points, style in lines:
            svg.path(points, f"{style} {arm.style}")
            for point in points if style == "curve" else ():
                svg.marker(*point, arm.shape, 2.1, f"point {arm.style}")
        drawings.append(svg.done())
    heads = ("task", "method", "base", *(f"after {place}" for place in range(1, len(tasks) + 1)))
    caption = (
        f"Accuracy on each task ({SCORE_NAMES[score]}, native prompt style, %) after each stage of the sequence;"
        " 0 is the base model. The shade begins where the task is learned."
    )
    return Figure(tuple(drawings), caption, Sheet("Accuracy over the sequence", heads, tuple(rows), 2))


def _joint_value(results: Json, arm: Series, task: str, score: str) -> float:
    values = []
    for entry in results["methods"][arm.name]["seeds"].values():
        block = entry["by_style"][native(results, arm)]
        matrix = block["matrix"] if score == "strict" else block["lenient"]["matrix"]
        values.append(matrix[-1][entry["order"].index(task)])
    return float(np.mean(values))
