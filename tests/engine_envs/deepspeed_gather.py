"""Gathers the weights of a model under ZeRO-3 again and again, as a save does, and counts how often they are wrong.

Usage: torchrun --nproc_per_node 2 deepspeed_gather.py CONFIG MODEL TIMES, on CPU.
"""

import json
import sys

import deepspeed
import deepspeed.comm
import torch
from deepspeed_initialize import without_auto
from transformers import Qwen2_5_VLForConditionalGeneration


def main(config_file: str, model_dir: str, times: int) -> None:
    """Print how many of the gathers differ from the one before; none should, as nothing is trained."""
    with open(config_file, encoding="utf-8") as file:
        config = without_auto(json.load(file))
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)
    wrong = 0
    for _ in range(times):
        now = engine._zero3_consolidated_16bit_state_dict()
        if deepspeed.comm.get_rank() == 0:
            wrong += any(not torch.equal(now[name], before[name]) for name in before)
            # What was gathered is also written back into every process's part.
            before = {name: weight.clone() for name, weight in now.items()}
    if deepspeed.comm.get_rank() == 0:
        print(f"wrong gathers: {wrong} of {times}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
