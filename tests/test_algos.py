"""The mathematics against closed forms and invariances."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cpt_rft.algos.aggregate import token_mean
from cpt_rft.algos.grpo import group_advantages, zero_variance
from cpt_rft.algos.kl import k3_divergence
from cpt_rft.algos.logprobs import entropy, token_logprobs
from cpt_rft.algos.policy import clipped_policy_loss
from cpt_rft.algos.sft import sft_loss
from cpt_rft.errors import UserError

REWARDS = st.sampled_from([0.0, 0.1, 0.9, 1.0, 1 / 3, 0.7])
GROUPS = st.integers(2, 9).flatmap(
    lambda n: st.lists(st.lists(REWARDS, min_size=n, max_size=n), min_size=1, max_size=4)
)


def test_one_right_of_eight() -> None:
    """Mean 1/8, unbiased variance 1/8: the right one gets (7/8) / sqrt(1/8), the others (-1/8) / sqrt(1/8)."""
    advantages = group_advantages(torch.tensor([[1.0] + [0.0] * 7]))[0]
    assert advantages[0].item() == pytest.approx(0.875 / math.sqrt(0.125), rel=1e-4)
    assert advantages[1:].tolist() == pytest.approx([-0.125 / math.sqrt(0.125)] * 7, rel=1e-4)


@pytest.mark.parametrize("size", range(2, 17))
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_have_advantage_zero_exactly(size: int, value: float, dtype: torch.dtype) -> None:
    rewards = torch.full((3, size), value, dtype=dtype)
    assert group_advantages(rewards).count_nonzero() == 0
    assert zero_variance(rewards).all()


@pytest.mark.parametrize("rewards", [torch.ones(4, 1), torch.ones(4), torch.ones(0, 1)])
def test_a_group_of_one_is_refused(rewards: torch.Tensor) -> None:
    with pytest.raises(UserError, match="at least 2 completions"):
        group_advantages(rewards)


@given(GROUPS)
@settings(max_examples=60)
def test_advantages_follow_their_completions_and_prompts(groups: list[list[float]]) -> None:
    """Permuting completions or prompts permutes advantages; a prompt that stands twice keeps its own group."""
    rewards = torch.tensor(groups, dtype=torch.float64)
    advantages = group_advantages(rewards)
    columns = torch.randperm(rewards.shape[1], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(group_advantages(rewards[:, columns]), advantages[:, columns])
    torch.testing.assert_close(group_advantages(rewards.flip(0)), advantages.flip(0))
    doubled = group_advantages(torch.cat([rewards, rewards]))
    torch.testing.assert_close(doubled, torch.cat([advantages, advantages]))
    torch.testing.assert_close(advantages.mean(1), torch.zeros(len(groups), dtype=torch.float64), atol=1e-9, rtol=0)


@given(st.floats(-8, 0), st.floats(-8, 0))
@example(-(2.0**-24), 0.0)
def test_k3_is_not_negative_and_zero_only_at_equality(policy: float, reference: float) -> None:
    value = k3_divergence(torch.tensor([policy]), torch.tensor([reference])).item()
    assert value >= 0
    assert policy != reference or value == 0.0


def test_k3_estimates_the_divergence() -> None:
    """Its mean under the policy is KL(policy || reference)."""
    policy, reference = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.3, 0.5]).log()
    kl = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * k3_divergence(policy, reference)).sum(), kl)


def test_on_policy_gradient_is_minus_the_advantage() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.3], requires_grad=True)
    advantages = torch.tensor([0.5, -2.0, 0.0])
    losses = clipped_policy_loss(logprobs, logprobs.detach(), advantages)
    losses.sum().backward()
    assert torch.equal(losses.detach(), -advantages)
    assert logprobs.grad is not None
    assert torch.equal(logprobs.grad, -advantages)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "flows"),
    [
        (1.25, 1.0, -1.25, True),  # inside the clip
        (1.5, 1.0, -1.3, False),  # too far up: clipped at 1 + 0.3
        (0.5, 1.0, -0.5, True),  # down with a good token: not clipped, it is pulled back up
        (0.5, -1.0, 0.8, False),  # too far down: clipped at 1 - 0.2
        (2.0, -1.0, 2.0, True),  # up with a bad token: pushed down
        (4.0, -1.0, 3.0, False),  # but by at most 3
    ],
)
def test_clipping(ratio: float, advantage: float, loss: float, flows: bool) -> None:
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    losses = clipped_policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]))
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss, rel=1e-5)
    assert logprobs.grad is not None
    assert bool(logprobs.grad.count_nonzero()) is flows


def test_the_first_step_on_policy_is_the_plain_policy_gradient() -> None:
    """One tensor as both policies: the ratio is 1, yet the gradient is minus the advantage, as of old values."""
    logprobs = torch.tensor([-0.5, -2.0], requires_grad=True)
    losses = clipped_policy_loss(logprobs, logprobs, torch.tensor([1.5, -0.5]))
    losses.sum().backward()
    assert losses.tolist() == [-1.5, 0.5]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-1.5, 0.5]


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    values, mask = torch.randn(6, 5), (torch.rand(6, 5) < 0.6).float()
    tokens = mask.sum()
    whole = token_mean(values, mask, tokens)
    parts = sum(token_mean(values[part], mask[part], tokens) for part in (slice(0, 1), slice(1, 4), slice(4, 6)))
    torch.testing.assert_close(parts, whole)
    assert whole.item() == pytest.approx((values * mask).sum().item() / tokens.item(), rel=1e-5)


def test_a_batch_without_tokens_has_no_loss_and_no_gradient() -> None:
    values = torch.full((2, 3), float("inf"), requires_grad=True)
    loss = token_mean(values, torch.zeros(2, 3), 0)
    loss.backward()
    assert loss.item() == 0.0
    assert values.grad is not None
    assert values.grad.count_nonzero() == 0


def test_token_logprobs_are_those_of_log_softmax() -> None:
    logits, tokens = torch.randn(7, 11), torch.arange(7)
    expected = torch.log_softmax(logits / 1.7, -1)[torch.arange(7), tokens]
    torch.testing.assert_close(token_logprobs(logits, tokens, temperature=1.7), expected)


def test_a_banned_token_has_no_share_and_no_gradient() -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    banned = torch.tensor([0.0, 0.0, float("-inf"), 0.0, 0.0])
    logprobs = token_logprobs(logits + banned, torch.tensor([0, 1, 3, 4]))
    rest = torch.log_softmax(logits[:, [0, 1, 3, 4]], -1)[torch.arange(4), torch.arange(4)]
    torch.testing.assert_close(logprobs, rest)
    logprobs.sum().backward()
    assert logits.grad is not None
    assert logits.grad[:, 2].count_nonzero() == 0
    assert torch.isfinite(entropy(logits.detach() + banned)).all()


def test_entropy_of_a_flat_distribution() -> None:
    torch.testing.assert_close(entropy(torch.zeros(2, 8)), torch.full((2,), math.log(8)))


def test_sft_loss_is_cross_entropy() -> None:
    logits, targets = torch.randn(6, 9), torch.randint(0, 9, (6,))
    mask = torch.tensor([1.0, 1, 0, 1, 0, 1])
    expected = torch.nn.functional.cross_entropy(logits[mask.bool()], targets[mask.bool()])
    torch.testing.assert_close(sft_loss(token_logprobs(logits, targets), mask, 4), expected)
