"""The named losses of reinforcement fine-tuning, each a choice of bound, ratio and aggregate, and the whole objective.

A name is a starting point: ``dataclasses.replace(find_loss("grpo"), ratio="sequence")`` is as good. What the sources
have and we do not offer stands in `NOT_OFFERED` with the reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from cpt_rft.algos.aggregate import Aggregate, StepSize, aggregate, only_real, token_mean
from cpt_rft.algos.kl import find_estimator, ratio_corrected
from cpt_rft.algos.policy import RatioLevel, cispo_loss, clipped_loss, log_ratios, sapo_loss, vespo_loss
from cpt_rft.config.nearest import nearest
from cpt_rft.errors import ConfigError


@dataclass(frozen=True)
class PolicyLoss:
    """How a token's advantage becomes a loss, and how the losses of tokens become one.

    Args:
        bound: What keeps the ratio near 1.
        ratio: Of which tokens the ratio is taken.
        aggregate: What the sum over tokens is divided by.
        clip_low: How far the ratio may fall below 1; 1 bounds nothing.
        clip_high: How far the ratio may rise above 1.
        dual_clip: Bound on the ratio where the advantage is negative.
        tau: SAPO's temperatures for positive and negative advantages.
    """

    bound: Literal["clip", "cispo", "sapo", "vespo"] = "clip"
    ratio: RatioLevel = "token"
    aggregate: Aggregate = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    tau: tuple[float, float] = (1.0, 1.05)


@dataclass(frozen=True)
class KlPenalty:
    """A divergence from the reference in the loss.

    Args:
        estimator: A name that `find_estimator` knows.
        coefficient: Weight in the loss.
        corrected: Multiply by policy / old policy, as TRL does by default.
    """

    estimator: str = "k3"
    coefficient: float = 0.0
    corrected: bool = False


class Sampled(NamedTuple):
    """What the loss sees of some sequences.

    Args:
        logprobs_ST: Log-probabilities under the policy being trained.
        old_ST: The same under the policy that wrote the tokens; at the first step the detached log-probabilities.
        advantages_ST: Advantage of each token; (S, 1) where all tokens of a sequence share one.
        mask_ST: 1 on tokens that count.
        reference_ST: Log-probabilities under the reference, where there is a KL penalty.
        entropy_ST: Entropy of the policy at each token, where there is a bonus.
    """

    logprobs_ST: Tensor
    old_ST: Tensor
    advantages_ST: Tensor
    mask_ST: Tensor
    reference_ST: Tensor | None = None
    entropy_ST: Tensor | None = None


LOSSES: Mapping[str, PolicyLoss] = {
    "default": PolicyLoss(clip_high=0.3, dual_clip=3.0),  # of EasyR1, which paper 1 (arXiv 2507.05386) ran
    "grpo": PolicyLoss(aggregate="sequence"),
    "bnpo": PolicyLoss(),  # the mean over the whole step: with TRL's over a micro-batch, its size would matter
    "dr_grpo": PolicyLoss(aggregate="constant"),  # goes with advantages of scale none
    "dapo": PolicyLoss(clip_high=0.28),
    "gspo": PolicyLoss(ratio="sequence", aggregate="sequence", clip_low=3e-4, clip_high=4e-4),
    "gspo_token": PolicyLoss(ratio="sequence_token", aggregate="sequence", clip_low=3e-4, clip_high=4e-4),
    "rloo": PolicyLoss(ratio="sequence_sum", aggregate="sequence"),
    "cispo": PolicyLoss(bound="cispo", clip_low=1.0, clip_high=4.0),
    "sapo": PolicyLoss(bound="sapo", aggregate="sequence"),
    "luspo": PolicyLoss(ratio="sequence", aggregate="sum"),
    "vespo": PolicyLoss(bound="vespo"),
}

NOT_OFFERED: Mapping[str, str] = {
    "gae": "needs a value network, which no method of the study has",
    "value_loss": "needs a value network, which no method of the study has",
    "grpo_passk": "rewards the best of k completions, while the study measures one",
    "normalize_then_sum": "needs several rewards a completion, while ours is one number",
    "top_entropy_quantile": "drops most tokens of the loss, which is a method of its own and of no arm",
    "off_policy_mask_threshold": "for completions of an older policy, while ours are written by the current one",
    "use_adaptive_entropy": "a controller of the entropy bonus, which is 0 in the study",
}


def find_loss(name: str) -> PolicyLoss:
    """The loss of a name.

    Source: none.

    Raises:
        ConfigError: No loss has this name, or it is one that we do not offer.
    """
    if name in NOT_OFFERED:
        raise ConfigError(f"{name!r} is not offered: {NOT_OFFERED[name]}.", f"use one of {', '.join(LOSSES)}.")
    if name not in LOSSES:
        raise ConfigError(
            f"unknown loss {name!r}, the nearest is {nearest(name, LOSSES)!r}.", f"use one of {', '.join(LOSSES)}."
        )
    return LOSSES[name]


def policy_losses(loss: PolicyLoss, batch: Sampled) -> tuple[Tensor, Tensor]:
    """Losses a token (S, T) before any penalty, and the log-ratios that they saw; padding holds no meaning.

    Source: none; chooses among the functions of ``policy``.
    """
    mask_ST = batch.mask_ST
    logprobs_ST = only_real(batch.logprobs_ST, mask_ST)
    advantages_ST = batch.advantages_ST.detach()
    log_ratio_ST = log_ratios(loss.ratio, logprobs_ST, batch.old_ST, mask_ST)
    if loss.bound == "cispo":
        losses_ST = cispo_loss(
            logprobs_ST, log_ratio_ST, advantages_ST, clip_low=loss.clip_low, clip_high=loss.clip_high
        )
    elif loss.bound == "sapo":
        losses_ST = sapo_loss(log_ratio_ST, advantages_ST, tau_positive=loss.tau[0], tau_negative=loss.tau[1])
    elif loss.bound == "vespo":
        tokens_ST = log_ratios("token", logprobs_ST, batch.old_ST, mask_ST)
        losses_ST = vespo_loss(logprobs_ST, tokens_ST, advantages_ST, mask_ST)
    else:
        losses_ST = clipped_loss(
            log_ratio_ST, advantages_ST, clip_low=loss.clip_low, clip_high=loss.clip_high, dual_clip=loss.dual_clip
        )
    return losses_ST, log_ratio_ST


def policy_objective(
    loss: PolicyLoss,
    batch: Sampled,
    size: StepSize,
    *,
    kl: KlPenalty | None = None,
    entropy_coefficient: float = 0.0,
) -> Tensor:
    """The share of some sequences in the loss of a step: policy gradient, KL penalty, entropy bonus.

    Source: DeepSeekMath, arXiv 2402.03300 equation 3; TRL@v1.16.0 trl/trainer/grpo_trainer.py _compute_loss.
    Differs from: every divisor counts the whole optimiser step, also that of the entropy bonus (a mean over tokens)
    and that of bnpo, so the size of a micro-batch changes nothing.

    Args:
        loss: Bound, ratio and aggregate.
        batch: Log-probabilities and advantages; ``reference_ST`` or ``entropy_ST`` where they are needed.
        size: Counts of the whole optimiser step.
        kl: The penalty in the loss; none without.
        entropy_coefficient: Weight of the entropy bonus.
    """
    losses_ST, log_ratio_ST = policy_losses(loss, batch)
    if kl is not None and kl.coefficient:
        assert batch.reference_ST is not None
        logprobs_ST = only_real(batch.logprobs_ST, batch.mask_ST)
        kl_ST = find_estimator(kl.estimator)(logprobs_ST, batch.reference_ST.detach())
        losses_ST = losses_ST + kl.coefficient * (ratio_corrected(kl_ST, log_ratio_ST) if kl.corrected else kl_ST)
    total = aggregate(loss.aggregate, losses_ST, batch.mask_ST, size)
    if entropy_coefficient:
        assert batch.entropy_ST is not None
        total = total - entropy_coefficient * token_mean(batch.entropy_ST, batch.mask_ST, size.tokens)
    return total
