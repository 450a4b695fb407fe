"""Holds our CPU worker against EasyR1's own actor: the same batch, log-probabilities and weights after an update.

Usage: python easyr1_worker.py STAGE, by the Python of EasyR1's environment; STAGE holds ``train.yaml``. Prints a JSON
object of the largest differences, which the test reads. EasyR1's actor takes the stock model here, without padding-free
attention, which is all of it that runs without a GPU.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import Qwen2_5_VLForConditionalGeneration

from cpt_rft.engines.easyr1 import cpu_batch
from cpt_rft.engines.easyr1.entry import read_config
from cpt_rft.engines.easyr1.stand_in import stand_in

stand_in()

from verl.protocol import DataProto  # noqa: E402
from verl.trainer.data_loader import create_dataloader  # noqa: E402
from verl.trainer.ray_trainer import compute_advantage  # noqa: E402
from verl.utils.dataset import process_image  # noqa: E402
from verl.utils.tokenizer import get_processor, get_tokenizer  # noqa: E402
from verl.workers.actor.dp_actor import DataParallelPPOActor  # noqa: E402

from cpt_rft.engines.easyr1.cpu_worker import LocalWorker  # noqa: E402


def first_batch(config: Any, worker: LocalWorker) -> DataProto:
    """What the trainer hands to its workers in the first step, with rewards that are drawn."""
    path = config.worker.actor.model.model_path
    loader, _ = create_dataloader(config.data, get_tokenizer(path), get_processor(path))
    limits = {"min_pixels": config.data.min_pixels, "max_pixels": config.data.max_pixels, "video_fps": 2.0}
    batch = DataProto.from_single_dict(next(iter(loader)), meta_info=limits)
    batch.non_tensor_batch["uid"] = np.array([f"prompt {row}" for row in range(len(batch))], dtype=object)
    keys = {"non_tensor_batch_keys": ["raw_prompt_ids", "multi_modal_data"], "meta_info_keys": list(limits)}
    asked = batch.pop(batch_keys=["input_ids", "attention_mask", "position_ids"], **keys)
    batch = batch.repeat(config.worker.rollout.n).union(worker.generate_sequences(asked))
    batch.reorder(torch.randperm(len(batch), generator=torch.Generator().manual_seed(0)))
    ends = batch.batch["response_mask"].sum(-1) - 1
    scores = torch.zeros(batch.batch["responses"].shape)
    scores[torch.arange(len(batch)), ends] = torch.rand(len(batch), generator=torch.Generator().manual_seed(1))
    batch.batch["token_level_rewards"] = scores
    return compute_advantage(batch, config.algorithm.adv_estimator)


def with_pictures(batch: DataProto, processor: Any) -> DataProto:
    """As FSDPWorker._process_multi_modal_inputs gives them to the actor."""
    limits = batch.meta_info["min_pixels"], batch.meta_info["max_pixels"]
    cut = [
        dict(processor.image_processor([process_image(each, *limits) for each in row["images"]], return_tensors="pt"))
        for row in batch.non_tensor_batch["multi_modal_data"]
    ]
    batch.non_tensor_batch["multi_modal_inputs"] = np.array(cut, dtype=object)
    return batch


def main(stage: Path) -> dict[str, float]:
    """The largest differences."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29571", rank=0, world_size=1)
    config = read_config(stage / "train.yaml")
    config.worker.actor.optim.training_steps = 1
    worker = LocalWorker(config.worker, "actor_rollout_ref")
    worker.init_model()
    batch = first_batch(config, worker)
    # The framework's training gives vision tokens the probability that the model gives them.
    cpu_batch.suppression = lambda policy, device: torch.zeros(policy.model.config.text_config.vocab_size)
    actor = config.worker.actor
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(actor.model.model_path, attn_implementation="eager")
    settings = {"lr": actor.optim.lr, "betas": tuple(actor.optim.betas), "weight_decay": actor.optim.weight_decay}
    theirs = DataParallelPPOActor(actor, model, torch.optim.AdamW(model.parameters(), **settings))
    actor.global_batch_size_per_device = actor.global_batch_size * config.worker.rollout.n

    batch = with_pictures(batch.union(worker.compute_log_probs(batch)), worker.processor)
    batch = batch.union(worker.compute_ref_log_probs(batch))
    real = batch.batch["response_mask"].bool()
    gap = float((batch.batch["old_log_probs"] - theirs.compute_log_prob(batch))[real].abs().max())
    draws = torch.Generator().manual_seed(2)
    # Another policy and another reference than the actor's, so that clip and penalty have something to do.
    for name, distance in (("old_log_probs", 0.3), ("ref_log_probs", 0.1)):
        batch.batch[name] += distance * torch.randn(real.shape, generator=draws)
    told = worker.update_actor(batch).non_tensor_batch
    metrics = theirs.update_policy(batch)
    ours, stock = worker.policy.model.state_dict(), model.state_dict()
    before = Qwen2_5_VLForConditionalGeneration.from_pretrained(actor.model.model_path).state_dict()
    return {
        "logprobs": gap,
        "moved": max(float((stock[name] - before[name]).abs().max()) for name in stock),
        "weights": float(np.mean([float((ours[name] - stock[name]).abs().mean()) for name in stock])),
        "step": float(np.mean([float((before[name] - stock[name]).abs().mean()) for name in stock])),
        "pg_loss": abs(float(np.mean(told["actor/pg_loss"])) - float(np.mean(metrics["actor/pg_loss"]))),
        "grad_norm": abs(float(told["actor/grad_norm"][0]) / float(metrics["actor/grad_norm"][0]) - 1.0),
        "clipped": float(np.mean(metrics["actor/pg_clipfrac_higher"])),
        "clipping": abs(
            float(np.mean(told["actor/pg_clipfrac_higher"])) - float(np.mean(metrics["actor/pg_clipfrac_higher"]))
        ),
        "penalty": float(metrics["actor/kl_loss"]),
        "kl_loss": abs(float(told["actor/kl_loss"][0]) - float(metrics["actor/kl_loss"])),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
