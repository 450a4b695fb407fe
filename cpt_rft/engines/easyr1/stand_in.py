"""What lets EasyR1 be imported without vLLM, on device cpu only.

Two of its modules import vllm as soon as they are read, and nearly all others import these two. The trainer needs
neither: its workers do, and on device cpu they are ours (`cpu_worker`). Ray calls `stand_in` in each of its processes
before it reads anything that the driver sent. Nothing heavy is imported here.
"""

import sys
from types import ModuleType
from typing import Any

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


def _refuse(self: object, *_: Any, **__: Any) -> None:
    raise RuntimeError(f"{type(self).__name__} needs vLLM and a GPU; on device cpu the workers are ours.")
