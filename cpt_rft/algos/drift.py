"""The drift meter: how far a model moved, as KL over the whole vocabulary, on sequences of the first model."""

from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from cpt_rft.algos.kl import full_divergence
from cpt_rft.errors import DataError


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval.

    Args:
        value: In nats.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def position_divergence(logits_NV: Tensor, other_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(first || other) in nats at each position, (N,), exact over the vocabulary.

    Source: RL's Razor, arXiv 2509.04259 (forward KL on new-task inputs). Differs from: exact at each position, where
    the tokens before it were sampled from the first model, so that sums over a sequence are unbiased for its KL.
    """
    first, other = (logits.float() / temperature for logits in (logits_NV, other_NV))
    return full_divergence(first.log_softmax(-1), other.log_softmax(-1))


def clustered_ratio(totals_S: Tensor, sizes_S: Tensor, prompts_S: Tensor, *, level: float = 0.95) -> Estimate:
    """``sum(totals) / sum(sizes)`` with a normal interval over prompts, whose sequences are not independent.

    Source: Cochran, Sampling Techniques, chapter 6 (variance of a ratio estimate, linearised).

    Raises:
        DataError: There are fewer than two prompts, which say nothing of their spread.
    """
    _, prompt_S = prompts_S.unique(return_inverse=True)
    count = int(prompt_S.max()) + 1 if len(prompt_S) else 0
    if count < 2:
        raise DataError(f"an interval over prompts needs two of them, not {count}.", "measure on more prompts.")
    totals_P, sizes_P = (
        torch.zeros(count, dtype=torch.float64).index_add(0, prompt_S.cpu(), values_S.double().cpu())
        for values_S in (totals_S, sizes_S)
    )
    ratio = totals_P.sum() / sizes_P.sum()
    variance = (totals_P - ratio * sizes_P).square().sum() * count / (count - 1) / sizes_P.sum().square()
    half = NormalDist().inv_cdf(0.5 + level / 2) * float(variance.sqrt())
    return Estimate(float(ratio), float(ratio) - half, float(ratio) + half)


def drift(
    divergence_S: Tensor, tokens_S: Tensor, prompts_S: Tensor, *, level: float = 0.95
) -> tuple[Estimate, Estimate]:
    """Drift a token and drift a sequence, from the sums of `position_divergence` over each sequence.

    Source: as `position_divergence` and `clustered_ratio`.

    Args:
        divergence_S: Sum over the positions of each sequence.
        tokens_S: Positions of each sequence.
        prompts_S: Whole number that names the prompt of each sequence.
        level: Of the intervals.
    """
    a_token = clustered_ratio(divergence_S, tokens_S, prompts_S, level=level)
    return a_token, clustered_ratio(divergence_S, torch.ones_like(divergence_S), prompts_S, level=level)
