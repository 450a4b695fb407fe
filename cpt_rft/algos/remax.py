"""ReMax: the baseline of a prompt is the reward of its greedy completion."""

from torch import Tensor

from cpt_rft.algos.rewards import check_finite


def greedy_baseline_advantages(rewards_PG: Tensor, greedy_P: Tensor) -> Tensor:
    """Advantages (P, G): rewards less that of one greedy completion a prompt, which no gradient reaches.

    Source: ReMax, arXiv 2310.10505; EasyR1@b44b311 verl/trainer/core_algos.py compute_remax_outcome_advantage. Differs
    from: several completions may share a baseline, where the paper has one a prompt; the baseline is subtracted along
    the prompts; at that commit the source multiplies (bs,) by (bs, T), which raises, or takes the rewards of other
    completions where bs equals T.

    Raises:
        TrainingError: A reward is infinite or not a number.
    """
    check_finite(rewards_PG)
    check_finite(greedy_P)
    return rewards_PG - greedy_P[:, None]
