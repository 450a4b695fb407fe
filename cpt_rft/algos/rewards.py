"""Rewards as tensors, checked once before anything is computed from them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cpt_rft.algos.aggregate import only_real
from cpt_rft.errors import ConfigError, TrainingError


def reward_groups(rewards: Sequence[float], completions: int, group: int) -> Tensor:
    """Rewards (P, G) in float64, from one flat list in the order of the completions.

    Source: none; EasyR1 leaves a missing reward at zero without a word.

    Raises:
        TrainingError: There is not one finite reward a completion.
    """
    if len(rewards) != completions:
        raise TrainingError(
            f"the reward function returned {len(rewards)} rewards for {completions} completions.",
            "return one number a completion, in their order.",
        )
    rewards_PG = torch.tensor(rewards, dtype=torch.float64).view(-1, group)
    check_finite(rewards_PG)
    return rewards_PG


def check_finite(rewards: Tensor) -> None:
    """Refuse rewards that are not numbers, naming the first.

    Source: none.

    Raises:
        TrainingError: A reward is infinite or not a number.
    """
    wrong = (~torch.isfinite(rewards)).flatten().nonzero().flatten()
    if len(wrong):
        first = int(wrong[0])
        raise TrainingError(
            f"the reward of completion {first} is {float(rewards.flatten()[first])}.",
            "let the reward function return finite numbers.",
        )


def check_groups(rewards_PG: Tensor) -> None:
    """Refuse rewards from which no baseline within a group can be taken.

    Source: none.

    Raises:
        ConfigError: A group has fewer than two completions, so that none can be better than its group.
        TrainingError: A reward is infinite or not a number.
    """
    if rewards_PG.dim() != 2 or rewards_PG.shape[1] < 2:
        raise ConfigError(
            f"a baseline within the group needs at least 2 completions a prompt, not rewards of shape"
            f" {tuple(rewards_PG.shape)}.",
            "set group to 2 or more, or take the baseline of ReMax or REINFORCE++.",
        )
    check_finite(rewards_PG)


def outcome_rewards(rewards_S: Tensor, mask_ST: Tensor) -> Tensor:
    """Rewards a token (S, T): that of the completion on its last real token, zero elsewhere.

    Source: EasyR1@b44b311 verl/workers/reward/function.py (reward at the last valid response token).
    """
    places_T = torch.arange(mask_ST.shape[1], device=mask_ST.device)
    last_S = mask_ST.sum(-1) - 1
    return only_real(rewards_S[:, None].expand_as(mask_ST), places_T == last_S[:, None])
