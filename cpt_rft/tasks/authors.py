"""The rows that the paper's authors put on the hub, in the form that EasyR1 reads."""

from collections.abc import Mapping
from typing import Any

from cpt_rft.data.example import IMAGE_TAG
from cpt_rft.tasks.base import Raw
from cpt_rft.tasks.table import TableTask, picture_bytes, text_of


class Reader(TableTask):
    """The problem is used as it is, instruction included; a missing ``<image>`` tag is put before it."""

    COLUMNS = ("problem", "answer")
    OPTIONAL = ("images", "image")

    def read(self, raw: Mapping[str, Any]) -> Raw:
        """Sets differ in whether a row has ``images`` or ``image``."""
        cells = raw["images"] if "images" in raw else [raw["image"]]
        problem = text_of(raw["problem"])
        if IMAGE_TAG not in problem:
            problem = IMAGE_TAG + problem
        return Raw(tuple(picture_bytes(cell) for cell in cells), {"question": problem}, text_of(raw["answer"]))
