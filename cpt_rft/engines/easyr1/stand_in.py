"""What lets EasyR1 be imported without vLLM, on device cpu only, and what that device has not.

Two of its modules import vllm as soon as they are read, and nearly all others import these two. The trainer needs
neither: its workers do, and on device cpu they are ours (`cpu_worker`). Ray calls `stand_in` in each of its processes
before it reads anything that the driver sent. Nothing heavy is imported here.
"""

import sys
from types import ModuleType
from typing import Any

from cpt_rft.errors import ConfigError

HOOK = "cpt_rft.engines.easyr1.stand_in.stand_in"
_NEED_VLLM = {
    "verl.workers.rollout.vllm_rollout_spmd": "vLLMRollout",
    "verl.workers.sharding_manager.fsdp_vllm": "FSDPVLLMShardingManager",
}


def stand_in() -> None:
    """Put a class that cannot be made in the place of each of the two that need vLLM."""
    for name, attribute in _NEED_VLLM.items():
        if name not in sys.modules:
            module = ModuleType(name)
            setattr(module, attribute, type(attribute, (), {"__init__": _refuse}))
            sys.modules[name] = module


def refuse_what_needs_a_gpu(config: Any, role: str, workers: int) -> None:
    """Check that a worker on device cpu is asked for nothing that only a GPU has.

    Args:
        config: The framework's ``worker`` section.
        role: What the worker is to be.
        workers: How many there are.

    Raises:
        ConfigError: The first thing that it has not.
    """
    actor, rollout = config.actor, config.rollout
    wanted = (
        ("the role of a worker", role, "actor_rollout_ref"),
        ("trainer.nnodes times trainer.n_gpus_per_node", workers, 1),
        ("worker.actor.model.lora.rank", actor.model.lora.rank, 0),
        ("worker.actor.ulysses_size", actor.ulysses_size, 1),
        ("worker.actor.optim.strategy", actor.optim.strategy, "adamw"),
        ("worker.rollout.tensor_parallel_size", rollout.tensor_parallel_size, 1),
        ("worker.rollout.top_k", rollout.top_k, -1),
        ("worker.rollout.ignore_eos", rollout.ignore_eos, False),
    )
    for key, value, only in wanted:
        if value != only:
            raise ConfigError(f"{key} is {value}, on device cpu it must be {only}.", f"set it to {only}, or use a GPU")


def _refuse(self: object, *_: Any, **__: Any) -> None:
    raise RuntimeError(f"{type(self).__name__} needs vLLM and a GPU; on device cpu the workers are ours.")
