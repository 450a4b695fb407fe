"""What the doctor says of one thing that it looked at, and of the environments of all engines alike."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Word = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: The thing.
        word: Whether it will do.
        text: What was found.
        fix: What to do about it; empty where it is fine.
    """

    what: str
    word: Word
    text: str
    fix: str = ""


def compare_with_lock(what: str, framework: str, lock: str, place: Path) -> Iterator[Finding]:
    """Whether an environment holds what its lock names.

    Args:
        what: The thing, for the finding.
        framework: Of the environment.
        lock: Name of its lock.
        place: The environment.
    """
    from cpt_rft.engines.environment import installed_versions, locked_versions

    there, locked = installed_versions(place), locked_versions(lock)
    differ = [
        f"{name} {there.get(name, 'missing')} instead of {version}"
        for name, version in locked.items()
        if there.get(name, "").partition("+")[0] != version.partition("+")[0]
    ]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        fix = f"delete it and run 'bash scripts/setup_{framework}.sh', unless you mean to use these"
        yield Finding(what, "warning", f"{place}: {', '.join(differ[:3])}{more}.", fix)
    else:
        yield Finding(what, "ok", f"{place}: all {len(locked)} packages as locked")
