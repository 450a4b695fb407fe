"""What LLaMA-Factory is told: its YAML, its environment variables, its command. All of it can be run by hand."""

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpt_rft.config.engine import LlamaFactoryConfig
from cpt_rft.config.methods import SftMethod
from cpt_rft.engines.environment import DEEPSPEED_FILES
from cpt_rft.engines.llamafactory.rows import NAME
from cpt_rft.errors import ConfigError
from cpt_rft.files import write_text_atomic
from cpt_rft.vision import VisionSpec

YAML, SCRIPT, DEEPSPEED, OUT, DATA = "train.yaml", "train.sh", "deepspeed.json", "out", "data"
TEMPLATE = "qwen2_vl"  # of Qwen2.5-VL too; the framework knows no template by that name
_PATHS = ("dataset_dir", "output_dir", "resume_from_checkpoint", "deepspeed")
# They would change what is trained, or whether anything is, behind the file's back.
_UNSET = ("ALLOW_EXTRA_ARGS", "DISABLE_VERSION_CHECK", "USE_MCA", "USE_RAY", "USE_KT", "FORCE_TORCHRUN")


def world(engine: LlamaFactoryConfig) -> int:
    """Training processes on all nodes."""
    assert engine.processes != "auto", "resolved when the run directory was made"
    return engine.processes * engine.nodes


def accumulation(engine: LlamaFactoryConfig, method: SftMethod) -> int:
    """Micro-batches that one process adds up in a step.

    Raises:
        ConfigError: The processes do not divide the rows of a step evenly.
    """
    share = world(engine) * method.micro_batch
    if method.prompts_per_step % share:
        even = [
            n for n in range(1, method.prompts_per_step + 1) if method.prompts_per_step % (n * method.micro_batch) == 0
        ]
        raise ConfigError(
            f"{world(engine)} processes of {method.micro_batch} rows do not divide the {method.prompts_per_step} rows"
            f" of a step (prompts_per_step of {method.name}).",
            f"use {', '.join(map(str, even))} processes (engine.processes x engine.nodes), or another micro_batch",
        )
    return method.prompts_per_step // share


def settings(
    engine: LlamaFactoryConfig, method: SftMethod, model: Path, spec: VisionSpec, seed: int, resume: str | None
) -> dict[str, Any]:
    """The keys of the framework's YAML; every default that is a trap is written out."""
    keys: dict[str, Any] = {
        **{"model_name_or_path": str(model.absolute()), "trust_remote_code": False, **spec.llamafactory()},
        **{"stage": "sft", "do_train": True, **_what_learns(engine)},
        **{"flash_attn": engine.attention, "disable_gradient_checkpointing": not engine.gradient_checkpointing},
        **{"dataset": NAME, "dataset_dir": DATA, "template": TEMPLATE, "cutoff_len": engine.cutoff_len},
        # The rows are written in their order, epoch after epoch.
        **{"disable_shuffling": True, "num_train_epochs": 1, "packing": False, "overwrite_cache": True},
        **{"dataloader_num_workers": engine.workers_a_process, "preprocessing_num_workers": 1},
        **{"output_dir": OUT, "overwrite_output_dir": False, "resume_from_checkpoint": resume},
        **{"logging_steps": 1, "report_to": "none", "plot_loss": False, "include_num_input_tokens_seen": "all"},
        **{"save_strategy": "steps", "save_steps": engine.save_every, "save_total_limit": 1, "save_only_model": False},
        **{"per_device_train_batch_size": method.micro_batch, "ddp_timeout": 180_000_000},
        **{"gradient_accumulation_steps": accumulation(engine, method), "max_grad_norm": method.max_grad_norm},
        **{"learning_rate": method.lr, "weight_decay": method.weight_decay},
        **{"adam_beta1": method.betas[0], "adam_beta2": method.betas[1]},
        **{"lr_scheduler_type": _SCHEDULES[method.schedule], "warmup_ratio": method.warmup_ratio},
        **{"bf16": engine.dtype == "bfloat16", "pure_bf16": False, "seed": seed, "data_seed": seed},
    }
    if engine.deepspeed != "none":
        keys["deepspeed"] = DEEPSPEED
    elif engine.device == "cpu":
        keys["use_cpu"] = True  # else bfloat16 is refused
    if engine.ray:
        keys["ray_num_workers"] = world(engine)
    return {key: value for key, value in keys.items() if value is not None}


_SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine"}


def _what_learns(engine: LlamaFactoryConfig) -> dict[str, Any]:
    frozen = {
        "freeze_vision_tower": engine.freeze_vision_tower,
        "freeze_multi_modal_projector": engine.freeze_projector,
        "freeze_language_model": False,
    }
    if engine.lora is None:
        return {"finetuning_type": "full", **frozen}
    lora = engine.lora
    values = {
        "lora_rank": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "lora_target": lora.target,
    }
    return {"finetuning_type": "lora", **values, **frozen}


def variables(engine: LlamaFactoryConfig) -> dict[str, str]:
    """The environment variables by which the framework's launcher is told about processes and machines.

    Raises:
        ConfigError: There are several nodes and nothing says where the first one is.
    """
    if engine.nodes > 1 and not engine.ray and not os.environ.get("MASTER_ADDR"):
        raise ConfigError(
            f"engine.nodes is {engine.nodes}, but MASTER_ADDR is not set.",
            "export MASTER_ADDR (a name of the first node that all reach) and MASTER_PORT",
        )
    values = {"OMP_NUM_THREADS": str(engine.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if engine.device == "cpu":
        # Else each of several processes has a "cpu:0", for which torch knows no way to load an optimizer's state.
        values |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_TORCH_DEVICE": "cpu"}
    elif ":" in engine.device:
        values["CUDA_VISIBLE_DEVICES"] = engine.device.partition(":")[2]
    if engine.ray:
        values["USE_RAY"] = "1"
    # With one GPU the framework would start without torchrun, which DeepSpeed needs; with several it would take all.
    elif world(engine) > 1 or engine.deepspeed != "none" or engine.device != "cpu":
        values |= {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(engine.processes), "NNODES": str(engine.nodes)}
    return values


def script(engine: LlamaFactoryConfig, environment: Path) -> str:
    """The shell script that is run on every node; by hand it does the same."""
    lines = [
        "#!/usr/bin/env bash",
        "# One stage by LLaMA-Factory, as cpt-rft starts it: bash train.sh. With several nodes, on each of them.",
        "set -euo pipefail",
        'cd "$(dirname "${BASH_SOURCE[0]}")"',
        f"unset {' '.join(_UNSET)}",
        f'export PATH={shlex.quote(str(environment / "bin"))}:"$PATH"',
        *(f"export {name}={shlex.quote(value)}" for name, value in variables(engine).items()),
    ]
    if engine.nodes > 1:
        lines.append('export NODE_RANK="${NODE_RANK:-${SLURM_NODEID:?set NODE_RANK, from 0, on every node}}"')
    # A bare file name: the framework's launcher splits its command at spaces.
    return "\n".join([*lines, f"exec llamafactory-cli train {YAML}", ""])


def command(engine: LlamaFactoryConfig, directory: Path) -> list[str]:
    """What starts a stage."""
    return [*engine.launcher, "bash", str((directory / SCRIPT).absolute())]


def shown(engine: LlamaFactoryConfig, directory: Path) -> str:
    """The native command for a reader."""
    words = [f"{name}={shlex.quote(value)}" for name, value in variables(engine).items()]
    launch = shlex.join([*engine.launcher, "llamafactory-cli", "train", YAML])
    return f"cd {shlex.quote(str(directory))} && {' '.join(words)} {launch}"


def write_native(directory: Path, keys: Mapping[str, Any], engine: LlamaFactoryConfig, environment: Path) -> None:
    """Write the YAML, the script and DeepSpeed's file into a directory."""
    if engine.ray:  # its workers are where the cluster was started, not where the script is
        keys = {key: str((directory / value).absolute()) if key in _PATHS else value for key, value in keys.items()}
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items())
    write_text_atomic(directory / YAML, lines)
    write_text_atomic(directory / SCRIPT, script(engine, environment))
    if engine.deepspeed != "none":
        text = (DEEPSPEED_FILES / f"{engine.deepspeed}.json").read_text(encoding="utf-8")
        write_text_atomic(directory / DEEPSPEED, text)
