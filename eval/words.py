"""Numbers and verdicts as text, the same in the terminal, in Markdown and on the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.results import NATIVE
from eval.runs import listed

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"
ARROW = "\N{RIGHTWARDS ARROW}"
#: Order and names of the headline metrics in every table.
METRIC_NAMES = {"bwt": "BWT", "fm": "FM", "learned": "learned", "avg_acc": "AvgAcc"}
SCORE_NAMES = {"strict": "strict", "lenient": "any form"}


def number(value: float) -> str:
    """One digit after the point, with a true minus sign.

    >>> number(-1.26) == MINUS + "1.3", number(-0.04), number(60)
    (True, '0.0', '60.0')
    """
    text = f"{abs(value):.1f}"
    return f"{MINUS}{text}" if value < 0 and float(text) else text


def signed(value: float) -> str:
    """As `number`, with a plus before what is above zero.

    >>> signed(1.25), signed(0.04)
    ('+1.2', '0.0')
    """
    text = number(value)
    return f"+{text}" if value > 0 and float(text) else text


def bounds(interval: Sequence[float] | None) -> str:
    """An interval in brackets, a dash for none.

    >>> bounds([1.04, 3.0]), bounds(None) == NONE
    ('[1.0, 3.0]', True)
    """
    return NONE if interval is None else f"[{number(interval[0])}, {number(interval[1])}]"


def seeds_text(count: int) -> str:
    """A count of seeds.

    >>> seeds_text(1), seeds_text(3)
    ('1 seed', '3 seeds')
    """
    return f"{count} seed{'' if count == 1 else 's'}"


def short(task: str) -> str:
    """A task's name on the page.

    >>> short("mini_gqa"), short("pathvqa")
    ('gqa', 'pathvqa')
    """
    return task.removeprefix("mini_")


@dataclass(frozen=True)
class Verdict:
    """The answer of a run.

    Attributes:
        answer: One sentence: which arm forgets less, by how much.
        details: What qualifies it, one sentence each: seeds, any form, equal learning, missing cells.
    """

    answer: str
    details: tuple[str, ...]


def verdict(results: dict[str, Any]) -> Verdict:
    """The headline of a run, from its first comparison and the native, strict view."""
    missing = results["missing"]
    partial = (f"Partial: {listed(missing)} missing; incomplete sequences are left out.",) if missing else ()
    if not results["comparisons"]:
        return Verdict("There are no two sequential methods to compare.", partial)
    entry = results["comparisons"][0]
    views = entry["views"][NATIVE]
    strict, lenient = (views[score]["bwt"] for score in ("strict", "lenient"))
    sign = 1 if strict["value"] >= 0 else -1
    less, more = (entry["first"], entry["second"])[::sign]
    span, form_free = _turned(strict["examples"], sign), _turned(lenient["examples"], sign)
    over_seeds = _turned(strict["seeds"], sign) if strict["seeds"] else None
    spread = f"over {seeds_text(entry['seeds'])} {bounds(over_seeds)}" if over_seeds else "one seed only"
    by = f"{number(sign * strict['value'])} points of backward transfer"
    if span[0] <= 0:
        answer = f"{less} and {more} do not differ clearly in what they forget."
    elif over_seeds is None:
        answer = f"{less} forgot less than {more}, by {by}, in one seed."
    elif over_seeds[0] <= 0:
        answer = f"{less} forgot less than {more}, by {by}, but the seeds do not settle it."
    else:
        answer = f"{less} forgets less than {more}, by {by}."
    details = [
        "Backward transfer (BWT) is the change of a task's score from right after it was learned to the end:"
        f" {_each(results, 'bwt', less, more)}. Difference {signed(sign * strict['value'])},"
        f" 95 % interval over examples {bounds(span)}, {spread}.",
        f"With answers in any accepted form instead of the required one the difference is"
        f" {signed(sign * lenient['value'])} {bounds(form_free)}"
        + (": what was lost is the form more than the answer." if span[0] > 0 >= form_free[0] else "."),
        f"Accuracy right after learning: {_each(results, 'learned', less, more)}"
        + (
            "."
            if entry["comparable"]
            else ", over 3 points apart (strict or in any form): no fair comparison at one"
            " point, so read learned against retained."
        ),
    ]
    return Verdict(answer, (*details, *partial))


def _each(results: dict[str, Any], metric: str, *methods: str) -> str:
    """A metric of some methods, native and strict."""
    values = [results["methods"][name]["summary"][NATIVE]["strict"][metric]["value"] for name in methods]
    return ", ".join(f"{name} {number(value)}" for name, value in zip(methods, values, strict=True))


def _turned(interval: Sequence[float], sign: int) -> tuple[float, float]:
    """The interval of a value whose sign was turned."""
    low, high = interval
    return (low, high) if sign > 0 else (-high, -low)
