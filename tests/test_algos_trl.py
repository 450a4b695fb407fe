"""The mathematics against numbers that TRL's own trainers computed: values and gradients, rtol 1e-5, atol 1e-6."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cpt_rft.algos.aggregate import StepSize, token_mean, without_truncated
from cpt_rft.algos.grpo import group_advantages
from cpt_rft.algos.kl import find_estimator, penalised_rewards, ratio_corrected
from cpt_rft.algos.logprobs import entropy, token_logprobs
from cpt_rft.algos.losses import NOT_OFFERED, KlPenalty, PolicyLoss, Sampled, find_loss, policy_objective
from cpt_rft.algos.policy import clip_counts, log_ratios
from cpt_rft.algos.rewards import outcome_rewards
from cpt_rft.algos.rloo import leave_one_out_advantages

FILE = json.loads((Path(__file__).parent / "vectors" / "trl_vectors.json").read_text())
INPUTS, CASES = FILE["inputs"], {case["name"]: case for case in FILE["cases"]}
EPSILON = 1e-4  # of TRL's standard deviations
REFUSED = {
    name: key
    for name, case in CASES.items()
    for key in (*case["config"], *(str(value) for value in case["config"].values()))
    if key in NOT_OFFERED
}
OFFERED = [name for name in CASES if name not in REFUSED]
KNOWN = {
    *("loss_type", "beta", "use_bias_correction_kl", "scale_rewards", "delta", "importance_sampling_level", "epsilon"),
    *("epsilon_high", "mask_truncated_completions", "entropy_coef", "normalize_advantages", "reward_clip_range"),
}


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def close(ours: Tensor, theirs: Any) -> None:
    torch.testing.assert_close(ours, tensor(theirs), rtol=1e-5, atol=1e-6)


MASK = tensor(INPUTS["completion_mask"])
OLD, REFERENCE = tensor(INPUTS["logps_old"]), tensor(INPUTS["logps_ref"])
REWARDS_PG = tensor(INPUTS["rewards"]).view(-1, INPUTS["num_generations"])


def advantages_of(case: dict[str, Any]) -> Tensor:
    """Advantages (S,) of the case's trainer, from rewards."""
    config, rewards_S = case["config"], REWARDS_PG.flatten()
    if case["algo"] == "grpo":
        scale = config.get("scale_rewards", "group")
        return group_advantages(REWARDS_PG, scale=scale, epsilon=EPSILON).flatten()
    if config.get("reward_clip_range"):
        rewards_S = rewards_S.clamp(*config["reward_clip_range"])
    if config["beta"]:
        kl = find_estimator("k1")(OLD, REFERENCE)
        rewards_S = penalised_rewards(outcome_rewards(rewards_S, MASK), kl, MASK, config["beta"]).sum(-1)
    normalise = EPSILON if config.get("normalize_advantages") else None
    return leave_one_out_advantages(rewards_S.view_as(REWARDS_PG), normalise=normalise).flatten()


def loss_of(case: dict[str, Any]) -> PolicyLoss:
    config = case["config"]
    assert set(config) <= KNOWN, f"an option that this test does not know: {set(config) - KNOWN}"
    if case["algo"] == "rloo":
        return find_loss("rloo")
    low = config.get("epsilon", 0.2)
    high = config.get("epsilon_high", low)
    ratio = config.get("importance_sampling_level", "token")
    loss = dataclasses.replace(find_loss(config["loss_type"]), ratio=ratio, clip_low=low, clip_high=high)
    if config["loss_type"] == "cispo":  # there epsilon_high bounds the ratio itself
        return dataclasses.replace(loss, clip_low=1.0, clip_high=high - 1.0)
    return dataclasses.replace(loss, dual_clip=config.get("delta"))


def objective(case: dict[str, Any], rows: slice, logprobs: Tensor, entropy_ST: Tensor | None, micro: int) -> Tensor:
    """Our loss of some rows, of which ``micro`` equal parts make a step."""
    config, loss = case["config"], loss_of(case)
    mask = MASK
    if config.get("mask_truncated_completions"):
        mask = without_truncated(mask, mask.sum(-1) == mask.shape[1])
    whole = mask if config.get("loss_type") != "bnpo" else torch.cat([mask[rows]] * micro)  # bnpo: of the micro-batch
    size = StepSize(len(mask), int(whole.sum()), INPUTS["max_completion_length"])
    old = logprobs.detach() if case.get("on_policy") else OLD[rows]
    advantages = tensor(case["result"]["advantages"])[:, None]
    kl = None
    if case["algo"] == "grpo":
        kl = KlPenalty("k3", config["beta"], corrected=config.get("use_bias_correction_kl", True))
    batch = Sampled(logprobs, old, advantages[rows], mask[rows], REFERENCE[rows], entropy_ST)
    return policy_objective(loss, batch, size, kl=kl, entropy_coefficient=config.get("entropy_coef", 0.0))


@pytest.mark.parametrize("name", OFFERED)
def test_advantages(name: str) -> None:
    close(advantages_of(CASES[name]), CASES[name]["result"]["advantages"])


@pytest.mark.parametrize("name", [name for name in OFFERED if "micro" not in CASES[name]])
def test_losses_and_gradients(name: str) -> None:
    """With respect to log-probabilities, and through them and the entropy to the logits."""
    case = CASES[name]
    policy = "old" if case.get("on_policy") else "new"
    logits = tensor(INPUTS[f"logits_{policy}"]).requires_grad_()
    tokens = torch.tensor(INPUTS["completion_ids"])
    from_logits = token_logprobs(logits.flatten(0, 1), tokens.flatten()).view(tokens.shape)
    from_logits.retain_grad()
    entropies = entropy(logits.flatten(0, 1)).view(tokens.shape)
    loss = objective(case, slice(None), from_logits, entropies, 1)
    loss.backward()
    close(loss.detach(), case["result"]["loss"])
    assert from_logits.grad is not None
    assert logits.grad is not None
    close(from_logits.grad, case["result"]["dloss_dlogps"])
    close(logits.grad.norm(), case["result"]["dloss_dlogits_l2"])


@pytest.mark.parametrize("name", [name for name in OFFERED if "micro" in CASES[name]])
def test_accumulation(name: str) -> None:
    case = CASES[name]
    micro = case["micro"]
    rows = len(MASK) // micro
    logprobs = tensor(INPUTS["logps_new"])
    parts = [slice(index * rows, (index + 1) * rows) for index in range(micro)]
    losses = torch.stack([objective(case, part, logprobs[part], None, micro) for part in parts])
    close(losses, case["result"]["micro_losses"])
    close(losses.sum(), case["result"]["accumulated_loss"])


@pytest.mark.parametrize("name", [name for name in OFFERED if "micro" not in CASES[name]])
def test_metrics(name: str) -> None:
    """Shares of clipped tokens, and the mean divergence."""
    case = CASES[name]
    config, metrics = case["config"], case["result"]["metrics"]
    loss = loss_of(case)
    mask = MASK
    if config.get("mask_truncated_completions"):
        mask = without_truncated(mask, mask.sum(-1) == mask.shape[1])
    logprobs = OLD if case.get("on_policy") else tensor(INPUTS["logps_new"])
    log_ratio = log_ratios(loss.ratio, logprobs, OLD, mask)
    advantages = tensor(case["result"]["advantages"])[:, None]
    if "clip_ratio/low_mean" in metrics:
        counts_of = mask if loss.ratio == "token" else mask * (torch.arange(mask.shape[1]) == 0)  # once a sequence
        counts = clip_counts(
            log_ratio, advantages, counts_of, clip_low=loss.clip_low, clip_high=loss.clip_high, dual_clip=None
        )
        close(counts.low / counts_of.sum(), metrics["clip_ratio/low_mean"])
        close(counts.high / counts_of.sum(), metrics["clip_ratio/high_mean"])
    if "kl" in metrics and case["algo"] == "grpo":
        kl = find_estimator("k3")(logprobs, REFERENCE)
        if config.get("use_bias_correction_kl", True):
            kl = ratio_corrected(kl, log_ratio)
        close(token_mean(kl, mask, mask.sum()), metrics["kl"])


def test_what_is_not_checked_is_not_offered() -> None:
    assert {CASES[name]["config"].get("loss_type") for name in OFFERED} >= {"grpo", "bnpo", "dr_grpo", "dapo", "sapo"}
    assert set(REFUSED.values()) <= set(NOT_OFFERED)
    assert len(OFFERED) >= 40
