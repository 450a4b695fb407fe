"""VizWiz: photographs and questions of blind people, often poor, often without an answer.

The training split is on no hub: it comes from the site's archives. The label is what most of ten people answered.
"""

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from cpt_rft.data.collection import Collection
from cpt_rft.data.drop import Drop
from cpt_rft.data.example import Example, Split
from cpt_rft.data.hub import Table, fetch_tables
from cpt_rft.data.picture import PictureError
from cpt_rft.data.site import fetch_archive
from cpt_rft.data.source import Source
from cpt_rft.errors import DataError
from cpt_rft.tasks.base import Options, Raw
from cpt_rft.tasks.table import TableTask, majority, picture_bytes, picture_id, text_of

SITE_SPLIT = "train"
_SAFE_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]*")


class Reader(TableTask):
    """The site's training rows and the hub's validation rows."""

    OPTIONS: ClassVar[Options] = {"annotations_url": None, "images_url": None}
    COLUMNS = ("question_id", "image", "question", "answers")
    OPTIONAL = ("category",)

    def key(self, index: int, raw: Mapping[str, Any]) -> str:
        """The question's id, or the picture's name without its suffix."""
        return text_of(raw["question_id"])

    def read(self, raw: Mapping[str, Any]) -> Raw:
        """Some training answers are empty strings: they are no answers."""
        answers = [answer for answer in map(text_of, raw["answers"] or []) if answer]
        return Raw(
            pictures=(picture_bytes(raw["image"]),),
            fields={"question": text_of(raw["question"])},
            answer=majority(answers),
            references=tuple(answers),
            meta={"category": raw["category"]} if raw.get("category") else {},
        )

    def source(self, cache: Path) -> Source:
        """The splits of the hub, then the two archives of the site."""
        config = self.config
        splits = [split for split in dict.fromkeys(config.splits.values()) if split != SITE_SPLIT]
        tables = [Table(split, config.config, split) for split in splits]
        hub = fetch_tables(config.repos, config.revision, tables, cache / "sources" / f"{config.name}.json")
        directory = cache / "archives" / config.name
        archives = tuple(
            fetch_archive(self.options[f"{part}_url"], directory, part) for part in ("annotations", "images")
        )
        rows = dict(hub.rows) | {SITE_SPLIT: len(_annotations(archives[0].path))}
        return Source(hub.repo, hub.revision, hub.config, hub.files + archives, rows, hub.card_rows, hub.renamed_from)

    def rows(self, split: Split, source: Source) -> Iterator[Example | Drop]:
        """Every row of a split, in the order of the source."""
        if self.source_split(split) != SITE_SPLIT:
            yield from super().rows(split, source)
            return
        pictures = Collection(source.part("images")[0].path)
        places = {PurePosixPath(name).name: name for name in pictures.names()}
        for index, note in enumerate(_annotations(source.part("annotations")[0].path)):
            yield from self._site_row(split, index, note, pictures, places)

    def _site_row(
        self, split: Split, index: int, note: Any, pictures: Collection, places: Mapping[str, str]
    ) -> Iterator[Example | Drop]:
        """The row of one annotation; nothing if another split holds it."""
        name = str(note.get("image") if isinstance(note, dict) else "")
        key = PurePosixPath(name).stem if _SAFE_NAME.fullmatch(name) else f"{index:06d}"
        try:
            picture = pictures.read(places[name]) if name in places else b""
            broken = None
        except PictureError as error:
            picture, broken = b"", Drop(self.row_id(split, key), split, error.reason, error.problem)
        if not self.holds(split, picture_id(key, picture)):
            return
        if broken is not None:
            yield broken
            return
        yield self.converted(split, key, lambda: self.read(_as_hub_row(note, key, picture)))


def _as_hub_row(note: Mapping[str, Any], key: str, picture: bytes) -> dict[str, Any]:
    answers = [answer["answer"] for answer in note["answers"]]
    cell = {"bytes": picture, "path": None}
    return {"question_id": key, "image": cell, "question": note["question"], "answers": answers}


def _annotations(archive: Path) -> list[Any]:
    """The rows of ``train.json`` in the archive, wherever it lies in it."""
    try:
        with zipfile.ZipFile(archive) as file:
            name = next(name for name in file.namelist() if PurePosixPath(name).name == f"{SITE_SPLIT}.json")
            rows = json.loads(file.read(name))
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile) as error:
        problem = f"{archive} holds no readable {SITE_SPLIT}.json ({type(error).__name__}: {error})."
        raise DataError(problem, "delete it and fetch it again") from error
    if not isinstance(rows, list):
        raise DataError(f"{SITE_SPLIT}.json in {archive} is not a list.", "delete the archive and fetch it again")
    return rows
