"""A task whose rows are given as a list, for tests of what comes after the source."""

from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from cpt_rft.data.drop import Drop
from cpt_rft.data.example import Example, Split
from cpt_rft.data.source import Source
from cpt_rft.tasks.base import Task, TaskConfig


class ListedTask(Task):
    """Rows by split, as they are; ``counts`` and ``card`` claim how many rows the files hold."""

    def __init__(
        self,
        rows: Mapping[Split, Iterable[Example | Drop]],
        counts: Mapping[str, int] | None = None,
        revision: str = "a" * 40,
        card: Mapping[str, int] | None = None,
        **config: object,
    ) -> None:
        splits = {split: split for split in rows}
        settings = {"name": "listed", "reader": "jigsaw", "kind": "short_text", "prompts": {"task": ""}}
        super().__init__(TaskConfig.model_validate(settings | {"splits": splits, "licence": "mit"} | config))
        self.given = rows
        self.counts = counts or {}
        self.revision = revision
        self.card = card or {}

    def source(self, cache: Path) -> Source:
        return Source("someone/listed", self.revision, None, (), self.counts, self.card)

    def rows(self, split: Split, source: Source) -> Iterator[Example | Drop]:
        yield from self.given[split]


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    """A smooth picture with a little noise, as cheap to encode and decode as a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray(np.clip(pixels + rng.integers(-6, 7, pixels.shape), 0, 255).astype(np.uint8))


def row(number: int, split: Split = "train", image: bytes | None = None, **changes: object) -> Example:
    """A row with a JPEG of its own, unless another picture is given."""
    name = f"listed/{split}/{number:05d}"
    picture = encoded(photo(number), "JPEG") if image is None else image
    cells: dict[str, object] = {
        "id": name,
        "task": "listed",
        "split": split,
        "images": (picture,),
        "image_paths": (f"{name}.jpg",),
        "problem": f"<image>What is picture {number}?",
        "answer": f"thing {number % 7}",
        "references": (f"thing {number % 7}", "a thing"),
        "kind": "short_text",
    }
    return Example(**(cells | changes))
