"""One canonical form of every picture, and a reason for each that has none."""

import pickle
import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from cpt_rft.data.picture import (
    MAX_PIXELS,
    Picture,
    PictureError,
    canonical,
    decode_picture,
    encode_png,
    load_picture,
    needs_no_change,
)
from cpt_rft.data.reasons import Reason
from cpt_rft.errors import DataError
from tests.helpers.listed_task import encoded, photo


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def alpha_picture(mode: str) -> Image.Image:
    picture = photo(1).convert("RGBA")
    alpha = np.full((48, 64), 255, np.uint8)
    alpha[:24] = 0
    picture.putalpha(Image.fromarray(alpha))
    return picture.convert(mode)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_pictures_need_no_change(kind: str, mode: str) -> None:
    data = encoded(photo(1).convert(mode), kind)
    picture = load_picture(data, "x")
    assert needs_no_change(picture)
    assert canonical(picture, "x").tobytes() == Image.open(BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_become_white(mode: str) -> None:
    picture = load_picture(encoded(alpha_picture(mode)), "x")
    assert not needs_no_change(picture)
    pixels = np.asarray(canonical(picture, "x"))
    assert (pixels[:24] == 255).all()
    assert (pixels[24:] == np.asarray(picture.convert("RGB"))[24:]).all()


def test_transparent_palettes_become_white() -> None:
    palette = photo(1).quantize(8)
    pixels = np.asarray(palette)
    data = encoded(palette, "PNG", transparency=int(pixels[0, 0]))
    picture = load_picture(data, "x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = np.asarray(canonical(picture, "x"))
    assert (found[pixels == pixels[0, 0]] == 255).all()
    assert not needs_no_change(picture)


def test_sixteen_bit_greys_are_scaled_not_cut() -> None:
    shades = (np.arange(48 * 64, dtype=np.uint32) * 21).astype(np.uint16).reshape(48, 64)
    picture = load_picture(encoded(Image.fromarray(shades)), "x")
    assert not needs_no_change(picture)
    found = np.asarray(canonical(picture, "x"))[:, :, 0]
    assert np.abs(found - shades / 257.0).max() <= 0.5


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("P", "PNG"), ("1", "PNG"), ("RGB", "BMP"), ("L", "GIF")])
def test_other_modes_and_formats_are_stored_anew(mode: str, kind: str) -> None:
    picture = load_picture(encoded(photo(1).convert(mode), kind), "x")
    assert not needs_no_change(picture)
    expected = picture.convert("RGB")
    assert canonical(picture, "x").tobytes() == expected.tobytes()
    again = load_picture(encode_png(canonical(picture, "x")), "x")
    assert needs_no_change(again)
    assert again.tobytes() == expected.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(1), "PNG", exif=exif)
    picture = load_picture(data, "x")
    assert needs_no_change(picture) == (orientation == 1)
    upright = canonical(picture, "x")
    assert upright.size == ((64, 48) if orientation < 5 else (48, 64))
    turned = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
    if turned.get(orientation, "mirrored") != "mirrored":
        expected = photo(1) if orientation == 1 else photo(1).transpose(turned[orientation])
        assert upright.tobytes() == expected.tobytes()


def test_films_are_their_first_frame() -> None:
    frames = [photo(1), photo(2)]
    for kind in ("PNG", "WEBP", "GIF"):
        data = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        picture = load_picture(data, "x")
        assert not needs_no_change(picture), kind
        if kind != "GIF":
            assert canonical(picture, "x").tobytes() == frames[0].tobytes()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.PICTURE_UNREADABLE),
        (b"not a picture", Reason.PICTURE_UNREADABLE),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", Reason.PICTURE_UNREADABLE),
        (encoded(photo(1), "PPM"), Reason.PICTURE_UNREADABLE),
        (encoded(photo(1), "JPEG")[:-200], Reason.PICTURE_TRUNCATED),
        (encoded(photo(1))[:2000], Reason.PICTURE_TRUNCATED),
        (encoded(photo(1, 27, 64)), Reason.PICTURE_TOO_SMALL),
        (encoded(photo(1, 28, 28 * 200 + 1), "JPEG"), Reason.PICTURE_TOO_THIN),
        (png_header(20_000, 20_000), Reason.PICTURE_BOMB),
        (png_header(MAX_PIXELS // 1000 + 1, 1000), Reason.PICTURE_BOMB),
        (png_header(100, 100), Reason.PICTURE_TRUNCATED),
        (encoded(Image.fromarray(np.zeros((48, 64), np.float32)), "TIFF"), Reason.PICTURE_UNREADABLE),
    ],
    ids=["empty", "text", "eps", "other", "jpeg", "png", "small", "thin", "bomb", "large", "hollow", "fractions"],
)
def test_what_cannot_be_used_has_a_reason(data: bytes, reason: Reason) -> None:
    with pytest.raises(PictureError, match=r"^x ") as caught:
        decode_picture(data, "x")
    assert caught.value.reason == reason
    assert "0x" not in caught.value.problem  # it is written to a file that must not change from run to run
    assert caught.value.fix


@pytest.mark.parametrize("size", [(28, 28), (28, 5600)])
def test_the_smallest_and_the_thinnest_pass(size: tuple[int, int]) -> None:
    assert decode_picture(encoded(photo(1, *size)), "x").size == size


def test_a_decoded_picture_is_checked_too() -> None:
    picture: Picture = photo(1)
    assert decode_picture(picture, "x") is picture
    with pytest.raises(PictureError):
        decode_picture(photo(1, 27, 27), "x")


def test_an_error_of_another_process_arrives_as_it_is() -> None:
    for error in (PictureError(Reason.PICTURE_MISSING, "It is gone."), DataError("It is wrong.", "mend it")):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), copy.args, vars(copy)) == (type(error), error.args, vars(error))
