"""From the rewards of a rollout to the advantage of every token, by the estimator that a method names."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cpt_rft.algos.aggregate import pad_rows
from cpt_rft.algos.grpo import group_advantages, paper_group_advantages
from cpt_rft.algos.kl import find_estimator, penalised_rewards
from cpt_rft.algos.reinforce import reinforce_plus_plus_advantages
from cpt_rft.algos.remax import greedy_baseline_advantages
from cpt_rft.algos.rewards import outcome_rewards
from cpt_rft.algos.rloo import leave_one_out_advantages
from cpt_rft.config.methods import GrpoMethod


class Advantages(NamedTuple):
    """Advantage of every completion token of a rollout.

    Attributes:
        tokens_N: (N,) float32, completion after completion.
        rounded: Groups of equal rewards whose advantage is not zero by rounding; none unless that is asked for.
    """

    tokens_N: Tensor
    rounded: int | None


def token_advantages(
    method: GrpoMethod,
    rewards_PG: Tensor,
    lengths_S: Sequence[int],
    *,
    greedy_P: Tensor | None = None,
    penalty: tuple[Tensor, Tensor] | None = None,
) -> Advantages:
    """The advantages of a rollout.

    Args:
        method: Estimator, scale, and the KL penalty in the reward.
        rewards_PG: Reward of each completion, in float64.
        lengths_S: Tokens of each completion.
        greedy_P: Reward of each prompt's greedy completion, for ReMax.
        penalty: Log-probabilities of all completion tokens, each (N,), under the policy that wrote them and under the
            reference, where the penalty is in the reward.
    """
    mask_ST = pad_rows(torch.ones(sum(lengths_S), dtype=torch.float64), lengths_S)[1]
    tokens_ST = outcome_rewards(rewards_PG.flatten(), mask_ST)
    if penalty is not None:
        kl_N = find_estimator(method.kl_estimator)(*(each.double() for each in penalty))
        tokens_ST = penalised_rewards(tokens_ST, pad_rows(kl_N, lengths_S)[0], mask_ST, method.kl_coef)
        rewards_PG = tokens_ST.sum(-1).view_as(rewards_PG)
    if method.advantage == "reinforce_plus_plus":
        return Advantages(reinforce_plus_plus_advantages(tokens_ST, mask_ST)[mask_ST.bool()].float(), None)
    rounded = None
    if method.paper_rounding:
        advantages_PG, rounded = paper_group_advantages(rewards_PG)
    else:
        advantages_PG = _completion_advantages(method, rewards_PG, greedy_P)
    lengths = torch.tensor(list(lengths_S))
    return Advantages(advantages_PG.flatten().float().repeat_interleave(lengths), rounded)


def _completion_advantages(method: GrpoMethod, rewards_PG: Tensor, greedy_P: Tensor | None) -> Tensor:
    """One advantage a completion, (P, G)."""
    epsilon, batch = method.advantage_epsilon, method.advantage_scale == "batch"
    if method.advantage == "grpo":
        return group_advantages(rewards_PG, scale=method.advantage_scale or "group", epsilon=epsilon)
    if method.advantage == "rloo":
        return leave_one_out_advantages(rewards_PG, normalise=epsilon if batch else None)
    assert greedy_P is not None
    advantages_PG = greedy_baseline_advantages(rewards_PG, greedy_P)
    return advantages_PG / (advantages_PG.std(unbiased=True) + epsilon) if batch else advantages_PG
