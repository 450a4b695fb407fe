"""An evaluation under way: the batches that a file of records has so far, each of them whole.

A work file lies beside the file that it becomes. Its first line is the key of the work, all that decides the bits; each
further line is a batch and is on the disk before the next batch is asked. A line that a killed process left unfinished
is cut off. The last batch comes with the file itself, so that a file of one batch needs no work file.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from cpt_rft.files import canonical_json, fsync_directory, write_text_atomic
from eval.records import RecordError


def work_path(final: Path) -> Path:
    """The work file of a file of records."""
    return final.with_name(f"{final.name}.partial")


class Work:
    """The work file of one file of records; a context that one process at a time can enter.

    Attributes:
        path: The work file.
        batches: The text of every batch that is there.
        seconds: What they took, whoever answered them.
    """

    def __init__(self, final: Path, key: Mapping[str, Any]) -> None:
        self.final = final
        self.path = work_path(final)
        self.batches: list[str] = []
        self.seconds = 0.0
        self._head = canonical_json(dict(key)).encode() + b"\n"
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        if self.path.exists():
            file = self._open()
            whole = self._take_up(file.read())
            file.truncate(whole)
            file.seek(whole)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, text: str, seconds: float) -> None:
        """Commit a batch: it is on the disk when this returns.

        Raises:
            RecordError: Another process works on the same file.
        """
        file = self._file or self._open()
        if not self.batches:
            file.truncate(0)
            file.seek(0)
            file.write(self._head)
        file.write(json.dumps({"seconds": seconds, "text": text}, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        if not self.batches:
            fsync_directory(self.path.parent)
        self._note(text, seconds)

    def publish(self, text: str, seconds: float) -> None:
        """Commit the last batch and with it the file of records; the work file goes."""
        self._note(text, seconds)
        write_text_atomic(self.final, "".join(self.batches))
        self.path.unlink(missing_ok=True)

    def _open(self) -> BinaryIO:
        self._file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecordError(
                f"{self.final} is being made by another process.", "wait for it, or evaluate into another directory"
            ) from error
        return self._file

    def _take_up(self, content: bytes) -> int:
        """Note the whole batches of this very work; returns where they end in the file."""
        end = len(self._head)
        if not content.startswith(self._head):
            return 0
        for line in content[end:].split(b"\n")[:-1]:
            try:
                batch = json.loads(line)
            except ValueError:  # written, but not all of it, when the machine went down
                break
            self._note(batch["text"], batch["seconds"])
            end += len(line) + 1
        return end

    def _note(self, text: str, seconds: float) -> None:
        self.batches.append(text)
        self.seconds += seconds
