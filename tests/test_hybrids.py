"""Reinforcement that borrows from supervision: hints, prefixes, curricula, supervised steps in between."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cpt_rft.algos.prefix_rft import most_uncertain
from cpt_rft.checkpoint import Policy, encode_prompt, load_policy, vision_token_ids
from cpt_rft.config.hybrids import Alternate, Curriculum, Hint, Prefix
from cpt_rft.config.load import REPOSITORY, dump, load_experiment
from cpt_rft.config.methods import GrpoMethod
from cpt_rft.data.example import Example
from cpt_rft.engines.base import Stage
from cpt_rft.engines.local.alternate import AlternatingObjective
from cpt_rft.engines.local.curriculum import difficulties
from cpt_rft.engines.local.generate import Completion
from cpt_rft.engines.local.grpo import GrpoObjective
from cpt_rft.engines.local.objective import Objective
from cpt_rft.engines.local.prefix import PrefixObjective
from cpt_rft.engines.local.sft import SftObjective
from cpt_rft.engines.local.team import ALONE
from cpt_rft.engines.local.uft import UftObjective
from cpt_rft.errors import ConfigError, DataError
from cpt_rft.files import read_json_lines
from cpt_rft.methods.curriculum import RowsByDifficulty
from cpt_rft.miniature.world import make_rows
from cpt_rft.prompts import user_text
from cpt_rft.scoring import Score
from cpt_rft.sequence.plan import Selection, training_cost
from tests.helpers.engine import TASK, grpo, make_base, make_stage, run, stock_inputs, weights
from tests.helpers.killed import train_and_die
from tests.helpers.tiny_run import unmeasured

PARTS: dict[str, dict[str, Any]] = {
    "uft": {"hint": Hint(coef=0.1)},
    "prefix_rft": {"prefix": Prefix()},
    "adarft": {"curriculum": Curriculum(rollouts=3, start=80.0, wanted=0.05, step=60.0)},
    "sft_rft_iterative": {"alternate": Alternate(rft_steps=1, sft_steps=1)},
}


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return make_rows(TASK, "train", 6, 3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("hybrids") / "base", scale=2.0)


@pytest.fixture
def policy(base: Path) -> Policy:
    return load_policy(base)


def marked(row: Example, completion: Completion, score: Score) -> Score:
    right = int(row.id[-1]) % 2 == 0 and sum(completion.token_ids) % 2 == 0
    return score._replace(strict=float(right))


class Plain(GrpoObjective):
    """Ids decide what is right."""

    def score(self, row: Example, completion: Completion) -> Score:
        return marked(row, completion, super().score(row, completion))


class Hinted(UftObjective):
    """The same."""

    def score(self, row: Example, completion: Completion) -> Score:
        return marked(row, completion, super().score(row, completion))


class Prefixed(PrefixObjective):
    """The same."""

    def score(self, row: Example, completion: Completion) -> Score:
        return marked(row, completion, super().score(row, completion))


def settings(policy: Policy, batches: Sequence[Sequence[Example]], **changes: Any) -> tuple[Any, ...]:
    method = grpo(**({"kl_coef": 0.0, "style": "cot", "prompts_per_step": 6, "micro_batch": 6} | changes))
    return policy, None, method, "miniature", ("test",), batches, ALONE


def update(policy: Policy, objective: Objective, rows: Sequence[Example], step: int = 0) -> tuple[float, Tensor]:
    policy.model.zero_grad()
    result = objective.gradients(step, rows, lambda loss: loss.backward())
    return result.loss, gradient_of(policy)


def gradient_of(policy: Policy) -> Tensor:
    parts = [torch.zeros_like(w) if w.grad is None else w.grad for w in policy.model.parameters()]
    return torch.cat([part.flatten() for part in parts]).clone()


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def stock_logits(policy: Policy, row: Example, tokens: list[int]) -> Tensor:
    """Logits of the stock model for each token of an answer."""
    prompt = encode_prompt(policy, row.images, user_text(row, "cot", "miniature"))
    logits: Tensor = policy.model(**stock_inputs(policy, prompt, tokens)).logits[0]
    return logits[len(prompt.ids) - 1 : -1]


# --- configuration ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["hint={}", "prefix={}"], "methods.grpo.prefix: it cannot be combined with hint"),
        (["hint={}", "rollout_steps=2"], "methods.grpo.rollout_steps: with hint every step samples anew"),
        (["hint={}", "advantage=remax"], "methods.grpo.advantage: with a hint there is no greedy completion"),
        (["prefix={}", "advantage=rloo"], "methods.grpo.advantage: prefix needs grpo"),
        (["prefix={}", "kl_in=reward"], "methods.grpo.kl_in: with prefix the penalty belongs in the loss"),
        (["curriculum={}", "replay={rows_per_step: 1}"], "methods.grpo.replay: a curriculum chooses the rows"),
        (["alternate={rft_steps: 0, sft_steps: 1}"], "methods.grpo.alternate.rft_steps"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(Path("smoke"), [f"methods.grpo.{change}" for change in changes])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_parts_are_absent_from_identities() -> None:
    study = load_experiment(Path("smoke"))
    for name in ("sft", "grpo"):
        assert not {"hint", "prefix", "curriculum", "alternate", "max_prompt_tokens"} & dump(study.methods[name]).keys()


def test_what_the_parts_sample_is_in_the_plan(tmp_path: Path) -> None:
    study = load_experiment(Path("smoke"), ["methods=[grpo, prefix_rft, adarft, remax]"])
    written = {}
    for chain in Selection().chains(study, tmp_path):
        method = chain.method
        assert isinstance(method, GrpoMethod)
        written[method.name] = training_cost(study, method, chain.stages[0]).written / method.max_new_tokens
    assert written["grpo"] == 16 * 8
    assert written["prefix_rft"] == written["remax"] == 16 * 9
    assert written["adarft"] == 16 * 8 + 16 * 8


# --- UFT ---


def test_without_hints_uft_is_grpo_to_the_bit(policy: Policy, rows: list[Example]) -> None:
    batches = [rows] * 3
    expected = update(policy, Plain(*settings(policy, batches)), rows)
    ours = update(policy, Hinted(*settings(policy, batches), hint=Hint(high=0.0, low=0.0)), rows)
    assert ours[0] == expected[0]
    assert torch.equal(ours[1], expected[1]) and expected[1].any()


def test_a_hint_is_taught_and_shown(policy: Policy, rows: list[Example]) -> None:
    """What a weight adds is that weight times the cross-entropy of the hints on the stock model."""
    batches = [rows] * 3
    unlearned = Hinted(*settings(policy, batches), hint=Hint(coef=0.0))
    taught = Hinted(*settings(policy, batches, micro_batch=2), hint=Hint(coef=0.5))
    loss, without = update(policy, unlearned, rows)
    loss_taught, ours = update(policy, taught, rows)
    pieces = taught.pieces(0, rows)
    assert all(pieces) and len(set(map(len, pieces))) > 1
    policy.model.zero_grad()
    losses = [
        torch.nn.functional.cross_entropy(stock_logits(policy, row, piece), torch.tensor(piece), reduction="none")
        for row, piece in zip(rows, pieces, strict=True)
    ]
    expected = 0.5 * torch.cat(losses).mean()
    expected.backward()
    assert loss_taught - loss == pytest.approx(expected.item(), rel=1e-4)
    assert relative(ours - without, gradient_of(policy)) < 1e-3
    sampled = taught._sample(0, rows)
    for prompt, row, piece, target in zip(
        sampled.prompts, rows, pieces, [SftObjective.target(sft_like(policy), row) for row in rows], strict=True
    ):
        bare = encode_prompt(policy, row.images, user_text(row, "cot", "miniature")).ids.tolist()
        assert prompt.ids.tolist() == bare + piece
        assert piece == target[: len(piece)] and len(piece) < len(target)


def sft_like(policy: Policy) -> SftObjective:
    return SftObjective(policy, grpo(style="cot"), "miniature")


def test_hints_end_and_what_is_written_after_one_is_scored_with_it(policy: Policy, rows: list[Example]) -> None:
    objective = UftObjective(*settings(policy, [rows] * 10), hint=Hint(until=0.5, high=1.0, low=0.5))
    assert sum(map(len, objective.pieces(0, rows))) > sum(map(len, objective.pieces(5, rows))) > 0
    assert not any(objective.pieces(6, rows))
    whole = [objective._sample(0, rows).scores, objective._sample(6, rows).scores]
    # With all of the target but its end shown, answers are in form; without, an untrained model's are not.
    assert sum(mark.format for group in whole[0] for mark in group) > 0
    assert sum(mark.format for group in whole[1] for mark in group) == 0


# --- Prefix-RFT ---


@pytest.mark.parametrize("micro_batch", [2, 6])
def test_prefix_rft_is_its_definition_on_the_stock_model(policy: Policy, rows: list[Example], micro_batch: int) -> None:
    objective = Prefixed(*settings(policy, [rows] * 4, micro_batch=micro_batch), prefix=Prefix(drop=0.5))
    loss, ours = update(policy, objective, rows, step=1)
    groups = objective.rollouts[0].groups
    pieces = objective.pieces(1, rows)
    assert all(pieces) and [len(group.completions) for group in groups] == [5] * len(rows)
    banned = vision_token_ids(policy)

    def logprobs(row: Example, tokens: list[int]) -> Tensor:
        logits = stock_logits(policy, row, tokens)
        logits[:, banned] = float("-inf")
        return logits.log_softmax(-1)

    with torch.no_grad():
        own = [logprobs(row, piece) for row, piece in zip(rows, pieces, strict=True)]
    entropies = torch.cat([torch.special.entr(each.exp()).sum(-1) for each in own])
    kept = most_uncertain(torch.ones_like(entropies)[None], entropies[None], drop=0.5)[0]
    kept_of = kept.split([len(piece) for piece in pieces])
    policy.model.zero_grad()
    total, tokens = torch.zeros(()), 0
    for row, group, piece, kept_T in zip(rows, groups, pieces, kept_of, strict=True):
        *free, hybrid = group.completions
        assert hybrid.token_ids[: len(piece)] == piece and len(hybrid.token_ids) > len(piece)
        rewards = torch.tensor([0.9 * m.strict + 0.1 * m.format for m in (objective.score(row, c) for c in free)])
        mark = objective.score(row, hybrid)
        earned = 0.9 * mark.strict + 0.1 * mark.format
        centred = rewards - rewards.mean()
        scaled = centred / (rewards.std() + 1e-6) if bool((rewards != rewards[0]).any()) else centred * 0
        weights_of = [scaled[index].expand(len(each.token_ids)) for index, each in enumerate(free)]
        after = torch.full((len(hybrid.token_ids) - len(piece),), earned)
        weights_of.append(torch.cat([kept_T * (earned - rewards.mean()), after]))
        for each, advantage_T in zip(group.completions, weights_of, strict=True):
            chosen = logprobs(row, each.token_ids)[torch.arange(len(each.token_ids)), torch.tensor(each.token_ids)]
            total = total - (advantage_T * (chosen - chosen.detach()).exp()).sum()
            tokens += len(each.token_ids)
    expected = total / tokens
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-3, abs=1e-5)
    assert relative(ours, gradient_of(policy)) < 1e-3


def test_prefixes_shrink_and_may_be_empty(policy: Policy, rows: list[Example]) -> None:
    objective = Prefixed(*settings(policy, [rows] * 4), prefix=Prefix(high=0.9, low=0.0))
    sizes = [sum(map(len, objective.pieces(step, rows))) for step in range(4)]
    assert sizes[0] > sizes[-1]
    nothing = Prefixed(*settings(policy, [rows] * 4), prefix=Prefix(high=0.0, low=0.0))
    result = nothing.gradients(0, rows, lambda loss: loss.backward())
    assert result.fields["shown"] == 0
    assert result.fields["tokens"] == sum(len(c.token_ids) for g in nothing.rollouts[0].groups for c in g.completions)
    assert result.fields["rollout_gap"] < 1e-4


# --- iterative SFT-RFT ---


def test_rounds_end_with_supervised_steps(policy: Policy, rows: list[Example]) -> None:
    reinforced, supervised = Plain(*settings(policy, [rows])), sft_like(policy)
    both = AlternatingObjective(reinforced, supervised, Alternate(rft_steps=2, sft_steps=1))
    assert [both.turn(step) is supervised for step in range(7)] == [False, False, True, False, False, True, False]
    assert torch.equal(update(policy, both, rows, 2)[1], update(policy, supervised, rows, 2)[1])
    assert torch.equal(update(policy, both, rows, 3)[1], update(policy, reinforced, rows, 3)[1])


# --- AdaRFT ---


def test_a_curriculum_takes_the_nearest_rows_and_follows_the_reward(rows: list[Example]) -> None:
    known = {row.id: 20.0 * index for index, row in enumerate(rows)}
    chosen = RowsByDifficulty(rows, known, Curriculum(start=0.0, step=50.0), 0)
    assert {row.id for row in chosen.take(0, 2)} == {rows[0].id, rows[1].id}
    chosen.saw(1.0)
    assert chosen.target == pytest.approx(38.08, abs=0.01)
    assert {row.id for row in chosen.take(1, 2)} == {rows[1].id, rows[2].id}
    chosen.saw(0.5)
    assert chosen.target == pytest.approx(38.08, abs=0.01)
    chosen.saw(0.0)
    assert chosen.target == pytest.approx(0.0)


def test_rows_of_equal_difficulty_take_turns(rows: list[Example]) -> None:
    chosen = RowsByDifficulty(rows, {row.id: 50.0 for row in rows}, Curriculum(), 0)
    assert {row.id for step in range(40) for row in chosen.take(step, 1)} == {row.id for row in rows}


def test_difficulty_is_the_percentage_of_wrong_tries(policy: Policy, rows: list[Example]) -> None:
    objective = Plain(*settings(policy, [rows], prompts_per_step=4, micro_batch=4))
    found = difficulties(objective, rows, 6)  # of groups of four: the second is used in part
    parts = [rows[:4], rows[4:]]
    marks = [[m for p, part in enumerate(parts) for m in objective.tries(n, p, part)] for n in (0, 1)]
    for index, row in enumerate(rows):
        tried = [*marks[0][index], *marks[1][index][:2]]
        assert found[row.id] == pytest.approx(100 * sum(m.strict == 0 for m in tried) / 6)
    assert 0 < min(found.values()) < 100


# --- as stages ---


def stage_of(directory: Path, base: Path, rows: list[Example], part: dict[str, Any]) -> Stage:
    # The bonus moves an untrained model, whose completions are all wrong.
    settings = {"style": "cot", "prompts_per_step": 2, "micro_batch": 1, "epochs": 2, "kl_coef": 0.0}
    method = grpo(**settings, entropy_coef=0.01, **part)
    return make_stage(directory, base, method, rows, save_every=1)


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())
def test_a_killed_stage_ends_with_the_same_bits(
    base: Path, rows: list[Example], tmp_path: Path, part: dict[str, Any]
) -> None:
    whole = stage_of(tmp_path / "whole", base, rows, part)
    killed = stage_of(tmp_path / "killed", base, rows, part)
    run(whole)
    train_and_die(killed, at=4)
    assert [line.step for line in run(killed)] == [4, 5, 6]
    one, other = (weights(each.directory / "checkpoint") for each in (whole, killed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [read_json_lines(each.directory / "train" / "log.jsonl") for each in (whole, killed)]
    assert [unmeasured(line) for line in logs[0]] == [unmeasured(line) for line in logs[1]]
    if "curriculum" in part:
        assert len({line["difficulty"] for line in logs[0]}) == 6
    before = weights(base)
    assert any(not torch.equal(before[name], one[name]) for name in one)


@pytest.mark.parametrize("part", [PARTS["uft"], PARTS["prefix_rft"], PARTS["sft_rft_iterative"]])
def test_a_missing_rationale_is_named_before_training(
    base: Path, rows: list[Example], tmp_path: Path, part: dict[str, Any]
) -> None:
    stage = stage_of(tmp_path / "stage", base, [*rows[:-1], replace(rows[-1], rationale=None)], part)
    with pytest.raises(DataError, match=f"Row {rows[-1].id} has no rationale"):
        run(stage)
    assert not (stage.directory / "train" / "log.jsonl").exists()


def test_a_prompt_over_the_limit_is_named_before_training(
    policy: Policy, base: Path, rows: list[Example], tmp_path: Path
) -> None:
    sizes = {row.id: len(encode_prompt(policy, row.images, user_text(row, "cot", "miniature")).ids) for row in rows}
    longest = max(sizes, key=lambda name: sizes[name])
    stage = stage_of(tmp_path / "fits", base, rows, {"max_prompt_tokens": sizes[longest]})
    assert len(run(stage)) == 6
    stage = stage_of(tmp_path / "over", base, rows, {"max_prompt_tokens": sizes[longest] - 1})
    words = f"has {sizes[longest]} tokens, more than max_prompt_tokens = {sizes[longest] - 1}"
    with pytest.raises(DataError, match=words) as caught:
        run(stage)
    assert any(f"Row {name}:" in str(caught.value) for name, size in sizes.items() if size == sizes[longest])
    assert not (stage.directory / "train" / "log.jsonl").exists()


@pytest.mark.full
def test_every_hybrid_runs_the_smoke_experiment_to_its_end(tmp_path: Path) -> None:
    """About half a minute."""
    names = list(PARTS)
    changes = ["prompts_per_step=4", "micro_batch=2", "group=2", "max_new_tokens=6"]
    command = [sys.executable, "-m", "cpt_rft.cli", "run", "smoke", f"methods=[{', '.join(names)}]"]
    command += [f"method.{change}" for change in changes] + [f"output={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (tmp_path / "run" / "report.html").is_file()
    assert sorted(results["methods"]) == sorted(names) and not results["missing"]
