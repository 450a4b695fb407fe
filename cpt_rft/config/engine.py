"""What an engine may be told: one class an engine, told apart by `name`.

The text under a field is its help: it appears in the JSON Schema that editors read (``cpt-rft schema``).
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, TypeAdapter, model_validator

from cpt_rft.config.strict import KeyedError, Share, Strict

DeepSpeed = Literal["none", "zero2", "zero3", "zero3_offload"]


def _not_zero3(value: Any) -> Any:
    if value in get_args(DeepSpeed)[2:]:
        why = "the local engine computes with whole weights, so ZeRO-3 would gather all of them for every step"
        raise ValueError(f"{value} would save nothing: {why}; use zero2, or the engine llamafactory or easyr1")
    return value


class _Engine(Strict):
    FREE: ClassVar[frozenset[str]] = frozenset()
    """Keys that decide where, how fast and how safely a stage is trained, but never its weights."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of forward and backward; master weights and optimizer are always float32."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """Where: `cpu`, `cuda`, or `auto` for a GPU if there is one."""
    threads: PositiveInt = 1
    """Threads of one worker. Methods and seeds run side by side, so one is usually best."""

    @property
    def pixel_limits(self) -> tuple[int | None, int | None]:
        """Least and largest area of a picture, where they are not the base checkpoint's own."""
        return None, None

    @property
    def cores(self) -> int:
        """Cores that one worker keeps busy."""
        return self.threads

    def identity(self) -> dict[str, Any]:
        """The part that decides a stage's weights, as plain JSON."""
        return {key: value for key, value in self.model_dump(mode="json").items() if key not in self.FREE}


class LocalConfig(_Engine):
    """Trains in process with transformers."""

    FREE: ClassVar[frozenset[str]] = frozenset({"save_every", "max_skipped_steps", "gradient_checkpointing"})

    name: Literal["local"]
    """The engine: `local` trains in process with transformers."""
    processes: PositiveInt = 1
    """Processes that share each step of a stage, through accelerate; on GPUs each takes one."""
    deepspeed: Annotated[Literal["none", "zero2"], BeforeValidator(_not_zero3)] = "none"
    """Which of configs/engines/deepspeed/*.json; `none` keeps float32 weights and optimizer whole in every process,
    `zero2` shares them out (extra `zero`; two processes or more)."""
    gradient_checkpointing: bool = False
    """Compute decoder layers again in the backward pass instead of keeping their values: the same gradients, less
    memory, about a third more time in the update."""
    save_every: PositiveInt = 10
    """Steps between two resume points within a stage."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 3
    """A stage stops after more non-finite steps than this."""

    @property
    def cores(self) -> int:
        """Cores that one worker keeps busy."""
        return self.threads * self.processes

    def identity(self) -> dict[str, Any]:
        """See `_Engine.identity`; one process, and no DeepSpeed, are not mentioned."""
        usual = {"processes": 1, "deepspeed": "none"}
        return {key: value for key, value in super().identity().items() if (key, value) not in usual.items()}

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.deepspeed != "none" and self.processes == 1:
            raise KeyedError(("deepspeed",), f"{self.deepspeed} shares out among processes, so it needs 2 or more")
        return self


class LoraConfig(Strict):
    """Low-rank adapters, merged into the checkpoint at the end of every stage."""

    rank: PositiveInt
    """Rank of the adapters."""
    alpha: PositiveFloat
    """Adapters are scaled by alpha / rank."""
    dropout: Share = 0.0
    """Share of an adapter's inputs that are dropped."""
    target: str = "all"
    """Comma-separated names of the adapted modules; `all` for every linear one that is not frozen."""


class LlamaFactoryConfig(_Engine):
    """LLaMA-Factory, run by its own command in its own environment (docs/llamafactory.md)."""

    FREE: ClassVar[frozenset[str]] = frozenset({"save_every", "environment", "launcher", "workers_a_process"})

    name: Literal["llamafactory"]
    """The engine: `llamafactory` writes the framework's own files and runs its own command."""
    environment: str | None = None
    """Its virtual environment; null for the one that `scripts/setup_llamafactory.sh` makes."""
    processes: Literal["auto"] | PositiveInt = "auto"
    """Training processes a node; `auto` for one a GPU, or one without a GPU."""
    nodes: PositiveInt = 1
    """Machines; with several, MASTER_ADDR must be set and the launcher must start the command on each."""
    launcher: tuple[str, ...] = ()
    """Put before the command, for example ["srun", "--ntasks-per-node=1"]; NODE_RANK defaults to SLURM_NODEID."""
    ray: bool = False
    """Start the processes by Ray (USE_RAY) instead of torchrun; the environment then needs the package ray[default]."""
    deepspeed: DeepSpeed = "none"
    """Which of configs/engines/deepspeed/*.json; `none` replicates the model in every process."""
    cutoff_len: PositiveInt = 7168
    """Longest row in tokens, picture tokens included; a longer one is refused, never cut."""
    min_pixels: PositiveInt | None = None
    """Least area of a picture as the model sees it; null for the base checkpoint's own."""
    max_pixels: PositiveInt | None = None
    """Largest area of a picture as the model sees it; null for the base checkpoint's own."""
    freeze_vision_tower: bool = False
    """Keep the vision tower as it is (the framework's own default is true)."""
    freeze_projector: bool = False
    """Keep what joins vision and language as it is (the framework's own default is true)."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: about a third more time, far less memory."""
    attention: Literal["auto", "sdpa", "fa2"] = "auto"
    """Attention kernel; `fa2` needs the package flash-attn."""
    save_every: PositiveInt = 200
    """Steps between two resume points within a stage."""
    workers_a_process: Annotated[int, Field(ge=0)] = 0
    """Processes that prepare pictures for each training process."""

    @property
    def pixel_limits(self) -> tuple[int | None, int | None]:
        """Least and largest area of a picture, where they are not the base checkpoint's own."""
        return self.min_pixels, self.max_pixels

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.ray and self.launcher:
            raise KeyedError(("launcher",), "Ray starts the processes itself, so there is nothing to launch")
        if self.nodes > 1 and not self.ray and not self.launcher:
            raise KeyedError(("launcher",), "with several nodes it must say what starts the command on each of them")
        return self


class EasyR1Config(_Engine):
    """EasyR1, run by our entry point in its own environment on Ray (docs/easyr1.md)."""

    FREE: ClassVar[frozenset[str]] = frozenset(
        {"environment", "ray_address", "gpu_memory_utilization", "enforce_eager", "offload", "save_every"}
    )

    name: Literal["easyr1"]
    """The engine: `easyr1` writes the framework's own files and starts its trainer on Ray."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of rollouts, forward and backward; what the weights are kept in is `param_dtype`."""
    environment: str | None = None
    """Its virtual environment; null for the one that `scripts/setup_easyr1.sh` makes."""
    processes: Literal["auto"] | PositiveInt = "auto"
    """GPUs a node, one worker on each; `auto` for all of this machine, or one worker without a GPU."""
    nodes: PositiveInt = 1
    """Machines of the Ray cluster; with several, `ray_address` must be set."""
    ray_address: Literal["auto"] | None = None
    """Null: a Ray that runs on this machine, else one of its own. `auto`: a running one must be there, of which this
    machine is the head (docs/easyr1.md)."""
    tensor_parallel: PositiveInt = 1
    """GPUs that share one copy of the model while it writes; it must divide the GPUs and the model's heads."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Share of a GPU's memory that vLLM takes while the model writes; it is given back for the update."""
    enforce_eager: bool = False
    """Write without CUDA graphs: slower, less memory."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Rollouts are sampled among the likeliest tokens that reach this share together."""
    min_pixels: PositiveInt | None = None
    """Least area of a picture as the model sees it; null for the base checkpoint's own."""
    max_pixels: PositiveInt | None = None
    """Largest area of a picture as the model sees it; null for the base checkpoint's own."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the trained weights and their gradients are kept in; the other engines always take float32."""
    optimizer: Literal["adamw", "adamw_bf16"] = "adamw"
    """AdamW with moments as wide as the weights, or with bfloat16 moments and a correction of their rounding."""
    offload: bool = False
    """Keep weights and optimizer in the machine's memory while the model writes."""
    freeze_vision_tower: bool = False
    """Keep the vision tower as it is."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: about a third more time, far less memory."""
    micro_batch_update: PositiveInt = 4
    """Completions that a GPU holds at most at once in the update; less where they do not divide its share of a step."""
    micro_batch_experience: PositiveInt = 16
    """The same where only log-probabilities are taken, of a whole rollout."""
    save_every: PositiveInt = 10
    """Rollouts between two resume points within a stage."""

    @property
    def pixel_limits(self) -> tuple[int | None, int | None]:
        """Least and largest area of a picture, where they are not the base checkpoint's own."""
        return self.min_pixels, self.max_pixels

    @model_validator(mode="after")
    def _ray_can_place_it(self) -> Self:
        if ":" in self.device:
            raise KeyedError(("device",), "Ray hands out the GPUs; write cuda, and choose by CUDA_VISIBLE_DEVICES")
        if self.device == "cpu":
            if self.nodes > 1 or self.processes not in ("auto", 1):
                raise KeyedError(("processes",), "without GPUs there is one worker; write 1, and nodes: 1")
            if self.ray_address is not None:
                raise KeyedError(("ray_address",), "without GPUs it runs on a Ray of its own; write null")
        elif self.nodes > 1 and self.ray_address is None:
            raise KeyedError(("ray_address",), "with several nodes a Ray cluster must run; start it and write auto")
        if self.device == "cuda" and self.dtype == "float32":
            raise KeyedError(("dtype",), "the framework's attention on GPUs has no float32; write bfloat16")
        return self


EngineConfig = Annotated[LocalConfig | LlamaFactoryConfig | EasyR1Config, Field(discriminator="name")]
ENGINES: Mapping[str, type[LocalConfig] | type[LlamaFactoryConfig] | type[EasyR1Config]] = {
    "local": LocalConfig,
    "llamafactory": LlamaFactoryConfig,
    "easyr1": EasyR1Config,
}


def parse_engine(data: Mapping[str, Any]) -> EngineConfig:
    """The inverse of dumping a configuration as plain JSON data."""
    config: EngineConfig = TypeAdapter(EngineConfig).validate_json(json.dumps(data))
    return config
