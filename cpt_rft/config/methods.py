"""What a method may say: what it learns from, and how it is optimised.

The text under a field is its help: it appears in the JSON Schema that editors read (``cpt-rft schema``).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from cpt_rft.config.restraints import Restrained
from cpt_rft.config.strict import KeyedError, Name, NotNegative, Share
from cpt_rft.prompts import Style


class _Method(Restrained):
    name: Name
    """The key under which the experiment lists the method."""
    joint: bool = False
    """Train once on all tasks together (the multi-task upper bound) instead of task after task."""
    style: Style
    """Prompt style of training: `cot` (think, then box) or `direct` (the bare answer). It is the native style."""
    lr: PositiveFloat
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up, within each stage."""
    warmup_ratio: Share = 0.0
    """Share of a stage's steps in which the learning rate rises linearly from zero."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of AdamW."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""
    epochs: PositiveInt = 1
    """Passes over the rows of a stage."""
    task_epochs: Mapping[Name, PositiveInt] = Field(default_factory=dict)
    """Passes over the rows of these tasks, where another number than `epochs` is wanted; not for joint training."""
    prompts_per_step: PositiveInt
    """Prompts (rows) in one optimizer step. Equal for all methods: they then see the same rows at the same step."""
    micro_batch: PositiveInt
    """Prompts in memory at once; it must divide `prompts_per_step`."""

    def epochs_of(self, tasks: Sequence[str]) -> int:
        """Passes over the rows of a stage on these tasks."""
        return self.task_epochs.get(tasks[0], self.epochs) if len(tasks) == 1 else self.epochs

    @model_serializer(mode="wrap")
    def _without_what_most_lack(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        lean = {*Restrained.model_fields, "task_epochs"}  # absent from identities where they are not used
        return {key: value for key, value in dump(self).items() if key not in lean or value}

    @model_validator(mode="after")
    def _micro_batch_divides(self) -> Self:
        if self.prompts_per_step % self.micro_batch:
            message = f"{self.micro_batch} does not divide prompts_per_step = {self.prompts_per_step}"
            raise KeyedError(("micro_batch",), message)
        return self


class SftMethod(_Method):
    """Supervised fine-tuning: the next-token loss on the label (`direct`) or on rationale and label (`cot`)."""

    kind: Literal["sft"]
    """Which objective: supervised targets."""


class GrpoMethod(_Method):
    """Group-relative policy optimisation on the verifiable reward 0.9 accuracy + 0.1 format."""

    kind: Literal["grpo"]
    """Which objective: sampled completions, weighed by their advantage within the group."""
    group: Annotated[int, Field(ge=2)]
    """Completions sampled a prompt."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of the rollouts; log-probabilities are taken at the same temperature."""
    max_new_tokens: PositiveInt
    """Longest completion in tokens."""
    kl_coef: NotNegative = 0.01
    """Weight of the k3 KL penalty to the reference policy; 0 switches it off."""
    kl_reference: Literal["base", "stage"] = "base"
    """Reference policy: the base model, or the model at the start of the stage."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The ratio to the sampling policy counts no further down than 1 - clip_low."""
    clip_high: PositiveFloat = 0.3
    """The ratio to the sampling policy counts no further up than 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] = 3.0
    """Bound on the ratio where the advantage is negative."""


MethodConfig = Annotated[SftMethod | GrpoMethod, Field(discriminator="kind")]
METHOD_KINDS: Mapping[str, type[SftMethod] | type[GrpoMethod]] = {"sft": SftMethod, "grpo": GrpoMethod}
