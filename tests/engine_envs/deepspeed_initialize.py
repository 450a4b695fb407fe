"""Takes two steps under one of our DeepSpeed files, on CPU and by two processes of torchrun.

Usage: torchrun --nproc_per_node 2 deepspeed_initialize.py CONFIG MODEL. LLaMA-Factory's trainer fills in what is
"auto"; without it those keys are left out, and the two sizes that DeepSpeed insists on are given.
"""

import json
import sys
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from transformers import Qwen2_5_VLForConditionalGeneration


def without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the keys that a trainer fills in."""
    return {k: without_auto(v) if isinstance(v, dict) else v for k, v in config.items() if v != "auto"}


def main(config_file: str, model_dir: str) -> None:
    """Two steps, then the stage and the loss."""
    with open(config_file, encoding="utf-8") as file:
        config = without_auto(json.load(file))
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    offloads = "offload_optimizer" in config["zero_optimization"]
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32)
    adam = DeepSpeedCPUAdam if offloads else torch.optim.AdamW
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam(model.parameters(), lr=1e-3), config=config)
    ids = torch.tensor([[5, 6, 7, 8]])
    for _ in range(2):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
    print(f"stage {engine.zero_optimization_stage()} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
