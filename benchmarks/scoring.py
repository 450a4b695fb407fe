"""How many answers a second the scorers take: short ones of every kind on one core, LaTeX on two with the sandbox on.

Every answer is another text, so nothing comes out of the store of compared pairs. Medians over the rounds, as JSON. For
LaTeX two rates are told: on the clock, where other work on the machine counts, and what two cores do that are given to
it, from the processor time of everything that takes part; starting the workers is in the second and not in the first.
"""

import argparse
import json
import os
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator

from cpt_rft.data.example import Kind
from cpt_rft.scoring import math_equality, reward, score

CORES = 2
WORDS = "red green dog cat the a left right yes no table 3 7 42 unanswerable window B C person".split()  # noqa: SIM905
ROWS: dict[Kind, tuple[str, list[str]]] = {
    "choice": ("B", ["B", "dog"]),
    "short_text": ("red", ["red"]),
    "vqa": ("red", ["red"] * 6 + ["crimson"] * 2 + ["dark red"] * 2),
    "yes_no": ("yes", ["yes"]),
    "number": ("3", ["3", "three"]),
    "sequence": ("3,1,2", ["3,1,2"]),
    "mmmu_choice": ("B", ["B"]),
    "mmmu_open": ("42", ["42"]),
    "mmlu_pro": ("B", ["B"]),
}
SURDS: tuple[Callable[[int, int], tuple[str, str]], ...] = (
    lambda a, b: (f"{a} \\sqrt {{ {b} }}", f"\\sqrt{{{a * a * b}}}"),
    lambda a, b: (f"\\frac {{ {a} }} {{ {b} }}", f"{a}/{b}"),
    lambda a, b: (f"{a} \\pi + {b}", f"{b} + {a}\\pi"),
    lambda a, b: (f"{a}.{b}", f"\\frac{{{a}}}{{{b}}}"),
    lambda a, b: (f"{a}{b} \\text{{ cm}}", f"{a}{b}.0"),
    lambda a, b: (f"\\sqrt {{ {b} }} / {a}", f"\\frac{{{a}}}{{\\sqrt{{{b}}}}}"),
)


def short_answers(count: int) -> Iterator[tuple[Kind, str, str]]:
    """Kind, style and response: half in the required form, half a short sentence."""
    rng = random.Random(0)
    kinds = list(ROWS)
    for number in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randrange(1, 4)))
        if number % 2:
            yield kinds[number % len(kinds)], "cot", f"<think> {text} {number} </think> \\boxed{{ {text} }}"
        else:
            yield kinds[number % len(kinds)], "direct", text


def time_short(count: int) -> float:
    """Processor seconds for `count` short answers, reward included."""
    rows = list(short_answers(count))
    options = ("cat", "dog", "bird", "fish")
    started = time.process_time()
    for kind, style, response in rows:
        answer, references = ROWS[kind]
        result = score(response, answer=answer, references=references, kind=kind, style=style, options=options)  # type: ignore[arg-type]
        reward(result, style)  # type: ignore[arg-type]
    return time.process_time() - started


def processor_seconds() -> float:
    """Processor time of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def rate_latex(first: int, count: int, judge: math_equality.JudgeName) -> tuple[float, float]:
    """Pairs a second, none alike, on the clock with the workers up, and of two cores' processor time, all included."""
    pairs = [SURDS[number % len(SURDS)](2 + number // 7, 3 + number) for number in range(first, first + count)]
    before = processor_seconds()
    math_equality.verdicts([("x+1", "1+x")] + [("x+2", f"{number}+x") for number in range(40)], judge)
    started = time.monotonic()
    math_equality.verdicts(pairs, judge)
    clock = time.monotonic() - started
    math_equality.close()
    return count / clock, CORES * count / (processor_seconds() - before)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=100_000, help="short answers (default: %(default)s)")
    parser.add_argument("--latex", type=int, default=3_000, help="pairs of LaTeX a library (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="(default: %(default)s)")
    arguments = parser.parse_args()
    seconds = statistics.median(time_short(arguments.answers) for _ in range(arguments.rounds))
    told = {"short_answers": arguments.answers, "seconds": round(seconds, 2), "latex_pairs": arguments.latex}
    for judge in ("math_verify", "mathruler"):
        starts = [arguments.latex * number for number in range(arguments.rounds)]
        rates = [rate_latex(start, arguments.latex, judge) for start in starts]  # type: ignore[arg-type]
        told[f"{judge}_pairs_a_second"] = round(statistics.median(clock for clock, _ in rates))
        told[f"{judge}_pairs_a_second_of_two_cores"] = round(statistics.median(rate for _, rate in rates))
    told |= {"rounds": arguments.rounds, "cores": os.cpu_count() or 1, "load": round(os.getloadavg()[0], 1)}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
