"""REINFORCE++: returns to go a token, whitened over the whole batch; no baseline of the prompt."""

import torch
from torch import Tensor

from cpt_rft.algos.rewards import check_finite

VARIANCE_EPSILON = 1e-8


def reinforce_plus_plus_advantages(token_rewards_ST: Tensor, mask_ST: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Advantages (S, T) of every token; padding holds no meaning.

    Source: REINFORCE++, arXiv 2501.03262 version 9, section 3.1; EasyR1@b44b311 verl/trainer/core_algos.py
    compute_reinforce_plus_plus_outcome_advantage, verl/utils/torch_functional.py masked_whiten: (R - mean) /
    sqrt(var + 1e-8), unbiased, over real tokens. Differs from: computed in float64; where all returns are equal the
    advantages are zero exactly.

    Args:
        token_rewards_ST: Rewards a token, of all sequences of the step; any KL penalty is already in them.
        mask_ST: 1 on real tokens.
        gamma: Discount a token.

    Raises:
        TrainingError: A reward is infinite or not a number.
    """
    check_finite(token_rewards_ST)
    rewards, mask = token_rewards_ST.double(), mask_ST.double()
    running_S = torch.zeros_like(rewards[:, 0])
    returns_T = []
    for place in reversed(range(rewards.shape[1])):
        later_S = running_S * mask[:, place + 1] if place + 1 < rewards.shape[1] else running_S
        running_S = rewards[:, place] + gamma * later_S
        returns_T.append(running_S)
    returns_ST = torch.stack(returns_T[::-1], dim=1)
    real = returns_ST[mask_ST.bool()]
    if real.numel() == 0 or bool((real == real[0]).all()):
        return torch.zeros_like(token_rewards_ST)
    advantages = (returns_ST - real.mean()) * (real.var(unbiased=True) + VARIANCE_EPSILON).rsqrt()
    return advantages.to(token_rewards_ST.dtype)
