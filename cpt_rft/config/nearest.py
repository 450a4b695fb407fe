"""The name that a mistyped one most likely meant."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like ``name``, whatever the distance; ties go to the first.

    >>> nearest("mini_gqua", ["mini_vizwiz", "mini_gqa"])
    'mini_gqa'
    """
    return max(known, key=lambda candidate: difflib.SequenceMatcher(None, name.lower(), candidate.lower()).ratio())
