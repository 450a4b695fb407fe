"""Pictures: decoded with clear errors, to one canonical form that every engine sees alike.

The canonical form is RGB, 8 bit, upright, opaque. A file that every consumer's plain ``open`` and ``convert("RGB")``
turns into exactly that needs no change; the others (see `canonical`) are decoded in different ways by different
libraries and are stored anew.
"""

import re
import struct
import warnings
from io import BytesIO
from typing import Any, NoReturn

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from cpt_rft.data.reasons import Reason
from cpt_rft.errors import DataError
from cpt_rft.vision import MAX_RATIO

Picture = bytes | Image.Image  # encoded (PNG, JPEG, ...) or decoded
MIN_SIDE = 28  # one merged vision token of Qwen2-VL and its successors
MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a gigabyte once decoded
# Formats that need neither another program nor another file to decode.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_STILL = {"JPEG", "MPO", "PNG", "WEBP"}  # read alike by every consumer if they hold one frame
_BROKEN = (
    UnidentifiedImageError,
    *(OSError, SyntaxError, ValueError, TypeError, EOFError, KeyError, IndexError, AttributeError),
    *(struct.error, OverflowError, ZeroDivisionError, MemoryError, RuntimeError),
)
_ADDRESS = re.compile(r"<[\w.]+ object at 0x[0-9a-fA-F]+>")
_FIXES = {
    Reason.PICTURE_TOO_SMALL: f"use pictures of at least {MIN_SIDE} pixels a side",
    Reason.PICTURE_TOO_THIN: f"crop it to a ratio of at most {MAX_RATIO}",
}


class PictureError(DataError):
    """A picture that cannot be used.

    Attributes:
        reason: Under which it is counted.
    """

    def __init__(self, reason: Reason, problem: str) -> None:
        super().__init__(problem, _FIXES.get(reason, "replace the picture or drop the row"))
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return PictureError, (self.reason, self.problem)


def decode_picture(data: Picture, where: str) -> Image.Image:
    """Decode a picture fully, to the canonical form; one that is decoded already is only checked and converted.

    Raises:
        PictureError: It does not decode, is cut short, claims too many pixels, a side is under 28 px, or one side
            is over 200 times the other.
    """
    return canonical(load_picture(data, where), where)


def load_picture(data: Picture, where: str) -> Image.Image:
    """Decode a picture fully and check its size; the mode stays what it is.

    Raises:
        PictureError: As for `decode_picture`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata that is not read, and sizes that are checked here
        try:
            picture = data if isinstance(data, Image.Image) else Image.open(BytesIO(data), formats=FORMATS)
            _check_size(picture, where)  # before a pixel is decoded
            picture.load()
        except Image.DecompressionBombError as error:
            raise PictureError(Reason.PICTURE_BOMB, f"{where} claims too many pixels ({error}).") from error
        except _BROKEN as error:
            _refuse(error, where)
    return picture


def canonical(picture: Image.Image, where: str) -> Image.Image:
    """RGB, 8 bit, upright, opaque; the picture itself if it is that already.

    Transparent parts become white, as in a browser, in qwen-vl-utils and in transformers 5; the plain
    ``convert("RGB")`` of transformers 4, EasyR1 and LLaMA-Factory shows what the file hides behind them.
    Sixteen-bit greys are scaled, where ``convert`` would cut them off at 255.

    Raises:
        PictureError: Its pixels are no numbers that stand for a shade.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if _orientation(picture) != 1:
                picture = ImageOps.exif_transpose(picture)
            if _is_transparent(picture):
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            elif picture.mode.startswith("I"):
                shades = np.clip(np.asarray(picture).astype(np.int64), 0, 65535)
                picture = Image.fromarray(((shades + 128) // 257).astype(np.uint8))
            elif picture.mode == "F":
                raise PictureError(Reason.PICTURE_UNREADABLE, f"{where} holds fractions, not shades (mode F).")
            return picture if picture.mode == "RGB" else picture.convert("RGB")
        except _BROKEN as error:
            _refuse(error, where)


def needs_no_change(picture: Image.Image) -> bool:
    """Whether a loaded file is canonical for every consumer as it is: grey and RGB, still, upright, opaque."""
    return (
        picture.mode in ("RGB", "L")
        and picture.format in _STILL
        and (picture.format in ("JPEG", "MPO") or getattr(picture, "n_frames", 1) == 1)
        and not _is_transparent(picture)
        and _orientation(picture) == 1
    )


def encode_png(picture: Image.Image) -> bytes:
    """A canonical picture as PNG, without metadata."""
    buffer = BytesIO()
    Image.frombytes("RGB", picture.size, picture.tobytes()).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def _orientation(picture: Image.Image) -> Any:
    return picture.getexif().get(ExifTags.Base.Orientation, 1)


def _is_transparent(picture: Image.Image) -> bool:
    return picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info


def _check_size(picture: Image.Image, where: str) -> None:
    width, height = picture.size
    shown = f"{where} is {width} x {height} px."
    if width * height > MAX_PIXELS:
        raise PictureError(Reason.PICTURE_BOMB, shown)
    if min(width, height) < MIN_SIDE:
        raise PictureError(Reason.PICTURE_TOO_SMALL, shown)
    if max(width, height) > MAX_RATIO * min(width, height):
        raise PictureError(Reason.PICTURE_TOO_THIN, shown)


def _refuse(error: BaseException, where: str) -> NoReturn:
    cut = "truncated" in str(error).lower()  # Pillow's one sign of it, for all formats but WebP
    reason = Reason.PICTURE_TRUNCATED if cut else Reason.PICTURE_UNREADABLE
    text = _ADDRESS.sub("the file", str(error))  # the same words in every run
    raise PictureError(reason, f"{where} does not decode ({type(error).__name__}: {text}).") from error
