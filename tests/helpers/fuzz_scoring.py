"""Score hostile strings in a process of its own and tell what it cost and touched, as JSON.

Usage: python -m tests.helpers.fuzz_scoring COUNT [SEED]
"""

import json
import os
import random
import resource
import sys
from collections import Counter
from functools import partial
from typing import Any

from cpt_rft.scoring import KINDS, PRESETS, math_equality, score
from tests.helpers.busy import timed
from tests.helpers.hostile import hostile_strings

ROWS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {  # kind: answer, references, options
    "choice": ("B", ("B", "dog"), ("cat", "dog", "bird")),
    "latex": ("2 \\sqrt { 3 }", ("2 \\sqrt { 3 }", "12"), ()),
    "mmlu_pro": ("B", ("B",), ("cat", "dog", "bird")),
    "mmmu_choice": ("B", ("B",), ("cat", "dog", "bird")),
    "mmmu_open": ("42", ("42", "Paris"), ()),
    "number": ("3", ("3", "three"), ()),
    "sequence": ("3,1,2", ("3,1,2",), ()),
    "short_text": ("red", ("red", "crimson"), ()),
    "vqa": ("red", ("red",) * 6 + ("crimson",) * 4, ()),
    "yes_no": ("yes", ("yes", "true"), ()),
}
#: Events of Python that touch nothing: what an interpreter does all the time.
INWARD = ("import", "compile", "exec", "object.", "sys._getframe", "marshal.", "builtins.", "gc.", "code.", "function.")
touched: Counter[str] = Counter()


def watch(event: str, details: tuple[Any, ...]) -> None:
    """Note what leaves the process; ending a fork of our own worker is what a deadline is for."""
    if not event.startswith(INWARD) and not (event == "os.kill" and details[0] in forks()):
        touched[event] += 1


def forks() -> set[int]:
    return {worker.fork for worker in math_equality._POOL.started}


def memory_mib() -> float:
    """Peak of resident memory: it cannot fall, so what it gains in the later part of a run bounds any leak."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main() -> None:
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    rng = random.Random(f"rows {seed}")
    math_equality.verdicts([("x+1", "1+x")] * 40, "math_verify")  # the workers are up
    sys.addaudithook(watch)
    worst, worst_of, statuses = 0.0, "", Counter[str]()
    settled = 0.0
    for number, text in enumerate(hostile_strings(count, seed)):
        kind, style, preset = rng.choice(sorted(KINDS)), rng.choice(("cot", "direct")), rng.choice(sorted(PRESETS))
        answer, references, options = ROWS[kind]
        row = {"answer": answer, "references": references, "kind": kind, "style": style, "options": options}
        seconds, result = timed(partial(score, text, **row, preset=preset), enough=0.9)
        statuses[result.status] += 1
        if seconds > worst:
            worst, worst_of = seconds, f"{kind} {style} {preset}: {text[:80]!a}"
        if number == count // 4:
            settled = memory_mib()
    noted = dict(touched)  # before this function itself looks for files
    told = {
        "count": count,
        "worst_seconds": round(worst, 3),
        "worst_of": worst_of,
        "growth_mib": round(memory_mib() - settled, 1),
        "touched": noted,
        "statuses": statuses,
        "mathematics": math_equality.counts()._asdict(),
        "left_behind": [name for name in os.listdir() if "pwned" in name],
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
