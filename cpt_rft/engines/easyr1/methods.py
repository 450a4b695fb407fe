"""Which methods EasyR1 can train, and the loss of one in its terms. What it has not is refused, never left out."""

from collections.abc import Iterator
from typing import Any

from cpt_rft.config.methods import GrpoMethod
from cpt_rft.engines.losses import policy_loss
from cpt_rft.errors import ConfigError

# The framework clamps the log-ratio at 20 before the exponential, so that a bound above e^20 never binds.
NO_DUAL_CLIP = 1e9
_EPSILON = 1e-6  # added to a group's standard deviation, fixed in the framework
_TYPES = {
    ("clip", "token"): "default",
    ("clip", "sequence"): "gspo",
    ("clip", "sequence_token"): "gspo_token",
    ("cispo", "token"): "cispo",
    ("sapo", "token"): "sapo",
}
_AVERAGES = {"token": "token", "sequence": "seq"}


def supported_method(method: Any) -> GrpoMethod:
    """The method itself, if EasyR1 can train it as it is.

    Raises:
        ConfigError: It cannot; the parts that it has not are named.
    """
    if method.kind != "grpo":
        raise ConfigError(
            f"The engine easyr1 trains methods of reinforcement, {method.name} is of the kind {method.kind}.",
            "use the engine llamafactory or local for it (rft_engine: easyr1 leaves it to the other engine)",
        )
    assert isinstance(method, GrpoMethod)
    absent = list(_absent(method))
    if absent:
        raise ConfigError(
            f"EasyR1 has no {' and no '.join(absent)}, which {method.name} asks for.",
            "use the engine local for it, or take the part out of the method",
        )
    return method


def _absent(method: GrpoMethod) -> Iterator[str]:
    """What the method asks for and EasyR1 has not."""
    yield from method.restraints
    yield from (key for key in ("hint", "prefix", "curriculum", "alternate") if getattr(method, key) is not None)
    for key in ("mask_truncated", "kl_ratio_correction", "entropy_coef"):
        if getattr(method, key):
            yield key
    own = {"grpo": "group", "rloo": "none", "remax": "none", "reinforce_plus_plus": "batch"}[method.advantage]
    if method.advantage_scale not in (None, own):
        yield f"advantage_scale {method.advantage_scale} for {method.advantage}"
    if method.advantage == "grpo" and method.advantage_epsilon != _EPSILON:
        yield f"advantage_epsilon {method.advantage_epsilon}"
    loss = policy_loss(method)
    if (loss.bound, loss.ratio) not in _TYPES:
        yield f"loss with bound {loss.bound} and ratio {loss.ratio}"
    if loss.aggregate not in _AVERAGES:
        yield f"aggregate {loss.aggregate}"


def native_loss(method: GrpoMethod) -> dict[str, Any]:
    """The keys of ``worker.actor`` that say which loss.

    Differs from: with ``seq`` the framework weighs micro-batches by their tokens, our engine sequences alike.
    """
    loss = policy_loss(method)
    return {
        "loss_type": _TYPES[loss.bound, loss.ratio],
        "loss_avg_mode": _AVERAGES[loss.aggregate],
        "clip_ratio_low": loss.clip_low,
        "clip_ratio_high": loss.clip_high,
        "clip_ratio_dual": loss.dual_clip or NO_DUAL_CLIP,
        "tau_positive": loss.tau[0],
        "tau_negative": loss.tau[1],
    }
