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

from cpt_rft.config.hybrids import Alternate, Curriculum, Hint, Prefix
from cpt_rft.config.restraints import Restrained
from cpt_rft.config.rollouts import Filter, Rollouts
from cpt_rft.config.strict import KeyedError, Name, NotNegative, Share
from cpt_rft.prompts import Style

LossName = Literal[
    "default", "grpo", "bnpo", "dr_grpo", "dapo", "gspo", "gspo_token", "rloo", "cispo", "sapo", "luspo", "vespo"
]  # fmt: skip


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
    max_prompt_tokens: PositiveInt | None = None
    """A row with a longer prompt, picture tokens included, is refused before training; null for no limit."""
    filter: Filter | None = None
    """Rollout-based instance filtering: train only on rows that the start of the stage can learn from."""

    @property
    def learns_from(self) -> str | None:
        """The method whose checkpoints write the targets, if another than this one does."""
        return None

    @property
    def knows_its_rows(self) -> bool:
        """Whether it trains on all rows of a stage, so that their number is known before it starts."""
        return self.filter is None

    def epochs_of(self, tasks: Sequence[str]) -> int:
        """Passes over the rows of a stage on these tasks."""
        return self.task_epochs.get(tasks[0], self.epochs) if len(tasks) == 1 else self.epochs

    @model_serializer(mode="wrap")
    def _without_what_most_lack(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Absent from identities where they are not used.
        lean = {*Restrained.model_fields, "task_epochs", "filter", "rollouts", "max_prompt_tokens"}
        lean |= {"hint", "prefix", "curriculum", "alternate"}
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
    rollouts: Rollouts | None = None
    """Learn from right rollouts instead of from labels and rationales."""

    @property
    def learns_from(self) -> str | None:
        """The method whose checkpoints write the targets, if another than this one does."""
        return None if self.rollouts is None else self.rollouts.from_method

    @property
    def knows_its_rows(self) -> bool:
        """Whether it trains on all rows of a stage, so that their number is known before it starts."""
        return self.filter is None and self.rollouts is None

    @model_validator(mode="after")
    def _tries_are_settled(self) -> Self:
        if self.filter is not None and self.filter.max_new_tokens is None:
            raise KeyedError(("filter", "max_new_tokens"), "null, but sft has no rollouts of its own; write a number")
        if self.rollouts is None:
            return self
        if self.filter is not None:
            raise KeyedError(("filter",), "rollouts leaves out the rows without a right one; remove one of the two")
        if self.rollouts.rounds > 1 and self.rollouts.from_method is not None:
            raise KeyedError(("rollouts", "rounds"), "with from_method the one who tries does not change; write 1")
        if self.rollouts.rounds > 1 and self.restraints:
            message = f"with several rounds there is no {self.restraints[0]}; write 1, or remove {self.restraints[0]}"
            raise KeyedError(("rollouts", "rounds"), message)
        return self


class GrpoMethod(_Method):
    """Reinforcement fine-tuning on the verifiable reward 0.9 accuracy + 0.1 format: GRPO and its relatives."""

    kind: Literal["grpo"]
    """Which objective: sampled completions, weighed by their advantage."""
    group: PositiveInt
    """Completions sampled a prompt; `grpo` and `rloo` need two at least."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of the rollouts; log-probabilities are taken at the same temperature."""
    max_new_tokens: PositiveInt
    """Longest completion in tokens."""
    rollout_steps: PositiveInt = 1
    """Optimizer steps made from one rollout. Above 1 the later steps learn from completions of an older policy, which
    is what ratio and clip are for; the released scripts make 4 (512 prompts a rollout, 128 a step)."""
    mask_truncated: bool = False
    """Leave completions that the length limit ended out of the loss (DAPO's overlong filtering)."""
    advantage: Literal["grpo", "rloo", "remax", "reinforce_plus_plus"] = "grpo"
    """What a completion is compared with: its group's mean, the others of its group, the reward of one greedy
    completion, or all tokens of the rollout."""
    advantage_scale: Literal["group", "batch", "none"] | None = None
    """What an advantage is divided by: the standard deviation of its group, that of the whole rollout, or nothing. Null
    for the estimator's own: `group` for grpo, `none` for rloo and remax; reinforce_plus_plus always takes `batch`."""
    advantage_epsilon: PositiveFloat = 1e-6
    """Added to that standard deviation."""
    paper_rounding: bool = False
    """Advantages in float32 with the rounding of EasyR1: a group of equal rewards can then have an advantage that is
    not zero. Such groups are counted in the log (`rounded_groups`)."""
    loss: LossName = "default"
    """Bound, ratio and aggregate by name (cpt_rft/algos/losses.py); `default` is EasyR1's, which paper 1 ran."""
    ratio: Literal["token", "sequence", "sequence_token", "sequence_sum"] | None = None
    """Of which tokens the ratio to the sampling policy is taken; null for the loss's own."""
    aggregate: Literal["token", "sequence", "constant", "sum"] | None = None
    """What the sum over tokens is divided by; null for the loss's own."""
    clip_low: Annotated[float, Field(gt=0, le=1)] | None = None
    """The ratio to the sampling policy counts no further down than 1 - clip_low; null for the loss's own."""
    clip_high: PositiveFloat | None = None
    """The ratio to the sampling policy counts no further up than 1 + clip_high; null for the loss's own."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound on the ratio where the advantage is negative; null for the loss's own."""
    entropy_coef: NotNegative = 0.0
    """Weight of the entropy bonus."""
    kl_coef: NotNegative = 0.01
    """Weight of the KL penalty to the reference policy; 0 switches it off."""
    kl_reference: Literal["base", "stage"] = "base"
    """Reference policy: the base model, or the model at the start of the stage."""
    kl_estimator: Literal["k1", "abs", "k2", "k3"] = "k3"
    """How the divergence is estimated from sampled tokens."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the penalty enters: differentiated in the loss, or taken off the reward of each token."""
    kl_ratio_correction: bool = False
    """Multiply the penalty in the loss by the ratio to the sampling policy, as TRL does."""
    hint: Hint | None = None
    """UFT: show a piece of the target, and teach it."""
    prefix: Prefix | None = None
    """Prefix-RFT: one further completion a prompt that begins with a piece of the target."""
    curriculum: Curriculum | None = None
    """AdaRFT: rows by difficulty."""
    alternate: Alternate | None = None
    """Iterative SFT-RFT: supervised steps between those of reinforcement."""

    @property
    def needs_targets(self) -> bool:
        """Whether rows are taught by supervision too, so that the style cot needs their rationales."""
        return bool(self.hint or self.prefix or self.alternate)

    @model_validator(mode="after")
    def _estimator_has_what_it_needs(self) -> Self:
        scales = {"grpo": ("group", "batch", "none"), "rloo": ("batch", "none"), "remax": ("batch", "none")}
        offered = scales.get(self.advantage, ("batch",))
        if self.group < 2 and self.advantage in ("grpo", "rloo"):
            message = f"{self.group}, but {self.advantage} compares the completions of a group; write 2 or more"
            raise KeyedError(("group",), message)
        if self.advantage_scale is not None and self.advantage_scale not in offered:
            message = f"{self.advantage_scale!r} is not offered with {self.advantage}; use {' or '.join(offered)}"
            raise KeyedError(("advantage_scale",), message)
        if self.paper_rounding and (self.advantage != "grpo" or self.advantage_scale not in (None, "group")):
            raise KeyedError(("paper_rounding",), "it belongs to advantage grpo with advantage_scale group")
        return self

    @model_validator(mode="after")
    def _hybrid_parts_fit(self) -> Self:
        parts = [key for key in ("hint", "prefix", "curriculum", "alternate") if getattr(self, key) is not None]
        if len(parts) > 1:
            raise KeyedError((parts[1],), f"it cannot be combined with {parts[0]}; remove one of the two")
        if parts and self.rollout_steps > 1:
            raise KeyedError(("rollout_steps",), f"with {parts[0]} every step samples anew; write 1")
        for key in {"replay", "lwf"}.intersection(self.restraints) if self.curriculum is not None else ():
            raise KeyedError((key,), "a curriculum chooses the rows of each step itself; remove one of the two")
        if self.hint is not None and self.advantage == "remax":
            raise KeyedError(("advantage",), "with a hint there is no greedy completion to compare with; use grpo")
        if self.prefix is not None:
            self._prefix_is_compared()
        return self

    def _prefix_is_compared(self) -> None:
        if self.advantage != "grpo" or self.advantage_scale == "batch" or self.paper_rounding:
            raise KeyedError(
                ("advantage",), "prefix needs grpo, scaled by the group or not at all, without paper_rounding"
            )
        if self.kl_in == "reward" and self.kl_coef:
            raise KeyedError(("kl_in",), "with prefix the penalty belongs in the loss")

    @model_validator(mode="after")
    def _filter_tries_as_in_training(self) -> Self:
        if self.filter is not None and self.filter.max_new_tokens is not None:
            raise KeyedError(("filter", "max_new_tokens"), "the tries are those of training; remove it")
        return self

    @model_validator(mode="after")
    def _penalty_has_a_reference(self) -> Self:
        if self.kl_coef == 0:
            for key in ("kl_in", "kl_ratio_correction"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise KeyedError((key,), "it needs a reference policy, and with kl_coef = 0 there is none")
        if self.kl_ratio_correction and self.kl_in == "reward":
            raise KeyedError(("kl_ratio_correction",), "it belongs to a penalty in the loss (kl_in: loss)")
        return self


MethodConfig = Annotated[SftMethod | GrpoMethod, Field(discriminator="kind")]
METHOD_KINDS: Mapping[str, type[SftMethod] | type[GrpoMethod]] = {"sft": SftMethod, "grpo": GrpoMethod}
