"""What a stage of EasyR1 will need: memory of each GPU and of the machine, disk, time. Nothing is loaded for it."""

from dataclasses import dataclass

from cpt_rft.config.engine import EasyR1Config
from cpt_rft.config.methods import GrpoMethod
from cpt_rft.engines.easyr1.native import KEPT, fitting, prompt_limit, world
from cpt_rft.engines.llamafactory.estimate import Shape, activation_bytes
from cpt_rft.vision import VisionSpec

# Weights, and tokens a second and GPU of whole training steps on H100 80 GB; a 7B step on L20 takes four times as long.
# Source: hiyouga/EasyR1@b44b311 assets/baselines.md (v0.3.2, Qwen2.5-VL on Geometry3K, default settings).
PUBLISHED = ((3_754_622_976, 1800), (8_292_166_656, 1600), (33_452_718_336, 620))
_WIDTH = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU at its two worst moments, and on each machine.

    Attributes:
        state: Weights, gradients, optimizer and reference, cut into a share a GPU.
        update: Activations of a micro-batch, and the layer that is gathered for it.
        writing: Weights that vLLM holds while the model writes; its cache takes what is left of its share.
        waiting: What of `state` stays on the GPU meanwhile.
        machine: Weights that the first worker of a machine loads, and what is offloaded.
    """

    state: int
    update: int
    writing: int
    waiting: int
    machine: int


def memory(engine: EasyR1Config, method: GrpoMethod, shape: Shape, spec: VisionSpec) -> Memory:
    """The memory of a stage.

    A micro-batch has as many tokens as its completions at full length: the framework fills it up with shorter ones.

    Args:
        engine: How to compute, ``auto`` resolved.
        method: What to optimise.
        shape: Sizes of the model.
        spec: The pixel budget.
    """
    params, gpus, width = shape.params, world(engine), _WIDTH[engine.dtype]
    kept = params * (_WIDTH[engine.param_dtype] + optimizer_width(engine)) // gpus
    gradients = params * _WIDTH[engine.param_dtype] // gpus
    reference = params * width // gpus if method.kl_coef and not engine.offload else 0
    prompt = prompt_limit(method)
    picture = min(spec.max_pixels // spec.factor**2, prompt)
    size = fitting(engine.micro_batch_update, method.prompts_per_step * method.group // gpus)
    activations = activation_bytes(engine, shape, size * (prompt + method.max_new_tokens), size * picture)
    offloaded = engine.processes * kept if engine.offload and engine.processes != "auto" else 0
    return Memory(
        state=kept + gradients + reference,
        update=activations + width * shape.largest_layer,
        writing=width * params // engine.tensor_parallel,
        waiting=reference if engine.offload else kept + reference,
        machine=_WIDTH[engine.param_dtype] * params + offloaded,
    )


def optimizer_width(engine: EasyR1Config) -> int:
    """Bytes a weight of the optimizer's state: two moments, and the correction of bfloat16 ones.

    Source: hiyouga/EasyR1@b44b311 verl/utils/torch_functional.py ``AnyPrecisionAdamW``.
    """
    return 6 if engine.optimizer == "adamw_bf16" else 2 * _WIDTH[engine.param_dtype]


def checkpoint_bytes(engine: EasyR1Config, shape: Shape) -> tuple[int, int]:
    """Bytes of the weights and of the optimizer in one of the framework's checkpoints."""
    return _WIDTH[engine.param_dtype] * shape.params, optimizer_width(engine) * shape.params


def work_bytes(engine: EasyR1Config, shape: Shape) -> int:
    """Disk of a stage in work: the framework's checkpoints, then the merged weights twice until they are published."""
    return KEPT * sum(checkpoint_bytes(engine, shape)) + 2 * 2 * shape.params


def published_rate(shape: Shape) -> int:
    """Tokens a second and GPU that EasyR1's authors measured for the model of the nearest size.

    >>> published_rate(Shape(7_000_000_000, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))
    1600
    """
    return min(PUBLISHED, key=lambda entry: abs(entry[0] - shape.params))[1]


def seconds(engine: EasyR1Config, method: GrpoMethod, shape: Shape, rows: int, prompt_tokens: int) -> int:
    """Time of a stage at the published rate, every completion in full length.

    Args:
        engine: How to compute, ``auto`` resolved.
        method: What to optimise.
        shape: Sizes of the model.
        rows: Rows of the stage, each epoch counted.
        prompt_tokens: Tokens of their prompts together.
    """
    tokens = method.group * (prompt_tokens + rows * method.max_new_tokens)
    return round(tokens / (published_rate(shape) * world(engine)))
