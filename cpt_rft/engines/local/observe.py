"""What explains forgetting, seen while training: how hard each kind of group pulls at the weights."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from cpt_rft.engines.local.team import Team
from cpt_rft.scoring import Score

Kind = Literal["right", "mixed", "wrong"]
KINDS: tuple[Kind, ...] = get_args(Kind)
#: Steps from one measurement of the gradient by kind of group to the next, the first of a stage included. It takes a
#: backward pass of its own for each kind that is there, which leaves the update's bits alone.
OBSERVE_EVERY = 20


def kind_of(scores: Iterable[Score]) -> Kind:
    """Whether the completions of a group are all right, all wrong, or mixed, by the strict score and not the reward:
    a group that is wrong throughout but differs in its form has a reward variance, and would pass for mixed.
    """
    right = [each.strict >= 0.5 for each in scores]
    return "right" if all(right) else "mixed" if any(right) else "wrong"


def reward_variance(rewards_PG: Tensor) -> float:
    """Mean over prompts of the unbiased variance of the rewards of a prompt's completions."""
    return float(rewards_PG.double().var(dim=1, unbiased=True).mean())


class GradientMeter:
    """Norm of each kind's share in the gradient of a step; the shares add up to the gradient.

    Args:
        model: The policy being trained.
        kinds: Kind of every group of the step, also of those that are left out of the update.
    """

    def __init__(self, model: nn.Module, kinds: Sequence[Kind]) -> None:
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.sums: dict[Kind, Tensor | None] = {kind: None for kind in KINDS if kind in kinds}

    def add(self, losses: Mapping[Kind, Tensor]) -> None:
        """The share of a micro-batch, before its graph is used for the update.

        Args:
            losses: The share of each kind's groups in the loss of the step.
        """
        for kind, loss in losses.items():
            parts = torch.autograd.grad(loss, self.weights, retain_graph=True, materialize_grads=True)
            flat = torch.cat([part.float().flatten() for part in parts])
            before = self.sums[kind]
            self.sums[kind] = flat if before is None else before + flat

    def share(self, team: Team) -> None:
        """Add up the shares of all processes of the step."""
        for kind, gradient in self.sums.items():
            # A kind that is left out everywhere stays left out.
            if team.size > 1 and team.total(gradient is not None):
                zeros = (torch.zeros(weight.numel(), device=weight.device) for weight in self.weights)
                whole = torch.cat(list(zeros)) if gradient is None else gradient
                team.add_up(whole)
                self.sums[kind] = whole

    def norms(self) -> dict[str, float]:
        """``grad_norm_<kind>`` of every kind that is there: zero for a group that was left out of the update."""
        return {
            f"grad_norm_{kind}": 0.0 if gradient is None else float(gradient.norm())
            for kind, gradient in self.sums.items()
        }
