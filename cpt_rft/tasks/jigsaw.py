"""Jigsaws: a picture cut into a grid and shuffled; say where each piece belongs. Of any pictures, to any grid.

Source: Jigsaw-R1@781ebd4a7e61 utils/{jigsaw_utils,prompt}.py, question type "full".
Differs from: permutations come from the seed and the picture, not from a running number; the identity is, as there,
not excluded.
"""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from cpt_rft.config.load import find_directory
from cpt_rft.data.collection import Collection
from cpt_rft.data.drop import Drop
from cpt_rft.data.example import Example, Split
from cpt_rft.data.picture import PictureError, decode_picture
from cpt_rft.data.reasons import Reason
from cpt_rft.data.source import Source, SourceFile
from cpt_rft.errors import ConfigError, DataError
from cpt_rft.files import sha256_json
from cpt_rft.seeds import python_random
from cpt_rft.tasks.base import Options, Raw, Task

PART = "pictures"


class Reader(Task):
    """One jigsaw a picture."""

    OPTIONS: ClassVar[Options] = {"folder": None, "rows": 3, "columns": 3, "seed": 0}

    def source(self, cache: Path) -> Source:
        """The folder or zip archive, with one hash over the names and hashes of its pictures."""
        if min(self.options["rows"], self.options["columns"]) < 1 or self.options["rows"] * self.options["columns"] < 2:
            raise ConfigError(f"task {self.config.name}: a jigsaw has at least two pieces.", "set rows and columns")
        folder = find_directory(str(self.options["folder"]))
        if not folder.exists():
            raise DataError(f"{folder} does not exist.", "set options.folder of the jigsaw task to your pictures")
        pictures = Collection(folder)
        hashes: dict[str, str] = {}
        size = 0
        for name in pictures.names():
            try:
                content = pictures.read(name)
            except PictureError as error:
                hashes[name] = error.reason
                continue
            hashes[name] = hashlib.sha256(content).hexdigest()
            size += len(content)
        if not hashes:
            raise DataError(f"{folder} holds no pictures.", "set options.folder of the jigsaw task to your pictures")
        file = SourceFile(PART, folder.name, size, sha256_json(hashes), folder)
        return Source(None, None, None, (file,), {PART: len(hashes)})

    def rows(self, split: Split, source: Source) -> Iterator[Example | Drop]:
        """The jigsaws of a split in the order of the names of their pictures."""
        pictures = Collection(source.part(PART)[0].path)
        kept = self.sampled(split, (name for name, _ in self._held(split, pictures)))
        for name, content in self._held(split, pictures):
            if kept is not None and name not in kept:
                yield self.left_out(split, name)
            elif isinstance(content, PictureError):
                yield Drop(self.row_id(split, name), split, content.reason, content.problem)
            else:
                yield self._jigsaw(split, name, content)

    def _held(self, split: Split, pictures: Collection) -> Iterator[tuple[str, bytes | PictureError]]:
        for name in pictures.names():
            content: bytes | PictureError
            try:
                content = pictures.read(name)
                identity = hashlib.sha256(content).hexdigest()
            except PictureError as error:
                content, identity = error, name
            if self.holds(split, identity):
                yield name, content

    def _jigsaw(self, split: Split, name: str, content: bytes) -> Example | Drop:
        rows, columns = self.options["rows"], self.options["columns"]
        try:
            picture = decode_picture(content, name)
        except PictureError as error:
            return Drop(self.row_id(split, name), split, error.reason, error.problem)
        if picture.width < columns or picture.height < rows:
            detail = f"{picture.width} x {picture.height} px for {rows}x{columns} pieces"
            return Drop(self.row_id(split, name), split, Reason.PICTURE_TOO_SMALL, detail)
        order = list(range(rows * columns))
        python_random("jigsaw", self.options["seed"], rows, columns, hashlib.sha256(content).hexdigest()).shuffle(order)
        shuffled = shuffle_patches(picture, rows, columns, order)
        buffer = io.BytesIO()
        shuffled.save(buffer, format="PNG", compress_level=1)
        raw = Raw(
            pictures=(buffer.getvalue(),),
            fields={"question": question(rows, columns), "grid": f"{rows}x{columns}"},
            answer=grid_text([piece + 1 for piece in order], columns),
            meta={"rows": rows, "columns": columns, "picture": name},
        )
        return self.row(split, name, raw)


def shuffle_patches(picture: Image.Image, rows: int, columns: int, order: list[int]) -> Image.Image:
    """The picture, cropped at right and bottom to whole patches, with patch ``order[i]`` at place ``i``."""
    width, height = picture.width // columns, picture.height // rows
    result = Image.new("RGB", (width * columns, height * rows))
    for place, piece in enumerate(order):
        left, top = piece % columns * width, piece // columns * height
        patch = picture.crop((left, top, left + width, top + height))
        result.paste(patch, (place % columns * width, place // columns * height))
    return result


def grid_text(numbers: list[Any], columns: int) -> str:
    r"""Numbers in lines of ``columns``.

    >>> grid_text([2, 1, 4, 3], 2)
    '2 1\n4 3'
    """
    lines = [numbers[start : start + columns] for start in range(0, len(numbers), columns)]
    return "\n".join(" ".join(map(str, line)) for line in lines)


def question(rows: int, columns: int) -> str:
    """The question of Jigsaw-R1, to the letter."""
    ends = ("left", "right") if rows == 1 else ("top", "bottom") if columns == 1 else ("top-left", "bottom-right")
    grid = grid_text(list(range(1, rows * columns + 1)), columns)
    return (
        f"The input image is divided into {rows}x{columns} patches that have been randomly permuted from their"
        f" original positions. Your task is to solve this {rows}x{columns} jigsaw puzzle and reconstruct the original"
        f" image.\n\nConsider a {rows}x{columns} grid, where each number represents a position index ranging from 1"
        f" ({ends[0]}) to {rows * columns} ({ends[1]}):\n\n```\n{grid}\n```\n\nFor each patch, determine its correct"
        " position index in the original image. If a patch currently at position X should belong at position Y,"
        ' place "Y" at position X.'
    )
