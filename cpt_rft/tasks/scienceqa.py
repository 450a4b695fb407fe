"""ScienceQA: school questions with lettered options; only those with a picture are used, as in the paper."""

from collections.abc import Mapping
from typing import Any

from cpt_rft.tasks.base import Raw
from cpt_rft.tasks.table import TableTask, picture_bytes, text_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Reader(TableTask):
    """The answer is a number in the source and a letter here; the solution is the rationale."""

    COLUMNS = ("image", "question", "choices", "answer", "hint", "solution")

    def read(self, raw: Mapping[str, Any]) -> Raw:
        """Without a picture the row is dropped as ``no_picture``."""
        choices = [text_of(choice) for choice in raw["choices"]]
        index = raw["answer"]
        if not 0 <= index < len(choices):
            raise ValueError(f"answer {index} of {len(choices)} choices")
        hint = text_of(raw["hint"] or "")
        return Raw(
            pictures=(picture_bytes(raw["image"]),),
            fields={
                "question": text_of(raw["question"]),
                "options": lettered(choices),
                "context_line": f"Context: {hint}\n" if hint else "",
                "bare_context_line": f"{hint}\n" if hint else "",
            },
            answer=LETTERS[index],
            references=(choices[index],),
            rationale=text_of(raw["solution"] or "") or None,
            meta={"options": choices},
        )


def lettered(choices: list[str]) -> str:
    """One option a line.

    >>> print(lettered(["cat", "dog"]))
    A. cat
    B. dog
    """
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
