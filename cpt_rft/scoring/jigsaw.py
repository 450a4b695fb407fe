"""Jigsaws: which patch belongs where, row by row from 1; whole, patch by patch, and by neighbours.

Source: zifuwanggg/Jigsaw-R1@781ebd4a utils/reward.py ``process_jigsaw_string``, ``score_jigsaw_patches``,
``score_jigsaw_connections`` and the ``grid`` branch of ``extract_answer`` and ``accuracy_reward_helper``.
Differs from: any wrapper is removed first, square brackets around the numbers too; answers that contradict each other
answer nothing, where the source takes the first tag.
"""

from collections.abc import Sequence
from typing import NamedTuple

from cpt_rft.scoring.extract import final_answer

_TO_SPACES = str.maketrans(dict.fromkeys("`,;\n", " "))
_DIGITS = 9  # of a patch number, leading zeros aside; more is out of range anyway


class Jigsaw(NamedTuple):
    """Scores between 0 and 1: the whole grid, patches in place, and neighbours that belong side by side."""

    exact: float
    patches: float
    connections: float


def parse(response: str, patches: int) -> list[int] | None:
    """The patch numbers of an answer, or none where a word is not a number from 1 to `patches`.

    >>> parse("<answer>3, 1, 4, 2</answer>", 4), parse("3 1 4 9", 4), parse("", 4)
    ([3, 1, 4, 2], None, None)
    """
    answer = final_answer(response)
    if answer is None:
        return None
    inner = answer.translate(_TO_SPACES).strip().removeprefix("[").removesuffix("]")
    numbers = []
    for word in inner.split():
        plain = word.lstrip("0")
        if not (word.isascii() and word.isdigit() and 0 < len(plain) <= _DIGITS and int(plain) <= patches):
            return None
        numbers.append(int(plain))
    return numbers


def grade(response: str, label: Sequence[int], rows: int, columns: int) -> Jigsaw:
    """All three scores of a response.

    Args:
        response: The text of a model.
        label: The right patch at each place, row by row: a permutation of 1 to rows times columns.
        rows: Rows of the grid.
        columns: Columns of the grid.

    >>> grade("4 2 3 1", [3, 1, 4, 2], 2, 2)
    Jigsaw(exact=0.0, patches=0.0, connections=0.5)
    >>> grade("3 1 4", [3, 1, 4, 2], 2, 2)  # too few numbers answer nothing
    Jigsaw(exact=0.0, patches=0.0, connections=0.0)
    """
    given = parse(response, rows * columns)
    if given is None or len(given) != len(label):
        return Jigsaw(0.0, 0.0, 0.0)
    in_place = sum(one == other for one, other in zip(given, label, strict=True))
    return Jigsaw(
        exact=float(given == list(label)),
        patches=in_place / len(label),
        connections=_connections(given, label, rows, columns),
    )


def _connections(given: Sequence[int], label: Sequence[int], rows: int, columns: int) -> float:
    """The share of inner edges whose two patches are neighbours, in that order, in the right grid too."""
    place = {patch: divmod(at, columns) for at, patch in enumerate(label)}
    right = 0
    for row in range(rows):
        for column in range(columns):
            here = place[given[row * columns + column]]
            if column + 1 < columns:
                right += place[given[row * columns + column + 1]] == (here[0], here[1] + 1)
            if row + 1 < rows:
                right += place[given[(row + 1) * columns + column]] == (here[0] + 1, here[1])
    edges = 2 * rows * columns - rows - columns
    return right / edges if edges else 0.0
