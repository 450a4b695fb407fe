"""GQA: questions about the relations of things. Questions and pictures are tables of their own."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from cpt_rft.data.drop import Drop
from cpt_rft.data.example import Example, Split
from cpt_rft.data.hub import Table, fetch_tables, stream
from cpt_rft.data.reasons import Reason
from cpt_rft.data.source import Source
from cpt_rft.tasks.base import Options, Raw
from cpt_rft.tasks.table import TableTask, picture_bytes, text_of

_QUESTION_COLUMNS = ("id", "imageId", "question", "answer", "fullAnswer")


class Reader(TableTask):
    """Rows come picture by picture, so that only the questions are ever all in memory."""

    OPTIONS: ClassVar[Options] = {"selection": "balanced"}
    COLUMNS = ("id", "image")

    def source(self, cache: Path) -> Source:
        """Two configurations a split, both with the split's first word as their only split."""
        config = self.config
        names = [
            (self._part(split, what), split)
            for split in dict.fromkeys(config.splits.values())
            for what in ("instructions", "images")
        ]
        tables = [Table(name, name, split) for name, split in names]
        found = fetch_tables(config.repos, config.revision, tables, cache / "sources" / f"{config.name}.json")
        questions = {split: found.rows[name] for name, split in names if name == self._part(split, "instructions")}
        return replace(found, rows=questions)

    def rows(self, split: Split, source: Source) -> Iterator[Example | Drop]:
        """First the rows that the sample leaves out, then the others in the order of their pictures."""
        kept = self.sampled(split, (key for key, _ in self._questions(split, source)))
        by_picture: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for key, raw in self._questions(split, source):
            if kept is not None and key not in kept:
                yield self.left_out(split, key)
            else:
                by_picture.setdefault(str(raw["imageId"]), []).append((key, raw))
        for picture in stream(source.part(self._part(self.source_split(split), "images")), self.COLUMNS):
            for key, raw in by_picture.pop(str(picture["id"]), []):
                yield self.converted(split, key, partial(self.read, raw | {"image": picture["image"]}))
        for questions in by_picture.values():
            for key, raw in questions:
                yield Drop(self.row_id(split, key), split, Reason.PICTURE_MISSING, f"no picture {raw['imageId']}")

    def read(self, raw: Mapping[str, Any]) -> Raw:
        """A question together with its picture."""
        meta = {"image_id": raw["imageId"]}
        if raw.get("fullAnswer"):
            meta["full_answer"] = raw["fullAnswer"]
        return Raw(
            pictures=(picture_bytes(raw["image"]),),
            fields={"question": text_of(raw["question"])},
            answer=text_of(raw["answer"]),
            meta=meta,
        )

    def _part(self, source_split: str, what: str) -> str:
        return f"{source_split}_{self.options['selection']}_{what}"

    def _questions(self, split: Split, source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
        """The questions on the pictures of a split, with the question's id as key."""
        files = source.part(self._part(self.source_split(split), "instructions"))
        for raw in stream(files, _QUESTION_COLUMNS, batch=1000):
            if self.holds(split, str(raw["imageId"])):
                yield str(raw["id"]), raw
