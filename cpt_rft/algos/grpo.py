"""Group-relative policy optimisation: advantages within a group of completions of one prompt."""

from typing import Literal

import torch
from torch import Tensor

from cpt_rft.algos.rewards import check_groups

STD_EPSILON = 1e-6
Scale = Literal["group", "batch", "none"]


def group_advantages(rewards_PG: Tensor, *, scale: Scale = "group", epsilon: float = STD_EPSILON) -> Tensor:
    """Advantages (P, G): rewards centred within each group, and scaled.

    Source: DeepSeekMath, arXiv 2402.03300 section 4.1.2; EasyR1@b44b311 verl/trainer/core_algos.py
    compute_grpo_outcome_advantage: (r - mean) / (std + 1e-6), unbiased std; TRL@v1.16.0 trl/trainer/grpo_trainer.py
    (scale_rewards, epsilon 1e-4). Differs from: computed in float64, and a group of equal rewards has advantage zero
    exactly, where the source divides the rounding error of the mean by 1e-6.

    Args:
        rewards_PG: All rewards of the step.
        scale: Divide by the standard deviation of the group, of the whole batch, or not at all (Dr. GRPO).
        epsilon: Added to the standard deviation.

    Raises:
        ConfigError: Groups have fewer than two completions.
        TrainingError: A reward is infinite or not a number.
    """
    check_groups(rewards_PG)
    rewards = rewards_PG.double()
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "group":
        advantages = advantages / (rewards.std(dim=1, keepdim=True, unbiased=True) + epsilon)
    elif scale == "batch":
        advantages = advantages / (rewards.std(unbiased=True) + epsilon)
    advantages = torch.where(zero_variance(rewards_PG)[:, None], torch.zeros_like(advantages), advantages)
    return advantages.to(rewards_PG.dtype)


def paper_group_advantages(rewards_PG: Tensor) -> tuple[Tensor, int]:
    """Advantages (P, G) in float32 with the source's rounding, and how many all-equal groups are not zero by it.

    For eight rewards of 0.9 the float32 mean is not 0.9, the standard deviation is nearly zero, and the quotient can
    reach 0.06: paper 1's runs pushed every completion of such a group the same way.

    Source: EasyR1@b44b311 verl/trainer/core_algos.py compute_grpo_outcome_advantage, as it stands.

    Raises:
        ConfigError: Groups have fewer than two completions.
        TrainingError: A reward is infinite or not a number.
    """
    check_groups(rewards_PG)
    rewards = rewards_PG.float()
    # One group at a time, as the source: a reduction over a dimension may add in another order.
    advantages = torch.stack([(row - row.mean()) / (row.std() + STD_EPSILON) for row in rewards])
    noisy_P = zero_variance(rewards) & (advantages != 0).any(dim=1)
    return advantages, int(noisy_P.sum())


def zero_variance(rewards_PG: Tensor) -> Tensor:
    """Groups (P,) whose rewards are all equal: they carry no policy gradient.

    Source: paper 1 (arXiv 2507.05386): a prompt whose rollouts all get the same reward makes no update.
    """
    return (rewards_PG == rewards_PG[:, :1]).all(dim=1)
