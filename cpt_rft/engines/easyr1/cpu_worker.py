"""EasyR1's worker without a GPU: rollouts, log-probabilities and updates by our local engine.

It takes and gives what the framework's FSDPWorker takes and gives, so that the trainer, the data set, the reward
manager, the logs and the checkpoints are the framework's own. The objective is the framework's own function; a prompt
is computed once for its responses. One process, float32, no adapter; everything else is refused by name.

Source: EasyR1@b44b311 verl/workers/fsdp_workers.py, verl/workers/actor/dp_actor.py,
verl/workers/rollout/vllm_rollout_spmd.py. Differs from: vision tokens have no probability at all (there the image token
has a logit lower by 100 in rollouts, and none in training); a micro-batch is a number of rows, never a number of
tokens; sampling is reproducible across a resume.
"""

import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import GenerationConfig
from verl.protocol import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.core_algos import average_loss, compute_kl, compute_policy_loss
from verl.utils import torch_functional as framework
from verl.utils.py_functional import append_to_dict
from verl.utils.tokenizer import get_processor

from cpt_rft.checkpoint import EncodedPrompt, Policy, load_policy
from cpt_rft.config.methods import SftMethod
from cpt_rft.engines.easyr1.cpu_batch import Sampling, encoded_prompts, response_logprobs, responses
from cpt_rft.engines.easyr1.stand_in import refuse_what_needs_a_gpu
from cpt_rft.engines.local.generate import generate
from cpt_rft.engines.local.optimise import Optimiser
from cpt_rft.seeds import derive_seed


class WithoutCuda(Worker):
    """The framework's base class, which asks for the name of a GPU when it is made."""

    def __init__(self) -> None:
        with patch.object(torch.cuda, "get_device_name", return_value="cpu"):
            super().__init__()


class LocalWorker(WithoutCuda):
    """Actor, rollout and reference of a stage in one process.

    Args:
        config: The framework's ``worker`` section.
        role: Always all three in one.

    Raises:
        ConfigError: The configuration asks for something that needs a GPU.
    """

    def __init__(self, config: Any, role: str) -> None:
        super().__init__()
        refuse_what_needs_a_gpu(config, role, self.world_size)
        self.config = config
        self.sampled = 0  # calls that sampled, also before a resume: each has its own seeds
        self.prompts: dict[str, EncodedPrompt] = {}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Load the actor and, where there is a penalty, the reference."""
        actor, ref = self.config.actor, self.config.ref
        same = {"model_config": actor.model, "padding_free": False}
        self._build_model_optimizer(**same, fsdp_config=actor.fsdp, optim_config=actor.optim, role="actor")
        if not actor.disable_kl:
            self._build_model_optimizer(**same, fsdp_config=ref.fsdp, optim_config=None, role="ref")

    def _build_model_optimizer(
        self, *, model_config: Any, fsdp_config: Any, optim_config: Any, padding_free: bool, role: str
    ) -> None:
        policy = load_policy(Path(model_config.model_path))
        if role == "ref":
            self.reference = policy
            return
        self.policy = policy
        self.generation_config = GenerationConfig.from_pretrained(model_config.model_path)
        self.processor = get_processor(model_config.tokenizer_path, use_fast=True)
        if model_config.freeze_vision_tower:
            policy.model.model.visual.requires_grad_(False)
        self.schedule = learning_rates(optim_config)
        self.optimiser = Optimiser(
            policy.model,
            _optimiser_settings(optim_config, self.config.actor.max_grad_norm),
            steps=1,
            dtype=torch.float32,
            max_skipped=sys.maxsize,  # the framework goes on for ever
        )

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def prepare_rollout_engine(self) -> None:
        """Nothing: rollouts are by the weights that are trained."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def release_rollout_engine(self) -> None:
        """Nothing, as above."""

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def generate_sequences(self, prompts: DataProto) -> DataProto:
        """Responses of prompts, ``n`` each and next to each other."""
        prompts.meta_info.update(
            eos_token_id=self.generation_config.eos_token_id, pad_token_id=self.generation_config.pad_token_id
        )
        how = Sampling.read(self.config.rollout, prompts.meta_info)
        seeds = None
        if how.temperature > 0:
            seeds = [derive_seed("easyr1", how.seed, self.sampled, place) for place in range(len(prompts))]
            self.sampled += 1
        groups = generate(
            self.policy,
            encoded_prompts(prompts, self.processor),
            group=how.n,
            max_new_tokens=self.config.rollout.response_length,
            temperature=how.temperature,
            top_p=how.top_p,
            seeds=seeds,
        )
        tokens = [each.token_ids for group in groups for each in group]
        return responses(prompts, tokens, how.n, self.config.rollout.response_length)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def compute_log_probs(self, data: DataProto) -> DataProto:
        """Log-probabilities of the responses under the actor."""
        temperature = self.config.rollout.temperature
        found = self._logprobs(self.policy, data)
        return DataProto.from_dict(tensors={"old_log_probs": found}, meta_info={"temperature": temperature})

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def compute_ref_log_probs(self, data: DataProto) -> DataProto:
        """Log-probabilities of the responses under the reference."""
        return DataProto.from_dict(tensors={"ref_log_probs": self._logprobs(self.reference, data)})

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def update_actor(self, data: DataProto) -> DataProto:
        """All optimiser steps on a batch."""
        actor = self.config.actor
        rate = self.schedule.get_last_lr()[0]
        self.optimiser.method = self.optimiser.method.model_copy(update={"lr": rate})
        metrics: dict[str, Any] = defaultdict(list)
        for _ in range(actor.ppo_epochs):
            for batch in data.split(actor.global_batch_size * self.config.rollout.n):
                total = batch.batch["response_mask"].sum()
                losses = [
                    self._backward(part, total, metrics)
                    for part in batch.split(actor.micro_batch_size_per_device_for_update)
                ]
                outcome = self.optimiser.step(0, sum(losses))
                if not outcome.moved:
                    print("Gradient norm is not finite. Skip update.")
                norm = math.nan if outcome.grad_norm is None else outcome.grad_norm
                append_to_dict(metrics, {"actor/grad_norm": norm})
        self.schedule.optimizer.step()  # moves nothing: the schedule wants to see it
        self.schedule.step()
        metrics |= {"actor/lr": rate, "perf/cpu_memory_used_gb": psutil.virtual_memory().used / 1024**3}
        arrays = {key: np.array([value] if np.isscalar(value) else value) for key, value in metrics.items()}
        return DataProto(non_tensor_batch=arrays)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, path: str, save_model_only: bool = False) -> None:
        """Write the framework's files: a shard a kind for the one rank that there is, and what a merge needs."""
        folder = Path(path)
        (folder / "huggingface").mkdir(parents=True, exist_ok=True)
        torch.save(self.policy.model.state_dict(), folder / _shard("model"))
        if not save_model_only:
            optimiser = self.optimiser.state()
            del optimiser["master"]  # it is the model
            torch.save(optimiser, folder / _shard("optim"))
            torch.save(
                {"lr_scheduler": self.schedule.state_dict(), "sampled": self.sampled}, folder / _shard("extra_state")
            )
        self.policy.model.config.save_pretrained(folder / "huggingface")
        self.generation_config.save_pretrained(folder / "huggingface")
        self.processor.save_pretrained(folder / "huggingface")

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, path: str) -> None:
        """Go on from what `save_checkpoint` wrote."""
        model, optimiser, extra = (torch.load(Path(path) / _shard(kind)) for kind in ("model", "optim", "extra_state"))
        self.policy.model.load_state_dict(model)
        self.optimiser.restore({"master": self.optimiser.flat(model), **optimiser})
        self.schedule.load_state_dict(extra["lr_scheduler"])
        self.sampled = extra["sampled"]

    def _encoded(self, data: DataProto) -> list[EncodedPrompt]:
        """The prompt of every row, each made once a batch."""
        uids = list(data.non_tensor_batch["uid"])
        if not set(uids) <= self.prompts.keys():
            firsts = [uids.index(uid) for uid in dict.fromkeys(uids)]
            self.prompts = dict(zip(dict.fromkeys(uids), encoded_prompts(data[firsts], self.processor), strict=True))
        return [self.prompts[uid] for uid in uids]

    @torch.no_grad()
    def _logprobs(self, policy: Policy, data: DataProto) -> Tensor:
        self._encoded(data)
        parts = data.split(self.config.actor.micro_batch_size_per_device_for_experience)
        return torch.cat([self._forward(policy, part) for part in parts])

    def _forward(self, policy: Policy, rows: DataProto) -> Tensor:
        uids = list(rows.non_tensor_batch["uid"])
        return response_logprobs(policy, rows, self._encoded(rows), uids, self.config.rollout.temperature)

    def _backward(self, rows: DataProto, total: Tensor, metrics: dict[str, Any]) -> float:
        """Add the gradient of some rows of an optimiser step that has ``total`` response tokens; its loss."""
        actor, tensors = self.config.actor, rows.batch
        mask = tensors["response_mask"]
        logprobs = self._forward(self.policy, rows)
        policy_loss, numbers = compute_policy_loss(
            old_log_probs=tensors["old_log_probs"],
            log_probs=logprobs,
            advantages=tensors["advantages"],
            response_mask=mask,
            clip_ratio_low=actor.clip_ratio_low,
            clip_ratio_high=actor.clip_ratio_high,
            clip_ratio_dual=actor.clip_ratio_dual,
            tau_positive=actor.tau_positive,
            tau_negative=actor.tau_negative,
            loss_type=actor.loss_type,
            loss_avg_mode=actor.loss_avg_mode,
        )
        loss = policy_loss
        if actor.use_kl_loss and "ref_log_probs" in tensors:
            kl = compute_kl(log_probs=logprobs, ref_log_probs=tensors["ref_log_probs"], kl_penalty=actor.kl_penalty)
            kl_loss = average_loss(kl, mask, mode=actor.loss_avg_mode)
            loss = loss + actor.kl_coef * kl_loss
            metrics |= {"actor/kl_loss": float(kl_loss.detach()), "actor/kl_coef": actor.kl_coef}
        loss = loss * mask.sum() / total
        self.optimiser.backward(loss)
        told = {**numbers, "pg_loss": float(policy_loss.detach())}
        append_to_dict(metrics, {f"actor/{key}": value for key, value in told.items()})
        return float(loss.detach())


def learning_rates(optim: Any) -> Any:
    """The framework's own schedule; its rate is read, and what it drives is a number that no one uses."""
    driven = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=optim.lr)
    warmup = optim.lr_warmup_steps
    if warmup is None:
        warmup = int(optim.lr_warmup_ratio * optim.training_steps)
    if optim.lr_scheduler_type == "constant":
        return framework.get_constant_schedule_with_warmup(driven, warmup)
    return framework.get_cosine_schedule_with_warmup(
        driven, warmup, optim.training_steps, min_lr_ratio=optim.min_lr_ratio
    )


def _optimiser_settings(optim: Any, max_grad_norm: float) -> SftMethod:
    """AdamW's settings in the form that our optimiser reads; the objective in it is not used."""
    return SftMethod(
        kind="sft",
        name="easyr1",
        style="direct",
        prompts_per_step=1,
        micro_batch=1,
        lr=optim.lr,
        betas=tuple(optim.betas),
        weight_decay=optim.weight_decay,
        max_grad_norm=max_grad_norm,
    )


def _shard(kind: str) -> str:
    return f"{kind}_world_size_1_rank_0.pt"
