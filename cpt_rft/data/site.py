"""Archives of plain web sites: fetched with resume, or put in place by hand."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpt_rft.data.retry import PATIENCE, is_transient, retrying
from cpt_rft.data.source import SourceFile
from cpt_rft.data.space import require_space
from cpt_rft.errors import DataError
from cpt_rft.files import fsync_file, read_json, sha256_file, write_json_atomic

_CHUNK = 2**20
_TIMEOUT_S = 60


def fetch_archive(url: str, directory: Path, part: str, headers: Mapping[str, str] | None = None) -> SourceFile:
    """A file of a site, downloaded to ``directory`` under its own name.

    What a killed download left is gone on with, unless the site's file changed. A file that is there without a
    record was put there by hand and is taken as it is.

    Args:
        url: Its last part is the name of the file.
        directory: Where the file goes.
        part: What the task reads it as.
        headers: Sent to the site itself and to no host that it redirects to.

    Raises:
        DataError: It cannot be fetched; the fix names the manual route.
    """
    target = directory / Path(url).name
    record_path = directory / f"{target.name}.json"
    record = read_json(record_path)
    directory.mkdir(parents=True, exist_ok=True)
    if not target.is_file():
        by_hand = f"download {url} by any means and put it at {target}, then give the same command again"
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
            raise DataError(f"{target.name} is not on this machine, and HF_HUB_OFFLINE forbids to fetch it.", by_hand)
        try:
            retrying(lambda: _download(url, target, headers or {}), PATIENCE)
        except OSError as error:
            if not is_transient(error) and not isinstance(error, urllib.error.URLError):
                raise
            raise DataError(f"{url} could not be fetched ({error}).", by_hand) from error
        record = {}
    size = target.stat().st_size
    if record.get("size") != size:
        record = {"url": url, "size": size, "sha256": sha256_file(target)}
        write_json_atomic(record_path, record)
    return SourceFile(part, url, size, record["sha256"], target)


def _download(url: str, target: Path, headers: Mapping[str, str]) -> None:
    """One attempt: everything from the first missing byte on."""
    partial = target.with_name(f".{target.name}.part")
    note = target.with_name(f".{target.name}.part.json")
    known = read_json(note)
    begun = partial.stat().st_size if partial.is_file() and known.get("validator") else 0
    request = urllib.request.Request(url, headers={"User-Agent": "cpt-rft"})
    for name, value in headers.items():
        request.add_unredirected_header(name, value)
    if begun:
        request.add_header("Range", f"bytes={begun}-")
        request.add_header("If-Range", known["validator"])
    if begun and begun == known.get("size"):
        return _publish(partial, note, target)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
        resumed = response.status == 206 and _starts_at(response.headers) == begun
        if not resumed:
            begun = 0
        length = response.headers.get("Content-Length")
        size = begun + int(length) if length else None
        if size is not None:
            require_space(target.parent, size - begun, url)
        validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
        note.write_text(json.dumps({"validator": validator, "size": size}), encoding="utf-8")
        with partial.open("ab" if resumed else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
    found = partial.stat().st_size
    if size is not None and found != size:
        raise ConnectionError(f"the connection was cut after {found} of {size} bytes")
    _publish(partial, note, target)


def _publish(partial: Path, note: Path, target: Path) -> None:
    fsync_file(partial)
    os.replace(partial, target)
    note.unlink(missing_ok=True)


def _starts_at(headers: Mapping[str, Any]) -> int | None:
    """The first byte of a ``Content-Range``.

    >>> _starts_at({"Content-Range": "bytes 5-9/10"})
    5
    """
    text = str(headers.get("Content-Range", ""))
    first = text.removeprefix("bytes ").partition("-")[0]
    return int(first) if first.isdigit() else None
