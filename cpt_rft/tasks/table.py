"""Tasks whose rows are a table of the hub with their pictures in it: most of them."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from cpt_rft.data.drop import Drop
from cpt_rft.data.example import Example, Split
from cpt_rft.data.hub import Table, columns_of, fetch_tables, stream
from cpt_rft.data.source import Source
from cpt_rft.errors import DataError
from cpt_rft.tasks.base import Raw, Task


class TableTask(Task):
    """A subclass names its columns and reads one row; a part is a split of the source."""

    COLUMNS: ClassVar[tuple[str, ...]]
    """Columns that must be there."""
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    """Columns that some revisions have."""

    @abstractmethod
    def read(self, raw: Mapping[str, Any]) -> Raw:
        """What a raw row says.

        Raises:
            ValueError: The row is not of the documented form. Any of `cpt_rft.tasks.base.MALFORMED` says so.
        """

    def key(self, index: int, raw: Mapping[str, Any]) -> str:
        """The key of a row, unique in its source split: its number, or an id that the source has."""
        return f"{index:06d}"

    def source(self, cache: Path) -> Source:
        """Resolve and download the parquet files of every split."""
        config = self.config
        splits = dict.fromkeys(config.splits.values())
        tables = [Table(split, config.config, split) for split in splits]
        return fetch_tables(config.repos, config.revision, tables, cache / "sources" / f"{config.name}.json")

    def rows(self, split: Split, source: Source) -> Iterator[Example | Drop]:
        """Every row of a split, in the order of the source."""
        kept = self.sampled(split, (key for key, _ in self._held(split, source)))
        for key, raw in self._held(split, source):
            if kept is not None and key not in kept:
                yield self.left_out(split, key)
            else:
                yield self.converted(split, key, partial(self.read, raw))

    def _held(self, split: Split, source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
        files = source.part(self.source_split(split))
        missing = [name for name in self.COLUMNS if name not in columns_of(files)]
        if missing:
            raise DataError(
                f"{source.repo} at {source.revision} has no column {', '.join(missing)}.",
                f"set 'revision' of {self.config.name} to a commit that has it, or 'repos' to a copy",
            )
        for index, raw in enumerate(stream(files, (*self.COLUMNS, *self.OPTIONAL))):
            key = self.key(index, raw)
            if not self.config.carve or self.holds(split, self._picture_id(key, raw)):
                yield key, raw

    def _picture_id(self, key: str, raw: Mapping[str, Any]) -> str:
        cell = raw.get("image") or (raw.get("images") or [None])[0]
        return picture_id(key, picture_bytes(cell))


def picture_id(key: str, picture: bytes) -> str:
    """What decides the split of a row: its picture, or its key if it has none."""
    return hashlib.sha256(picture).hexdigest() if picture else key


def picture_bytes(cell: Any) -> bytes:
    """The bytes of a cell of a picture column; empty if there is no picture.

    >>> picture_bytes({"bytes": b"png", "path": "a.png"}), picture_bytes(None)
    (b'png', b'')
    """
    content = cell.get("bytes") if isinstance(cell, Mapping) else None
    return content if isinstance(content, bytes) else b""


def text_of(cell: Any) -> str:
    """A text cell, stripped.

    Raises:
        TypeError: It holds no text.
        UnicodeEncodeError: It holds half a character, as JSON can write it, which no file takes.
    """
    if not isinstance(cell, str):
        raise TypeError(f"text expected, found {type(cell).__name__}")
    cell.encode()
    return cell.strip()


def majority(answers: list[str]) -> str:
    """The answer that most annotators gave; of several, the one given first.

    >>> majority(["a cat", "dog", "dog", "a cat"])
    'a cat'
    """
    return max(answers, key=answers.count) if answers else ""
