"""What a framework's run that ended badly is to be reported as: its known failures, each as one line with a fix."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cpt_rft.errors import StageError, TrainingError, UserError

_TAIL = 400_000
_FULL = re.compile(
    r"No space left on device|os error 28|Disk quota exceeded|PytorchStreamWriter failed writing|File too large"
    r"|basic_ios::clear: iostream error"
)
_ROOM = 1 << 20  # with less, what the framework had to say may not have fitted into its log


class Known(NamedTuple):
    """A failure: what the framework prints, what that means, and what to do."""

    pattern: str
    meaning: str
    fix: str


def explain(framework: str, known: Sequence[Known], status: int, output: str, log: Path) -> UserError:
    """What a failed run is to be reported as.

    Args:
        framework: Its name.
        known: Its known failures; the first that is found anywhere in the output decides.
        status: Exit status, negative for a signal.
        output: What it has printed.
        log: Where all of it is.
    """
    output = output[-_TAIL:]
    if _FULL.search(output) or shutil.disk_usage(log.parent).free < _ROOM:
        return StageError(
            f"The disk is full: {framework} could not write below {log.parent}.",
            "free some space ('cpt-rft plan' prints what a run needs) and give the same command again",
        )
    for pattern, meaning, fix in known:
        found = re.search(pattern, output)
        if found is not None:
            return TrainingError(
                f"{framework} failed: {meaning} ({_line_of(output, found.start())}).", f"{fix}; log: {log}"
            )
    if status < 0 or re.search(r"Signal 9 \(SIGKILL\)", output):
        return TrainingError(
            f"{framework} was killed (signal {-status if status < 0 else 9}).",
            f"if memory ran out, see 'cpt-rft plan'; then give the same command again: it goes on. Log: {log}",
        )
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"^(\[rank\d+\]: )?[\w.]*(Error|Exception)\b.*: ", line)]
    last = (errors or lines or ["it printed nothing"])[-1]
    return TrainingError(f"{framework} failed with status {status}: {last[:300]}", f"see {log}")


def _line_of(text: str, place: int) -> str:
    start = text.rfind("\n", 0, place) + 1
    end = text.find("\n", place)
    return text[start : end if end >= 0 else None].strip()[:200]
