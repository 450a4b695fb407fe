"""DeepSpeed ZeRO-2 through accelerate: a process keeps its part of float32 weights, optimiser state and gradient.

All of them hold the whole model in the arithmetic's dtype, so that rollouts, scores and both passes stay what they are.

Source: ZeRO, arXiv 1910.02054 section 5 (P_os+g).
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpt_rft.config.engine import LocalConfig
from cpt_rft.config.methods import MethodConfig
from cpt_rft.engines.base import Stage
from cpt_rft.engines.environment import DEEPSPEED_FILES
from cpt_rft.engines.local.optimise import BaseOptimiser, StepOutcome, learning_rate, unusable_weights
from cpt_rft.engines.local.team import Processes
from cpt_rft.errors import ConfigError, install_extra

T = TypeVar("T")
_PIECE = 1 << 25  # numbers a process that are gathered at once


def deepspeed_settings(engine: LocalConfig, method: MethodConfig) -> dict[str, Any]:
    """The DeepSpeed file of an engine, with what it leaves to a trainer (``auto``) filled in or left to DeepSpeed."""
    text = (DEEPSPEED_FILES / f"{engine.deepspeed}.json").read_text(encoding="utf-8")
    settings = {key: value for key, value in json.loads(text).items() if value != "auto"}
    return settings | {
        "train_micro_batch_size_per_gpu": 1,  # it computes none; without a number accelerate wants a data loader
        "gradient_accumulation_steps": 1,
        "gradient_clipping": method.max_grad_norm,
        "bf16": {"enabled": engine.dtype == "bfloat16"},
    }


def refuse_whole_weights(engine: LocalConfig, method: MethodConfig) -> None:
    """Refuse a method that needs every float32 weight in every process.

    Raises:
        ConfigError: It is one.
    """
    held = [key for key in ("ewc", "l2") if getattr(method, key) is not None]
    if engine.deepspeed != "none" and held:
        raise ConfigError(
            f"{method.name} holds the float32 weights back by {held[0]}, and with engine.deepspeed={engine.deepspeed}"
            " no process has all of them.",
            "say engine.deepspeed=none for this method",
        )


class Sharing(Processes):
    """Several processes under DeepSpeed, which adds a micro-batch's gradient up as soon as it is handed over.

    All must hand over together, but their numbers of micro-batches differ. So one that wants to exchange something
    else hands over nothing until all want that.

    Args:
        engine: Where they compute, and which DeepSpeed file.
        method: How gradients are clipped.

    Attributes:
        join: Hands over nothing; set by the optimiser.

    Raises:
        ConfigError: accelerate or deepspeed is not installed.
    """

    def __init__(self, engine: LocalConfig, method: MethodConfig) -> None:
        try:
            import deepspeed
            from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
        except ImportError as error:
            raise ConfigError(
                f"engine.deepspeed={engine.deepspeed} needs the packages accelerate and deepspeed.",
                install_extra("zero"),
            ) from error
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # A kernel that a compiler would have to make first, on CPUs only; gloo does its work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.accelerator = Accelerator(
            mixed_precision="bf16" if engine.dtype == "bfloat16" else "no",
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_settings(engine, method)),
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo" if engine.device == "cpu" else "nccl")],
        )
        self.rank, self.size = self.accelerator.process_index, self.accelerator.num_processes
        self.join: Callable[[], None]

    def meet(self) -> None:
        """Wait until all are about to hand over; the next thing to do."""
        super()._everyone((True, None))

    def add_up(self, gradient: Tensor) -> None:
        """See `Team.add_up`."""
        self._everyone(None)
        super().add_up(gradient)

    def _everyone(self, value: T) -> list[T]:
        while True:
            said = super()._everyone((False, value))
            if not any(handing for handing, _ in said):
                return [each for _, each in said]
            self.join()


def join_team(stage: Stage) -> Processes:
    """Become one of the processes of a stage.

    Raises:
        ConfigError: A package for that is not installed.
    """
    engine = stage.engine
    assert isinstance(engine, LocalConfig)
    return Processes(engine.device) if engine.deepspeed == "none" else Sharing(engine, stage.method)


class ShardedOptimiser(BaseOptimiser):
    """AdamW under ZeRO-2; see `cpt_rft.engines.local.optimise.Optimiser`.

    Differs from: DeepSpeed adds up gradients in the arithmetic's dtype.

    Args:
        model: A float32 model; its parameters become views of DeepSpeed's buffer, in ``dtype``.
        method: Learning rate, schedule, decay, clipping.
        steps: Steps of the stage.
        dtype: Arithmetic of forward and backward.
        max_skipped: More steps than this without a finite loss and gradient end the stage.
        team: The processes, none of which may have an optimiser yet.

    Raises:
        ConfigError: This DeepSpeed cuts the weights in another way than those that are known.
    """

    team: Sharing

    def __init__(
        self, model: nn.Module, method: MethodConfig, steps: int, *, dtype: torch.dtype, max_skipped: int, team: Sharing
    ) -> None:
        super().__init__(model, method, steps, max_skipped, team)
        self.weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        start = torch.cat([weight.detach().float().flatten().cpu() for weight in self.weights])
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.adam = torch.optim.AdamW(
            self.weights, lr=method.lr, betas=method.betas, weight_decay=method.weight_decay, fused=True
        )
        self.engine, _ = team.accelerator.prepare(_Handover(self.weights), self.adam)
        self.engine.set_gradient_accumulation_boundary(False)
        self.engine.optimizer.check_grad_overflow = True  # by default only some releases, for some dtypes
        team.join = lambda: self._hand([None] * len(self.weights))
        if not torch.equal(self._part.cpu(), self._own(start.to(dtype).float())):
            raise ConfigError(
                "This release of deepspeed cuts the weights in another way than those that are known.",
                "install deepspeed==0.18.4, or say engine.deepspeed=none",
            )
        self._go_on_from(start)

    def backward(self, loss: Tensor) -> None:
        """See `BaseOptimiser.backward`."""
        # DeepSpeed takes the mean over the processes, and the loss is their sum.
        gradients = torch.autograd.grad(loss * self.team.size, self.weights, allow_unused=True)
        self.team.meet()
        self._hand(list(gradients))

    def step(self, step: int, loss: float) -> StepOutcome:
        """See `BaseOptimiser.step`."""
        finite = self.team.total(math.isfinite(loss)) == self.team.size  # and all have handed over what they had
        lr = learning_rate(self.method, step, self.steps)
        self.adam.param_groups[0]["lr"] = lr
        self.engine.set_gradient_accumulation_boundary(True)
        broken = self.weights[0].new_tensor(math.nan)
        self._hand([None if finite else broken.expand(weight.shape) for weight in self.weights])
        self.engine.step()
        self.engine.set_gradient_accumulation_boundary(False)
        if not self.engine.was_step_applied():
            return self._skip(step, lr)
        return StepOutcome(float(self.engine.get_global_grad_norm()), lr, True)

    def named_weights(self) -> dict[str, Tensor]:
        """See `BaseOptimiser.named_weights`; the process that leads gets them, and all must ask."""
        if self.team.total(not bool(torch.isfinite(self._part).all())):
            raise unusable_weights()
        whole = self._whole(self._part)
        return dict(zip(self.shapes, self._views(whole), strict=True)) if self.team.leads else {}

    def state(self) -> dict[str, Any]:
        """See `BaseOptimiser.state`; the process that leads gets it whole, and all must ask."""
        adam = self.adam.state_dict()
        moments = {place: _each(self._whole, values) for place, values in adam["state"].items()}
        return {"master": self._whole(self._part), "adam": {**adam, "state": moments}, "skipped": self.skipped}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `BaseOptimiser.restore`."""
        self._go_on_from(state["master"])
        adam = state["adam"]
        moments = {place: _each(self._own, values) for place, values in adam["state"].items()}
        self.adam.load_state_dict({**adam, "state": moments})
        self.skipped = state["skipped"]

    @property
    def _part(self) -> Tensor:
        """This process's part of the float32 weights: DeepSpeed has put it in the optimiser's only group."""
        part: Tensor = self.adam.param_groups[0]["params"][0].detach()
        return part

    def _hand(self, gradients: list[Tensor | None]) -> None:
        """Hand over gradients of all weights, none for one of zero."""
        self.engine.backward(self.engine(gradients))

    def _go_on_from(self, whole: Tensor) -> None:
        with torch.no_grad():
            self._part.copy_(self._own(whole))
            for weight, value in zip(self.weights, self._views(whole), strict=True):
                weight.copy_(value)

    def _own(self, whole: Tensor) -> Tensor:
        """This process's part of a vector of all weights; the last part ends in zeros."""
        size = self._part.numel()
        own = whole[self.team.rank * size : (self.team.rank + 1) * size]
        return F.pad(own, (0, size - own.numel()))

    def _whole(self, part: Tensor) -> Tensor:
        """The inverse, in the memory of the machine, for the process that leads; another gets nothing."""
        pieces = []
        for piece in part.detach().split(_PIECE):
            every = self.team.accelerator.gather(piece).view(self.team.size, -1)
            if self.team.leads:
                pieces.append(every.cpu())
        count = sum(shape.numel() for shape in self.shapes.values())
        return torch.cat(pieces, dim=1).flatten()[:count] if pieces else torch.empty(0)


class _Handover(nn.Module):
    """All that DeepSpeed sees of a model: trained weights, and a forward pass whose backward pass gives them gradients.

    It adds gradients up in the order in which a backward pass makes them, which must be that of all processes; but one
    may have pictures in its micro-batch, another none, and a third no micro-batch at all.
    """

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)

    def forward(self, gradients: list[Tensor | None]) -> Tensor:
        """A scalar with these gradients; the list is emptied when they are given."""
        out: Tensor = _Given.apply(gradients, *self.weights)
        return out


class _Given(torch.autograd.Function):
    """Gradients that were computed before."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor | None], *weights: Tensor) -> Tensor:
        ctx.gradients, ctx.shapes = gradients, [weight.shape for weight in weights]
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.gradients, ctx.shapes, strict=True)
        given = [grad.new_zeros(()).expand(shape) if gradient is None else gradient for gradient, shape in pairs]
        ctx.gradients.clear()  # each is free as soon as it is added up
        return None, *given


def _each(change: Callable[[Tensor], Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of an optimiser, those a number a weight changed."""
    return {name: change(value) if value.dim() else value for name, value in values.items()}
