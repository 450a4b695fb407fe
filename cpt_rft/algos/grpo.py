"""Group-relative policy optimisation: advantages within a group, clipped ratios, a penalty towards a reference."""

import math

import torch
from torch import Tensor

STD_EPSILON = 1e-6
MAX_LOG_RATIO = 20.0
MAX_KL = 10.0


def group_advantages(rewards_PG: Tensor) -> Tensor:
    """Advantages (P, G): rewards centred and scaled within each group.

    Source: EasyR1@b44b311 verl/trainer/core_algos.py compute_grpo_outcome_advantage: (r - mean) / (std + 1e-6),
    unbiased std. Differs from: computed in float64, and a group of equal rewards has advantage zero exactly, where
    the source divides the rounding error of the mean by 1e-6.

    Raises:
        ValueError: Groups have fewer than two completions, so that no completion can be better than its group.
    """
    if rewards_PG.dim() != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(f"groups of at least 2 completions are needed, not shape {tuple(rewards_PG.shape)}")
    rewards = rewards_PG.double()
    std = rewards.std(dim=1, keepdim=True, unbiased=True)
    advantages = (rewards - rewards.mean(dim=1, keepdim=True)) / (std + STD_EPSILON)
    advantages = torch.where(zero_variance(rewards_PG)[:, None], torch.zeros_like(advantages), advantages)
    return advantages.to(rewards_PG.dtype)


def zero_variance(rewards_PG: Tensor) -> Tensor:
    """Groups (P,) whose rewards are all equal: they carry no policy gradient."""
    return (rewards_PG == rewards_PG[:, :1]).all(dim=1)


def k3_divergence(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) a token: ``r - log r - 1`` with ``r`` = reference / policy; never negative.

    Source: Schulman, "Approximating KL divergence" (k3); EasyR1@b44b311 verl/trainer/core_algos.py compute_kl
    (low_var_kl), with its limits of 20 on the log-ratio and 10 on the value, beyond which the gradient is zero.
    """
    log_ratio_T = (reference_T - logprobs_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (log_ratio_T.expm1() - log_ratio_T).clamp(-MAX_KL, MAX_KL)


def clipped_policy_loss(
    logprobs_T: Tensor,
    old_T: Tensor,
    advantages_T: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    dual_clip: float | None = 3.0,
) -> Tensor:
    """Policy loss a token, the same shape as ``logprobs_T``.

    Source: EasyR1@b44b311 verl/trainer/core_algos.py compute_policy_loss (default): ratio clipped to
    [1 - low, 1 + high], and for negative advantages at most ``dual_clip`` times the advantage
    (arXiv 1912.09729). The ratio itself is limited to ``exp(+-20)``.

    Args:
        logprobs_T: Log-probabilities under the policy being trained.
        old_T: Log-probabilities under the policy that wrote the tokens; no gradient flows into them.
        advantages_T: Advantage of each token.
        clip_low: How far the ratio may fall below 1.
        clip_high: How far the ratio may rise above 1.
        dual_clip: Bound on the ratio where the advantage is negative; none switches it off.
    """
    log_ratio_T = (logprobs_T - old_T.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    clipped_ratio_T = log_ratio_T.clamp(math.log(1.0 - clip_low), math.log(1.0 + clip_high)).exp()
    loss_T = torch.maximum(-advantages_T * log_ratio_T.exp(), -advantages_T * clipped_ratio_T)
    if dual_clip is None:
        return loss_T
    return torch.where(advantages_T < 0, torch.minimum(loss_T, -advantages_T * dual_clip), loss_T)
