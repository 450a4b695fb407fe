"""Penalties on moving the weights: EWC, weighed by the diagonal of the Fisher information, and plain L2."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def fisher_diagonal(scores: Iterable[Weights]) -> dict[str, Tensor]:
    """Mean over examples of the squared gradient of one example's log-likelihood.

    With answers sampled from the model it estimates the Fisher information, with the labels only the empirical one.
    The gradient must be of one example: the square of a batch's mean is another, smaller thing.

    Source: EWC, arXiv 1612.00796 section 2; GMvandeVen/continual-learning@e6d795a models/cl/continual_learner.py
    estimate_fisher.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    for score in scores:
        count += 1
        for name, gradient in score.items():
            square = gradient.detach().float().square()
            sums[name] = sums[name] + square if name in sums else square
    return {name: total / count for name, total in sums.items()}


def carried_fisher(before: Weights, fisher: Weights, *, gamma: float = 1.0) -> dict[str, Tensor]:
    """Importance after one more task: ``gamma * before + fisher``, so that one penalty stands for all tasks.

    Source: online EWC, arXiv 1805.06370 section 4, equation 9; GMvandeVen/continual-learning@e6d795a
    models/cl/continual_learner.py estimate_fisher (gamma). Differs from: no task's importance is normalised; the next
    penalty takes this sum as it is, where equation 8 and the code shrink it by gamma, so that gamma times their
    strength is the same.
    """
    return {name: gamma * before[name] + value for name, value in fisher.items()}


def ewc_penalty(weights: Weights, start: Weights, fisher: Weights) -> Tensor:
    """Half the sum of ``F (w - w0)^2`` over the weights that ``fisher`` names; its strength is the caller's.

    Source: EWC, arXiv 1612.00796 equation 3; GMvandeVen/continual-learning@e6d795a models/cl/continual_learner.py
    ewc_loss.
    """
    terms = [(fisher[name] * (weights[name].float() - start[name].detach().float()).square()).sum() for name in fisher]
    return 0.5 * torch.stack(terms).sum()


def merged_penalty(
    importance: Weights, anchor: Weights, fisher: Weights, weights: Weights
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Importance and anchor of one penalty with the gradient of two: around ``anchor`` and around ``weights``.

    A sum of squares around several points is one square around their mean, weighed by importance, and a constant. So
    the penalties of all earlier tasks fit into two numbers a weight.

    Source: EWC, arXiv 1612.00796 section 2 (a penalty for each earlier task), with the square completed.
    """
    total = {name: importance[name] + fisher[name] for name in fisher}
    shares = {name: fisher[name] / total[name].clamp(min=torch.finfo(torch.float32).tiny) for name in fisher}
    return total, {name: anchor[name] + shares[name] * (weights[name] - anchor[name]) for name in fisher}


def l2_penalty(weights: Weights, start: Weights) -> Tensor:
    """Half the squared distance to the start, over all weights; its strength is the caller's.

    Source: L2-SP, arXiv 1802.01483. Differs from: no other penalty on new layers, of which there are none.
    """
    terms = [(value.float() - start[name].detach().float()).square().sum() for name, value in weights.items()]
    return 0.5 * torch.stack(terms).sum()
