"""MMLU-Pro: questions of 14 subjects with up to ten options, without pictures. A general ability: never trained on."""

from collections.abc import Mapping
from typing import Any

from cpt_rft.tasks.base import Raw
from cpt_rft.tasks.scienceqa import LETTERS, lettered
from cpt_rft.tasks.table import TableTask, text_of


class Reader(TableTask):
    """Asked without examples, as all tasks here are.

    Source: TIGER-AI-Lab/MMLU-Pro@f418b116db00: options that say N/A are padding.
    Differs from: the official evaluation shows five solved questions of the category first.
    """

    COLUMNS = ("question_id", "question", "options", "answer", "answer_index", "category")

    def key(self, index: int, raw: Mapping[str, Any]) -> str:
        """The question's number in the source."""
        return str(raw["question_id"])

    def read(self, raw: Mapping[str, Any]) -> Raw:
        """The letter and the number of the answer must agree."""
        options = [option for option in map(text_of, raw["options"]) if option != "N/A"]
        answer, index = text_of(raw["answer"]), raw["answer_index"]
        if not 0 <= index < len(options) or LETTERS[index] != answer:
            raise ValueError(f"answer {answer!r} with index {index} of {len(options)} options")
        return Raw(
            pictures=(),
            fields={"question": text_of(raw["question"]), "options": lettered(options)},
            answer=answer,
            references=(options[index],),
            meta={"category": text_of(raw["category"]), "options": options},
        )
