"""Advantages and whole objectives: closed forms, invariances, and what is refused."""

import dataclasses
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpt_rft.algos.aggregate import StepSize, aggregate, pad_rows, without_truncated
from cpt_rft.algos.grpo import Scale, group_advantages, paper_group_advantages
from cpt_rft.algos.kl import (
    ESTIMATORS,
    adaptive_coefficient,
    find_estimator,
    full_divergence,
    penalised_rewards,
    ratio_corrected,
)
from cpt_rft.algos.losses import LOSSES, KlPenalty, PolicyLoss, Sampled, find_loss, policy_objective
from cpt_rft.algos.policy import RatioLevel, clip_counts, log_ratios
from cpt_rft.algos.reinforce import reinforce_plus_plus_advantages
from cpt_rft.algos.remax import greedy_baseline_advantages
from cpt_rft.algos.rewards import outcome_rewards, reward_groups
from cpt_rft.algos.rloo import leave_one_out_advantages
from cpt_rft.errors import UserError

REWARDS = st.sampled_from([0.0, 0.1, 0.9, 1.0, 1 / 3, 0.7])
GROUPS = st.integers(2, 9).flatmap(
    lambda n: st.lists(st.lists(REWARDS, min_size=n, max_size=n), min_size=1, max_size=4)
)
SIZES = st.integers(2, 17)
RATIOS: list[RatioLevel] = ["token", "sequence", "sequence_token", "sequence_sum"]
NAN, INF = float("nan"), float("inf")


def batch(sequences: int = 6, tokens: int = 5) -> Sampled:
    """Ragged sequences off policy, with everything that an objective may ask for."""
    mask = (torch.arange(tokens) < torch.randint(1, tokens + 1, (sequences, 1))).double()
    logprobs = (-3 * torch.rand(sequences, tokens, dtype=torch.float64)).requires_grad_()
    old, reference = (logprobs.detach() + 0.3 * torch.randn(sequences, tokens).double() for _ in range(2))
    entropies = torch.rand(sequences, tokens).double()
    return Sampled(logprobs, old, torch.randn(sequences, 1).double(), mask, reference, entropies)


def size_of(mask: Tensor) -> StepSize:
    return StepSize(len(mask), int(mask.sum()), mask.shape[1])


def gradient(loss: Tensor, logprobs: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logprobs)[0]


def everything(loss: PolicyLoss, part: Sampled, size: StepSize) -> Tensor:
    return policy_objective(loss, part, size, kl=KlPenalty("k3", 0.04, corrected=True), entropy_coefficient=0.01)


# Advantages


@given(GROUPS)
@settings(max_examples=60)
def test_rloo_is_the_centred_reward_times_n_over_n_minus_1(groups: list[list[float]]) -> None:
    rewards = torch.tensor(groups, dtype=torch.float64)
    n = rewards.shape[1]
    closed_form = n / (n - 1) * (rewards - rewards.mean(1, keepdim=True))
    torch.testing.assert_close(leave_one_out_advantages(rewards), closed_form, rtol=0, atol=1e-12)
    torch.testing.assert_close(group_advantages(rewards, scale="none") * n / (n - 1), closed_form, rtol=0, atol=1e-12)


@given(SIZES, st.floats(0, 1), st.sampled_from([torch.float32, torch.float64]))
@example(8, 0.1, torch.float64)  # whose sum, less itself, is not seven times itself
@settings(max_examples=60)
def test_equal_rewards_have_advantage_zero_exactly(size: int, value: float, dtype: torch.dtype) -> None:
    """In every estimator with a baseline of the group, also beside a group that is scaled with it."""
    rewards = torch.full((2, size), value, dtype=dtype)
    rewards[1, 0] += 1
    scales: list[Scale] = ["group", "batch", "none"]
    for advantages in (
        *(group_advantages(rewards, scale=scale) for scale in scales),
        leave_one_out_advantages(rewards),
        leave_one_out_advantages(rewards, normalise=1e-4),
        greedy_baseline_advantages(rewards, rewards[:, 1]),
    ):
        assert advantages[0].count_nonzero() == 0
        assert advantages[1].count_nonzero() > 0
    same = torch.full((3, size), value, dtype=dtype)
    mask = (torch.arange(size) < torch.tensor([[1], [2], [size]])).to(dtype)
    assert reinforce_plus_plus_advantages(outcome_rewards(same[:, 0], mask), mask).count_nonzero() == 0
    assert all(group_advantages(same, scale=scale).count_nonzero() == 0 for scale in scales)


def test_paper_mode_keeps_the_rounding_of_the_source_and_counts_it() -> None:
    """Eight rewards of 0.9: the float32 mean is not 0.9, and its error is divided by 1e-6."""
    rewards = torch.tensor([[0.9] * 8, [1.0] * 8, [1.0] + [0.0] * 7])
    advantages, noisy = paper_group_advantages(rewards)
    assert noisy == 1
    assert 0.01 < advantages[0].abs().max() < 0.06
    assert len(advantages[0].unique()) == 1  # every completion is pushed the same way
    assert advantages[1].count_nonzero() == 0
    torch.testing.assert_close(advantages[2], group_advantages(rewards)[2])


def test_scales_of_the_advantage() -> None:
    """Deviations 1/2 and 1: by the group both become the same, by the batch the second stays the larger."""
    rewards = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    root = math.sqrt(0.5)
    assert group_advantages(rewards, epsilon=0.0).tolist() == [pytest.approx([-root, root])] * 2
    deviation = math.sqrt((0.75**2 * 2 + 0.25**2 + 1.25**2) / 3)
    expected = [pytest.approx([-0.5 / deviation, 0.5 / deviation]), pytest.approx([-1 / deviation, 1 / deviation])]
    assert group_advantages(rewards, scale="batch", epsilon=0.0).tolist() == expected
    assert group_advantages(rewards, scale="none").tolist() == [[-0.5, 0.5], [-1.0, 1.0]]


def test_reinforce_plus_plus_discounts_from_the_last_token() -> None:
    """Returns 0.25, 0.5, 1 and 2, whitened over the four real tokens; what follows the end does not flow back."""
    mask = torch.tensor([[1.0, 1, 1, 0], [1.0, 0, 0, 0]])
    rewards = outcome_rewards(torch.tensor([1.0, 2.0]), mask)
    assert rewards.tolist() == [[0, 0, 1, 0], [2, 0, 0, 0]]
    rewards[0, 3] = 100.0
    returns = torch.tensor([0.25, 0.5, 1.0, 2.0])
    expected = (returns - returns.mean()) / returns.std()
    torch.testing.assert_close(reinforce_plus_plus_advantages(rewards, mask, gamma=0.5)[mask.bool()], expected)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_rewards_that_are_not_finite_are_refused(value: float) -> None:
    rewards = torch.tensor([[0.0, 1.0], [value, 1.0]])
    for refused in (
        lambda: group_advantages(rewards),
        lambda: paper_group_advantages(rewards),
        lambda: leave_one_out_advantages(rewards),
        lambda: greedy_baseline_advantages(rewards, torch.zeros(2)),
        lambda: greedy_baseline_advantages(torch.zeros(3, 2), rewards.flatten()[:3]),
        lambda: reinforce_plus_plus_advantages(rewards, torch.ones(2, 2)),
        lambda: reward_groups([0.0, 1.0, value, 1.0], 4, 2),
    ):
        with pytest.raises(UserError, match="the reward of completion 2 is"):
            refused()


@pytest.mark.parametrize("rewards", [[1.0] * 7, [1.0] * 9, []])
def test_rewards_of_another_number_are_refused(rewards: list[float]) -> None:
    with pytest.raises(UserError, match=f"returned {len(rewards)} rewards for 8 completions"):
        reward_groups(rewards, 8, 4)
    assert reward_groups([0.0] * 4 + [1.0] * 4, 8, 4).tolist() == [[0.0] * 4, [1.0] * 4]


# Losses


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_the_ratio_is_one_and_the_gradient_that_of_reinforce(name: str) -> None:
    """Exactly, at the first step; so every loss that shares an aggregate begins with the same update."""
    loss, sampled = find_loss(name), batch()
    sampled = sampled._replace(old_ST=sampled.logprobs_ST.detach())
    assert log_ratios(loss.ratio, sampled.logprobs_ST, sampled.old_ST, sampled.mask_ST).count_nonzero() == 0
    size = size_of(sampled.mask_ST)
    plain = aggregate(loss.aggregate, -sampled.advantages_ST * sampled.logprobs_ST, sampled.mask_ST, size)
    expected = gradient(plain, sampled.logprobs_ST)
    if loss.ratio == "sequence_sum":  # the ratio of a sequence stands at each of its tokens, and moves with all
        expected = expected * sampled.mask_ST.sum(-1, keepdim=True)
    torch.testing.assert_close(
        gradient(policy_objective(loss, sampled, size), sampled.logprobs_ST), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", LOSSES)
def test_order_duplicates_and_micro_batches_do_not_change_the_update(name: str) -> None:
    loss, sampled = find_loss(name), batch()
    size = size_of(sampled.mask_ST)
    whole = gradient(everything(loss, sampled, size), sampled.logprobs_ST)

    def rows(index: Tensor) -> Sampled:
        return Sampled(*(field[index] for field in sampled if field is not None))

    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(gradient(everything(loss, rows(order), size), sampled.logprobs_ST), whole)
    for parts in ([1] * 6, [2, 4], [5, 1]):
        total = sum(everything(loss, rows(part), size) for part in torch.arange(6).split(parts))
        torch.testing.assert_close(gradient(total, sampled.logprobs_ST), whole)
    twice = torch.arange(6).repeat(2)
    doubled = StepSize(2 * size.sequences, 2 * size.tokens, size.length)
    torch.testing.assert_close(gradient(everything(loss, rows(twice), doubled), sampled.logprobs_ST), whole)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_may_hold_anything(name: str) -> None:
    sampled = batch()
    expected = everything(find_loss(name), sampled, size_of(sampled.mask_ST))
    real = sampled.mask_ST.bool()
    dirty = Sampled(
        *(
            torch.where(real, field.detach().expand_as(real), wrong)
            for field, wrong in zip(sampled[:3], (-INF, INF, NAN), strict=True)
        ),
        sampled.mask_ST,
        *(torch.where(real, field, NAN) for field in (sampled[4], sampled[5]) if field is not None),
    )
    dirty.logprobs_ST.requires_grad_()
    loss = everything(find_loss(name), dirty, size_of(sampled.mask_ST))
    assert torch.equal(loss.detach(), expected.detach())
    assert torch.equal(gradient(loss, dirty.logprobs_ST), gradient(expected, sampled.logprobs_ST) * sampled.mask_ST)


@pytest.mark.parametrize("name", LOSSES)
def test_all_masked_and_all_equal_have_no_loss_and_no_gradient(name: str) -> None:
    sampled = batch()
    masked = sampled._replace(mask_ST=without_truncated(sampled.mask_ST, torch.ones(6)))
    loss = everything(find_loss(name), masked, size_of(masked.mask_ST))
    assert loss.item() == 0.0
    assert gradient(loss, sampled.logprobs_ST).count_nonzero() == 0
    equal = sampled._replace(advantages_ST=leave_one_out_advantages(torch.full((2, 3), 0.7)).double().view(6, 1))
    loss = policy_objective(find_loss(name), equal, size_of(equal.mask_ST))
    assert loss.item() == 0.0
    assert gradient(loss, sampled.logprobs_ST).count_nonzero() == 0


def test_a_truncated_completion_counts_as_a_sequence_without_tokens() -> None:
    mask = without_truncated(torch.ones(2, 3), torch.tensor([0, 1]))
    assert mask.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert aggregate("sequence", torch.ones(2, 3), mask, StepSize(2, 3, 3)).item() == 0.5


def test_aggregates_of_a_ragged_batch() -> None:
    """Losses 1 on one token and 4 on each of three: 13/4, (1 + 4)/2, 13/(2 x 10), 13/2."""
    values, mask = pad_rows(torch.tensor([1.0, 4.0, 4.0, 4.0]), [1, 3])
    size = StepSize(2, 4, 10)
    assert aggregate("token", values, mask, size).item() == pytest.approx(13 / 4)
    assert aggregate("sequence", values, mask, size).item() == pytest.approx(5 / 2)
    assert aggregate("constant", values, mask, size).item() == pytest.approx(13 / 20)
    assert aggregate("sum", values, mask, size).item() == pytest.approx(13 / 2)


@pytest.mark.parametrize("level", RATIOS)
def test_ratios_of_a_sequence(level: RatioLevel) -> None:
    """Log-ratios 0.1 and 0.3: their own, their mean 0.2 twice, or their sum; whose gradient is whose."""
    logprobs = torch.tensor([[-1.0, -2.0, -9.0]], requires_grad=True)
    old = torch.tensor([[-1.1, -2.3, 0.0]], requires_grad=True)
    ratios = log_ratios(level, logprobs, old, torch.tensor([[1.0, 1.0, 0.0]]))
    values = {"token": [0.1, 0.3, 0], "sequence_sum": [0.4, 0.4, 0]}.get(level, [0.2, 0.2, 0])
    assert ratios[0].tolist() == pytest.approx(values, abs=1e-6)
    slopes = {"sequence": [0.5, 0.5, 0.0], "sequence_sum": [1.0, 1.0, 0.0]}.get(level, [1.0, 0.0, 0.0])
    assert gradient(ratios[0, 0], logprobs)[0].tolist() == slopes
    assert not ratios.requires_grad or torch.autograd.grad(ratios.sum(), old, allow_unused=True)[0] is None


def test_clipped_tokens_are_counted_where_they_are_clipped() -> None:
    log_ratio = torch.tensor([0.5, 1.5, 1.5, 0.5, 4.0, 4.0, 0.5]).log()
    advantages = torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    mask = torch.tensor([1.0] * 6 + [0.0])
    counts = clip_counts(log_ratio, advantages, mask, clip_low=0.2, clip_high=0.3, dual_clip=3.0)
    assert [int(count) for count in counts] == [1, 2, 1]


@pytest.mark.parametrize(("name", "near"), [("drgrpo", "dr_grpo"), ("GRPO", "grpo"), ("gspo-token", "gspo_token")])
def test_an_unknown_loss_is_refused_with_its_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"unknown loss '{name}', the nearest is '{near}'"):
        find_loss(name)


# Divergences


@pytest.mark.parametrize(("name", "near"), [("k4", "k1"), ("low_var", "low_var_kl")])
def test_an_unknown_estimator_is_refused_with_its_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"unknown KL estimator '{name}', the nearest is '{near}'"):
        find_estimator(name)


def test_estimates_and_their_gradients_against_the_true_divergence() -> None:
    """Summed over the vocabulary with the policy's weights: k1 and k3 are KL, and corrected they have its gradient.

    Uncorrected, k1 has none, and k2 has it although its value is another.
    """
    logits = torch.tensor([0.3, -0.5, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.9, 0.2, -0.3, 0.1], dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    true = full_divergence(logprobs[None], reference[None])[0]
    slope = gradient(true, logits)
    weights = logprobs.exp().detach()
    for name in ("k1", "k3"):
        estimate = ESTIMATORS[name](logits.log_softmax(-1), reference)
        torch.testing.assert_close((weights * estimate).sum(), true.detach())
        log_ratio = logits.log_softmax(-1) - logprobs.detach()
        corrected = ratio_corrected(ESTIMATORS[name](logits.log_softmax(-1), reference), log_ratio)
        torch.testing.assert_close(gradient((weights * corrected).sum(), logits), slope)
    plain = {name: (weights * ESTIMATORS[name](logits.log_softmax(-1), reference)).sum() for name in ("k1", "k2")}
    torch.testing.assert_close(gradient(plain["k1"], logits), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(gradient(plain["k2"], logits), slope)


def test_a_token_that_the_policy_cannot_write_adds_nothing() -> None:
    policy = torch.tensor([[0.0, -INF]], requires_grad=True)
    kl = full_divergence(policy, torch.tensor([[0.5, 0.5]]).log())
    assert kl.item() == pytest.approx(math.log(2))
    assert torch.isfinite(gradient(kl.sum(), policy)).all()


def test_the_penalty_in_the_reward_carries_no_gradient() -> None:
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    rewards = torch.tensor([[0.0, 1.0]], requires_grad=True)
    kl = find_estimator("k1")(logprobs, torch.tensor([[-1.5, -1.0]]))
    penalised = penalised_rewards(rewards, kl, torch.tensor([[1.0, 1.0]]), 0.1)
    assert penalised[0].tolist() == pytest.approx([-0.05, 1.1])
    assert torch.autograd.grad(penalised.sum(), logprobs, allow_unused=True)[0] is None


@pytest.mark.parametrize(("observed", "factor"), [(0.1, 1.0), (0.11, 1.01), (9.0, 1.02), (0.0, 0.98)])
def test_the_adaptive_coefficient_follows_the_divergence_slowly(observed: float, factor: float) -> None:
    after = adaptive_coefficient(0.5, observed, target=0.1, horizon=1000, sequences=100)
    assert after == pytest.approx(0.5 * factor)


def test_the_penalty_of_the_loss_is_its_weighted_mean() -> None:
    sampled = batch()
    size = size_of(sampled.mask_ST)
    loss = dataclasses.replace(find_loss("default"), aggregate="sequence")
    assert sampled.reference_ST is not None
    kl = find_estimator("k2")(sampled.logprobs_ST, sampled.reference_ST)
    difference = policy_objective(loss, sampled, size, kl=KlPenalty("k2", 0.5)) - policy_objective(loss, sampled, size)
    torch.testing.assert_close(difference, 0.5 * aggregate("sequence", kl, sampled.mask_ST, size))


def test_the_bonus_lowers_the_loss_by_the_mean_entropy_of_a_token() -> None:
    sampled = batch()
    size, loss = size_of(sampled.mask_ST), find_loss("grpo")
    assert sampled.entropy_ST is not None
    difference = policy_objective(loss, sampled, size, entropy_coefficient=0.5) - policy_objective(loss, sampled, size)
    torch.testing.assert_close(difference, -0.5 * sampled.entropy_ST[sampled.mask_ST.bool()].mean())


def test_the_size_of_the_log_ratio() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    sizes = find_estimator("abs")(logprobs, torch.tensor([-1.5, -1.0]))
    assert sizes.tolist() == [0.5, 1.0]
    assert gradient(sizes.sum(), logprobs).tolist() == [1.0, -1.0]
