"""How many answers a second the scorers take: short ones of every kind on one core, LaTeX on two with the sandbox on.

Every answer is another text, so nothing comes out of the store of compared pairs. Prints JSON.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterator

from cpt_rft.data.example import Kind
from cpt_rft.scoring import math_equality, reward, score

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


def time_latex(count: int, judge: math_equality.JudgeName) -> float:
    """Seconds for `count` pairs, none alike, workers up."""
    pairs = [SURDS[number % len(SURDS)](2 + number // 7, 3 + number) for number in range(count)]
    math_equality.verdicts([("x+1", "1+x")] + [("x+2", f"{number}+x") for number in range(40)], judge)
    started = time.monotonic()
    math_equality.verdicts(pairs, judge)
    return time.monotonic() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=100_000, help="short answers (default: %(default)s)")
    parser.add_argument("--latex", type=int, default=3_000, help="pairs of LaTeX a library (default: %(default)s)")
    arguments = parser.parse_args()
    seconds = time_short(arguments.answers)
    told = {"short_answers": arguments.answers, "seconds": round(seconds, 2)}
    for judge in ("math_verify", "mathruler"):
        elapsed = time_latex(arguments.latex, judge)  # type: ignore[arg-type]
        told[f"{judge}_pairs_a_second"] = round(arguments.latex / elapsed)
    print(json.dumps(told | {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}))


if __name__ == "__main__":
    main()
