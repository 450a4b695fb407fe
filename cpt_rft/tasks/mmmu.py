"""MMMU: college questions with up to seven pictures, lettered or open. A general ability: never trained on."""

import ast
import re
from collections.abc import Mapping
from typing import Any

from cpt_rft.data.example import IMAGE_TAG
from cpt_rft.tasks.base import Raw
from cpt_rft.tasks.scienceqa import LETTERS, lettered
from cpt_rft.tasks.table import TableTask, picture_bytes, text_of

_PLACE = re.compile(r"<image (\d)>")
_CLOSED = "Answer with the option's letter from the given choices directly."
_OPEN = "Answer the question using a single word or phrase."


class Reader(TableTask):
    """``<image 1>`` stands in the question and in options; each place becomes a tag with its picture."""

    COLUMNS = ("id", "question", "options", "answer", "question_type", *(f"image_{i}" for i in range(1, 8)))
    OPTIONAL = ("subfield", "topic_difficulty")

    def key(self, index: int, raw: Mapping[str, Any]) -> str:
        """The id in the source, for example ``validation_Accounting_1``."""
        return text_of(raw["id"])

    def read(self, raw: Mapping[str, Any]) -> Raw:
        """Pictures that no place names stand before the question; a place without a picture drops the row."""
        options = [str(option).strip() for option in _literal_list(raw["options"])]
        text = text_of(raw["question"]) + (f"\n{lettered(options)}" if options else "")
        named = [int(number) for number in _PLACE.findall(text)]
        unnamed = [i for i in range(1, 8) if picture_bytes(raw[f"image_{i}"]) and i not in named]
        pictures = tuple(picture_bytes(raw.get(f"image_{i}")) for i in (*unnamed, *named)) or (b"",)
        fields = {"images": IMAGE_TAG * len(unnamed), "question": _PLACE.sub(IMAGE_TAG, text)}
        meta = {key: raw[key] for key in self.OPTIONAL if raw.get(key)}
        answer = text_of(raw["answer"])
        if raw["question_type"] == "multiple-choice":
            if answer not in LETTERS[: len(options)] or not answer:
                raise ValueError(f"answer {answer!r} of {len(options)} options")
            fields["instruction"] = _CLOSED
            right = options[LETTERS.index(answer)]
            return Raw(pictures, fields, answer, (right,), "mmmu_choice", meta=meta | {"options": options})
        fields["instruction"] = _OPEN
        golds = [str(gold).strip() for gold in _literal_list(answer)] if answer.startswith("[") else [answer]
        return Raw(pictures, fields, golds[0] if golds else "", tuple(golds), "mmmu_open", meta=meta)


def _literal_list(text: str) -> list[Any]:
    """The value of a cell that holds a Python list as text."""
    value = ast.literal_eval(text)
    if not isinstance(value, list):
        raise ValueError(f"a list expected, found {type(value).__name__}")
    return value
