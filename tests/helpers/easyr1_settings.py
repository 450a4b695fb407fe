"""Settings of the engine easyr1 for the tests, with every file that they name."""

import json
from pathlib import Path
from typing import Any

from cpt_rft.config.engine import EasyR1Config
from cpt_rft.config.methods import GrpoMethod
from cpt_rft.engines.easyr1.native import Files
from cpt_rft.vision import VisionSpec

SPEC = VisionSpec(min_pixels=3136, max_pixels=1003520)
# Heads of Qwen2.5-VL-7B, whose file is flat, as older ones are.
SEVEN_B = {"num_attention_heads": 28, "num_key_value_heads": 4}


def engine(**changes: Any) -> EasyR1Config:
    """EasyR1 on eight GPUs of this machine."""
    stated = {"name": "easyr1", "device": "cuda", "dtype": "bfloat16", "processes": 8, **changes}
    return EasyR1Config.model_validate(stated)


def grpo(**changes: Any) -> GrpoMethod:
    """The released method's batches."""
    stated = {"kind": "grpo", "name": "grpo", "style": "cot", "lr": 1e-6, "prompts_per_step": 128, "micro_batch": 1}
    lengths = {"max_new_tokens": 1024, "max_prompt_tokens": 4096}
    return GrpoMethod(**{**stated, **lengths, "group": 8, "rollout_steps": 4, **changes})


def make_files(directory: Path) -> Files:
    """Files that exist, with a model of which only the heads are told."""
    model = directory / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SEVEN_B))
    for name in ("train.parquet", "prompt.jinja", "reward.py"):
        (directory / name).touch()
    return Files(
        model=model,
        train=directory / "train.parquet",
        template=directory / "prompt.jinja",
        reward=directory / "reward.py",
        records=directory / "rewards.jsonl",
        out=directory / "out",
    )
