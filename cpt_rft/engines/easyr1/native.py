"""What EasyR1 is told: its YAML, the list of our fixes, its command. All of it can be run by hand."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cpt_rft.config.engine import EasyR1Config
from cpt_rft.config.methods import GrpoMethod
from cpt_rft.engines.easyr1.methods import native_loss
from cpt_rft.engines.easyr1.resume import RECORDS
from cpt_rft.engines.easyr1.rows import TEMPLATE, TRAIN
from cpt_rft.engines.easyr1.rules import flattened
from cpt_rft.engines.environment import REPOSITORY
from cpt_rft.errors import ConfigError
from cpt_rft.files import write_text_atomic
from cpt_rft.vision import VisionSpec

YAML, FIXES, SCRIPT, OUT, DATA = "train.yaml", "fixes.json", "train.sh", "out", "data"
REWARD = Path(__file__).resolve().with_name("reward.py")
REWARD_CPUS = 1
# The framework takes the first checkpoint for the best one while nothing is validated, never removes it, and removes
# what is over the limit before it writes: with 2, a kill while it writes would leave the first one only.
KEPT = 3
DEFAULT_BATCHED_TOKENS = 8192
_KL = {"k1": "kl", "abs": "abs", "k2": "mse", "k3": "low_var_kl"}
_WIDTH = {"bfloat16": "bf16", "float32": "fp32"}
_ENTRY = f"python -m cpt_rft.engines.easyr1.entry {YAML} {FIXES}"


@dataclass(frozen=True)
class Files:
    """The absolute paths that a stage's YAML names.

    Attributes:
        model: Checkpoint to start from.
        train: The training rows, a parquet file.
        template: Jinja template of the prompt, over ``content``.
        reward: Python file that holds ``compute_score``.
        records: Where the reward function writes what it scored, JSON lines.
        out: Directory of the framework's own checkpoints and logs.
    """

    model: Path
    train: Path
    template: Path
    reward: Path
    records: Path
    out: Path

    @classmethod
    def of(cls, directory: Path, model: Path) -> "Files":
        """Where a stage has them.

        Args:
            directory: The stage's directory of this engine.
            model: Checkpoint to start from.
        """
        place = directory.absolute()
        return cls(
            model=model.absolute(),
            train=place / DATA / TRAIN,
            template=place / DATA / TEMPLATE,
            reward=REWARD,
            records=place / RECORDS,
            out=place / OUT,
        )


def world(engine: EasyR1Config) -> int:
    """Workers on all nodes, one a GPU."""
    assert engine.processes != "auto", "resolved when the run directory was made"
    return engine.processes * engine.nodes


def settings(
    engine: EasyR1Config, method: GrpoMethod, files: Files, spec: VisionSpec, seed: int, resume: Path | None = None
) -> dict[str, Any]:
    """The framework's YAML, nested; every default that is a trap is written out.

    Args:
        engine: How to compute, ``auto`` resolved.
        method: What to optimise.
        files: The paths that it names.
        spec: The pixel budget.
        seed: Training seed.
        resume: The framework's checkpoint to go on from, a directory ``global_step_N``.

    Raises:
        ConfigError: The method says not how long a prompt may be.
    """
    flat = {
        **_data(engine, method, files, spec, seed),
        **_actor(engine, method, files),
        **_rollout(engine, method, seed),
        **_reward(method, files),
        **_algorithm(method),
        **_trainer(engine, method, files, resume),
    }
    return nested(flat)


def _data(engine: EasyR1Config, method: GrpoMethod, files: Files, spec: VisionSpec, seed: int) -> dict[str, Any]:
    return {
        "data.train_files": f"{files.train}@train",
        "data.val_files": f"{files.train}@train[:1]",  # must not be empty; nothing is ever validated
        "data.prompt_key": "problem",
        "data.answer_key": "answer",
        "data.image_key": "images",
        "data.image_dir": str(files.train.parent),
        "data.max_prompt_length": prompt_limit(method),
        "data.max_response_length": method.max_new_tokens,
        "data.rollout_batch_size": method.prompts_per_step * method.rollout_steps,
        "data.mini_rollout_batch_size": None,
        "data.val_batch_size": 1,
        "data.format_prompt": str(files.template),
        "data.override_chat_template": None,
        "data.shuffle": False,  # the rows are written in their order, epoch after epoch
        "data.seed": seed,
        **spec.easyr1(),
        "data.filter_overlong_prompts": False,  # a longer row was refused when the rows were written
    }


def prompt_limit(method: GrpoMethod) -> int:
    """The longest prompt in tokens.

    Raises:
        ConfigError: The method does not say.
    """
    if method.max_prompt_tokens is None:
        raise ConfigError(
            f"{method.name} has no max_prompt_tokens, by which EasyR1 sizes its buffers.",
            f"set methods.{method.name}.max_prompt_tokens=N, picture tokens included",
        )
    return method.max_prompt_tokens


def fitting(most: int, whole: int) -> int:
    """The largest number up to ``most`` that divides ``whole``.

    >>> fitting(16, 24), fitting(4, 7), fitting(4, 0)
    (12, 1, 4)
    """
    return next(size for size in range(most, 0, -1) if whole % size == 0)


def _actor(engine: EasyR1Config, method: GrpoMethod, files: Files) -> dict[str, Any]:
    step = method.prompts_per_step * method.group
    values = {
        "model.model_path": str(files.model),
        "model.tokenizer_path": str(files.model),
        "model.trust_remote_code": False,
        "model.enable_gradient_checkpointing": engine.gradient_checkpointing,
        "model.freeze_vision_tower": engine.freeze_vision_tower,
        "global_batch_size": method.prompts_per_step,  # prompts; the worker multiplies by the group
        "micro_batch_size_per_device_for_update": fitting(engine.micro_batch_update, step // world(engine)),
        "micro_batch_size_per_device_for_experience": fitting(
            engine.micro_batch_experience, step * method.rollout_steps
        ),
        "ppo_epochs": 1,
        "max_grad_norm": method.max_grad_norm,
        "padding_free": True,
        "dynamic_batching": True,
        "ulysses_size": 1,  # the framework's sequence parallelism breaks on pictures
        "use_torch_compile": engine.device != "cpu",
        **native_loss(method),
        "optim.strategy": engine.optimizer,
        "optim.lr": method.lr,
        "optim.betas": list(method.betas),
        "optim.weight_decay": method.weight_decay,
        "optim.lr_scheduler_type": method.schedule,
        "optim.lr_warmup_ratio": method.warmup_ratio,
        "optim.lr_warmup_steps": None,
        "optim.min_lr_ratio": None,
        "fsdp.torch_dtype": _WIDTH[engine.param_dtype],
        "fsdp.mp_param_dtype": _WIDTH[engine.dtype],
        "fsdp.mp_reduce_dtype": "fp32",
        "fsdp.enable_full_shard": True,
        "fsdp.enable_cpu_offload": False,
        "fsdp.enable_rank0_init": True,
        "offload.offload_params": engine.offload,
        "offload.offload_optimizer": engine.offload,
    }
    reference = {
        "fsdp.torch_dtype": _WIDTH[engine.dtype],
        "fsdp.mp_param_dtype": _WIDTH[engine.dtype],
        "fsdp.enable_full_shard": True,
        "fsdp.enable_cpu_offload": engine.offload,
        "fsdp.enable_rank0_init": True,
        "offload.offload_params": False,
    }
    return {f"worker.actor.{key}": value for key, value in values.items()} | {
        f"worker.ref.{key}": value for key, value in reference.items()
    }


def _rollout(engine: EasyR1Config, method: GrpoMethod, seed: int) -> dict[str, Any]:
    longest = prompt_limit(method) + method.max_new_tokens
    values = {
        "n": method.group,
        "temperature": method.temperature,
        "top_p": engine.top_p,
        "top_k": -1,
        "seed": seed,
        "limit_images": 0,
        "dtype": _WIDTH[engine.dtype],
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "ignore_eos": False,
        "enforce_eager": engine.enforce_eager,
        "enable_chunked_prefill": False,
        "tensor_parallel_size": engine.tensor_parallel,
        "max_model_len": None,
        "max_num_batched_tokens": max(DEFAULT_BATCHED_TOKENS, longest),
        "disable_tqdm": True,
        "val_override_config": {"n": 1},
    }
    return {f"worker.rollout.{key}": value for key, value in values.items()}


def _reward(method: GrpoMethod, files: Files) -> dict[str, Any]:
    return {
        "worker.reward.reward_function": f"{files.reward}:compute_score",
        "worker.reward.reward_function_kwargs": {
            "style": method.style,
            "longest": method.max_new_tokens,
            "records": str(files.records),
        },
        "worker.reward.skip_special_tokens": True,
        "worker.reward.num_cpus": REWARD_CPUS,
    }


def _algorithm(method: GrpoMethod) -> dict[str, Any]:
    return {
        "algorithm.adv_estimator": method.advantage,
        "algorithm.gamma": 1.0,
        "algorithm.disable_kl": method.kl_coef == 0,
        "algorithm.use_kl_loss": method.kl_coef > 0 and method.kl_in == "loss",
        "algorithm.kl_penalty": _KL[method.kl_estimator],
        "algorithm.kl_coef": method.kl_coef,
        "algorithm.kl_type": "fixed",
        "algorithm.online_filtering": False,
    }


def _trainer(engine: EasyR1Config, method: GrpoMethod, files: Files, resume: Path | None) -> dict[str, Any]:
    values = {
        "total_epochs": 1,
        "max_steps": None,
        "project_name": "cpt-rft",
        "experiment_name": method.name,
        "logger": ["console", "file"],
        "nnodes": engine.nodes,
        "n_gpus_per_node": engine.processes,
        "critic_warmup": 0,
        "val_before_train": False,
        "val_only": False,
        "val_freq": -1,
        "val_generations_to_log": 0,
        "save_freq": engine.save_every,
        "save_limit": KEPT,
        "save_model_only": False,
        "save_checkpoint_path": str(files.out),
        "load_checkpoint_path": None if resume is None else str(resume),
        "find_last_checkpoint": False,
    }
    return {f"trainer.{key}": value for key, value in values.items()}


def fixes(engine: EasyR1Config, method: GrpoMethod, base: Path, rounded: Path) -> dict[str, Any]:
    """What our entry point changes in the framework, as ``fixes.json`` says it.

    Args:
        engine: How to compute.
        method: What to optimise.
        base: The base checkpoint of the sequence.
        rounded: Where groups of equal rewards with an advantage by rounding are listed.
    """
    anchored = method.kl_coef > 0 and method.kl_reference == "base"
    return {
        "reference": str(base.absolute()) if anchored else None,  # null: the stage's start, the framework's own
        "exact_zero": not method.paper_rounding,
        "count_rounded": str(rounded) if method.paper_rounding else None,
        "device": engine.device,
        "ray_address": engine.ray_address,
    }


def deciding(keys: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """What of a stage's files decides what is trained, so that the rest may change between two starts of it.

    Args:
        keys: Of `settings`.
        told: Of `fixes`.
    """
    flat = {key: value for key, value in flattened(keys) if key not in _FREE}
    return {"settings": flat, "fixes": {key: value for key, value in told.items() if key != "ray_address"}}


# The keys that `EasyR1Config.FREE` ends up in.
_FREE = frozenset(
    {
        *("worker.rollout.gpu_memory_utilization", "worker.rollout.enforce_eager", "trainer.save_freq"),
        *("worker.actor.offload.offload_params", "worker.actor.offload.offload_optimizer"),
        "worker.ref.fsdp.enable_cpu_offload",
    }
)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as mappings in mappings.

    >>> nested({"a.b": 1, "a.c": 2})
    {'a': {'b': 1, 'c': 2}}
    """
    result: dict[str, Any] = {}
    for dotted, value in flat.items():
        *above, last = dotted.split(".")
        place = result
        for key in above:
            place = place.setdefault(key, {})
        place[last] = value
    return result


def variables(engine: EasyR1Config) -> dict[str, str]:
    """The environment variables of a stage."""
    values = {"OMP_NUM_THREADS": str(engine.threads), "HF_HUB_OFFLINE": "1", "RAY_DEDUP_LOGS": "0"}
    values["PYTHONPATH"] = str(REPOSITORY)  # our entry and our scorers are those of whoever started the stage
    return values


def script(engine: EasyR1Config, environment: Path) -> str:
    """The shell script that is run on one node, the head of the cluster; by hand it does the same."""
    lines = [
        "#!/usr/bin/env bash",
        "# One stage by EasyR1, as cpt-rft starts it: bash train.sh. With several nodes, on the head of the cluster.",
        "set -euo pipefail",
        'cd "$(dirname "${BASH_SOURCE[0]}")"',
        "unset USE_MODELSCOPE_HUB",  # it would fetch models from elsewhere
        *(["unset RAY_ADDRESS"] if engine.device == "cpu" else []),
        f'export PATH={shlex.quote(str(environment / "bin"))}:"$PATH"',
        *(f"export {name}={shlex.quote(value)}" for name, value in variables(engine).items()),
        f"exec {_ENTRY}",
    ]
    return "\n".join([*lines, ""])


def command(engine: EasyR1Config, directory: Path) -> list[str]:
    """What starts a stage."""
    return ["bash", str((directory / SCRIPT).absolute())]


def shown(engine: EasyR1Config, directory: Path) -> str:
    """The native command for a reader."""
    words = [f"{name}={shlex.quote(value)}" for name, value in variables(engine).items()]
    return f"cd {shlex.quote(str(directory))} && {' '.join(words)} {_ENTRY}"


def write_native(
    directory: Path, keys: Mapping[str, Any], told: Mapping[str, Any], engine: EasyR1Config, environment: Path
) -> None:
    """Write the YAML, the list of fixes and the script into a directory.

    Args:
        directory: The stage's directory of this engine.
        keys: Of `settings`.
        told: Of `fixes`.
        engine: How to compute.
        environment: The framework's environment.
    """
    write_text_atomic(directory / YAML, yaml.safe_dump(dict(keys), sort_keys=False, allow_unicode=True))
    write_text_atomic(directory / FIXES, json.dumps(dict(told), indent=2) + "\n")
    write_text_atomic(directory / SCRIPT, script(engine, environment))
