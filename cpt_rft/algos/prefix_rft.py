"""Prefix-RFT: one completion of a group begins with a piece of a demonstration."""

from typing import NamedTuple

import torch
from torch import Tensor

from cpt_rft.algos.grpo import STD_EPSILON, Scale, group_advantages
from cpt_rft.algos.rewards import check_finite
from cpt_rft.algos.schedule import cosine


class PrefixAdvantages(NamedTuple):
    """Advantages of a group with one prefixed completion.

    Args:
        free_PG: Of the completions without a prefix.
        continuation_P: Of the tokens that the policy wrote after the prefix.
        prefix_P: Of the tokens of the demonstration.
    """

    free_PG: Tensor
    continuation_P: Tensor
    prefix_P: Tensor


def prefix_length(
    demonstration: int, draw: float, step: int, steps: int, *, high: float = 0.95, low: float = 0.05
) -> int:
    """Tokens of a demonstration of that many to show: a share between a falling bound and ``high``, never all of it.

    Source: Prefix-RFT, arXiv 2507.01679 version 3, section 3 and appendix A.2; ZeroYuHuang/prefix_rft@5f5d2a1
    recipe/prefix_rft/rl_dataset.py _get_prefix. Differs from: no least number of tokens.

    Args:
        demonstration: Tokens of the demonstration.
        draw: Uniform in [0, 1), from the caller's named seed.
        step: Optimiser steps done.
        steps: Over how many the lower bound falls from ``high`` to ``low``.
        high: Upper bound of the share, and the lower bound at step 0.
        low: The lower bound at the end.
    """
    bound = cosine(step, steps, high, low)
    return max(min(int((bound + draw * (high - bound)) * demonstration), demonstration - 1), 0)


def prefix_advantages(rewards_PG: Tensor, hybrid_P: Tensor, *, scale: Scale = "group") -> PrefixAdvantages:
    """Advantages where one further completion of each prompt, with reward ``hybrid_P``, began with a prefix.

    Its continuation has no baseline, being the only one of its kind: its reward is its advantage. The prefix is
    weighed by how much better it did than the free completions.

    Source: Prefix-RFT, arXiv 2507.01679 version 3, section 3; ZeroYuHuang/prefix_rft@5f5d2a1
    recipe/prefix_rft/core_algos.py compute_grpo_prefix_outcome_advantage (scale group),
    compute_dr_grpo_prefix_outcome_advantage (none), with one completion a prefix. Differs from: all-equal free
    completions have advantage zero exactly.

    Raises:
        ConfigError: Groups have fewer than two free completions.
        TrainingError: A reward is infinite or not a number.
    """
    free_PG = group_advantages(rewards_PG, scale=scale)
    check_finite(hybrid_P)
    continuation_P = hybrid_P / (1.0 + STD_EPSILON) if scale == "group" else hybrid_P
    return PrefixAdvantages(free_PG, continuation_P, continuation_P - rewards_PG.mean(dim=1))


def most_uncertain(prefix_ST: Tensor, entropy_ST: Tensor, *, drop: float = 0.8) -> Tensor:
    """The mask of prefix tokens without the ``drop`` share on which the policy is surest; those get advantage zero.

    Source: Prefix-RFT, arXiv 2507.01679 version 3, section 3 (entropy-based clipping, the top 20 %);
    ZeroYuHuang/prefix_rft@5f5d2a1 recipe/prefix_rft/dp_actor.py reshape_func (entropy). Differs from: equal entropies
    are ordered by place.
    """
    places = prefix_ST.bool().flatten().nonzero().flatten()
    order = entropy_ST.detach().flatten()[places].argsort(stable=True)
    kept = torch.zeros_like(prefix_ST).flatten()
    kept[places[order[int(len(places) * drop) :]]] = 1
    return kept.view_as(prefix_ST)
