"""The rivals of the study, and the meters of forgetting, against closed forms and their released code's formulas."""

import math

import pytest
import torch
from torch import Tensor

from cpt_rft.algos.adarft import nearest_prompts, next_difficulty
from cpt_rft.algos.drift import Estimate, clustered_ratio, drift, position_divergence
from cpt_rft.algos.ewc import carried_fisher, ewc_penalty, fisher_diagonal, l2_penalty
from cpt_rft.algos.fisher import diagonal_fisher_risk, fisher_risk
from cpt_rft.algos.lwf import distillation_loss
from cpt_rft.algos.o_lora import orthogonality_penalty
from cpt_rft.algos.prefix_rft import most_uncertain, prefix_advantages, prefix_length
from cpt_rft.algos.uft import hint_length, hint_loss, hint_share
from cpt_rft.algos.wise_ft import averaged_weights
from cpt_rft.errors import UserError


def scores_of(logits: Tensor) -> Tensor:
    """Gradient of log softmax with respect to the logits, one row an answer: one-hot less probabilities."""
    return torch.eye(len(logits), dtype=logits.dtype) - logits.softmax(-1)


# EWC, L2, and the Fisher information


def test_the_fisher_diagonal_is_the_mean_square_of_single_gradients() -> None:
    """Of a coin with log-odds 0.4, every answer weighed as often as it comes: p (1 - p)."""
    theta = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    probability = theta.detach().sigmoid().item()
    heads = round(probability * 1000)
    logliks = [torch.nn.functional.logsigmoid(theta if index < heads else -theta).sum() for index in range(1000)]
    scores = ({"w": torch.autograd.grad(loglik, theta)[0]} for loglik in logliks)
    assert fisher_diagonal(scores)["w"].item() == pytest.approx(probability * (1 - probability), rel=1e-3)
    two = fisher_diagonal([{"w": torch.tensor([1.0])}, {"w": torch.tensor([-1.0])}])
    assert two["w"].item() == 1.0  # the square of the mean would be zero


def test_ewc_pulls_back_by_importance_and_l2_by_distance() -> None:
    start = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.0])}
    weights = {"a": torch.tensor([2.0, 4.0]).requires_grad_(), "b": torch.tensor([3.0]).requires_grad_()}
    fisher = {"a": torch.tensor([10.0, 0.1])}
    penalty = ewc_penalty(weights, start, fisher)
    assert penalty.item() == pytest.approx(0.5 * (10.0 * 1 + 0.1 * 4))
    assert torch.autograd.grad(penalty, weights["a"])[0].tolist() == pytest.approx([10.0, 0.2])
    plain = l2_penalty(weights, start)
    assert plain.item() == pytest.approx(0.5 * (1 + 4 + 9))
    assert torch.autograd.grad(plain, weights["b"])[0].item() == 3.0
    assert ewc_penalty(start, start, fisher).item() == l2_penalty(start, start).item() == 0.0
    carried = carried_fisher(fisher, {"a": torch.tensor([1.0, 1.0])}, gamma=0.5)
    assert carried["a"].tolist() == pytest.approx([6.0, 1.05])


def test_half_the_fisher_risk_is_the_divergence_of_a_small_step() -> None:
    logits = torch.tensor([0.5, -0.3, 0.1, 0.9], dtype=torch.float64)
    update = {"w": torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)}
    answers = torch.multinomial(logits.softmax(-1), 60000, replacement=True)
    counts = torch.bincount(answers, minlength=4)
    scores = [{"w": scores_of(logits)[answer]} for answer in range(4) for _ in range(int(counts[answer]) // 20)]
    risk = fisher_risk(update, scores)
    step = 1e-3
    moved = (logits + step * update["w"]).log_softmax(-1)
    kl = (logits.softmax(-1) * (logits.log_softmax(-1) - moved)).sum().item()
    assert 0.5 * risk * step**2 == pytest.approx(kl, rel=0.03)
    exact = logits.softmax(-1).diag() - logits.softmax(-1).outer(logits.softmax(-1))
    assert risk == pytest.approx((update["w"] @ exact @ update["w"]).item(), rel=0.03)
    assert diagonal_fisher_risk(update, {"w": exact.diag()}) == pytest.approx(
        (exact.diag() * update["w"].square()).sum().item()
    )


def test_where_all_answers_weigh_alike_the_risk_of_rft_is_the_reward_variance_times_that_of_sft() -> None:
    """The papers' relation, exact for a policy of equal chances, whose answers all have the same risk."""
    logits, rewards = torch.zeros(5, dtype=torch.float64), torch.tensor([1.0, 0, 0, 1, 0], dtype=torch.float64)
    scores = [{"w": score} for score in scores_of(logits)]
    sft = torch.tensor([fisher_risk(score, scores) for score in scores])
    centred = rewards - rewards.mean()
    rft = torch.tensor(
        [fisher_risk({"w": weight * score["w"]}, scores) for weight, score in zip(centred, scores, strict=True)]
    )
    assert rft.mean().item() == pytest.approx(rewards.var(unbiased=False).item() * sft.mean().item())


# LwF, WiSE-FT, O-LoRA


def test_distillation_is_softened_cross_entropy() -> None:
    """Least at the previous model, where it is the entropy and has no gradient; at temperature 1 that of labels."""
    previous = torch.randn(3, 7)
    logits = previous.clone().requires_grad_()
    losses = distillation_loss(logits, previous)
    soft = (previous / 2).softmax(-1)
    torch.testing.assert_close(losses.detach(), torch.special.entr(soft).sum(-1))
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), logits)[0], torch.zeros(3, 7), atol=1e-6, rtol=0)
    sure = torch.full((1, 4), -100.0).index_fill(1, torch.tensor([2]), 100.0)
    other = torch.randn(1, 4)
    expected = torch.nn.functional.cross_entropy(other, torch.tensor([2]))
    torch.testing.assert_close(distillation_loss(other, sure, temperature=1.0)[0], expected)
    source = torch.nn.functional.cross_entropy(other / 3, (torch.ones(1, 4) / 3).softmax(-1))
    torch.testing.assert_close(distillation_loss(other, torch.ones(1, 4), temperature=3.0)[0], source)


def test_averaged_weights() -> None:
    before = {"w": torch.randn(3).bfloat16(), "steps": torch.tensor(1)}
    after = {"w": torch.randn(3).bfloat16(), "steps": torch.tensor(9)}
    middle = averaged_weights(before, after, 0.25)
    expected = (0.75 * before["w"].float() + 0.25 * after["w"].float()).bfloat16()
    assert torch.equal(middle["w"], expected)
    assert middle["steps"].item() == 9
    for share, end in ((0.0, before), (1.0, after)):
        whole = averaged_weights(before, after, share)
        assert all(torch.equal(whole[name], end[name]) for name in end)
        assert whole["w"].data_ptr() != end["w"].data_ptr()
    with pytest.raises(UserError, match="differ in 1 tensors, first 'w'"):
        averaged_weights(before, {**after, "w": torch.zeros(2)}, 0.5)


def test_the_orthogonality_penalty_sees_every_earlier_adapter() -> None:
    earlier = [torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0]]).requires_grad_()]
    current = torch.tensor([[3.0, -1.0, 5.0], [0.0, 0.0, 7.0]], requires_grad=True)
    penalty = orthogonality_penalty(earlier, current)
    assert penalty.item() == 3.0 + 2.0
    penalty.backward()
    assert current.grad is not None
    assert current.grad.tolist() == [[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]]
    assert earlier[1].grad is None
    assert orthogonality_penalty([], current).item() == 0.0


# Prefix-RFT, UFT, AdaRFT


def test_the_prefix_shrinks_and_never_is_the_whole_demonstration() -> None:
    """The bound falls from 0.95 to 0.05 by half a cosine; at its middle the share is uniform in [0.5, 0.95]."""
    assert prefix_length(100, 0.0, 0, 500) == prefix_length(100, 0.99, 0, 500) == 95
    assert prefix_length(101, 0.0, 250, 500) == 50
    assert prefix_length(101, 0.5, 250, 500) == 73
    assert prefix_length(100, 0.0, 500, 500) == prefix_length(100, 0.0, 900, 500) == 5
    assert [prefix_length(size, 0.9, 0, 500, high=1.0) for size in (0, 1, 2, 3)] == [0, 0, 1, 2]


def test_a_prefix_is_worth_what_it_gained_over_free_completions() -> None:
    """Rewards 1, 0, 0 without and 1 with a prefix: 2/3 for the prefix, 1 for what followed it."""
    rewards, hybrid = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), torch.tensor([1.0, 0.0])
    plain = prefix_advantages(rewards, hybrid, scale="none")
    torch.testing.assert_close(plain.free_PG[0], torch.tensor([2 / 3, -1 / 3, -1 / 3]))
    assert plain.free_PG[1].count_nonzero() == 0
    assert plain.continuation_P.tolist() == [1.0, 0.0]
    assert plain.prefix_P.tolist() == pytest.approx([2 / 3, -1.0])
    scaled = prefix_advantages(rewards, hybrid)
    torch.testing.assert_close(scaled.free_PG[0], torch.tensor([2 / 3, -1 / 3, -1 / 3]) / math.sqrt(1 / 3))
    assert scaled.prefix_P.tolist() == pytest.approx([2 / 3, -1.0], rel=1e-5)


def test_only_the_least_certain_prefix_tokens_are_kept() -> None:
    prefix = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    entropy = torch.tensor([[0.3, 0.9, 0.1, 99.0], [0.8, 0.2, 99.0, 99.0]])
    assert most_uncertain(prefix, entropy).tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert most_uncertain(prefix, entropy, drop=0.6).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert most_uncertain(prefix, entropy, drop=0.0).tolist() == prefix.tolist()
    assert most_uncertain(torch.zeros(2, 4), entropy).count_nonzero() == 0


def test_hints_shorten_and_end() -> None:
    assert hint_share(0, 300, high=0.9, low=0.1) == 0.9
    assert hint_share(150, 300, high=0.9, low=0.1) == pytest.approx(0.5)
    assert hint_share(300, 300, high=0.9, low=0.1) == pytest.approx(0.1)
    assert hint_share(301, 300, high=0.9, low=0.1) == 0.0
    generator = torch.Generator().manual_seed(1)
    assert {hint_length(10, 0.0, generator) for _ in range(9)} == {0}
    assert {hint_length(10, 1.0, generator) for _ in range(9)} == {10}
    lengths = torch.tensor([hint_length(10, 0.3, generator) for _ in range(2000)]).double()
    assert set(lengths.tolist()) <= {0, 2, 4, 6, 8, 10}
    assert lengths.mean().item() == pytest.approx(3.0, abs=0.15)
    assert lengths.var().item() == pytest.approx(4 * 5 * 0.3 * 0.7, rel=0.15)  # five pieces of two parts
    assert hint_length(0, 1.0, generator) == 0


def test_the_hint_is_supervised() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -4.0]])
    assert hint_loss(logprobs, torch.tensor([[1.0, 1.0, 0.0]]), 2).item() == 1.5


def test_difficulty_follows_the_reward() -> None:
    """Steps of 50 tanh(2 (R - 0.5)), between 0 and 100."""
    assert next_difficulty(20.0, 0.5) == 20.0
    assert next_difficulty(20.0, 1.0) == pytest.approx(20 + 50 * math.tanh(1.0))
    assert next_difficulty(20.0, 0.0) == 0.0
    assert next_difficulty(90.0, 1.0) == 100.0
    difficulties = torch.tensor([10.0, 50.0, 30.0, 34.0, 26.0])
    assert nearest_prompts(difficulties, 30.0, 3).tolist() == [2, 3, 4]


# The drift meter


def test_drift_a_position_is_the_divergence_over_the_vocabulary() -> None:
    first, other = torch.randn(5, 9), torch.randn(5, 9)
    p, q = (first / 1.5).softmax(-1), (other / 1.5).softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(position_divergence(first, other, temperature=1.5), expected)
    assert position_divergence(first, first).abs().max() < 1e-6
    assert not torch.allclose(position_divergence(first, other), position_divergence(other, first))


def test_sums_along_sampled_sequences_are_the_divergence_of_sequences() -> None:
    """Two steps over two tokens: KL of the joint is the first step's plus the second's, weighed by what was sampled."""
    p1, p2 = torch.tensor([0.7, 0.3]), torch.tensor([[0.5, 0.5], [0.1, 0.9]])
    q1, q2 = torch.tensor([0.4, 0.6]), torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    joint_p, joint_q = (p1[:, None] * p2).flatten(), (q1[:, None] * q2).flatten()
    second = position_divergence(p2.log(), q2.log())
    total = position_divergence(p1.log()[None], q1.log()[None])[0] + (p1 * second).sum()
    torch.testing.assert_close(total, (joint_p * (joint_p / joint_q).log()).sum())


def test_drift_a_token_and_a_sequence() -> None:
    """Long sequences weigh more in the one and alike in the other."""
    a_token, a_sequence = drift(torch.tensor([1.0, 5.0]), torch.tensor([1, 9]), torch.tensor([3, 8]))
    assert a_token.value == pytest.approx(6 / 10)
    assert a_sequence.value == pytest.approx(3.0)
    half = 1.959964 * 4 / 2  # standard deviation sqrt(8) over the root of 2 is 2
    assert (a_sequence.low, a_sequence.high) == pytest.approx((3 - half, 3 + half), rel=1e-5)


def test_sequences_of_one_prompt_are_not_independent() -> None:
    """Repeating each sequence under its prompt changes nothing; as if of new prompts it would narrow the interval."""
    values, ones, prompts = torch.rand(20), torch.ones(20), torch.arange(20)
    once = clustered_ratio(values, ones, prompts)
    order = torch.randperm(40)
    repeated = [tensor.repeat(2)[order] for tensor in (values, ones, prompts)]
    again = clustered_ratio(*repeated)
    assert (again.value, again.low, again.high) == pytest.approx((once.value, once.low, once.high))
    apart = clustered_ratio(repeated[0], repeated[1], torch.arange(40))
    assert apart.high - apart.low < 0.8 * (once.high - once.low)
    assert isinstance(once, Estimate)
    with pytest.raises(UserError, match="needs two of them, not 1"):
        clustered_ratio(values, ones, torch.zeros(20))


def test_intervals_cover_the_true_ratio() -> None:
    """Of 600 samples of 64 prompts with skewed values and ragged sizes, 95 % intervals hold the truth in 92 to 98 %."""
    inside = 0
    for _ in range(600):
        sizes = torch.randint(1, 9, (64,)).double()
        totals = sizes * torch.distributions.Exponential(torch.tensor(2.0)).sample((64,)).double()
        estimate = clustered_ratio(totals, sizes, torch.arange(64))
        inside += estimate.low <= 0.5 <= estimate.high
    assert 0.92 <= inside / 600 <= 0.98
