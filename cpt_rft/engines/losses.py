"""The loss that a method names, as every engine of reinforcement takes it."""

from dataclasses import replace

from cpt_rft.algos.losses import PolicyLoss, find_loss
from cpt_rft.config.methods import GrpoMethod


def policy_loss(method: GrpoMethod) -> PolicyLoss:
    """The named loss of a method with the parts that it replaces."""
    parts = {key: getattr(method, key) for key in ("ratio", "aggregate", "clip_low", "clip_high", "dual_clip")}
    return replace(find_loss(method.loss), **{key: part for key, part in parts.items() if part is not None})
