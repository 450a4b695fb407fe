"""The options of reinforcement fine-tuning: estimators, losses, penalties, and rollouts that serve several steps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from cpt_rft.algos.aggregate import Aggregate
from cpt_rft.algos.kl import ESTIMATORS
from cpt_rft.algos.losses import LOSSES
from cpt_rft.algos.policy import RatioLevel
from cpt_rft.algos.rloo import leave_one_out_advantages
from cpt_rft.checkpoint import EncodedPrompt, Policy, load_policy
from cpt_rft.config.load import REPOSITORY, load_experiment
from cpt_rft.config.methods import GrpoMethod, LossName
from cpt_rft.data.example import Example
from cpt_rft.engines.local import grpo as engine
from cpt_rft.engines.local.advantages import token_advantages
from cpt_rft.engines.local.generate import Completion, generate
from cpt_rft.engines.local.grpo import GrpoObjective
from cpt_rft.engines.local.objective import StepResult
from cpt_rft.engines.local.optimise import Optimiser
from cpt_rft.engines.losses import policy_loss
from cpt_rft.errors import ConfigError, TrainingError
from cpt_rft.miniature.world import make_rows
from cpt_rft.scoring import Score
from tests.helpers.engine import TASK, grpo, make_base, make_stage, run, weights

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.9, 0.9, 0.9, 0.9]], dtype=torch.float64)
LENGTHS = [1, 2, 1, 3, 2, 1, 1, 1]


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return make_rows(TASK, "train", 8, 3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("core") / "base", scale=2.0)


@pytest.fixture
def policy(base: Path) -> Policy:
    return load_policy(base)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load_policy(make_base(tmp_path_factory.mktemp("core") / "other", scale=2.0, seed=1))


class Marked(GrpoObjective):
    """Ids decide what is right: some groups are mixed, the rest all wrong. Completions are cut to ragged lengths."""

    def rollout(self, step: int, prompts: Sequence[EncodedPrompt]) -> list[list[Completion]]:
        def cut(each: Completion) -> Completion:
            length = 1 + each.token_ids[0] % len(each.token_ids)
            finish = each.finish if length == len(each.token_ids) else "stop"
            return Completion(each.token_ids[:length], each.logprobs[:length], finish)

        return [[cut(each) for each in group] for group in super().rollout(step, prompts)]

    def score(self, row: Example, completion: Completion) -> Score:
        right = int(row.id[-1]) % 2 == 0 and sum(completion.token_ids) % 2 == 0
        return super().score(row, completion)._replace(strict=float(right))


def update(
    policy: Policy,
    reference: Policy | None,
    rows: Sequence[Example],
    kind: type[GrpoObjective] = Marked,
    **changes: Any,
) -> tuple[StepResult, Tensor]:
    """The result and the flat gradient of one step."""
    settings = {"prompts_per_step": 8, "micro_batch": 8} | changes
    objective = kind(policy, reference, grpo(**settings), "miniature", ("test",))
    policy.model.zero_grad()
    result = objective.gradients(0, rows, lambda loss: loss.backward())
    parts = [torch.zeros_like(w) if w.grad is None else w.grad for w in policy.model.parameters()]
    return result, torch.cat([part.flatten() for part in parts]).clone()


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# --- configuration ---


def test_the_choices_of_a_file_are_those_of_the_mathematics() -> None:
    fields = GrpoMethod.model_fields
    assert set(get_args(LossName)) == set(LOSSES)
    assert set(get_args(fields["kl_estimator"].annotation)) == set(ESTIMATORS)
    optional = {"ratio": RatioLevel, "aggregate": Aggregate}
    for key, known in optional.items():
        assert set(get_args(get_args(fields[key].annotation)[0])) == set(get_args(known))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["group=1"], "methods.grpo.group: 1, but grpo compares"),
        (["group=1", "advantage=rloo"], "methods.grpo.group: 1, but rloo compares"),
        (["advantage=rloo", "advantage_scale=group"], "advantage_scale: 'group' is not offered with rloo"),
        (["advantage=reinforce_plus_plus", "advantage_scale=none"], "advantage_scale: 'none' is not offered"),
        (["advantage=remax", "paper_rounding=true"], "paper_rounding: it belongs to advantage grpo"),
        (["kl_coef=0", "kl_in=reward"], "kl_in: it needs a reference policy"),
        (["kl_coef=0", "kl_ratio_correction=true"], "kl_ratio_correction: it needs a reference policy"),
        (["kl_in=reward", "kl_ratio_correction=true"], "kl_ratio_correction: it belongs to a penalty in the loss"),
        (["loss=gspoo"], "gspo"),
        (["kl_estimator=k4"], "k3"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(Path("smoke"), [f"methods.grpo.{change}" for change in changes])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_group_of_one_will_do_without_a_baseline_of_the_group() -> None:
    for advantage in ("remax", "reinforce_plus_plus"):
        assert grpo(group=1, advantage=advantage).group == 1


def test_parts_replace_those_of_the_named_loss() -> None:
    assert policy_loss(grpo()) == LOSSES["default"]
    replaced = policy_loss(grpo(loss="gspo", aggregate="token", clip_high=0.5))
    assert (replaced.ratio, replaced.aggregate, replaced.clip_low, replaced.clip_high) == (
        "sequence",
        "token",
        3e-4,
        0.5,
    )


def test_every_file_of_a_method_names_its_source_and_explains_its_keys() -> None:
    for path in (REPOSITORY / "configs" / "methods").glob("*.yaml"):
        lines = path.read_text().splitlines()
        assert path.stem.startswith(("sft", "multitask")) or any(line.startswith("# Source: ") for line in lines), path
        keys = [line for line in lines if not line.startswith(("#", "kind:")) and not line.endswith(":")]
        assert all(" # " in line for line in keys), path


# --- advantages ---


def test_rloo_is_the_centred_reward_times_n_over_n_minus_one() -> None:
    tokens_N, rounded = token_advantages(grpo(advantage="rloo"), REWARDS, LENGTHS)
    centred = (REWARDS - REWARDS.mean(1, keepdim=True)) * 4 / 3
    assert rounded is None
    assert tokens_N.tolist() == pytest.approx(centred.flatten().repeat_interleave(torch.tensor(LENGTHS)).tolist())
    scaled = token_advantages(grpo(advantage="rloo", advantage_scale="batch"), REWARDS, LENGTHS).tokens_N
    expected = leave_one_out_advantages(REWARDS, normalise=1e-6).flatten().repeat_interleave(torch.tensor(LENGTHS))
    assert scaled.tolist() == pytest.approx(expected.tolist())


def test_remax_subtracts_the_greedy_reward() -> None:
    greedy = torch.tensor([1.0, 0.9], dtype=torch.float64)
    tokens_N = token_advantages(grpo(advantage="remax"), REWARDS, LENGTHS, greedy_P=greedy).tokens_N
    assert tokens_N.tolist() == pytest.approx([0, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0])
    scaled = token_advantages(
        grpo(advantage="remax", advantage_scale="batch"), REWARDS, LENGTHS, greedy_P=greedy
    ).tokens_N
    assert float(scaled[1]) == pytest.approx(-1 / (float((REWARDS - greedy[:, None]).std()) + 1e-6), rel=1e-6)


def test_reinforce_plus_plus_whitens_over_all_tokens() -> None:
    tokens_N = token_advantages(grpo(advantage="reinforce_plus_plus"), REWARDS, LENGTHS).tokens_N.double()
    assert float(tokens_N.mean()) == pytest.approx(0, abs=1e-6)
    assert float(tokens_N.var()) == pytest.approx(1, rel=1e-5)
    assert tokens_N[1] == tokens_N[2] == tokens_N[3] < tokens_N[0] == tokens_N[4]


def test_the_rounding_of_the_paper_is_kept_and_counted_only_where_asked() -> None:
    rewards = torch.full((3, 8), 0.9, dtype=torch.float64)
    plain = token_advantages(grpo(), rewards, [1] * 24)
    paper = token_advantages(grpo(paper_rounding=True), rewards, [1] * 24)
    assert not plain.tokens_N.any() and plain.rounded is None
    assert paper.tokens_N.all() and paper.rounded == 3


def test_a_penalty_in_the_reward_is_taken_off_before_completions_are_compared() -> None:
    written = torch.linspace(-1, 0, sum(LENGTHS))
    reference = written - torch.linspace(0, 1, sum(LENGTHS))
    settings = {"kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.5, "advantage": "rloo"}
    tokens_N = token_advantages(grpo(**settings), REWARDS, LENGTHS, penalty=(written, reference)).tokens_N
    sums = torch.stack([part.sum() for part in torch.linspace(0, 1, sum(LENGTHS)).split(LENGTHS)]).view(2, 4)
    expected = leave_one_out_advantages(REWARDS - 0.5 * sums).flatten().repeat_interleave(torch.tensor(LENGTHS))
    assert tokens_N.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


# --- one update ---

VARIANTS: dict[str, dict[str, Any]] = {
    "rloo": {"advantage": "rloo"},
    "remax": {"advantage": "remax"},
    "reinforce_plus_plus": {"advantage": "reinforce_plus_plus"},
    "grpo loss": {"loss": "grpo"},
    "dr_grpo": {"loss": "dr_grpo", "advantage_scale": "none"},
    "dapo": {"loss": "dapo", "mask_truncated": True},
    "gspo": {"loss": "gspo"},
    "vespo": {"loss": "vespo"},
    "penalty k2, corrected": {"kl_estimator": "k2", "kl_coef": 0.3, "kl_ratio_correction": True},
    "penalty in the reward": {"kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.3},
    "entropy bonus": {"entropy_coef": 0.1},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_micro_batches_do_not_change_the_update(
    policy: Policy, other: Policy, rows: list[Example], changes: dict[str, Any]
) -> None:
    settings = {"kl_coef": 0.0} | changes
    reference = other if settings["kl_coef"] else None
    whole, expected = update(policy, reference, rows, **settings)
    parts, ours = update(policy, reference, rows, **settings, micro_batch=2)
    assert float(expected.norm()) > 0
    assert relative(ours, expected) < 1e-5
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5, abs=1e-7)


def test_the_order_of_prompts_does_not_change_the_update(policy: Policy, rows: list[Example]) -> None:
    """With the same completions, whatever their place, and each prompt twice for once."""
    stored: dict[tuple[int, ...], list[Completion]] = {}

    class Stored(Marked):
        def rollout(self, step: int, prompts: Sequence[EncodedPrompt]) -> list[list[Completion]]:
            fresh = super().rollout(step, prompts)
            keys = [tuple(prompt.ids.tolist()) for prompt in prompts]
            return [stored.setdefault(key, group) for key, group in zip(keys, fresh, strict=True)]

    _, expected = update(policy, None, rows, Stored, kl_coef=0.0)
    _, turned = update(policy, None, rows[::-1], Stored, kl_coef=0.0)
    _, doubled = update(policy, None, [*rows, *rows], Stored, kl_coef=0.0, prompts_per_step=16)
    assert relative(turned, expected) < 1e-5
    assert relative(doubled, expected) < 1e-5


def test_rloo_gives_the_unscaled_gradient_times_n_over_n_minus_one(policy: Policy, rows: list[Example]) -> None:
    _, centred = update(policy, None, rows, kl_coef=0.0, advantage_scale="none")
    _, ours = update(policy, None, rows, kl_coef=0.0, advantage="rloo")
    assert relative(ours, centred * 4 / 3) < 1e-5


def test_the_first_ratio_is_one_so_that_no_clip_binds(policy: Policy, rows: list[Example]) -> None:
    _, wide = update(policy, None, rows, kl_coef=0.0)
    _, tight = update(policy, None, rows, kl_coef=0.0, clip_low=1e-9, clip_high=1e-9, dual_clip=1.001)
    assert torch.equal(wide, tight)


def test_all_masked_completions_give_no_loss_and_no_gradient(policy: Policy, rows: list[Example]) -> None:
    class Cut(Marked):
        def rollout(self, step: int, prompts: Sequence[EncodedPrompt]) -> list[list[Completion]]:
            return [[each._replace(finish="length") for each in group] for group in super().rollout(step, prompts)]

    result, gradient = update(policy, None, rows, Cut, kl_coef=0.0, mask_truncated=True)
    assert result.loss == 0.0 and not gradient.any()
    result, gradient = update(policy, None, rows, Cut, kl_coef=0.0)
    assert gradient.any()


def test_the_rounding_of_the_paper_moves_groups_of_equal_rewards(policy: Policy, rows: list[Example]) -> None:
    class Equal(Marked):
        def score(self, row: Example, completion: Completion) -> Score:
            return super().score(row, completion)._replace(strict=1.0, format=0.0)

    settings = {"kl_coef": 0.0, "style": "cot", "group": 8}
    plain, nothing = update(policy, None, rows, Equal, **settings)
    paper, noise = update(policy, None, rows, Equal, **settings, paper_rounding=True)
    assert not nothing.any() and plain.fields["rounded_groups"] is None
    assert noise.any() and paper.fields["rounded_groups"] == 8


def test_remax_takes_the_reward_of_the_likeliest_completion(policy: Policy, rows: list[Example]) -> None:
    objective = Marked(policy, None, grpo(advantage="remax", kl_coef=0.0), "miniature", ("test",))
    prompts = objective._prompts(rows)
    greedy = generate(policy, prompts, max_new_tokens=objective.method.max_new_tokens, temperature=0.0)
    expected = [objective.score(row, group[0]).strict for row, group in zip(rows, greedy, strict=True)]
    assert objective._greedy_rewards(rows, prompts).tolist() == expected
    written = objective._write_greedily(prompts)
    assert [group[0].token_ids for group in written] == [group[0].token_ids for group in greedy]
    assert 0 < sum(expected) < len(rows)


def test_rollout_and_update_give_the_same_log_probabilities(policy: Policy, rows: list[Example]) -> None:
    fields = update(policy, None, rows, kl_coef=0.0, temperature=0.9)[0].fields
    assert 0 < fields["rollout_gap_mean"] <= fields["rollout_gap"] < 1e-5


# --- several steps a rollout ---


def test_later_steps_learn_from_the_older_policy(policy: Policy, rows: list[Example]) -> None:
    """The completions of both steps are drawn before the first update; then the ratio has the old policy below it."""
    asked: list[int] = []

    class Counted(Marked):
        def rollout(self, step: int, prompts: Sequence[EncodedPrompt]) -> list[list[Completion]]:
            asked.append(step)
            return super().rollout(step, prompts)

    batches = [rows[:4], rows[4:], rows[:4]]
    method = grpo(kl_coef=0.0, rollout_steps=2, lr=1e-5)
    objective = Counted(policy, None, method, "miniature", ("test",), batches)
    optimiser = Optimiser(policy.model, method, 3, dtype=torch.float32, max_skipped=0)
    seen, settled = [], []
    for step, batch in enumerate(batches):
        fields = objective.gradients(step, batch, optimiser.backward).fields
        optimiser.step(step, 0.0)
        seen.append((list(asked), fields["rollout_gap"] is not None))
        settled.append(objective.settled(step))
    assert seen == [([0, 1], True), ([0, 1], False), ([0, 1, 2], True)]
    assert settled == [False, True, False]
    # An older policy's completions are off its ratio of one: a tight clip now stops gradients.
    _, free = _second_step(policy, rows, batches, clip_high=1e6, clip_low=1.0)
    _, held = _second_step(policy, rows, batches, clip_high=1e-6, clip_low=1e-6)
    assert not torch.equal(free, held)


def _second_step(
    policy: Policy, rows: list[Example], batches: list[list[Example]], **changes: Any
) -> tuple[StepResult, Tensor]:
    """The gradient of a second step on completions that the policy wrote before a change of all its weights."""
    objective = Marked(policy, None, grpo(kl_coef=0.0, rollout_steps=2, **changes), "miniature", ("test",), batches)
    objective.gradients(0, batches[0], lambda loss: None)
    before = [weight.detach().clone() for weight in policy.model.parameters()]
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(1.01)
    policy.model.zero_grad()
    result = objective.gradients(1, batches[1], lambda loss: loss.backward())
    parts = [torch.zeros_like(w) if w.grad is None else w.grad for w in policy.model.parameters()]
    gradient = torch.cat([part.flatten() for part in parts]).clone()
    with torch.no_grad():
        for weight, old in zip(policy.model.parameters(), before, strict=True):
            weight.copy_(old)
    return result, gradient


def test_a_killed_stage_resumes_where_a_rollout_ends(base: Path, rows: list[Example], tmp_path: Path) -> None:
    method = grpo(prompts_per_step=2, micro_batch=2, rollout_steps=2, epochs=2)
    whole = make_stage(tmp_path / "whole", base, method, rows, save_every=1)
    run(whole)
    stage = make_stage(tmp_path / "killed", base, method, rows, save_every=1)
    _die(stage, at=5)
    assert [log.step for log in run(stage)] == [5, 6, 7, 8]
    one, other = (weights(each.directory / "checkpoint") for each in (whole, stage))
    assert all(torch.equal(one[name], other[name]) for name in one)


def _die(stage: Any, at: int) -> None:
    from cpt_rft.engines.base import get_engine

    def report(line: Any) -> None:
        if line.step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get_engine(stage.engine).train(stage, report)


# --- bad rewards ---


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda mark, style: float("nan"), "the reward of completion 0 is nan"),
        (lambda mark, style: 1 / 0, "The reward of a completion of row .* raised ZeroDivisionError"),
    ],
    ids=["not a number", "raises"],
)
def test_a_bad_reward_stops_the_step_with_one_line(
    policy: Policy, rows: list[Example], monkeypatch: pytest.MonkeyPatch, reward: Callable[..., float], words: str
) -> None:
    monkeypatch.setattr(engine, "reward", reward)
    with pytest.raises(TrainingError, match=words):
        update(policy, None, rows, kl_coef=0.0)


def test_no_rate_moves_no_bit(base: Path, rows: list[Example], tmp_path: Path) -> None:
    still = grpo(advantage="reinforce_plus_plus", kl_coef=0.0).model_copy(update={"lr": 0.0})
    stage = make_stage(tmp_path / "stage", base, still, rows)
    run(stage)
    before, after = weights(base), weights(stage.directory / "checkpoint")
    assert all(torch.equal(before[name], after[name]) for name in before)
