"""What one row must fulfil by itself, each picture decoded once. Rows beside each other: `cpt_rft.data.overlap`."""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from cpt_rft.data.drop import Drop
from cpt_rft.data.example import IMAGE_TAG, Example
from cpt_rft.data.picture import PictureError, canonical, encode_png, load_picture, needs_no_change
from cpt_rft.data.reasons import Reason
from cpt_rft.data.tokens import PromptCounter
from cpt_rft.prompts import PRESETS, STYLES, user_text_of
from cpt_rft.vision import VisionSpec

if TYPE_CHECKING:  # pydantic takes longer to import than everything else that a worker needs
    from cpt_rft.data.config import Checks

# What engines replace by a picture, a film, a sound or the end of a turn wherever it stands.
_RESERVED = re.compile(r"<\|\w+\|>|<video>|<audio>")
_SAMPLES = 32  # pixels a side that a fingerprint looks at
_REMEMBERED = 20_000  # verdicts on pictures that come again and again
_PNG_REMEMBERED = 8  # pictures stored anew: neighbours often share one


class PictureFacts(NamedTuple):
    """What is remembered of a picture.

    Attributes:
        fingerprint: Of its size and some of its decoded pixels: equal pictures have equal fingerprints.
        sha256: Of the bytes as they came, in hex.
        width, height: Of the canonical picture, in pixels.
        changed: Whether it is stored anew instead of byte for byte.
    """

    fingerprint: str
    sha256: str
    width: int
    height: int
    changed: bool


class CheckedRow(NamedTuple):
    """A row that is fine by itself.

    Attributes:
        example: With pictures in their canonical form.
        pictures: In the order of their tags.
        vision_tokens: Of all its pictures.
        tokens: Of the longest prompt; an upper bound where no tokenizer was named.
    """

    example: Example
    pictures: tuple[PictureFacts, ...]
    vision_tokens: int
    tokens: int


class RowChecker:
    """Checks rows. It lives in one process and remembers what it saw of repeated pictures."""

    def __init__(self, checks: "Checks", counter: PromptCounter | None = None) -> None:
        self.counter = counter
        self.vision = VisionSpec(checks.min_pixels, checks.max_pixels)
        self.max_prompt_tokens = checks.max_prompt_tokens
        self._facts: dict[str, PictureFacts | PictureError] = {}
        self._stored_anew: OrderedDict[str, bytes] = OrderedDict()

    def __call__(self, rows: Iterable[Example | Drop]) -> list[CheckedRow | Drop]:
        """Each row with canonical pictures, or why it is dropped; what is dropped already stays so.

        One check after the other goes over all rows: a picture that is decoded takes the processor's cache for itself.
        """
        texts = [row if isinstance(row, Drop) else _with_fine_texts(row) for row in rows]
        pictures = [row if isinstance(row, Drop) else self._with_pictures(row) for row in texts]
        return [row if isinstance(row, Drop) else self._measured(*row) for row in pictures]

    def _with_pictures(self, row: Example) -> tuple[Example, tuple[PictureFacts, ...]] | Drop:
        facts, images = [], []
        try:
            for number, data in enumerate(row.images, 1):
                found, stored = self._picture(data, f"picture {number}")
                facts.append(found)
                images.append(stored)
        except PictureError as error:
            return Drop(row.id, row.split, error.reason, error.problem)
        return _stored_row(row, facts, images), tuple(facts)

    def _measured(self, row: Example, facts: tuple[PictureFacts, ...]) -> CheckedRow | Drop:
        counts = [self.vision.image_tokens(fact.height, fact.width) for fact in facts]
        texts = prompts_of(row)
        if self.counter is not None:
            tokens = max(self.counter(text, counts) for text in texts)
            too_long = tokens > self.max_prompt_tokens
        else:  # a byte-level tokenizer makes at most one token a byte
            tokens = sum(counts) + max(len(text.encode()) for text in texts)
            too_long = sum(counts) > self.max_prompt_tokens
        if too_long:
            detail = f"{tokens} tokens, {sum(counts)} of them for pictures"
            return Drop(row.id, row.split, Reason.TOO_LONG, detail)
        return CheckedRow(row, facts, sum(counts), tokens)

    def _picture(self, data: bytes, where: str) -> tuple[PictureFacts, bytes]:
        """What a picture is and the bytes to store of it.

        Raises:
            PictureError: It cannot be used.
        """
        if not data:
            raise PictureError(Reason.PICTURE_MISSING, f"{where} has no bytes.")
        sha256 = hashlib.sha256(data).hexdigest()
        known = self._facts.get(sha256)
        if isinstance(known, PictureError):
            raise known
        if known is not None and not known.changed:
            return known, data
        if known is not None and sha256 in self._stored_anew:
            return known, self._stored_anew[sha256]
        if len(self._facts) >= _REMEMBERED:
            self._facts.clear()
        try:
            facts, stored = _examine(data, sha256, where)
        except PictureError as error:
            self._facts[sha256] = error
            raise
        self._facts[sha256] = facts
        if facts.changed:
            self._stored_anew[sha256] = stored
            if len(self._stored_anew) > _PNG_REMEMBERED:
                self._stored_anew.popitem(last=False)
        return facts, stored


def _examine(data: bytes, sha256: str, where: str) -> tuple[PictureFacts, bytes]:
    picture = load_picture(data, where)
    keep = needs_no_change(picture)
    picture = picture if keep and picture.mode == "RGB" else canonical(picture, where)
    facts = PictureFacts(fingerprint(picture), sha256, picture.width, picture.height, not keep)
    return facts, data if keep else encode_png(picture)


def fingerprint(picture: Image.Image) -> str:
    """A hash of the size and of 32 x 32 pixels: a hundredth of the time that a hash of all pixels takes."""
    digest = hashlib.blake2b(f"{picture.size}".encode(), digest_size=10)
    digest.update(picture.resize((_SAMPLES, _SAMPLES), Image.Resampling.NEAREST).tobytes())
    return digest.hexdigest()


def pixels_sha256(data: bytes) -> str:
    """A hash of every decoded pixel of a stored picture."""
    picture = canonical(load_picture(data, "picture"), "picture")
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def prompts_of(row: Example) -> list[str]:
    """Every user turn that a preset and a style make of a row's problem."""
    wordings = {"task": row.problem} | row.meta.get("problems", {})
    return list(
        dict.fromkeys(user_text_of(text, style, preset) for preset, text in wordings.items() for style in STYLES)
    )


def text_fault(row: Example) -> tuple[Reason, str] | None:
    """What is wrong with the texts, the names and the types of a row, or none."""
    wordings = row.meta.get("problems", {}) if isinstance(row.meta, dict) else None
    options = row.meta.get("options", []) if isinstance(row.meta, dict) else []
    texts = {"id": row.id, "problem": row.problem, "answer": row.answer, "rationale": row.rationale or ""}
    if not isinstance(wordings, dict) or not set(wordings) <= set(PRESETS):
        return Reason.ROW_MALFORMED, "meta['problems'] does not name presets"
    texts |= {f"problem of preset {name}": text for name, text in wordings.items()}
    texts |= {f"reference {number}": text for number, text in enumerate(row.references, 1)}
    if not isinstance(options, list):
        return Reason.ROW_MALFORMED, "meta['options'] is no list"
    texts |= {f"option {number}": text for number, text in enumerate(options, 1)}
    for name, text in texts.items():
        if not isinstance(text, str) or not _is_unicode(text):
            return Reason.ROW_MALFORMED, f"{name} is no text"
        if "<" not in text:
            continue
        reserved = _RESERVED.search(text)
        if reserved:
            return Reason.RESERVED_TOKEN, f"{name} holds {reserved.group()}"
        if not name.startswith("problem") and IMAGE_TAG in text:
            return Reason.RESERVED_TOKEN, f"{name} holds {IMAGE_TAG}"
    for name, text in texts.items():
        if name.startswith("problem") and text.count(IMAGE_TAG) != len(row.images):
            return Reason.IMAGE_TAGS, f"{name}: {text.count(IMAGE_TAG)} tags for {len(row.images)} pictures"
    if not all(isinstance(data, bytes) for data in row.images):
        return Reason.PICTURE_MISSING, "a picture is not there as bytes"
    for name in row.image_paths:
        if not is_safe_name(name):
            return Reason.UNSAFE_NAME, f"the picture's name is {name!r}"
    return None


def is_safe_name(name: object) -> bool:
    """Whether a relative name stays below the folder that it is joined to, on every system.

    >>> [is_safe_name(name) for name in ("a/b.png", "../b.png", "/b.png", "C:b.png", "")]
    [True, False, False, False, False]
    """
    if not isinstance(name, str) or not name or len(name) > 1024 or not name.isprintable():
        return False
    path = PurePosixPath(name)
    odd = any(mark in name for mark in "\\:")
    return not (odd or path.is_absolute() or ".." in path.parts or not path.name or not _is_unicode(name))


def _with_fine_texts(row: Example) -> Example | Drop:
    fault = text_fault(row)
    return row if fault is None else Drop(str(row.id), row.split, *fault)


def _stored_row(row: Example, facts: Sequence[PictureFacts], images: Sequence[bytes]) -> Example:
    if not any(fact.changed for fact in facts):
        return row
    names = [
        str(PurePosixPath(name).with_suffix(".png")) if fact.changed else name
        for name, fact in zip(row.image_paths, facts, strict=True)
    ]
    return replace(row, images=tuple(images), image_paths=tuple(names))


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
