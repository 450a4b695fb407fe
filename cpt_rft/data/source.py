"""Where the rows of a task come from, as resolved: what a lock and a ledger record of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class SourceFile(NamedTuple):
    """One file of raw rows or pictures.

    Attributes:
        part: What the task reads it as: a split of the source, a configuration, ``annotations``...
        name: The path in the repository, the address of a site's archive, or the name in a folder.
        size: Bytes.
        sha256: Of the content, in hex; what the hub states and what was computed here agree.
        path: Where it lies on this machine.
    """

    part: str
    name: str
    size: int
    sha256: str
    path: Path


@dataclass(frozen=True)
class Source:
    """The files of one task, downloaded and checked.

    Attributes:
        repo: The hub repository under its current name; none for a site or a folder.
        revision: The commit on the hub that was resolved; none without a repository.
        config: The configuration of the repository, if it has more than one.
        files: Every file that the task reads.
        rows: Raw rows a part, counted in the files, before anything is dropped. Only parts whose files know it.
        card_rows: Rows a part as the repository's card states them, where it does.
        renamed_from: The name in our configuration, if the hub redirected it to `repo`.
    """

    repo: str | None
    revision: str | None
    config: str | None
    files: tuple[SourceFile, ...]
    rows: Mapping[str, int] = field(default_factory=dict)
    card_rows: Mapping[str, int] = field(default_factory=dict)
    renamed_from: str | None = None

    def part(self, name: str) -> tuple[SourceFile, ...]:
        """The files of one part, in order; empty if there is none."""
        return tuple(file for file in self.files if file.part == name)

    def record(self) -> dict[str, Any]:
        """What is worth locking: everything but the places on this machine."""
        return {
            "repo": self.repo,
            "revision": self.revision,
            "config": self.config,
            "files": [{"part": f.part, "name": f.name, "size": f.size, "sha256": f.sha256} for f in self.files],
            "rows": dict(self.rows),
            "card_rows": dict(self.card_rows),
            "renamed_from": self.renamed_from,
        }
