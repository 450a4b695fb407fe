"""Super-CLEVR as the paper has it: the subset in MathV360K, with free-text answers."""

import re
from collections.abc import Mapping
from typing import Any

from cpt_rft.data.example import IMAGE_TAG
from cpt_rft.tasks.base import Raw
from cpt_rft.tasks.table import TableTask, picture_bytes, text_of

_QUESTION = re.compile(r"Question:\s*(.+?)\s*(?:Answer the question using a single word or phrase\.)?", re.DOTALL)


class Reader(TableTask):
    """A row is a conversation; the question stands behind a hint and the word "Question:"."""

    COLUMNS = ("id", "image", "conversations")

    def read(self, raw: Mapping[str, Any]) -> Raw:
        """The first turn asks, the second answers; the label stays as it is written."""
        asked, answered = (text_of(turn["value"]) for turn in raw["conversations"][:2])
        text = asked.replace(IMAGE_TAG, "").strip()
        start = text.find("Question:")
        found = _QUESTION.fullmatch(text[start:]) if start >= 0 else None
        return Raw(
            pictures=(picture_bytes(raw["image"]),),
            fields={"question": found.group(1) if found else text},
            answer=answered,
            meta={"source_id": raw["id"]},
        )
