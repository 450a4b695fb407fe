"""Figures of plasticity and stability, of general abilities, and of training."""

from collections.abc import Mapping, Sequence

from eval.report.drawn import WIDTH, Figure, Json, Series
from eval.report.gather import CURVES, Curve
from eval.report.svg import Scale, Svg, room, scale
from eval.results import NATIVE
from eval.table import Sheet
from eval.words import METRIC_NAMES, MINUS, NONE, SCORE_NAMES, bounds, number, short, signed


def plasticity(results: Json, arms: Sequence[Series], score: str) -> Figure:
    """Learned against retained: on the diagonal nothing is lost."""
    dots, rows = [], []
    parts = {arm: results["methods"][arm.name]["summary"][NATIVE][score] for arm in arms}
    for arm, part in parts.items():
        if "learned" in part:
            pairs = list(zip(part["learned"]["values"], part["avg_acc"]["values"], strict=True))
            dots.append((arm, part["learned"]["value"], part["avg_acc"]["value"], pairs))
        learned = number(part["learned"]["value"]) if "learned" in part else NONE
        rows.append((arm.name, learned, number(part["avg_acc"]["value"])))
    joint = [(arm, part["avg_acc"]["value"]) for arm, part in parts.items() if arm.joint]
    reach = [value for _, a, b, pairs in dots for value in (a, b, *(v for pair in pairs for v in pair))]
    reach += [value for _, value in joint]
    size, left, bottom = 300.0, 40.0, 256.0
    x, y = scale(reach, left, WIDTH - 12, pad=0.12), scale(reach, bottom, 10, pad=0.12)
    told = "; ".join(f"{name}: learned {learned}, retained {kept}" for name, learned, kept in rows)
    svg = Svg(WIDTH, size, f"Learned against retained, {SCORE_NAMES[score]}", told)
    for tick in x.ticks():
        svg.line(x(tick), 10, x(tick), bottom, "grid")
        svg.line(left, y(tick), WIDTH - 12, y(tick), "grid")
        svg.text(x(tick), bottom + 15, number(tick).removesuffix(".0"), "", "middle")
        svg.text(left - 6, y(tick) + 4, number(tick).removesuffix(".0"), "", "end")
    svg.line(x(x.low), y(x.low), x(x.high), y(x.high), "zero")
    svg.text((left + WIDTH) / 2, bottom + 34, "learned: accuracy right after learning, %", "", "middle")
    svg.text(left + 4, 22, f"retained at the end, %, {SCORE_NAMES[score]}", "halo")
    for arm, value in joint:
        svg.line(left, y(value), WIDTH - 12, y(value), f"joint-line {arm.style}")
        svg.text(left + 4, y(value) - 5, arm.name, f"label halo {arm.style}")
    for arm, learned_, kept, pairs in dots:
        for one in pairs if len(pairs) > 1 else ():
            svg.marker(x(one[0]), y(one[1]), arm.shape, 3, f"faint {arm.style}")
        svg.marker(x(learned_), y(kept), arm.shape, 6.5, f"point {arm.style}", arm.name)
        svg.text(x(learned_) - 11, y(kept) + 4, arm.name, f"label halo {arm.style}", "end")
    caption = "The same with answers in any accepted form."
    if score == "strict":
        caption = (
            "Plasticity and stability: on the diagonal nothing is lost; the distance below it is what was forgotten."
            " Large marks are means, small ones single seeds; the dashed line is multi-task training."
        )
    heads = ("method", METRIC_NAMES["learned"], "retained (AvgAcc)")
    return Figure((svg.done(),), caption, Sheet("Learned against retained", heads, tuple(rows), 1))


def general(results: Json, arms: Sequence[Series], score: str) -> Figure:
    """Held-out abilities before and after, one panel an ability."""
    names = [*results["general"], "mean"]
    tables = {arm: results["methods"][arm.name]["summary"][NATIVE][score]["general"] for arm in arms}
    width, step, top, drawings = 280.0, 20.0, 26.0, []
    left = room((arm.name for arm in arms), 72.0, width / 2)
    reach = [row[key] for table in tables.values() for row in table.values() for key in ("before", "after")]
    x = scale(reach, left, width - 44, pad=0.08)
    bottom = top + step * len(arms)
    for name in names:
        told = "; ".join(
            f"{a.name} {number(t[name]['before'])} to {number(t[name]['after'])}" for a, t in tables.items()
        )
        svg = Svg(width, bottom + 20, f"{short(name)} before and after", told)
        svg.text(0, 14, short(name), "panel")
        for tick in x.ticks():
            svg.line(x(tick), top - 4, x(tick), bottom, "grid")
            svg.text(x(tick), bottom + 14, number(tick).removesuffix(".0"), "", "middle")
        for place, (arm, table) in enumerate(tables.items()):
            row, y = table[name], top + step * (place + 0.5)
            svg.text(left - 10, y + 4, arm.name, "name", "end")
            svg.line(x(row["before"]), y, x(row["after"]), y, f"bar {arm.style}")
            svg.marker(x(row["before"]), y, arm.shape, 4, f"hollow {arm.style}")
            svg.marker(x(row["after"]), y, arm.shape, 4.5, f"point {arm.style}")
            svg.text(width - 2, y + 4, signed(row["change"]["value"]), "", "end")
        drawings.append(svg.done())
    rows = tuple(
        (arm.name, short(n), number(t[n]["before"]), number(t[n]["after"]), bounds(t[n]["change"]["examples"]))
        for arm, t in tables.items()
        for n in names
    )
    caption = (
        f"Held-out abilities ({SCORE_NAMES[score]}, native prompt style, %): hollow before the first task, filled after"
        " the last. Nothing here was trained on."
    )
    heads = ("method", "ability", "before", "after", "change, 95 % interval")
    return Figure(tuple(drawings), caption, Sheet("General abilities", heads, rows, 2))


def training(found: Mapping[str, Sequence[Curve]], arms: Sequence[Series], stages: int) -> Figure | None:
    """One panel a logged quantity, over the whole sequence."""
    drawings, rows = [], []
    by_name = {arm.name: arm for arm in arms}
    for key in (key for key in CURVES if key in found):
        drawn = found[key]
        width, height = 260.0, 132.0
        name = CURVES[key][0]
        values = [value for curve in drawn for _, value in curve.points]
        x, y = Scale(0, 1, 40, width - 6), scale(values, height - 18, 24)
        ends = [(curve.method, curve.points[0][1], curve.points[-1][1]) for curve in drawn]
        svg = Svg(width, height, f"Training: {name}", "; ".join(f"{m} from {a:.3g} to {b:.3g}" for m, a, b in ends))
        svg.text(0, 12, name, "panel")
        for tick in y.ticks(3):
            svg.line(40, y(tick), width - 6, y(tick), "grid")
            svg.text(35, y(tick) + 4, f"{tick:g}".replace("-", MINUS), "", "end")
        for stage in range(stages + 1):
            svg.line(x(stage / stages), height - 18, x(stage / stages), height - 14, "axis")
            if stage:
                svg.text(x((stage - 0.5) / stages), height - 4, str(stage), "", "middle")
        for curve in drawn:
            points = [(x(share), y(value)) for share, value in curve.points]
            svg.path(points, f"curve {by_name[curve.method].style}{' joint-line' * by_name[curve.method].joint}")
        drawings.append(svg.done())
        rows += [(name, m, f"{a:.4g}".replace("-", MINUS), f"{b:.4g}".replace("-", MINUS)) for m, a, b in ends]
    if not drawings:
        return None
    caption = (
        "Training logs over the whole sequence, mean over the seeds, smoothed to at most 140 points; numbers below are"
        " the tasks. Multi-task training is stretched over the same width."
    )
    sheet = Sheet("Training logs", ("quantity", "method", "first", "last"), tuple(rows), 2)
    return Figure(tuple(drawings), caption, sheet)
