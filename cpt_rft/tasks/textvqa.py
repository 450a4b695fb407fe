"""TextVQA: read text in a photograph. Ten people answered each question; the label is what most of them said."""

from collections.abc import Mapping
from typing import Any

from cpt_rft.tasks.base import Raw
from cpt_rft.tasks.table import TableTask, majority, picture_bytes, text_of


class Reader(TableTask):
    """The paper tests on the official validation split: the test split has no answers."""

    COLUMNS = ("question_id", "image", "question", "answers")
    OPTIONAL = ("image_id", "ocr_tokens")

    def key(self, index: int, raw: Mapping[str, Any]) -> str:
        """The question's number in the source."""
        return str(raw["question_id"])

    def read(self, raw: Mapping[str, Any]) -> Raw:
        """Empty answers, all that the test split has, are no answers."""
        answers = [answer for answer in map(text_of, raw["answers"] or []) if answer]
        tokens = ",".join(text_of(token) for token in raw.get("ocr_tokens") or [])
        return Raw(
            pictures=(picture_bytes(raw["image"]),),
            fields={"question": text_of(raw["question"]), "ocr_line": f"Reference OCR token:{tokens}\n"},
            answer=majority(answers),
            references=tuple(answers),
            meta={"image_id": raw.get("image_id")},
        )
