"""REINFORCE leave-one-out: the baseline of a completion is the mean reward of the others."""

import torch
from torch import Tensor

from cpt_rft.algos.grpo import zero_variance
from cpt_rft.algos.rewards import check_groups


def leave_one_out_advantages(rewards_PG: Tensor, *, normalise: float | None = None) -> Tensor:
    """Advantages (P, G): ``r_i`` less the mean of the other rewards, which is n/(n-1) times the centred reward.

    Source: RLOO, arXiv 2402.14740 section 2.3; EasyR1@b44b311 verl/trainer/core_algos.py
    compute_rloo_outcome_advantage; TRL@v1.16.0 trl/trainer/rloo_trainer.py (normalize_advantages, epsilon 1e-4).
    Differs from: computed in float64; all-equal groups have advantage zero exactly, also normalised, since the mean of
    the advantages, zero but for rounding, is not subtracted again.

    Args:
        rewards_PG: All rewards of the step.
        normalise: Divide by the standard deviation of all advantages plus this; none leaves them as they are.

    Raises:
        ConfigError: Groups have fewer than two completions.
        TrainingError: A reward is infinite or not a number.
    """
    check_groups(rewards_PG)
    rewards = rewards_PG.double()
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    equal_P = zero_variance(rewards_PG)
    advantages = torch.where(equal_P[:, None], torch.zeros_like(rewards), rewards - others)
    if normalise is not None:
        advantages = advantages / (advantages.std(unbiased=True) + normalise)
    return advantages.to(rewards_PG.dtype)
