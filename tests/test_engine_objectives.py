"""Losses and gradients of the objectives against the stock model, one row a completion."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cpt_rft.algos.grpo import group_advantages
from cpt_rft.algos.kl import k3_divergence
from cpt_rft.checkpoint import EncodedPrompt, Policy, encode_prompt, load_policy, vision_token_ids
from cpt_rft.data.example import Example
from cpt_rft.engines.local.generate import Completion
from cpt_rft.engines.local.grpo import GrpoObjective
from cpt_rft.engines.local.objective import StepResult
from cpt_rft.engines.local.observe import KINDS, OBSERVE_EVERY, kind_of, reward_variance
from cpt_rft.engines.local.sft import SftObjective
from cpt_rft.errors import DataError
from cpt_rft.miniature.world import make_rows
from cpt_rft.prompts import target_text, user_text
from cpt_rft.scoring import Score, reward
from tests.helpers.engine import TASK, grpo, make_base, sft, stock_inputs


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return make_rows(TASK, "train", 6, 3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("objectives") / "base", scale=2.0)


@pytest.fixture
def policy(base: Path) -> Policy:
    return load_policy(base)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """A reference policy that differs from the policy."""
    return load_policy(make_base(tmp_path_factory.mktemp("objectives") / "other", scale=2.0, seed=1))


def gradients_of(policy: Policy) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in policy.model.named_parameters() if weight.grad is not None}


def run(
    objective: SftObjective | GrpoObjective, policy: Policy, rows: list[Example]
) -> tuple[StepResult, dict[str, Tensor]]:
    policy.model.zero_grad()
    result = objective.gradients(0, rows, lambda loss: loss.backward())
    return result, gradients_of(policy)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 3e-5) -> None:
    assert ours.keys() == theirs.keys()
    scale = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).abs().max() <= tolerance * scale, name


def stock_logits(policy: Policy, prompt: EncodedPrompt, tokens: list[int]) -> Tensor:
    logits: Tensor = policy.model(**stock_inputs(policy, prompt, tokens)).logits[0]
    return logits[len(prompt.ids) - 1 : -1]


@pytest.mark.parametrize("style", ["direct", "cot"])
def test_sft_is_teacher_forcing_of_the_stock_model(policy: Policy, rows: list[Example], style: str) -> None:
    """The mean over all answer tokens of the batch, end token included, prompt tokens excluded."""
    objective = SftObjective(policy, sft(style=style), "miniature")
    result, ours = run(objective, policy, rows)
    policy.model.zero_grad()
    losses = []
    for row in rows:
        prompt = encode_prompt(policy, row.images, user_text(row, style, "miniature"))
        text = target_text(row, style) + "<|im_end|>"
        tokens = policy.tokenizer.encode(text, add_special_tokens=False)
        logits = stock_logits(policy, prompt, tokens)
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens), reduction="none"))
    loss = torch.cat(losses).mean()
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert result.fields["tokens"] == len(torch.cat(losses))
    assert_same(ours, gradients_of(policy))


def test_every_sft_target_ends_the_turn(policy: Policy, rows: list[Example]) -> None:
    objective = SftObjective(policy, sft(style="cot"), "miniature")
    for row in rows:
        target = objective.target(row)
        assert policy.tokenizer.decode(target) == target_text(row, "cot") + "<|im_end|>"


def test_sft_in_the_cot_style_needs_rationales(policy: Policy, rows: list[Example]) -> None:
    with pytest.raises(DataError, match="no rationale"):
        run(SftObjective(policy, sft(style="cot"), "miniature"), policy, [replace(rows[0], rationale=None)])


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_accumulation_does_not_change_sft(policy: Policy, rows: list[Example], micro_batch: int) -> None:
    """Rows have unequal numbers of answer tokens, so that a mean of means would differ."""
    style = {"style": "cot", "prompts_per_step": 6}
    whole, expected = run(SftObjective(policy, sft(**style, micro_batch=6), "miniature"), policy, rows)
    parts, ours = run(SftObjective(policy, sft(**style, micro_batch=micro_batch), "miniature"), policy, rows)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert_same(ours, expected, 2e-6)


class Scripted(GrpoObjective):
    """Completions are sampled as ever, then cut to ragged lengths; their ids decide what is right, so that some groups
    have variance and some have not."""

    def rollout(self, step: int, prompts: Sequence[EncodedPrompt]) -> list[list[Completion]]:
        def cut(each: Completion) -> Completion:
            length = 1 + each.token_ids[0] % len(each.token_ids)
            return Completion(each.token_ids[:length], each.logprobs[:length], each.finish)

        return [[cut(each) for each in group] for group in super().rollout(step, prompts)]

    def score(self, row: Example, completion: Completion) -> Score:
        right = row.id.endswith(("1", "2", "4")) and sum(completion.token_ids) % 2 == 0
        return super().score(row, completion)._replace(strict=float(right))


def oracle(
    policy: Policy,
    reference: Policy | None,
    rows: list[Example],
    objective: GrpoObjective,
    only: Sequence[str] = KINDS,
) -> tuple[float, dict[str, Tensor], list[list[Completion]]]:
    """GRPO written down once more, on the stock model, without sharing, packing, chunks or left-out groups.

    With ``only``, the share of the groups of some kinds.
    """
    method = objective.method
    prompts = [encode_prompt(policy, row.images, user_text(row, method.style, "miniature")) for row in rows]
    groups = objective.rollout(0, prompts)
    scores = [[objective.score(row, each) for each in group] for row, group in zip(rows, groups, strict=True)]
    rewards = [[reward(each, method.style) for each in group] for group in scores]
    advantages = group_advantages(torch.tensor(rewards))
    banned = vision_token_ids(policy)

    def logprobs(which: Policy, prompt: EncodedPrompt, tokens: list[int]) -> Tensor:
        logits = stock_logits(which, prompt, tokens)
        logits[:, banned] = float("-inf")
        return (logits / method.temperature).log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]

    policy.model.zero_grad()
    total, tokens = torch.zeros(()), 0
    for prompt, group, group_values, group_scores in zip(prompts, groups, advantages, scores, strict=True):
        counted = kind_of(group_scores) in only
        for completion, advantage in zip(group, group_values, strict=True):
            ours = logprobs(policy, prompt, completion.token_ids)
            losses = -advantage * (ours - ours.detach()).exp()
            if reference is not None:
                with torch.no_grad():
                    theirs = logprobs(reference, prompt, completion.token_ids)
                losses = losses + method.kl_coef * k3_divergence(ours, theirs)
            total = total + losses.sum() * counted
            tokens += len(completion.token_ids)
    loss = total / tokens
    loss.backward()
    return loss.item(), gradients_of(policy), groups


@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
@pytest.mark.parametrize("micro_batch", [2, 6])
def test_grpo_is_its_definition_on_the_stock_model(
    policy: Policy, other: Policy, rows: list[Example], kl_coef: float, micro_batch: int
) -> None:
    method = grpo(kl_coef=kl_coef, temperature=1.3, prompts_per_step=6, micro_batch=micro_batch)
    reference = other if kl_coef else None
    objective = Scripted(policy, reference, method, "miniature", ("test",))
    result, ours = run(objective, policy, rows)
    loss, expected, groups = oracle(policy, reference, rows, objective)
    assert 0 < result.fields["zero_variance"] < 1
    assert result.loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert_same(ours, expected)
    # The very ids that were sampled are scored: text would not survive decoding and encoding.
    tokenizer = policy.tokenizer
    sampled = [each.token_ids for group in groups for each in group]
    assert any(tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) != ids for ids in sampled)


@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
def test_each_kind_of_group_has_its_share_of_the_gradient(
    policy: Policy, other: Policy, rows: list[Example], kl_coef: float
) -> None:
    """Without a KL penalty groups of equal rewards pull at nothing; with it they do."""
    method = grpo(kl_coef=kl_coef, prompts_per_step=6, micro_batch=2)
    reference = other if kl_coef else None
    objective = Scripted(policy, reference, method, "miniature", ("test",))
    result, _ = run(objective, policy, rows)
    assert result.fields["all_wrong"] == 0.5 and result.fields["all_right"] == 0.0
    assert "grad_norm_right" not in result.fields
    for kind in ("mixed", "wrong"):
        _, share, _ = oracle(policy, reference, rows, objective, only=[kind])
        expected = float(torch.stack([gradient.square().sum() for gradient in share.values()]).sum().sqrt())
        assert result.fields[f"grad_norm_{kind}"] == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert (result.fields["grad_norm_wrong"] > 0) == (kl_coef > 0)


def test_looking_at_the_gradient_does_not_change_it(policy: Policy, rows: list[Example]) -> None:
    """Every twentieth step is looked at; the same rollouts in one that is not give the same bits."""

    class Fixed(Scripted):
        def rollout(self, step: int, prompts: Sequence[EncodedPrompt]) -> list[list[Completion]]:
            return super().rollout(0, prompts)

    found = []
    for step in (OBSERVE_EVERY, OBSERVE_EVERY + 1):
        policy.model.zero_grad()
        objective = Fixed(policy, None, grpo(kl_coef=0.0), "miniature", ("test",))
        result = objective.gradients(step, rows, lambda loss: loss.backward())
        found.append((any(key.startswith("grad_norm_") for key in result.fields), gradients_of(policy)))
    (seen, ours), (unseen, theirs) = found
    assert seen and not unseen
    assert all(torch.equal(gradient, theirs[name]) for name, gradient in ours.items())


def test_a_group_is_of_one_kind(policy: Policy, rows: list[Example]) -> None:
    right, wrong = (
        Score(strict=x, lenient=x, format=f, extracted=None, status="answered") for x, f in ((1, 1), (0, 0))
    )
    formed = wrong._replace(format=1.0)
    assert [kind_of(group) for group in ([right] * 2, [right, wrong], [wrong, formed])] == ["right", "mixed", "wrong"]


def test_reward_variance_is_that_within_a_prompt() -> None:
    assert reward_variance(torch.tensor([[0.0, 1.0], [0.9, 0.9]])) == 0.25


def test_the_first_ratio_is_one(policy: Policy, rows: list[Example]) -> None:
    """So the loss is minus the token mean of the advantages exactly, and nothing is clipped."""
    method = grpo(kl_coef=0.0, temperature=0.8, prompts_per_step=6, micro_batch=6)
    objective = Scripted(policy, None, method, "miniature", ("test",))
    result, _ = run(objective, policy, rows)
    prompts = [encode_prompt(policy, row.images, user_text(row, "direct", "miniature")) for row in rows]
    groups = objective.rollout(0, prompts)
    scores = [[objective.score(row, each) for each in group] for row, group in zip(rows, groups, strict=True)]
    rewards = torch.tensor([[each.strict for each in group] for group in scores])
    lengths = torch.tensor([[len(each.token_ids) for each in group] for group in groups])
    expected = -(group_advantages(rewards) * lengths).sum() / lengths.sum()
    assert result.loss == pytest.approx(float(expected), rel=1e-5) != 0
    assert result.fields["rollout_gap"] < 1e-4


def test_groups_of_equal_rewards_do_not_move_the_policy(policy: Policy, rows: list[Example]) -> None:
    """Nothing is right, so without a KL penalty there is no gradient at all."""
    objective = GrpoObjective(policy, None, grpo(kl_coef=0.0, max_new_tokens=2), "miniature", ("test",))
    result, gradients = run(objective, policy, rows)
    assert result.fields["zero_variance"] == 1.0
    assert result.loss == 0.0
    assert not any(gradient.count_nonzero() for gradient in gradients.values())
    assert result.fields["kl"] is None and result.fields["entropy"] is None


def test_groups_of_equal_rewards_keep_their_kl(policy: Policy, other: Policy, rows: list[Example]) -> None:
    objective = GrpoObjective(policy, other, grpo(max_new_tokens=2), "miniature", ("test",))
    result, gradients = run(objective, policy, rows)
    assert result.fields["zero_variance"] == 1.0
    assert result.loss == pytest.approx(0.01 * result.fields["kl"], rel=1e-5)
    assert any(gradient.count_nonzero() for gradient in gradients.values())


def test_the_log_of_a_step(policy: Policy, other: Policy, rows: list[Example]) -> None:
    objective = Scripted(policy, other, grpo(), "miniature", ("test",))
    fields = run(objective, policy, rows)[0].fields
    prompts = [encode_prompt(policy, row.images, user_text(row, "direct", "miniature")) for row in rows]
    completions = [each for group in objective.rollout(0, prompts) for each in group]
    assert fields["tokens"] == sum(len(each.token_ids) for each in completions)
    assert fields["length"] == fields["tokens"] / len(completions)
    assert fields["truncated"] == sum(each.finish == "length" for each in completions) / len(completions)
    assert fields["reward"] == fields["accuracy"] > 0
    assert 0 < fields["entropy"] < 6.0 and fields["kl"] > 0


def test_rollouts_differ_between_steps_and_prompts(policy: Policy, rows: list[Example]) -> None:
    objective = GrpoObjective(policy, None, grpo(kl_coef=0.0), "miniature", ("test",))
    prompt = encode_prompt(policy, rows[0].images, user_text(rows[0], "direct", "miniature"))
    first, again, later = (objective.rollout(step, [prompt, prompt]) for step in (0, 0, 1))
    ids = [[[each.token_ids for each in group] for group in groups] for groups in (first, again, later)]
    assert ids[0] == ids[1] != ids[2]
    assert ids[0][0] != ids[0][1]
