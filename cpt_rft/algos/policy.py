"""Policy-gradient losses a token: ratios of the policy to the one that wrote the tokens, and what bounds them."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cpt_rft.algos.aggregate import only_real

MAX_LOG_RATIO = 20.0
MIN_VESPO_LOG_RATIO = math.log(1e-8)
RatioLevel = Literal["token", "sequence", "sequence_token", "sequence_sum"]


class ClipCounts(NamedTuple):
    """Real tokens whose gradient the clip stops; counts, so that micro-batches add up.

    Args:
        low: Ratio below the lower bound, negative advantage.
        high: Ratio above the upper bound, positive advantage.
        dual: Ratio above the dual bound, negative advantage.
    """

    low: Tensor
    high: Tensor
    dual: Tensor


def log_ratios(level: RatioLevel, logprobs_ST: Tensor, old_ST: Tensor, mask_ST: Tensor) -> Tensor:
    """Log of policy / old policy for every token, (S, T), zero on padding; no gradient flows into ``old_ST``.

    ``token``: of the token. ``sequence``: its mean over the sequence, for all tokens alike (GSPO). ``sequence_token``:
    the same value, but each token's gradient is its own (GSPO-token). ``sequence_sum``: that of the whole sequence
    (RLOO).

    Source: GSPO, arXiv 2507.18071 equations 7 and 14; EasyR1@b44b311 verl/trainer/core_algos.py compute_policy_loss;
    TRL@v1.16.0 trl/trainer/rloo_trainer.py _compute_loss (sequence_sum).
    """
    difference_ST = only_real(logprobs_ST - old_ST.detach(), mask_ST)
    if level == "token":
        return difference_ST
    sums = difference_ST.sum(-1, keepdim=True)
    if level == "sequence_sum":
        return only_real(sums.expand_as(difference_ST), mask_ST)
    means = sums / mask_ST.sum(-1, keepdim=True).clamp(min=1.0)
    if level == "sequence_token":
        # The first summand has the value, the second is zero and has the gradient.
        return only_real(means.detach() + (difference_ST - difference_ST.detach()), mask_ST)
    return only_real(means.expand_as(difference_ST), mask_ST)


def clipped_policy_loss(
    logprobs_T: Tensor,
    old_T: Tensor,
    advantages_T: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    dual_clip: float | None = 3.0,
) -> Tensor:
    """Clipped loss with the ratio of each token, the same shape as ``logprobs_T``; see `clipped_loss`.

    Source: as `clipped_loss`.

    Args:
        logprobs_T: Log-probabilities under the policy being trained.
        old_T: Log-probabilities under the policy that wrote the tokens; no gradient flows into them.
        advantages_T: Advantage of each token.
        clip_low: How far the ratio may fall below 1.
        clip_high: How far the ratio may rise above 1.
        dual_clip: Bound on the ratio where the advantage is negative; none switches it off.
    """
    log_ratio_T = logprobs_T - old_T.detach()
    return clipped_loss(log_ratio_T, advantages_T, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def clipped_loss(
    log_ratio_T: Tensor, advantages_T: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None
) -> Tensor:
    """Loss a token: the worse of ``-A r`` and ``-A clip(r)``, and for negative advantages at most ``-A dual_clip``.

    Source: PPO, arXiv 1707.06347 equation 7; EasyR1@b44b311 verl/trainer/core_algos.py compute_policy_loss (default,
    gspo): ratio clipped to [1 - low, 1 + high], dual clip of arXiv 1912.09729 equation 5, ratio limited to
    ``exp(+-20)``; TRL@v1.16.0 trl/trainer/grpo_trainer.py _compute_loss (``dual_clip`` is its delta, where at least
    1 + high).
    """
    log_ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    clipped_ratio_T = log_ratio_T.clamp(*log_bounds(clip_low, clip_high)).exp()
    loss_T = torch.maximum(-advantages_T * log_ratio_T.exp(), -advantages_T * clipped_ratio_T)
    if dual_clip is None:
        return loss_T
    return torch.where(advantages_T < 0, torch.minimum(loss_T, -advantages_T * dual_clip), loss_T)


def log_bounds(clip_low: float, clip_high: float) -> tuple[float, float]:
    """Logs of 1 - low and 1 + high; a ``clip_low`` of 1 or more bounds nothing.

    Source: none.
    """
    return (math.log(1.0 - clip_low) if clip_low < 1.0 else -math.inf), math.log(1.0 + clip_high)


def cispo_loss(
    logprobs_T: Tensor, log_ratio_T: Tensor, advantages_T: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Loss a token: REINFORCE weighed by the clipped ratio, through which no gradient flows; every token keeps one.

    Source: MiniMax-M1, arXiv 2506.13585 section 3.1, equations 4 and 5; EasyR1@b44b311 verl/trainer/core_algos.py
    compute_policy_loss (cispo); TRL@v1.16.0 trl/trainer/grpo_trainer.py _compute_loss, whose epsilon_high bounds the
    ratio itself, here ``1 + clip_high``, and which has no lower bound, here ``clip_low=1``.
    """
    weights_T = log_ratio_T.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).clamp(*log_bounds(clip_low, clip_high)).exp()
    return -advantages_T * weights_T * logprobs_T


def sapo_loss(
    log_ratio_T: Tensor, advantages_T: Tensor, *, tau_positive: float = 1.0, tau_negative: float = 1.05
) -> Tensor:
    """Loss a token: a sigmoid of the ratio in place of the clip, steeper for negative advantages.

    Source: SAPO, arXiv 2511.20347 equations 5 and 6; EasyR1@b44b311 verl/trainer/core_algos.py compute_policy_loss
    (sapo).
    """
    tau_T = torch.where(advantages_T < 0, tau_negative, tau_positive)
    ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return -advantages_T * (tau_T * (ratio_T - 1.0)).sigmoid() * 4.0 / tau_T


def vespo_loss(
    logprobs_ST: Tensor,
    log_ratio_ST: Tensor,
    advantages_ST: Tensor,
    mask_ST: Tensor,
    *,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
) -> Tensor:
    """Loss a token: REINFORCE weighed by ``w^k exp(l (1 - w))`` of the ratio ``w`` of the whole sequence.

    Source: VESPO, arXiv 2602.10693 version 3, section 3.5, equation 20; TRL@v1.16.0 trl/trainer/grpo_trainer.py
    get_gamma_weights, _compute_loss (vespo).

    Args:
        logprobs_ST: Log-probabilities under the policy being trained.
        log_ratio_ST: Log-ratios of the tokens.
        advantages_ST: Advantage of each token; of one sign within a sequence.
        mask_ST: 1 on real tokens.
        positive: ``k`` and ``l`` where the advantage is not negative.
        negative: ``k`` and ``l`` where it is.
    """
    clamped_ST = only_real(log_ratio_ST.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), mask_ST)
    log_weight = clamped_ST.sum(-1, keepdim=True).clamp(MIN_VESPO_LOG_RATIO, MAX_LOG_RATIO)
    power_ST = torch.where(advantages_ST < 0, negative[0], positive[0])
    decay_ST = torch.where(advantages_ST < 0, negative[1], positive[1])
    weights_ST = (power_ST * log_weight + decay_ST * (1.0 - log_weight.exp())).exp()
    return -advantages_ST * weights_ST * logprobs_ST


def clip_counts(
    log_ratio_ST: Tensor,
    advantages_ST: Tensor,
    mask_ST: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> ClipCounts:
    """How many real tokens `clipped_loss` clips, and where.

    Source: EasyR1@b44b311 verl/trainer/core_algos.py compute_policy_loss (pg_clipfrac_higher is low and high together,
    pg_clipfrac_lower is dual); TRL@v1.16.0 trl/trainer/grpo_trainer.py _compute_loss (clip_ratio). Differs from:
    counts, not shares.
    """
    low, high = log_bounds(clip_low, clip_high)
    dual = math.log(dual_clip) if dual_clip is not None else math.inf
    real_ST, bad_ST, good_ST = mask_ST.bool(), advantages_ST < 0, advantages_ST > 0
    return ClipCounts(
        (real_ST & bad_ST & (log_ratio_ST < low)).sum(),
        (real_ST & good_ST & (log_ratio_ST > high)).sum(),
        (real_ST & bad_ST & (log_ratio_ST > dual)).sum(),
    )
