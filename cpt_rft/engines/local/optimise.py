"""Steps of AdamW on float32 master weights, whatever the arithmetic of the model."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cpt_rft.checkpoint import released_name
from cpt_rft.config.methods import MethodConfig
from cpt_rft.engines.local.team import ALONE, Team
from cpt_rft.errors import TrainingError


class StepOutcome(NamedTuple):
    """Norm of the gradient before clipping (none if not finite), the learning rate, and whether weights moved."""

    grad_norm: float | None
    lr: float
    moved: bool


class BaseOptimiser(ABC):
    """AdamW over all trained weights of a model, wherever they are kept.

    Args:
        model: Parameters that need no gradient are no part of it.
        method: Learning rate, schedule, decay, clipping.
        steps: Steps of the stage.
        max_skipped: More steps than this without a finite loss and gradient end the stage.
        team: The processes that share each step.
    """

    def __init__(self, model: nn.Module, method: MethodConfig, steps: int, max_skipped: int, team: Team) -> None:
        self.team = team
        self.method, self.steps, self.max_skipped, self.skipped = method, steps, max_skipped, 0
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's share of the loss."""

    @abstractmethod
    def step(self, step: int, loss: float) -> StepOutcome:
        """Move the weights by the gradient gathered since the last step, or skip if it is not finite.

        Args:
            step: Counts from 0.
            loss: The loss whose gradient it is.

        Raises:
            TrainingError: Too many steps were skipped.
        """

    @abstractmethod
    def named_weights(self) -> dict[str, Tensor]:
        """The float32 weights by name.

        Raises:
            TrainingError: A weight is not finite, so that nothing may be saved.
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that a later process needs to go on with the same bits."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""

    def _skip(self, step: int, lr: float) -> StepOutcome:
        """Count a step without a finite loss and gradient."""
        self.skipped += 1
        if self.skipped > self.max_skipped:
            raise TrainingError(
                f"Loss or gradient was not finite in {self.skipped} steps, at last in step {step + 1}.",
                f"lower the learning rate (it is {self.method.lr:g}) or train in float32 (engine.dtype=float32)",
            )
        return StepOutcome(None, lr, False)

    def _views(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split([shape.numel() for shape in self.shapes.values()])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes.values(), strict=True)]


class Optimiser(BaseOptimiser):
    """AdamW over all trained weights of a model as one flat vector.

    The model's parameters become views of one buffer in the arithmetic's dtype, their gradients views of another:
    clipping and the update are then one operation each instead of one a parameter. Gradients of micro-batches add up
    in float32.

    Args:
        model: A float32 model; its parameters are replaced in place by parameters of ``dtype``. Those that need no
            gradient stay as they are and are no part of the vector.
        method: Learning rate, schedule, decay, clipping.
        steps: Steps of the stage.
        dtype: Arithmetic of forward and backward.
        max_skipped: More steps than this without a finite loss and gradient end the stage.
        team: The processes whose gradients are added up.
    """

    def __init__(
        self,
        model: nn.Module,
        method: MethodConfig,
        steps: int,
        *,
        dtype: torch.dtype,
        max_skipped: int,
        team: Team = ALONE,
    ) -> None:
        super().__init__(model, method, steps, max_skipped, team)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.master = nn.Parameter(torch.cat([parameter.detach().float().flatten() for parameter in trained]))
        self.master.grad = torch.zeros_like(self.master)
        same = dtype == torch.float32
        self.weights = self.master.detach() if same else self.master.detach().to(dtype)
        self.gradients = self.master.grad if same else torch.zeros_like(self.weights)
        views = zip(self._views(self.weights), self._views(self.gradients), strict=True)
        for parameter, (weight, gradient) in zip(trained, views, strict=True):
            parameter.data = weight
            parameter.grad = gradient
        self.adam = torch.optim.AdamW(
            [self.master], lr=method.lr, betas=method.betas, weight_decay=method.weight_decay, fused=True
        )

    def backward(self, loss: Tensor) -> None:
        """See `BaseOptimiser.backward`."""
        loss.backward()
        if self.gradients is not self.master.grad:
            assert self.master.grad is not None
            self.master.grad.add_(self.gradients)
            self.gradients.zero_()

    def step(self, step: int, loss: float) -> StepOutcome:
        """See `BaseOptimiser.step`."""
        gradient = self.master.grad
        assert gradient is not None
        self.team.add_up(gradient)
        lr = learning_rate(self.method, step, self.steps)
        norm = float(gradient.norm())
        if not (math.isfinite(norm) and math.isfinite(loss)):
            gradient.zero_()
            return self._skip(step, lr)
        if norm > self.method.max_grad_norm:
            gradient.mul_(self.method.max_grad_norm / norm)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        gradient.zero_()
        self._publish()
        return StepOutcome(norm, lr, True)

    def take(self) -> dict[str, Tensor]:
        """The gradient gathered since the last step, by name, for another purpose than a step."""
        assert self.master.grad is not None
        gradient = self.master.grad.clone()
        self.master.grad.zero_()
        return dict(zip(self.shapes, self._views(gradient), strict=True))

    def flat(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Something that has a number a weight, by its released name or the one in memory, as one vector of ours."""
        released = {released_name(name): value for name, value in weights.items()}
        pieces = [released[released_name(name)].detach().flatten() for name in self.shapes]
        return torch.cat([piece.to(self.master.device, torch.float32) for piece in pieces])

    def named(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same by the names in memory."""
        return dict(zip(self.shapes, self._views(self.flat(weights)), strict=True))

    def assign(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from other weights."""
        with torch.no_grad():
            self.master.copy_(self.flat(weights))
        self._publish()

    def named_weights(self) -> dict[str, Tensor]:
        """See `BaseOptimiser.named_weights`."""
        if not bool(torch.isfinite(self.master).all()):
            raise unusable_weights()
        return dict(zip(self.shapes, self._views(self.master.detach()), strict=True))

    def state(self) -> dict[str, Any]:
        """See `BaseOptimiser.state`."""
        self.named_weights()
        return {"master": self.master.detach(), "adam": self.adam.state_dict(), "skipped": self.skipped}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `BaseOptimiser.restore`."""
        with torch.no_grad():
            self.master.copy_(state["master"])
        self.adam.load_state_dict(state["adam"])
        self.skipped = state["skipped"]
        self._publish()

    def _publish(self) -> None:
        """Give the model the new weights."""
        if self.weights.dtype != torch.float32:
            self.weights.copy_(self.master.detach())


def unusable_weights() -> TrainingError:
    """What to raise where a weight is not finite."""
    return TrainingError("A weight is not finite; nothing was saved.", "lower the learning rate")


def learning_rate(method: MethodConfig, step: int, steps: int) -> float:
    """The rate of a step (from 0): a linear warm-up that ends at the full rate, then constant or half a cosine to zero.

    Source: transformers get_cosine_schedule_with_warmup. Differs from: the first step has rate 1 / warm-up steps of the
    full rate, not zero.
    """
    warmup = math.ceil(method.warmup_ratio * steps)
    if step < warmup:
        return method.lr * (step + 1) / warmup
    if method.schedule == "constant":
        return method.lr
    return method.lr * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
