"""A raw row that is not used, and why: rows in = rows used + rows dropped."""

from typing import NamedTuple

from cpt_rft.data.example import Split


class Drop(NamedTuple):
    """One row that a task does not use.

    Attributes:
        id: The id that the row would have had.
        split: The split that it would have been in.
        reason: A short fixed word, the same for every row dropped on that ground, for example ``no_picture``.
        detail: What was found.
    """

    id: str
    split: Split
    reason: str
    detail: str
