"""What may hold a method back from forgetting, whatever its objective: each part is absent unless a file has it.

The text under a field is its help: it appears in the JSON Schema that editors read (``cpt-rft schema``).
"""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from cpt_rft.config.strict import KeyedError, NotNegative, Strict

LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Replay(Strict):
    """Rows of earlier tasks beside the new ones. In the first stage there are none, so nothing is replayed."""

    rows_per_step: PositiveInt
    """Rows of earlier tasks added to each step; the rows of the new task stay as they are without replay."""
    memory: PositiveInt | None = None
    """Rows kept of each earlier task, chosen by the seed; null for all."""


class Ewc(Strict):
    """Elastic weight consolidation: weights that the answers to earlier tasks depend on move less."""

    strength: PositiveFloat
    """Weight of the penalty, half the sum of F (w - w0)^2."""
    gamma: Annotated[float, Field(gt=0, le=1)] | None = None
    """Null: one penalty a task, around the weights right after it. A number: online EWC, one penalty around the
    weights at the start of the stage, older importance shrunk by this factor at each stage."""
    rows: PositiveInt
    """Rows of a stage from which its importance is estimated when it ends."""
    max_new_tokens: PositiveInt
    """Longest of the answers that are sampled for the estimate, in tokens."""


class L2(Strict):
    """A pull back to the weights at the start of the stage."""

    strength: PositiveFloat
    """Weight of the penalty, half the sum of (w - w0)^2."""


class Lwf(Strict):
    """Learning without forgetting: on the new rows, say what the model at the start of the stage would have said."""

    strength: PositiveFloat
    """Weight of the distillation loss."""
    temperature: PositiveFloat = 2.0
    """Softens both distributions."""
    max_new_tokens: PositiveInt
    """Longest answer of the earlier model, in tokens."""


class Average(Strict):
    """WiSE-FT: what a stage publishes is the average of the weights before and after it."""

    share: Annotated[float, Field(gt=0, le=1)]
    """Share of the weights after training; the rest is the start of the stage."""


class Lora(Strict):
    """Low-rank adapters on the decoder's linear layers; all other weights are frozen. Published merged."""

    rank: PositiveInt
    """Rank of each adapter."""
    alpha: PositiveFloat
    """The adapter counts alpha / rank times."""
    targets: Annotated[tuple[LoraTarget, ...], Field(min_length=1)]
    """Linear layers of each decoder layer that get an adapter."""
    orthogonality: NotNegative = 0.0
    """Weight of O-LoRA's penalty on sharing directions with the adapters of earlier stages; 0 switches it off."""
    per_task: bool = False
    """Every stage trains an adapter of its own on the base, and evaluation picks it by the task: an oracle."""

    @model_validator(mode="after")
    def _each_layer_once(self) -> Self:
        if len(set(self.targets)) < len(self.targets):
            raise KeyedError(("targets",), "a layer is listed twice")
        if self.per_task and self.orthogonality:
            raise KeyedError(("orthogonality",), "with per_task no stage builds on an earlier adapter; write 0")
        return self


class Restrained(Strict):
    """The parts that hold a method back."""

    replay: Replay | None = None
    """Experience replay: rows of earlier tasks in every step."""
    ewc: Ewc | None = None
    """Elastic weight consolidation, or with `gamma` its online form."""
    l2: L2 | None = None
    """Pull to the weights at the start of the stage."""
    lwf: Lwf | None = None
    """Distillation to the model at the start of the stage, on the new rows."""
    average: Average | None = None
    """Averaging of the weights before and after a stage."""
    lora: Lora | None = None
    """Low-rank adapters instead of all weights."""

    further_parts: ClassVar[tuple[str, ...]] = ()
    """Other keys that a dump leaves out where they are null, so that files without them keep their identity."""

    @property
    def adapter_per_task(self) -> bool:
        """Whether every task has weights of its own, picked by its name at evaluation."""
        return self.lora is not None and self.lora.per_task

    @property
    def restraints(self) -> tuple[str, ...]:
        """The names of the parts that are there."""
        return tuple(key for key in Restrained.model_fields if getattr(self, key) is not None)

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        for key, reason in self._misfits():
            raise KeyedError((key,), reason)
        return self

    def _misfits(self) -> Iterator[tuple[str, str]]:
        """Parts that cannot be used beside another, and why."""
        if self.lora is not None:
            for key in {"ewc", "l2"}.intersection(self.restraints):
                yield key, "it penalises the full weights, which lora leaves as they are; remove one of the two"
        if self.adapter_per_task:
            for key in {"replay", "lwf", "average"}.intersection(self.restraints):
                yield key, "with lora.per_task no weights are shared between tasks; remove one of the two"
        if getattr(self, "joint", False):
            for key in {"replay", "ewc"}.intersection(self.restraints):
                yield key, "a joint method has one stage, so there is nothing earlier; remove it"
            if self.lora is not None and (self.lora.per_task or self.lora.orthogonality):
                yield "lora", "a joint method has one stage, so there is no earlier adapter; remove it"

    @model_serializer(mode="wrap")
    def _only_what_is_there(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        parts = {*Restrained.model_fields, *self.further_parts}
        return {key: value for key, value in dump(self).items() if key not in parts or value not in (None, {})}
