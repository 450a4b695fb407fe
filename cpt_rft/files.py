"""Files that are whole or absent, directories published by one rename, hashes, and a lock that names its holder."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from cpt_rft.errors import StageError, UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
# Libraries in C++ and Rust wrap the system's error in a text of their own; torch.save loses it altogether.
_FULL_TEXTS = (
    "No space left on device",
    "os error 28",
    "File too large",
    "os error 27",
    "Disk quota exceeded",
    "basic_ios::clear: iostream error",
    "PytorchStreamWriter failed writing",
)


class FileRecord(NamedTuple):
    """What a manifest remembers of one file."""

    size: int
    sha256: str


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path`` to write to; on success it is fsynced and takes the place of ``path``.

    A process killed inside leaves only the hidden name, which the next writer overwrites.
    """
    partial = path.with_name(f".{path.name}.tmp")
    try:
        yield partial
        fsync_file(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json_atomic(path: Path, value: Any) -> None:
    """Write indented JSON with sorted keys, whole or not at all."""
    write_text_atomic(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing, or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: what is hashed.

    >>> canonical_json({"b": 1.0, "a": [1, None]})
    '{"a":[1,null],"b":1.0}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_json(value: Any) -> str:
    """The sha256 of the canonical JSON of a value, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_tree(directory: Path) -> list[str]:
    """The relative names of all files below a directory, sorted, with forward slashes."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def hash_tree(directory: Path) -> dict[str, FileRecord]:
    """Size and sha256 of every file below a directory, by relative name."""
    return {
        name: FileRecord((directory / name).stat().st_size, sha256_file(directory / name))
        for name in list_tree(directory)
    }


def tree_sha256(files: dict[str, FileRecord]) -> str:
    """One hash for a whole directory: over the names and hashes of its files."""
    return sha256_json({name: record.sha256 for name, record in files.items()})


def tree_problem(directory: Path, files: dict[str, FileRecord], *, full: bool) -> str | None:
    """The first difference between a directory and what was recorded of it, or none.

    Args:
        directory: Where the files should be.
        files: What was recorded, by relative name.
        full: Compare hashes too; otherwise only names and sizes.
    """
    for name, record in files.items():
        path = directory / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != record.size:
            return f"{path} has {path.stat().st_size} bytes instead of {record.size}"
        if full and sha256_file(path) != record.sha256:
            return f"{path} was changed (its sha256 differs from the recorded one)"
    return None


def fsync_file(path: Path) -> None:
    """Force a file's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_directory(directory: Path) -> None:
    """Force a directory's entries (names, renames) to disk."""
    fsync_file(directory)


def publish_directory(partial: Path, final: Path) -> None:
    """Give a complete directory its final name: everything below is fsynced, then one rename."""
    for path in sorted(partial.rglob("*")):
        fsync_file(path)
    fsync_directory(partial)
    os.rename(partial, final)
    fsync_directory(final.parent)


def discard_directory(directory: Path) -> None:
    """Remove a directory that may have been published: first its name, then its content."""
    if not directory.exists():
        return
    trash = directory.with_name(f".{directory.name}.trash")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(directory, trash)
    fsync_directory(directory.parent)
    shutil.rmtree(trash)


def explain_os_error(error: BaseException, place: Path) -> UserError | None:
    """A full disk or a forbidden place as an error for the user; none if it is something else.

    Args:
        error: What was raised; its causes are looked at too.
        place: What was being written to, for the message when the error does not name a file.
    """
    cause: BaseException | None = error
    while cause is not None:
        where = getattr(cause, "filename", None) or place
        number = cause.errno if isinstance(cause, OSError) else None
        if number in _FULL or any(text in str(cause) for text in _FULL_TEXTS):
            return StageError(
                f"The disk is full: {where} could not be written.",
                "free some space (the 'plan' verb prints what a run needs) and give the same command again",
            )
        if number in _FORBIDDEN:
            return StageError(
                f"{where} cannot be written ({os.strerror(number or 0)}).",
                "make the directory writable or choose another with output=DIRECTORY",
            )
        cause = cause.__cause__ or cause.__context__
    return None


class DirectoryLock:
    """An exclusive lock on a run directory, held by this process and every child that inherits `descriptor`.

    The kernel lets it go when the last holder ends, however it ends. The file names the holder for messages.
    """

    def __init__(self, directory: Path, *, patience_s: float = 5.0) -> None:
        self.path = directory / ".lock"
        self.patience_s = patience_s
        self.descriptor = -1

    def __enter__(self) -> Self:
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + self.patience_s
        while not self._try():
            holder = self._holder()
            # Workers of a killed run need a moment to notice; a living holder is not waited for.
            if self._alive(holder) or time.monotonic() > deadline:
                os.close(self.descriptor)
                raise StageError(
                    f"{self.path.parent} is in use by process {holder.get('pid', '?')} on {holder.get('host', '?')}"
                    f" since {holder.get('since', '?')}.",
                    "wait for it, stop it with Ctrl-C or kill, or choose another directory with output=DIRECTORY",
                )
            time.sleep(0.05)
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(note).encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.descriptor)

    def _try(self) -> bool:
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _holder(self) -> dict[str, Any]:
        return read_json(self.path)

    @staticmethod
    def _alive(holder: dict[str, Any]) -> bool:
        if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
            return False
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True
