"""What an accuracy matrix says about a sequence: pure functions, named in full.

Every function takes ``matrix``, an array of shape (..., T+1, T): row 0 is the base model, row i the model after
the i-th task, column j the j-th task *in the order learned*. Leading axes (bootstrap replicates, seeds) are kept:
the result has shape (...). Units are those of the matrix (percent everywhere in this project). In the formulas
below tasks count from 1, so that ``R[0]`` is the base row. A matrix with a missing cell is refused.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cpt_rft.errors import UserError

Array = NDArray[np.float64]


class MatrixError(UserError):
    """An accuracy matrix has the wrong shape or lacks cells."""


def complete(matrix: ArrayLike) -> Array:
    """The matrix as floats of shape (..., T+1, T).

    Raises:
        MatrixError: The shape is not (..., T+1, T), or a cell is missing or not finite; its place is named.
    """
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim < 2 or values.shape[-2] != values.shape[-1] + 1 or values.shape[-1] == 0:
        raise MatrixError(
            f"An accuracy matrix of shape {values.shape} is not (T+1, T).",
            "give the base row and one row a task, with one column a task",
        )
    if not np.isfinite(values).all():
        *_, row, column = np.argwhere(~np.isfinite(values))[0]
        raise MatrixError(
            f"The accuracy matrix is incomplete: task {column + 1} after stage {row} is missing.",
            "evaluate the missing cell",
        )
    return values


def _several(matrix: ArrayLike) -> Array:
    values = complete(matrix)
    if values.shape[-1] < 2:
        raise MatrixError("Forgetting and transfer need at least two tasks.", "use a longer sequence")
    return values


def _diagonal(values: Array) -> Array:
    """R[j][j], shape (..., T): each task right after it was learned."""
    return np.diagonal(values[..., 1:, :], axis1=-2, axis2=-1)


def _best(values: Array, *, with_last: bool) -> Array:
    """The best score on each task from when it was learned on, shape (..., T-1) for tasks 1..T-1."""
    tasks = values.shape[-1]
    rows = values[..., 1:, :] if with_last else values[..., 1:-1, :]
    learned = np.tril(np.ones((tasks, tasks), dtype=bool))[: rows.shape[-2]]
    return np.asarray(np.where(learned, rows, -np.inf).max(axis=-2)[..., : tasks - 1])


def avg_acc(matrix: ArrayLike) -> Array:
    """Average accuracy after the last task, mean_j R[T][j]. Also called Last, MFN, ACC, final average accuracy."""
    return np.asarray(complete(matrix)[..., -1, :].mean(axis=-1))


def learned(matrix: ArrayLike) -> Array:
    """Accuracy right after learning, mean_j R[j][j] (also MFT): plasticity."""
    return np.asarray(_diagonal(complete(matrix)).mean(axis=-1))


def bwt(matrix: ArrayLike) -> Array:
    """Backward transfer, mean_{j<T} (R[T][j] - R[j][j]); negative is forgetting.

    Source: Lopez-Paz & Ranzato 2017, arXiv 1706.08840 equation 3.
    """
    values = _several(matrix)
    return np.asarray((values[..., -1, :-1] - _diagonal(values)[..., :-1]).mean(axis=-1))


def forgetting_max_minus_last(matrix: ArrayLike) -> Array:
    """mean_{j<T} (max_{j<=l<T} R[l][j] - R[T][j]); can be negative.

    Source: Chaudhry et al. 2018, arXiv 1801.10112 equation 3. Differs from: the maximum begins where the task was
    learned, there at the first task.
    """
    values = _several(matrix)
    return np.asarray((_best(values, with_last=False) - values[..., -1, :-1]).mean(axis=-1))


def fm(matrix: ArrayLike) -> Array:
    """The paper's forgetting measure, mean_{j<T} (R[T][j] - max_{j<=l<=T} R[l][j]), at most 0.

    Source: arXiv 2507.05386 (no account of it states the ranges of j and l; these are ours). Biased by noise: read it
    beside `eval.statistics.null_fm`.
    """
    values = _several(matrix)
    return np.asarray((values[..., -1, :-1] - _best(values, with_last=True)).mean(axis=-1))


def average_incremental_accuracy(matrix: ArrayLike) -> Array:
    """mean_i mean_{j<=i} R[i][j] (also AIA, MAA). Source: Rebuffi et al. 2017, arXiv 1611.07725."""
    values = complete(matrix)[..., 1:, :]
    steps = np.arange(1, values.shape[-1] + 1)
    return np.asarray((np.tril(values).sum(axis=-1) / steps).mean(axis=-1))


def forward_transfer(matrix: ArrayLike) -> Array:
    """mean_{j>=2} (R[j-1][j] - R[0][j]): what earlier tasks did for a task not yet learned.

    Source: as `bwt`. Differs from: compared with the base model, there with a random initialisation.
    """
    values = _several(matrix)
    before = np.diagonal(values[..., 1:-1, 1:], axis1=-2, axis2=-1)
    return np.asarray((before - values[..., 0, 1:]).mean(axis=-1))


def intransigence(matrix: ArrayLike, multitask: ArrayLike) -> Array:
    """mean_j (a*_j - R[j][j]) with a* the joint model's accuracy, shape (T,).

    Source: Chaudhry et al. 2018, arXiv 1801.10112. Differs from: one joint model of all tasks, there one of
    the tasks so far.
    """
    values = complete(matrix)
    joint = np.asarray(multitask, dtype=np.float64)
    if joint.shape != values.shape[-1:] or not np.isfinite(joint).all():
        raise MatrixError("Intransigence needs one multi-task accuracy a task.", "evaluate the multi-task model whole")
    return np.asarray((joint - _diagonal(values)).mean(axis=-1))


def bwt_over_tasks(matrix: ArrayLike) -> Array:
    """`bwt` summed as usual but divided by T, not T-1. Source: the numbers of CoIN (zackschen/CoIN issue 11)."""
    values = _several(matrix)
    return np.asarray(bwt(values) * (values.shape[-1] - 1) / values.shape[-1])


def bwt_all_pairs(matrix: ArrayLike) -> Array:
    """R[i][j] - R[j][j] averaged over all i > j.

    Source: Diaz-Rodriguez et al. 2018, arXiv 1810.13166; continuum's backward_transfer.
    """
    values = _several(matrix)
    drop = values[..., 1:, :] - _diagonal(values)[..., None, :]
    below = np.tril_indices(values.shape[-1], k=-1)
    return np.asarray(drop[..., below[0], below[1]].mean(axis=-1))


def accuracy_all_pairs(matrix: ArrayLike) -> Array:
    """R[i][j] averaged over all i >= j. Source: Diaz-Rodriguez et al. 2018; continuum's accuracy_A."""
    values = complete(matrix)[..., 1:, :]
    lower = np.tril_indices(values.shape[-1])
    return np.asarray(values[..., lower[0], lower[1]].mean(axis=-1))


def forward_transfer_without_base(matrix: ArrayLike) -> Array:
    """mean_{j>=2} R[j-1][j], the base model not subtracted. Source: continuum's forward_transfer."""
    values = _several(matrix)
    return np.asarray(np.diagonal(values[..., 1:-1, 1:], axis1=-2, axis2=-1).mean(axis=-1))


def forgetting_max_including_last(matrix: ArrayLike) -> Array:
    """`-fm`: the maximum includes the last row, so it is never negative. Source: mammoth's forgetting."""
    return np.asarray(-fm(matrix))


def forgetting_first_minus_last(matrix: ArrayLike) -> Array:
    """`-bwt`: first value minus last value. Source: avalanche's Forgetting."""
    return np.asarray(-bwt(matrix))


def forgetting_over_tasks(matrix: ArrayLike) -> Array:
    """`forgetting_max_minus_last` divided by T, not T-1. Source: BeGin's average forgetting."""
    values = _several(matrix)
    return np.asarray(forgetting_max_minus_last(values) * (values.shape[-1] - 1) / values.shape[-1])


def remembering(matrix: ArrayLike) -> Array:
    """100 - |min(0, bwt_all_pairs)|, for a matrix in percent. Source: Diaz-Rodriguez et al. 2018."""
    return np.asarray(100.0 + np.minimum(bwt_all_pairs(matrix), 0.0))


def positive_backward_transfer(matrix: ArrayLike) -> Array:
    """max(0, bwt_all_pairs). Source: Diaz-Rodriguez et al. 2018."""
    return np.asarray(np.maximum(bwt_all_pairs(matrix), 0.0))


Metric = Callable[[ArrayLike], Array]

#: The four that every table shows.
HEADLINE: dict[str, Metric] = {"avg_acc": avg_acc, "learned": learned, "bwt": bwt, "fm": fm}

#: Further ones that need nothing but the matrix.
FURTHER: dict[str, Metric] = {
    "forgetting_max_minus_last": forgetting_max_minus_last,
    "average_incremental_accuracy": average_incremental_accuracy,
    "forward_transfer": forward_transfer,
}

#: Conventions of other code bases, by name, for comparing with their numbers.
CONVENTIONS: dict[str, Metric] = {
    "bwt_over_tasks": bwt_over_tasks,
    "bwt_all_pairs": bwt_all_pairs,
    "accuracy_all_pairs": accuracy_all_pairs,
    "forward_transfer_without_base": forward_transfer_without_base,
    "forgetting_max_including_last": forgetting_max_including_last,
    "forgetting_first_minus_last": forgetting_first_minus_last,
    "forgetting_over_tasks": forgetting_over_tasks,
    "remembering": remembering,
    "positive_backward_transfer": positive_backward_transfer,
}
