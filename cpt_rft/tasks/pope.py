"""POPE: is an object in the picture? A general ability: never trained on."""

from collections.abc import Mapping
from typing import Any

from cpt_rft.tasks.base import Raw
from cpt_rft.tasks.table import TableTask, picture_bytes, text_of


class Reader(TableTask):
    """Three thousand questions in each of three categories, over the same pictures."""

    COLUMNS = ("image", "question", "answer", "category")

    def read(self, raw: Mapping[str, Any]) -> Raw:
        """The answer is yes or no."""
        answer = text_of(raw["answer"]).lower()
        if answer not in ("yes", "no"):
            raise ValueError(f"answer {answer!r} is neither yes nor no")
        return Raw(
            pictures=(picture_bytes(raw["image"]),),
            fields={"question": text_of(raw["question"])},
            answer=answer,
            meta={"category": text_of(raw["category"])},
        )
