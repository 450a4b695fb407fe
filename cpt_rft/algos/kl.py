"""Estimates of KL(policy || reference) from the log-probabilities of sampled tokens, and where they enter.

In the loss an estimate is differentiated as it stands. Then k1 pulls nowhere on average and k2 pulls as the true
divergence does, unless the estimate is multiplied by the ratio (`ratio_corrected`), which makes the gradient of every
unbiased estimate that of the divergence. In the reward only the value counts, and k1 is the natural choice.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cpt_rft.algos.aggregate import only_real
from cpt_rft.config.nearest import nearest
from cpt_rft.errors import ConfigError

MAX_LOG_RATIO = 20.0
MAX_KL = 10.0
CONTROLLER_STEP = 0.2

Estimator = Callable[[Tensor, Tensor], Tensor]


def k1_divergence(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """``log policy - log reference``: unbiased, of either sign.

    Source: Schulman, "Approximating KL divergence" (k1); EasyR1@b44b311 verl/trainer/core_algos.py compute_kl (kl).
    """
    return logprobs_T - reference_T


def absolute_divergence(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """Size of the log-ratio: no estimate of the divergence, but zero only at equality.

    Source: EasyR1@b44b311 verl/trainer/core_algos.py compute_kl (abs).
    """
    return (logprobs_T - reference_T).abs()


def k2_divergence(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """Half the squared log-ratio: biased, small variance; its gradient is unbiased on policy.

    Source: Schulman, "Approximating KL divergence" (k2); EasyR1@b44b311 verl/trainer/core_algos.py compute_kl (mse).
    """
    return 0.5 * (logprobs_T - reference_T).square()


def k3_divergence(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """``r - log r - 1`` with ``r`` = reference / policy: unbiased and never negative.

    Source: Schulman, "Approximating KL divergence" (k3); DeepSeekMath, arXiv 2402.03300 equation 4; EasyR1@b44b311
    verl/trainer/core_algos.py compute_kl (low_var_kl), with its limits of 20 on the log-ratio and 10 on the value,
    beyond which the gradient is zero. Differs from: computed without cancellation near equality.
    """
    log_ratio_T = (reference_T - logprobs_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (log_ratio_T.expm1() - log_ratio_T).clamp(-MAX_KL, MAX_KL)


def full_divergence(logprobs_NV: Tensor, reference_NV: Tensor) -> Tensor:
    """KL(policy || reference) a position, (N,), over the whole vocabulary: no estimate.

    Source: EasyR1@b44b311 verl/trainer/core_algos.py compute_kl (full). Differs from: a token that the policy cannot
    write adds nothing, where the source yields not a number.
    """
    possible_NV = logprobs_NV > -torch.inf
    difference_NV = torch.where(possible_NV, logprobs_NV - reference_NV, torch.zeros_like(logprobs_NV))
    return (logprobs_NV.exp() * difference_NV).sum(-1)


ESTIMATORS: dict[str, Estimator] = {
    "k1": k1_divergence,
    "abs": absolute_divergence,
    "k2": k2_divergence,
    "k3": k3_divergence,
}
EASYR1_NAMES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}


def find_estimator(name: str) -> Estimator:
    """The estimator of a name, ours or EasyR1's.

    Source: none.

    Raises:
        ConfigError: No estimator has this name.
    """
    known = [*ESTIMATORS, *EASYR1_NAMES]
    if name not in known:
        raise ConfigError(
            f"unknown KL estimator {name!r}, the nearest is {nearest(name, known)!r}.",
            f"use one of {', '.join(known)}.",
        )
    return ESTIMATORS[EASYR1_NAMES.get(name, name)]


def ratio_corrected(kl_T: Tensor, log_ratio_T: Tensor) -> Tensor:
    """The estimate times policy / old policy: right for tokens of the old policy, in value and in gradient.

    Source: DeepSeek-V3.2, arXiv 2512.02556 section 3.1; TRL@v1.16.0 trl/trainer/grpo_trainer.py _compute_loss
    (use_bias_correction_kl). Differs from: the log-ratio is limited to +-20.
    """
    return kl_T * log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def penalised_rewards(token_rewards_ST: Tensor, kl_ST: Tensor, mask_ST: Tensor, coefficient: float) -> Tensor:
    """Rewards a token (S, T) less ``coefficient * kl``; their sum over tokens is the penalised reward of a sequence.

    Source: EasyR1@b44b311 verl/trainer/ray_trainer.py apply_kl_penalty (a token); TRL@v1.16.0
    trl/trainer/rloo_trainer.py (k1 summed over the sequence).
    """
    return token_rewards_ST - coefficient * only_real(kl_ST, mask_ST).detach()


def adaptive_coefficient(
    coefficient: float, observed: float, *, target: float, horizon: float, sequences: int
) -> float:
    """The coefficient after a step that saw a mean divergence of ``observed`` on ``sequences`` completions.

    Source: arXiv 1909.08593 section 2.2; EasyR1@b44b311 verl/trainer/core_algos.py AdaptiveKLController.update.
    Differs from: the gain is EasyR1's ``sequences / horizon``, where the paper has 0.1 a step.
    """
    error = min(max(observed / target - 1.0, -CONTROLLER_STEP), CONTROLLER_STEP)
    return coefficient * (1.0 + error * sequences / horizon)
