"""PathVQA: pathology pictures; half of the questions are closed (yes or no), half are open."""

from collections.abc import Mapping
from typing import Any

from cpt_rft.tasks.base import Raw
from cpt_rft.tasks.table import TableTask, picture_bytes, text_of


class Reader(TableTask):
    """No column says which questions are closed: those whose answer is yes or no."""

    COLUMNS = ("image", "question", "answer")

    def read(self, raw: Mapping[str, Any]) -> Raw:
        """A closed question compares as yes or no, an open one as words."""
        answer = text_of(raw["answer"])
        closed = answer.casefold() in ("yes", "no")
        return Raw(
            pictures=(picture_bytes(raw["image"]),),
            fields={"question": text_of(raw["question"])},
            answer=answer,
            kind="yes_no" if closed else "short_text",
        )
