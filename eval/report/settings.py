"""Learning rates and task orders as curves: what was learned against what was retained."""

from collections.abc import Sequence

from eval.report.drawn import WIDTH, Figure, Json, Series
from eval.report.svg import Svg, scale
from eval.table import Sheet
from eval.words import METRIC_NAMES, number

#: A mark: its label, what was learned and what was retained.
Mark = tuple[str, float, float]


def rates(results: Json, arms: Sequence[Series]) -> Figure | None:
    """Each family of settings as one line from its lowest learning rate to its highest; none without a family."""
    by_name = {arm.name: arm for arm in arms}
    lines = []
    for label, members in results["families"].items():
        if len(members) > 1:
            ordered = sorted(members, key=lambda name: results["methods"][name]["lr"])
            marks = [(f"{results['methods'][name]['lr']:g}", *_means(results, name)) for name in ordered]
            lines.append((by_name[members[0]], label, marks))
    caption = (
        "Learning rates: each line is one method from its lowest rate to its highest. Compare the lines where they"
        " stand at the same place along the axis, not the points."
    )
    return _figure("Learned against retained by learning rate", "learning rate", caption, lines)


def orders(results: Json, arms: Sequence[Series]) -> Figure | None:
    """Each method as one line over its task orders; none with a single order."""
    lines = []
    for arm in arms:
        entries = results["methods"][arm.name]["seeds"].values()
        indices = sorted({entry["order_index"] for entry in entries})
        if len(indices) > 1 and not arm.joint:
            lines.append((arm, arm.name, [(str(index), *_means(results, arm.name, index)) for index in indices]))
    caption = "Task orders, numbered as in the experiment: how much of the result is the order."
    return _figure("Learned against retained by task order", "order", caption, lines)


def _means(results: Json, name: str, order: int | None = None) -> tuple[float, float]:
    """Learned and retained, native and strict, mean over the seeds (of one order)."""
    entries = [e for e in results["methods"][name]["seeds"].values() if order is None or e["order_index"] == order]
    return (
        sum(entry["learned"] for entry in entries) / len(entries),
        sum(entry["avg_acc"] for entry in entries) / len(entries),
    )


def _figure(title: str, what: str, caption: str, lines: Sequence[tuple[Series, str, list[Mark]]]) -> Figure | None:
    if not lines:
        return None
    marks = [mark for _, _, found in lines for mark in found]
    left, bottom = 40.0, 256.0
    x = scale([mark[1] for mark in marks], left, WIDTH - 12, pad=0.12)
    y = scale([mark[2] for mark in marks], bottom, 10, pad=0.12)
    told = "; ".join(
        f"{label}: " + ", ".join(f"{name} learned {number(a)}, retained {number(b)}" for name, a, b in found)
        for _, label, found in lines
    )
    svg = Svg(WIDTH, 300.0, title, told)
    for tick in x.ticks():
        svg.line(x(tick), 10, x(tick), bottom, "grid")
        svg.text(x(tick), bottom + 15, number(tick).removesuffix(".0"), "", "middle")
    for tick in y.ticks():
        svg.line(left, y(tick), WIDTH - 12, y(tick), "grid")
        svg.text(left - 6, y(tick) + 4, number(tick).removesuffix(".0"), "", "end")
    svg.text((left + WIDTH) / 2, bottom + 34, "learned: accuracy right after learning, %", "", "middle")
    svg.text(left + 4, 22, "retained at the end, %, strict", "halo")
    for arm, label, found in lines:
        svg.path([(x(a), y(b)) for _, a, b in found], f"curve {arm.style}")
        for name, a, b in found:
            svg.marker(x(a), y(b), arm.shape, 4, f"point {arm.style}", f"{label}, {what} {name}")
            svg.text(x(a) + 6, y(b) - 6, name, f"halo {arm.style}")
        svg.text(x(found[-1][1]) - 8, y(found[-1][2]) + 14, label, f"label halo {arm.style}", "end")
    rows = tuple((label, name, number(a), number(b)) for _, label, found in lines for name, a, b in found)
    heads = ("method", what, METRIC_NAMES["learned"], "retained (AvgAcc)")
    return Figure((svg.done(),), caption, Sheet(title, heads, rows, 2))
