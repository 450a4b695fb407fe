"""The mathematics against numbers that EasyR1 and TRL themselves computed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cpt_rft.algos.aggregate import token_mean
from cpt_rft.algos.grpo import clipped_policy_loss, group_advantages, k3_divergence

VECTORS = Path(__file__).parent / "vectors"
EASYR1 = {case["name"]: case for case in json.loads((VECTORS / "easyr1_grpo.json").read_text())["cases"]}
TRL = json.loads((VECTORS / "trl_grpo.json").read_text())
TRL_CASES = {case["name"]: case for case in TRL["cases"]}


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def close(ours: Tensor, theirs: Any) -> None:
    torch.testing.assert_close(ours, tensor(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in EASYR1 if name.startswith("grpo/")])
def test_advantages_are_those_of_easyr1(name: str) -> None:
    case = EASYR1[name]
    mask = tensor(case["inputs"]["response_mask"])
    rewards = tensor(case["inputs"]["token_level_rewards"]).sum(-1)
    index = case["inputs"]["index"]
    for group in sorted(set(index)):
        members = [row for row, other in enumerate(index) if other == group]
        advantages = group_advantages(rewards[members][None])[0]
        theirs = tensor(case["outputs"]["advantages"])[members]
        torch.testing.assert_close(advantages[:, None] * mask[members], theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in EASYR1 if name.startswith("policy/default/token")])
def test_policy_loss_and_gradient_are_those_of_easyr1(name: str) -> None:
    inputs, outputs = EASYR1[name]["inputs"], EASYR1[name]["outputs"]
    logprobs, mask = tensor(inputs["log_probs"]).requires_grad_(), tensor(inputs["response_mask"])
    losses = clipped_policy_loss(
        logprobs,
        tensor(inputs["old_log_probs"]),
        tensor(inputs["advantages"]),
        clip_low=inputs["clip_ratio_low"],
        clip_high=inputs["clip_ratio_high"],
        dual_clip=inputs["clip_ratio_dual"],
    )
    loss = token_mean(losses, mask, mask.sum())
    loss.backward()
    close(loss.detach(), outputs["loss"])
    assert logprobs.grad is not None
    close(logprobs.grad, outputs["grad_log_probs"])


def test_divergence_and_gradient_are_those_of_easyr1() -> None:
    inputs = EASYR1["kl/low_var_kl"]["inputs"]
    logprobs = tensor(inputs["log_probs"]).requires_grad_()
    divergence = k3_divergence(logprobs, tensor(inputs["ref_log_probs"]))
    divergence.sum().backward()
    close(divergence.detach(), EASYR1["kl/low_var_kl"]["outputs"]["kl"])
    assert logprobs.grad is not None
    close(logprobs.grad, EASYR1["kl/low_var_kl_grad"]["outputs"]["grad"])


def test_token_mean_is_that_of_easyr1() -> None:
    case = EASYR1["average_loss"]
    mask = tensor(case["inputs"]["mask"])
    close(token_mean(tensor(case["inputs"]["values"]), mask, mask.sum()), case["outputs"]["token"])


@pytest.mark.parametrize("name", list(TRL_CASES))
def test_loss_and_gradient_are_those_of_trl(name: str) -> None:
    """TRL clips at 0.2 on both sides, without dual clip; its advantages (epsilon 1e-4) are taken as given."""
    case, inputs = TRL_CASES[name], TRL["inputs"]
    on_policy, beta = case.get("on_policy", False), case["config"]["beta"]
    mask = tensor(inputs["completion_mask"])
    logprobs = tensor(inputs["logps_old" if on_policy else "logps_new"]).requires_grad_()
    old = logprobs.detach() if on_policy else tensor(inputs["logps_old"])
    advantages = tensor(case["result"]["advantages"])
    losses = clipped_policy_loss(logprobs, old, advantages[:, None], clip_low=0.2, clip_high=0.2, dual_clip=None)
    losses = losses + beta * k3_divergence(logprobs, tensor(inputs["logps_ref"]))
    loss = token_mean(losses, mask, mask.sum())
    loss.backward()
    torch.testing.assert_close(loss.detach(), tensor(case["result"]["loss"]), rtol=2e-5, atol=2e-6)
    if not (on_policy and beta):  # there TRL multiplies the divergence by the ratio, which changes its gradient
        assert logprobs.grad is not None
        torch.testing.assert_close(logprobs.grad, tensor(case["result"]["dloss_dlogps"]), rtol=2e-4, atol=2e-6)


def test_advantages_are_those_of_trl_up_to_its_epsilon() -> None:
    case = TRL_CASES["dapo beta0.0 onpolicy"]
    rewards = tensor(TRL["inputs"]["rewards"]).view(2, 4)
    theirs = tensor(case["result"]["advantages"]).view(2, 4)
    torch.testing.assert_close(group_advantages(rewards), theirs, rtol=1e-3, atol=1e-6)
