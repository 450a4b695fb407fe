"""Super-CLEVR as its authors released it: one archive of pictures and one file of questions."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from cpt_rft.data.collection import Collection
from cpt_rft.data.drop import Drop
from cpt_rft.data.example import Example, Split
from cpt_rft.data.hub import fetch_files
from cpt_rft.data.picture import PictureError
from cpt_rft.data.source import Source
from cpt_rft.errors import DataError
from cpt_rft.tasks.base import Raw, Task
from cpt_rft.tasks.table import text_of

FILES = {"questions": "superCLEVR_questions_30k.json", "pictures": "images.zip"}
FIRST_INDEX = {"train": 0, "val": 20_000, "test": 25_000}
END_INDEX = {"train": 20_000, "val": 25_000, "test": 30_000}
_CHUNK = 2**20


class Reader(Task):
    """The split is by the picture's index (the README's rule); the file says "new" for all."""

    def source(self, cache: Path) -> Source:
        """Two files of the repository."""
        config = self.config
        lock = cache / "sources" / f"{config.name}.json"
        return fetch_files(config.repos, config.revision, FILES, lock, cache / "archives" / config.name)

    def rows(self, split: Split, source: Source) -> Iterator[Example | Drop]:
        """The questions of a split in the order of the file."""
        kept = self.sampled(split, (key for key, _ in self._questions(split, source)))
        pictures = Collection(source.part("pictures")[0].path)
        places = {PurePosixPath(name).name: name for name in pictures.names()}
        for key, raw in self._questions(split, source):
            if kept is not None and key not in kept:
                yield self.left_out(split, key)
                continue
            try:
                name = str(raw.get("image_filename"))
                picture = pictures.read(places[name]) if name in places else b""
            except PictureError as error:
                yield Drop(self.row_id(split, key), split, error.reason, error.problem)
                continue
            yield self.converted(split, key, partial(read, raw, picture))

    def _questions(self, split: Split, source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
        wanted = self.source_split(split)
        with source.part("questions")[0].path.open(encoding="utf-8") as file:
            for number, raw in enumerate(items(file, "questions")):
                index = raw.get("image_index") if isinstance(raw, dict) else None
                # A row without an index is counted once: with train.
                if FIRST_INDEX[wanted] <= (index if isinstance(index, int) else 0) < END_INDEX[wanted]:
                    yield f"{number:06d}", raw if isinstance(raw, dict) else {}


def read(raw: Mapping[str, Any], picture: bytes) -> Raw:
    """One question; a truth value becomes yes or no, a count becomes digits.

    >>> [read({"question": "q", "answer": answer}, b"").answer for answer in (True, 3, "bus")]
    ['yes', '3', 'bus']
    """
    answer, question = raw["answer"], {"question": text_of(raw["question"])}
    if isinstance(answer, bool):
        words = ("yes", "true") if answer else ("no", "false")
        return Raw((picture,), question, words[0], words[1:], "yes_no")
    if isinstance(answer, int):
        return Raw((picture,), question, str(answer), (), "number")
    return Raw((picture,), question, text_of(answer))


def items(file: TextIO, key: str) -> Iterator[Any]:
    """The items of the list under a key of a large JSON object, one at a time.

    >>> list(items(__import__("io").StringIO('{"info": {}, "rows": [{"a": 1}, 2 ]}'), "rows"))
    [{'a': 1}, 2]

    Raises:
        DataError: There is no such list, or the text ends within it.
    """
    decoder = json.JSONDecoder()
    opening = re.compile(rf'"{key}"\s*:\s*\[')
    text, place, ended = "", 0, False
    found = None
    while found is None and not ended:
        more = file.read(_CHUNK)
        text, ended = text + more, not more
        found = opening.search(text)
    if found is None:
        raise DataError(f"There is no list {key!r} in {getattr(file, 'name', 'the file')}.", "fetch the file again")
    place = found.end()
    while True:
        place = _skip(text, place)
        if place < len(text) and text[place] == "]":
            return
        try:
            item, end = decoder.raw_decode(text, place)
            complete = end < len(text)  # a number may go on
        except json.JSONDecodeError:
            complete = False
        if complete:
            yield item
            place = end
            continue
        more = file.read(_CHUNK)
        if not more:
            raise DataError(f"{getattr(file, 'name', 'The file')} ends within its {key}.", "fetch the file again")
        text, place = text[place:] + more, 0


def _skip(text: str, place: int) -> int:
    """The place of the next character that is neither white space nor a comma."""
    while place < len(text) and text[place] in " \t\r\n,":
        place += 1
    return place
