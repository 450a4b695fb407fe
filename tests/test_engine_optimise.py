"""The optimiser against torch's own, and what happens when numbers break."""

import math

import pytest
import torch
from torch import Tensor, nn

from cpt_rft.engines.local.optimise import Optimiser, learning_rate
from cpt_rft.errors import TrainingError
from tests.helpers.engine import sft

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def loss_of(model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    return (model(X.to(dtype)).float() - Y).square().mean()


def optimiser(
    model: nn.Module, *, dtype: torch.dtype = torch.float32, max_skipped: int = 2, **method: object
) -> Optimiser:
    return Optimiser(model, sft(**({"lr": 0.05} | method)), 20, dtype=dtype, max_skipped=max_skipped)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_steps_are_those_of_torch() -> None:
    ours, theirs = network(), network()
    settings = {"weight_decay": 0.1, "betas": (0.8, 0.95), "max_grad_norm": 0.3}
    ours_optimiser = optimiser(ours, **settings)
    adam = torch.optim.AdamW(theirs.parameters(), lr=0.05, weight_decay=0.1, betas=(0.8, 0.95))
    for step in range(6):
        loss = loss_of(ours)
        ours_optimiser.backward(loss)
        outcome = ours_optimiser.step(step, loss.item())
        adam.zero_grad()
        loss_of(theirs).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        adam.step()
        assert outcome.grad_norm == pytest.approx(float(norm), rel=1e-5)
        torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-4, atol=1e-5)
    assert norm > 0  # and clipping was at work in the first steps
    torch.testing.assert_close(dict(ours.named_parameters()), ours_optimiser.named_weights())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_gradients_of_micro_batches_add_up(dtype: torch.dtype, tolerance: float) -> None:
    whole, parts = network(), network()
    one, two = optimiser(whole, dtype=dtype), optimiser(parts, dtype=dtype)
    one.backward(loss_of(whole))
    for rows in (slice(0, 2), slice(2, 6)):
        two.backward((parts(X[rows].to(dtype)).float() - Y[rows]).square().sum() / Y.numel())
    assert one.master.grad is not None
    assert float(one.master.grad.norm()) > 10 * tolerance
    torch.testing.assert_close(two.master.grad, one.master.grad, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_rate_of_zero_moves_nothing(schedule: str) -> None:
    model = network()
    before = flat(model)
    method = sft(weight_decay=0.1, schedule=schedule).model_copy(update={"lr": 0.0})
    zero = Optimiser(model, method, 3, dtype=torch.float32, max_skipped=0)
    for step in range(3):
        zero.backward(loss_of(model))
        assert zero.step(step, 1.0).moved
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_broken_step_is_skipped_and_leaves_no_trace(bad: str) -> None:
    model, clean = network(), network()
    one, other = optimiser(model), optimiser(clean)
    for step in range(4):
        for each, net in ((one, model), (other, clean)):
            each.backward(loss_of(net))
            each.step(step, 1.0)
        if step == 1:
            before = flat(model)
            one.backward(loss_of(model) * (1.0 if bad == "loss" else float("inf")))
            outcome = one.step(step, float("nan") if bad == "loss" else 1.0)
            assert outcome.grad_norm is None and not outcome.moved
            assert torch.equal(flat(model), before)
    assert one.skipped == 1
    assert torch.equal(flat(model), flat(clean))


def test_too_many_broken_steps_end_the_stage() -> None:
    model = network()
    fragile = optimiser(model, max_skipped=2)
    for step in range(2):
        fragile.step(step, math.inf)
    with pytest.raises(TrainingError, match=r"3 steps, at last in step 3\..*lower the learning rate"):
        fragile.step(2, math.inf)


def test_broken_weights_are_never_handed_out() -> None:
    model = network()
    broken = optimiser(model)
    broken.master.data[0] = float("nan")
    for give in (broken.named_weights, broken.state):
        with pytest.raises(TrainingError, match="not finite"):
            give()


def test_bfloat16_keeps_float32_masters() -> None:
    """Steps far below bfloat16's resolution still add up."""
    model = network()
    start = flat(model).clone()
    half = optimiser(model, dtype=torch.bfloat16, lr=1e-5)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for step in range(20):
        half.backward(loss_of(model))
        half.step(step, 1.0)
    masters = torch.cat([weight.flatten() for weight in half.named_weights().values()])
    assert masters.dtype == torch.float32
    assert (masters - start).abs().max().item() == pytest.approx(20e-5, rel=0.1)
    assert torch.equal(flat(model), masters.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimiser_goes_on_with_the_same_bits(dtype: torch.dtype) -> None:
    straight, first, second = network(), network(), network()
    whole, half = optimiser(straight, dtype=dtype), optimiser(first, dtype=dtype)

    def steps(each: Optimiser, net: nn.Module, numbers: range) -> None:
        for step in numbers:
            each.backward(loss_of(net))
            each.step(step, 1.0)

    steps(whole, straight, range(6))
    steps(half, first, range(3))
    half.skipped = 1
    later = optimiser(second, dtype=dtype)
    later.restore(half.state())
    assert later.skipped == 1
    steps(later, second, range(3, 6))
    assert torch.equal(flat(straight), flat(second))
    assert torch.equal(whole.master, later.master)


def test_schedules() -> None:
    constant = sft(lr=1.0, warmup_ratio=0.2)
    assert [learning_rate(constant, step, 10) for step in range(10)] == [0.5] + [1.0] * 9
    cosine = sft(lr=1.0, schedule="cosine", warmup_ratio=0.2)
    rates = [learning_rate(cosine, step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 0.05
    assert learning_rate(sft(lr=1.0, schedule="cosine"), 0, 1) == 1.0
