"""The responses of a step by their prompts, and what is to be known of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cpt_rft.algos.grpo import zero_variance
from cpt_rft.engines.local.observe import reward_variance


def places_of(uids: Sequence[str]) -> list[list[int]]:
    """The places of the responses of each prompt, prompts in their first order.

    >>> places_of(["a", "b", "a"])
    [[0, 2], [1]]
    """
    places: dict[str, list[int]] = {}
    for place, uid in enumerate(uids):
        places.setdefault(uid, []).append(place)
    return list(places.values())


def side_by_side(uids: Sequence[str]) -> tuple[list[int], int]:
    """An order of the rows in which those of one prompt are neighbours, and how many a prompt has; if the prompts have
    unequally many, the order as it is and one.

    >>> side_by_side(["a", "b", "b", "a"]), side_by_side(["a", "b", "b"])
    (([0, 3, 1, 2], 2), ([0, 1, 2], 1))
    """
    places = places_of(uids)
    sizes = {len(rows) for rows in places}
    if len(sizes) > 1:
        return list(range(len(uids))), 1
    return [row for rows in places for row in rows], sizes.pop()


def group_numbers(
    scores_S: Tensor, compared_S: Tensor, advantages_ST: Tensor, uids: Sequence[str]
) -> dict[str, float | int]:
    """Numbers on the groups of a step.

    Args:
        scores_S: Reward of each response.
        compared_S: What the estimate compares within a group: the reward, less a KL penalty if it is part of it.
        advantages_ST: Zero on padding.
        uids: The prompt of each response; equally many responses a prompt, two at least.
    """
    places_PG = torch.tensor(places_of(uids))
    largest_S = advantages_ST.abs().amax(dim=-1)
    noise_P = torch.where(zero_variance(compared_S[places_PG]), largest_S[places_PG].amax(dim=-1), 0.0)
    return {
        "groups": len(places_PG),
        "zero_variance": float(zero_variance(scores_S[places_PG]).double().mean()),
        "reward_variance": reward_variance(scores_S[places_PG]),
        "rounded_groups": int((noise_P > 0).sum()),
        "largest_rounded": float(noise_P.max()),
    }
