"""AdaRFT: the difficulty of the next prompts follows the reward of the last ones."""

import math

from torch import Tensor


def next_difficulty(
    target: float,
    reward: float,
    *,
    wanted: float = 0.5,
    sensitivity: float = 2.0,
    step: float = 50.0,
    bounds: tuple[float, float] = (0.0, 100.0),
) -> float:
    """The target difficulty after a step of mean reward ``reward``: up where it is above ``wanted``.

    Source: AdaRFT, arXiv 2504.05520 section 3.3; uscnlp-lime/verl@bf2dd7e verl/trainer/ppo/ray_trainer.py fit:
    ``clip(T + eta tanh(alpha (R - beta)), d_min, d_max)``.
    """
    return min(max(target + step * math.tanh(sensitivity * (reward - wanted)), bounds[0]), bounds[1])


def nearest_prompts(difficulties_P: Tensor, target: float, count: int) -> Tensor:
    """Indices (count,) of the prompts whose difficulty is nearest to the target; the first of equals come first.

    Source: AdaRFT, arXiv 2504.05520 section 3.1; uscnlp-lime/verl@bf2dd7e verl/trainer/ppo/custom_sampler.py
    _select_closest_to_target.
    """
    return (difficulties_P - target).abs().argsort(stable=True)[:count]
