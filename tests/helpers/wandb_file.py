"""A run file of W&B: messages in a log of LevelDB's form, in blocks of 32 KiB after a head of seven bytes."""

import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEAD = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def messages(path: Path) -> Iterator[bytes]:
    """Every message, put together from its parts; the file must be whole."""
    content, place, parts = path.read_bytes(), HEAD, b""
    assert content.startswith(b":W&B")
    while place < len(content):
        if BLOCK - place % BLOCK < HEAD:  # too little for the head of a part: filled up
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + HEAD])
        part = content[place + HEAD : place + HEAD + length]
        assert len(part) == length and kind in (FULL, FIRST, MIDDLE, LAST)
        assert bool(parts) == (kind in (MIDDLE, LAST))
        parts += part
        place += HEAD + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""
    assert not parts
