"""Forgetting risk of an update: how much it changes what the previous model says on its own tasks, to second order."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def inner(left: Weights, right: Weights) -> Tensor:
    """Scalar product over the weights that ``left`` names, in float64.

    Source: none.
    """
    return torch.stack([(left[name].double() * right[name].double()).sum() for name in left]).sum()


def fisher_risk(update: Weights, scores: Iterable[Weights]) -> float:
    """``g' F g`` with F the Fisher information of the previous model: the mean of ``(g . s)^2``.

    Half of it, times the squared step, is the KL divergence that the step causes, to second order.

    Source: paper 1 (arXiv 2507.05386 versions 2 to 4), forgetting risk R(g). Differs from: F is not approximated by
    its diagonal; only products with ``g`` are formed.

    Args:
        update: Direction of the update.
        scores: Gradients of the log-likelihood of single answers, sampled from the previous model to its own prompts.
    """
    return float(torch.stack([inner(update, score).square() for score in scores]).mean())


def diagonal_fisher_risk(update: Weights, fisher: Weights) -> float:
    """``sum F g^2`` with the diagonal that `fisher_diagonal` estimates: cheaper, blind to how weights act together.

    Source: paper 1 (arXiv 2507.05386 versions 2 to 4), forgetting risk R(g).
    """
    return float(inner(fisher, {name: update[name].double().square() for name in fisher}))
