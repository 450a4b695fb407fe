"""EasyR1's own start, with our fixes applied where they must be: in the process that runs its trainer.

Usage: python -m cpt_rft.engines.easyr1.entry TRAIN_YAML FIXES_JSON, by the Python of EasyR1's environment.

Source: EasyR1@b44b311 verl/trainer/main.py. Differs from: no options on the command line; no validation, which the
source always does once the training is over; the fixes; device cpu; a Ray address. A patch of the driver would not
reach the trainer, which lives in an actor of its own: hence a runner of ours.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import ray

from cpt_rft.engines.easyr1.fixes import Fixes, apply_fixes, worker_class
from cpt_rft.engines.easyr1.stand_in import HOOK, stand_in

# As the source sets them in every process of the job.
_VARIABLES = {
    "TOKENIZERS_PARALLELISM": "true",
    "NCCL_DEBUG": "WARN",
    "VLLM_LOGGING_LEVEL": "WARN",
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}


class Runner:
    """The process of the trainer."""

    def run(self, config: Any, fixes: Fixes) -> None:
        """Train.

        Args:
            config: The framework's configuration, complete.
            fixes: What is to be mended.
        """
        from verl.trainer.data_loader import create_dataloader
        from verl.utils.tokenizer import get_processor, get_tokenizer
        from verl.workers.reward import AutoRewardManager

        apply_fixes(fixes, config)
        from verl.single_controller.ray import RayWorkerGroup
        from verl.trainer.ray_trainer import RayPPOTrainer, ResourcePoolManager, Role

        print(json.dumps(config.to_dict(), indent=2))
        model = config.worker.actor.model
        loading = {"override_chat_template": config.data.override_chat_template, "use_fast": True}
        loading["trust_remote_code"] = model.trust_remote_code
        tokenizer = get_tokenizer(model.model_path, **loading)
        processor = get_processor(model.model_path, **loading)
        rewards = ray.remote(AutoRewardManager).options(num_cpus=config.worker.reward.num_cpus)
        train, validation = create_dataloader(config.data, tokenizer, processor)
        pool = {"global_pool": [config.trainer.n_gpus_per_node] * config.trainer.nnodes}
        trainer = RayPPOTrainer(
            config=config,
            tokenizer=tokenizer,
            processor=processor,
            train_dataloader=train,
            val_dataloader=validation,
            role_worker_mapping={Role.ActorRolloutRef: ray.remote(worker_class(fixes))},
            resource_pool_manager=ResourcePoolManager(pool, {Role.ActorRolloutRef: "global_pool"}),
            ray_worker_group_cls=RayWorkerGroup,
            reward_fn=rewards.remote(config.worker.reward, tokenizer),
            val_reward_fn=None,
        )
        trainer.init_workers()
        trainer.fit()


def read_config(path: Path) -> Any:
    """The framework's configuration from its defaults and a file."""
    from omegaconf import OmegaConf
    from verl.trainer.config import PPOConfig

    merged = OmegaConf.merge(OmegaConf.structured(PPOConfig()), OmegaConf.load(path))
    config = OmegaConf.to_object(merged)
    config.deep_post_init()
    return config


def start_ray(fixes: Fixes, config: Any) -> None:
    """Join the cluster that is told or that ``RAY_ADDRESS`` names, or start one; on device cpu always one of our own.

    There its GPUs are only numbers, since the framework asks Ray for one a worker, and its CPUs are as many as the
    framework will ask for, since with fewer it would wait for ever.
    """
    environment: dict[str, Any] = {"env_vars": _VARIABLES}
    if fixes.device == "cuda":
        ray.init(address=fixes.ray_address, runtime_env=environment)
        return
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # where it names no GPU, Ray would hand out no number either
    workers = config.trainer.n_gpus_per_node * config.trainer.nnodes
    cpus = max(os.cpu_count() or 1, workers + 1 + 2 * config.worker.reward.num_cpus)
    environment["worker_process_setup_hook"] = HOOK
    ray.init(address="local", num_gpus=workers, num_cpus=cpus, include_dashboard=False, runtime_env=environment)


def main(train: Path, fixes_file: Path) -> None:
    """Run the stage that two files describe."""
    fixes = Fixes.read(fixes_file)
    if fixes.device == "cpu":
        stand_in()
    config = read_config(train)
    start_ray(fixes, config)
    runner = ray.remote(num_cpus=1)(Runner).remote()
    ray.get(runner.run.remote(config, fixes))
    if config.trainer.ray_timeline is not None:
        ray.timeline(filename=config.trainer.ray_timeline)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
