"""Runs EasyR1's own functions with and without our fixes, and shows what its real classes make of ours.

Usage: python easyr1_fixes.py STAGE, by the Python of EasyR1's environment; STAGE holds ``train.yaml``. Prints a JSON
object, which the test reads. No GPU: FSDPWorker is not made, but its own ``init_model`` is run up to what it builds.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import ray
import torch

from cpt_rft.engines.easyr1.entry import read_config
from cpt_rft.engines.easyr1.fixes import Fixes, apply_fixes, worker_class
from cpt_rft.engines.easyr1.stand_in import stand_in

stand_in()

from verl.single_controller.base import Worker  # noqa: E402
from verl.single_controller.base.decorator import MAGIC_ATTR  # noqa: E402
from verl.single_controller.ray import RayClassWithInitArgs  # noqa: E402
from verl.single_controller.ray.base import create_colocated_worker_cls  # noqa: E402
from verl.trainer import core_algos  # noqa: E402
from verl.workers.fsdp_workers import FSDPWorker  # noqa: E402


def raised(action: Any) -> str | None:
    """The error of a call, or none."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def estimate(name: str, rewards: list[float], **more: Any) -> list[list[float]]:
    """EasyR1's advantages of one prompt's responses, three tokens each."""
    tokens = torch.zeros(len(rewards), 3)
    tokens[:, 1] = torch.tensor(rewards)
    index = ["prompt"] * len(rewards)
    inputs = {"token_level_rewards": tokens, "response_mask": torch.ones_like(tokens), "index": index, **more}
    advantages, _ = core_algos.compute_advantage_return(name, gamma=1.0, lam=1.0, **inputs)
    found: list[list[float]] = advantages.tolist()
    return found


def built(worker: type, config: Any) -> dict[str, str]:
    """Role and model path of everything that the real ``init_model`` builds in a worker of this class."""
    seen: dict[str, str] = {}

    def record(self: Any, *, model_config: Any, role: str, **_: Any) -> None:
        seen[role] = model_config.model_path
        if role == "ref":
            raise InterruptedError  # what follows needs a GPU

    original, FSDPWorker._build_model_optimizer = FSDPWorker._build_model_optimizer, record
    os.environ["DISABLE_WORKER_INIT"] = "1"
    try:
        made = worker.__new__(worker)
        made.config, made._is_lora = config.worker, False
        made._has_critic, made._has_actor, made._has_ref = False, True, True
        made.init_model()
    except InterruptedError:
        pass
    finally:
        FSDPWorker._build_model_optimizer = original
    return seen


def outer_base(worker: type) -> dict[str, Any]:
    """What EasyR1 makes its outer class of, and whether it finds the methods of the inner one."""
    remote = RayClassWithInitArgs(cls=ray.remote(worker), config=None, role="actor_rollout_ref")
    outer = create_colocated_worker_cls({"actor_rollout_ref": remote}).cls.__ray_actor_class__
    return {
        "plain": outer.__base__.__init__ is Worker.__init__,
        "worker": issubclass(outer, Worker),
        "methods": sorted(
            name.removeprefix("actor_rollout_ref_")
            for name in dir(outer)
            if name.startswith("actor_rollout_ref_") and hasattr(getattr(outer, name), MAGIC_ATTR)
        ),
    }


def main(stage: Path) -> dict[str, Any]:
    """Everything that the test asks for."""
    config = read_config(stage / "train.yaml")
    cuda = Fixes(reference="elsewhere", exact_zero=True, count_rounded=None, device="cuda", ray_address=None)
    anchored, equal = worker_class(cuda), [0.7] * 7
    baselines = {"reward_baselines": torch.tensor([0.25, 0.25])}
    told: dict[str, Any] = {
        "paths": built(anchored, config),
        "framework_paths": built(FSDPWorker, config),
        "outer": outer_base(anchored),
        "framework_outer": outer_base(FSDPWorker),
        "naive_outer": outer_base(type("Naive", (FSDPWorker,), {})),
        "grpo_before": estimate("grpo", equal),
        "mixed_before": estimate("grpo", [1.0, 0.0, 0.0, 1.0]),
        "remax_before": raised(lambda: estimate("remax", [1.0, 0.0], **baselines)),
    }
    apply_fixes(cuda, config)
    config.algorithm.adv_estimator = "remax"
    apply_fixes(cuda, config)
    config.worker.actor.model.lora.rank = 8
    return told | {
        "grpo": estimate("grpo", equal),
        "mixed": estimate("grpo", [1.0, 0.0, 0.0, 1.0]),
        "remax": estimate("remax", [1.0, 0.0], **baselines),
        "lora": raised(lambda: apply_fixes(cuda, config)),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
