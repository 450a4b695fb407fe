"""What a stage will need: memory of each GPU and of the machine, and disk. Arithmetic on shapes; nothing is loaded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt_rft.checkpoint import stored_shapes
from cpt_rft.config.engine import EasyR1Config, LlamaFactoryConfig
from cpt_rft.engines.llamafactory.native import world
from cpt_rft.files import read_json

PATCH_VALUES = 1176  # numbers of one patch: 14 x 14 pixels, 3 channels, 2 frames


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2.5-VL model.

    Attributes:
        params: Weights.
        largest_layer: Weights of the module that has most of its own.
        layers: Decoder layers.
        hidden: Width of the decoder.
        intermediate: Width of its MLP.
        key_value: Width of keys and of values.
        vocabulary: Rows of the output layer.
        tower_layers: Layers of the vision tower.
        tower_hidden: Width of the vision tower.
        tower_intermediate: Width of its MLP.
        merge: Patches of a picture token.
    """

    params: int
    largest_layer: int
    layers: int
    hidden: int
    intermediate: int
    key_value: int
    vocabulary: int
    tower_layers: int
    tower_hidden: int
    tower_intermediate: int
    merge: int

    @classmethod
    def read(cls, checkpoint: Path) -> "Shape":
        """The sizes of a checkpoint, from its configuration and the headers of its weight files."""
        config = read_json(checkpoint / "config.json")
        text: Mapping[str, Any] = config.get("text_config") or config  # older files are flat
        tower = config["vision_config"]
        modules: dict[str, int] = {}
        for name, shape in stored_shapes(checkpoint).items():
            module = name.rpartition(".")[0]
            modules[module] = modules.get(module, 0) + math.prod(shape)
        head = text["hidden_size"] // text["num_attention_heads"]
        return cls(
            params=sum(modules.values()),
            largest_layer=max(modules.values()),
            layers=text["num_hidden_layers"],
            hidden=text["hidden_size"],
            intermediate=text["intermediate_size"],
            key_value=head * text["num_key_value_heads"],
            vocabulary=text["vocab_size"],
            tower_layers=tower["depth"],
            tower_hidden=tower["hidden_size"],
            tower_intermediate=tower["intermediate_size"],
            merge=tower["spatial_merge_size"] ** 2,
        )


def state_bytes(engine: LlamaFactoryConfig, shape: Shape) -> tuple[int, int]:
    """Bytes of weights, gradients and optimizer on each GPU, and on each machine.

    Source: deepspeed 0.18.4 runtime/zero/stage_1_and_2.py ``estimate_zero2_model_states_mem_needs`` and
    runtime/zero/stage3.py ``estimate_zero3_model_states_mem_needs``, with the default factor of 1.5 for the machine;
    without ZeRO, float32 weights, gradients and the two moments of AdamW, which the framework keeps in every process.
    Under ``lora`` only the adapters are trained: that part is small and left out.
    """
    params, processes = shape.params, world(engine)
    local = processes // engine.nodes
    if engine.lora is not None and engine.deepspeed in ("none", "zero2"):
        return (2 if engine.dtype == "bfloat16" else 4) * params, 4 * params * local
    if engine.deepspeed == "none":
        return 16 * params, 4 * params * local
    if engine.deepspeed == "zero2":
        return 2 * params + int(18 * params / processes), int(params * 4 * local * 1.5)
    layer = 4 * shape.largest_layer
    if engine.deepspeed == "zero3":
        return layer + int(18 * params / processes), int(shape.largest_layer * 4 * local * 1.5)
    return layer, int(params * 18 / engine.nodes * 1.5)


def activation_bytes(engine: LlamaFactoryConfig | EasyR1Config, shape: Shape, tokens: int, picture_tokens: int) -> int:
    """Bytes that one micro-batch keeps and makes on a GPU at the worst moment.

    With checkpointing, the input of every layer is kept and one layer is recomputed and differentiated at a time,
    while the logits live on; without, every layer's tensors are kept. The loss takes the logits twice more in float32
    (a copy, and its gradient). Attention is by a fused kernel that keeps no matrix of scores. Within 15 % of what
    PyTorch's own tracker measures on the miniature (tests/test_llamafactory_estimate.py).

    Args:
        engine: Arithmetic and checkpointing.
        shape: Sizes of the model.
        tokens: Tokens of a micro-batch.
        picture_tokens: How many of them stand for pictures.
    """
    width = 2 if engine.dtype == "bfloat16" else 4
    patches = picture_tokens * shape.merge
    layer = tokens * (9 * shape.hidden + 2 * shape.key_value + 4 * shape.intermediate)
    tower = patches * (10 * shape.tower_hidden + 4 * shape.tower_intermediate)
    gradients = max(
        tokens * (shape.hidden + 3 * shape.intermediate),
        patches * (shape.tower_hidden + 3 * shape.tower_intermediate),
    )
    logits = tokens * shape.vocabulary
    kept = tokens * shape.hidden * shape.layers + patches * shape.tower_hidden * shape.tower_layers
    moment = max(layer, tower)
    if not engine.gradient_checkpointing:
        kept += shape.layers * layer + shape.tower_layers * tower
        moment = 0
    worst = max(width * (moment + gradients + logits), (width + 8) * logits)
    return width * kept + worst + 4 * PATCH_VALUES * patches


def work_bytes(engine: LlamaFactoryConfig, shape: Shape) -> int:
    """Disk that a stage in work needs beside its data: the trainer writes a new resume point before it removes the old.

    A resume point holds the weights and the optimizer's state; then come the final weights.
    """
    trained = 0.05 if engine.lora is not None else 1.0
    weights = (2 if engine.deepspeed != "none" and engine.dtype == "bfloat16" else 4) * shape.params
    optimizer = (12 if engine.deepspeed != "none" else 8) * shape.params
    return int(trained * 2 * (weights + optimizer)) + weights
