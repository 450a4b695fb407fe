"""What explains forgetting as scatter plots: one panel a cause, one mark a stage."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from eval.explain import CAUSES, Cause
from eval.explain_table import EFFECT_NAMES, cause_name, relation_sheet, small
from eval.report.drawn import Figure, Json, Series
from eval.report.svg import Scale, Svg, scale
from eval.words import MINUS, SCORE_NAMES, number

#: A cause that spans more than this factor is drawn on a logarithmic axis.
_WIDE = 20.0
_SIZE = (280.0, 196.0)


def scatters(results: Json, arms: Sequence[Series], score: str) -> Figure | None:
    """Forgetting against everything that was measured; none where nothing was."""
    entries = {entry["cause"]: entry for entry in results["explained"]}
    drawings = []
    for cause in CAUSES:
        entry = entries.get(".".join(cause.key))
        if entry and cause.key[-1] != "token":  # an answer's drift is the one that two prompt styles share
            drawings.append(_panel(results, arms, cause, entry, score))
    if not drawings:
        return None
    caption = (
        "Each mark is one stage of one sequence: across, what was measured; up, how the score on the old tasks changed"
        f" ({SCORE_NAMES[score]}, points), below zero where they were forgotten. \N{GREEK SMALL LETTER RHO} is"
        " Spearman's rank correlation, with a 95 % interval where sequences allow one. Correlation only: stage,"
        " method and prompt style move both sides, so what holds within a method (in the numbers) says more than"
        " what holds over all."
    )
    return Figure(tuple(drawings), caption, relation_sheet(results))


def _panel(results: Json, arms: Sequence[Series], cause: Cause, entry: Json, score: str) -> Markup:
    dots = [
        (arm, value, stage[cause.effect][score])
        for arm in arms
        for seed in results["methods"][arm.name]["seeds"].values()
        for stage in seed["stages"]
        if (value := cause.of(stage)) is not None and stage[cause.effect][score] is not None
    ]
    across = [value for _, value, _ in dots]
    wide = min(across) > 0 and max(across) / min(across) > _WIDE
    width, height = _SIZE
    name, found = cause_name(entry["cause"]), _coefficient_text(entry[score])
    svg = Svg(width, height, f"{EFFECT_NAMES[cause.effect]} against {name}", f"{len(dots)} stages; {found}")
    x = scale([math.log10(value) for value in across] if wide else across, 36.0, width - 10)
    y = scale([*(value for _, _, value in dots), 0.0], height - 36, 42.0)
    for tick in y.ticks(4):
        svg.line(36, y(tick), width - 10, y(tick), "zero" if tick == 0 else "grid")
        svg.text(31, y(tick) + 4, number(tick).removesuffix(".0"), "", "end")
    for place, label in _ticks(x, wide=wide):
        svg.line(x(place), 42, x(place), height - 36, "grid")
        svg.text(x(place), height - 22, label, "", "middle")
    for arm, value, change in dots:
        svg.marker(x(math.log10(value) if wide else value), y(change), arm.shape, 3.2, f"scatter {arm.style}")
    svg.text(0, 12, name, "panel")
    svg.text(0, 29, f"{EFFECT_NAMES[cause.effect]}, points; {found}")
    svg.text((36 + width - 10) / 2, height - 6, f"{_unit(cause)}{', logarithmic' * wide}", "", "middle")
    return svg.done()


def _ticks(x: Scale, *, wide: bool) -> list[tuple[float, str]]:
    """Places on the axis and their labels; a logarithmic axis has powers of ten, or 1, 2 and 5 where it is short."""
    if not wide:
        return [(tick, f"{tick:g}".replace("-", MINUS)) for tick in x.ticks()]
    powers = range(math.floor(x.low), math.ceil(x.high) + 1)
    factors = (1,) if x.high - x.low > 2 else (1, 3)
    step = max(1, round((x.high - x.low) / 4))
    places = [power + math.log10(factor) for power in powers[::step] for factor in factors]
    return [(place, small(10**place)) for place in places if x.low <= place <= x.high]


def _unit(cause: Cause) -> str:
    return {"drift": "nats", "fisher": "g'Fg / g'g" if cause.key[-1] == "per_norm" else "g'Fg"}.get(
        cause.key[0], "mean over the stage's steps"
    )


def _coefficient_text(found: Json) -> str:
    if found["rho"] is None:
        return "no coefficient"
    text = f"\N{GREEK SMALL LETTER RHO} {found['rho']:+.2f}"
    if found["interval"] is not None:
        text += f" [{found['interval'][0]:.2f}, {found['interval'][1]:.2f}]"
    return text.replace("-", MINUS)
