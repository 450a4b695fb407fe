"""Geometry3K: a figure and a question whose answer is a number or an expression in LaTeX."""

import re
from collections.abc import Mapping
from typing import Any

from cpt_rft.data.example import IMAGE_TAG
from cpt_rft.tasks.base import Raw
from cpt_rft.tasks.table import TableTask, picture_bytes, text_of

_NUMBER = re.compile(r"-?\d+(\.\d+)?")


class Reader(TableTask):
    """``problem`` begins with its own ``<image>`` tag, which the prompts write instead."""

    COLUMNS = ("images", "problem", "answer")

    def read(self, raw: Mapping[str, Any]) -> Raw:
        """Plain numbers compare in value, all other answers as LaTeX."""
        answer = text_of(raw["answer"])
        return Raw(
            pictures=tuple(picture_bytes(cell) for cell in raw["images"]) or (b"",),
            fields={"question": text_of(raw["problem"]).removeprefix(IMAGE_TAG).strip()},
            answer=answer,
            kind="number" if _NUMBER.fullmatch(answer) else "latex",
        )
