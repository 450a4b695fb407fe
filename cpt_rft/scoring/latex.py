r"""LaTeX: equal text once white space is removed; ``2 \sqrt { 3 }`` is ``2\sqrt{3}``, ``0.5`` is not a half."""

from collections.abc import Sequence


def normalise(text: str) -> str:
    """The text without white space and dollar signs.

    Letter case stays: ``X`` and ``x`` may be two variables.
    """
    return "".join(text.split()).replace("$", "")


def matches(candidate: str, references: Sequence[str]) -> bool:
    """Whether the candidate is written as one of the references is."""
    return normalise(candidate) in {normalise(reference) for reference in references}
