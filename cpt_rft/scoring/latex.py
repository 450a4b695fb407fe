r"""LaTeX (Geometry3K): equal as written, or equal in mathematics; ``2 \sqrt { 3 }`` is ``\sqrt{12}``, 0.5 a half.

Source: math-verify 0.9.0 ``verify(parse("$gold$"), parse("$candidate$"))``, called in a sandbox (`math_equality`).
Differs from: (1) texts that are equal without their white space are equal, where math-verify finds two texts that it
cannot read unequal; (2) time, memory and length are bounded.
"""

from collections.abc import Sequence

from cpt_rft.scoring import math_equality


def normalise(text: str) -> str:
    """The text without white space and dollar signs.

    Letter case stays: ``X`` and ``x`` may be two variables.
    """
    return "".join(text.split()).replace("$", "")


def matches(candidate: str, references: Sequence[str]) -> bool:
    """Whether the candidate is a reference in writing, which costs nothing, or in mathematics.

    Raises:
        ScoringError: Mathematics is needed and its libraries are not installed.
    """
    given = normalise(candidate)
    if not given or given in {normalise(reference) for reference in references}:
        return bool(given)
    for reference in references:
        verdict = math_equality.verdict(candidate, reference, "math_verify")
        if verdict is not False:
            return bool(verdict)  # a candidate that costs all the time there is gets no second chance
    return False
