"""Replay, EWC, L2, LwF and averaging: each is what its source says, in a stage of SFT as in one of GRPO."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cpt_rft.algos.ewc import merged_penalty
from cpt_rft.checkpoint import Policy, encode_prompt, encode_prompts, load_policy, released_name, vision_token_ids
from cpt_rft.config.methods import GrpoMethod, SftMethod
from cpt_rft.config.restraints import Average, Ewc, Lwf, Replay
from cpt_rft.data.example import Example
from cpt_rft.data.parquet import write_split
from cpt_rft.engines.base import ARTEFACTS_NAME, EarlierStage, Stage
from cpt_rft.engines.local.batches import stage_batches
from cpt_rft.engines.local.generate import generate
from cpt_rft.engines.local.importance import ANCHOR_NAME, IMPORTANCE_NAME, read_importance
from cpt_rft.engines.local.optimise import Optimiser
from cpt_rft.engines.local.restrain import Distillation, WeightPenalty
from cpt_rft.methods.replay import replayed
from cpt_rft.miniature.world import make_rows
from cpt_rft.prompts import user_text
from cpt_rft.seeds import derive_seed, python_random
from tests.helpers.engine import TASK, grpo, make_base, make_stage, run, sft, stock_inputs, weights
from tests.helpers.killed import train_and_die

EARLIER = "mini_textvqa"
EWC: dict[str, Any] = {"strength": 50.0, "rows": 3, "max_new_tokens": 4}
ARMS = pytest.mark.parametrize("arm", [sft, grpo], ids=["sft", "grpo"])


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return make_rows(TASK, "train", 8, 1)


@pytest.fixture(scope="module")
def old_rows() -> list[Example]:
    return make_rows(EARLIER, "train", 6, 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("restraints") / "base", scale=2.0)


@pytest.fixture(scope="module")
def first(base: Path, old_rows: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A first stage on another task, trained with EWC."""
    stage = make_stage(tmp_path_factory.mktemp("first") / "stage", base, sft(ewc=Ewc(**EWC)), old_rows)
    run(stage := replace(stage, tasks=(EARLIER,)))
    return stage


def second(first: Stage, directory: Path, method: SftMethod | GrpoMethod, rows: list[Example], **engine: Any) -> Stage:
    """A stage that follows the first."""
    stage = make_stage(directory, first.base, method, rows, parent=first.directory / "checkpoint", **engine)
    return replace(stage, history=(EarlierStage(first.tasks, first.data, first.directory / ARTEFACTS_NAME),))


def distance(checkpoint: Path, other: Path) -> float:
    left, right = weights(checkpoint), weights(other)
    return sum(float((left[name] - right[name]).detach().square().sum()) for name in left)


# --- replay ---


@pytest.mark.parametrize("memory", [None, 4])
def test_replayed_rows_follow_the_new_ones_and_come_in_passes(
    rows: list[Example], old_rows: list[Example], memory: int | None
) -> None:
    new = [rows[:4], rows[4:6]] * 3
    other = make_rows("mini_vizwiz", "train", 6, 1)
    earlier = {"mini_vizwiz": other, EARLIER: old_rows}
    mixed = replayed(new, earlier, Replay(rows_per_step=3, memory=memory), 0)
    assert [batch[: len(part)] for batch, part in zip(mixed, new, strict=True)] == new
    stream = [row.id for batch, part in zip(mixed, new, strict=True) for row in batch[len(part) :]]
    assert len(stream) == 18
    size = 12 if memory is None else 8
    assert len(set(stream[:size])) == size == len(set(stream))
    assert sum(name.startswith(EARLIER) for name in stream[:size]) == size // 2
    assert mixed == replayed(new, dict(reversed(earlier.items())), Replay(rows_per_step=3, memory=memory), 0)
    assert mixed != replayed(new, earlier, Replay(rows_per_step=3, memory=memory), 1)


def test_a_first_stage_replays_nothing(rows: list[Example]) -> None:
    assert replayed([rows[:2], rows[2:]], {}, Replay(rows_per_step=3), 0) == [rows[:2], rows[2:]]


def test_both_arms_replay_the_same_rows_and_count_them(
    first: Stage, rows: list[Example], old_rows: list[Example], tmp_path: Path
) -> None:
    replay = Replay(rows_per_step=2, memory=4)
    stages = [second(first, tmp_path / each.__name__, each(replay=replay), rows) for each in (sft, grpo)]
    one, other = ([[row.id for row in batch] for batch in stage_batches(stage)] for stage in stages)
    assert one == other
    plain = stage_batches(second(first, tmp_path / "plain", sft(), rows))
    assert [[row.id for row in batch] for batch in plain] == [names[:4] for names in one]
    assert {name for names in one for name in names[4:]} <= {row.id for row in old_rows}
    for stage in stages:
        assert [log.replayed for log in run(stage)] == [2, 2]
    assert [log.replayed for log in run(make_stage(tmp_path / "none", first.base, sft(replay=replay), rows))] == [0, 0]


# --- penalties on the weights ---


def test_penalties_on_the_weights_and_their_gradients(base: Path) -> None:
    model = load_policy(base).model
    optimiser = Optimiser(model, sft(), 1, dtype=torch.bfloat16, max_skipped=0)
    anchor = optimiser.master.detach() + torch.linspace(-1, 2, len(optimiser.master))
    importance = torch.linspace(0, 3, len(anchor))
    moved = optimiser.master.detach() - anchor
    for weighed in (None, importance):
        value = WeightPenalty(optimiser, 0.5, anchor, weighed).gradients([], optimiser.backward)
        weight = torch.ones_like(moved) if weighed is None else weighed
        assert value == pytest.approx(0.25 * float((weight.double() * moved.double().square()).sum()), rel=1e-4)
        assert optimiser.master.grad is not None
        torch.testing.assert_close(optimiser.master.grad, 0.5 * weight * moved)
        optimiser.master.grad.zero_()


@ARMS
def test_l2_pulls_to_the_start_of_the_stage(first: Stage, rows: list[Example], tmp_path: Path, arm: Any) -> None:
    start = first.directory / "checkpoint"
    ends = {}
    for strength in (1e-6, 10.0):
        stage = second(first, tmp_path / str(strength), arm(l2={"strength": strength}, epochs=3), rows)
        logs = run(stage)
        assert logs[0].penalty == 0.0 and logs[1].penalty is not None and logs[1].penalty > 0
        ends[strength] = distance(stage.directory / "checkpoint", start)
    assert ends[10.0] < 0.7 * ends[1e-6]


# --- EWC ---


def single_gradients(policy: Policy, stage: Stage, rows: list[Example], settings: Ewc) -> list[dict[str, Tensor]]:
    """Of the log-likelihood of the answers that the stage samples, by the stock model, one at a time."""
    chosen = python_random("importance", *stage.seed_path).sample(rows, settings.rows)
    texts = [(row.images, user_text(row, stage.method.style, "miniature")) for row in chosen]
    seeds = [derive_seed(*stage.seed_path, "importance", index) for index in range(len(chosen))]
    prompts = encode_prompts(policy, texts)
    limit = settings.max_new_tokens
    groups = generate(policy, prompts, max_new_tokens=limit, temperature=1.0, seeds=seeds)
    scores = []
    for prompt, (answer,) in zip(prompts, groups, strict=True):
        policy.model.zero_grad()
        logits = policy.model(**stock_inputs(policy, prompt, answer.token_ids)).logits[0][len(prompt.ids) - 1 : -1]
        logits[:, vision_token_ids(policy)] = float("-inf")
        logits.log_softmax(-1)[torch.arange(len(answer.token_ids)), torch.tensor(answer.token_ids)].sum().backward()
        named = policy.model.named_parameters()
        scores.append({released_name(name): weight.grad.clone() for name, weight in named if weight.grad is not None})
    return scores


def test_importance_is_the_mean_square_of_gradients_of_sampled_answers(first: Stage, old_rows: list[Example]) -> None:
    policy = load_policy(first.directory / "checkpoint")
    scores = single_gradients(policy, first, old_rows, Ewc(**EWC))
    importance, anchor = read_importance(first.directory / ARTEFACTS_NAME)
    for name, weight in policy.model.named_parameters():
        assert torch.equal(anchor[released_name(name)], weight)
    assert importance.keys() == scores[0].keys() == anchor.keys()
    largest = max(float(value.max()) for value in importance.values())
    for name, value in importance.items():
        expected = sum(score[name].square() for score in scores) / len(scores)
        assert (value - expected).abs().max() <= 1e-4 * largest, name
    assert largest > 1e-3


def test_penalties_around_two_places_are_one_and_a_constant() -> None:
    parts = [{"w": torch.rand(20)} for _ in range(4)]
    importance, anchor, fisher, here = parts
    fisher["w"][0] = importance["w"][0] = 0.0  # nothing depends on this weight
    total, centre = merged_penalty(importance, anchor, fisher, here)
    assert torch.isfinite(centre["w"]).all()
    for _ in range(3):
        w = torch.rand(20)
        both = importance["w"] * (w - anchor["w"]) + fisher["w"] * (w - here["w"])
        torch.testing.assert_close(total["w"] * (w - centre["w"]), both)


@pytest.mark.parametrize("gamma", [None, 0.5])
@ARMS
def test_ewc_carries_the_importance_of_all_earlier_stages(
    first: Stage, rows: list[Example], tmp_path: Path, gamma: float | None, arm: Any
) -> None:
    settings = Ewc(**EWC, gamma=gamma)
    stage = second(first, tmp_path / "stage", arm(ewc=settings), rows)
    logs = run(stage)
    assert logs[0].penalty == 0.0 and logs[1].penalty is not None and logs[1].penalty > 0
    policy = load_policy(stage.directory / "checkpoint")
    scores = single_gradients(policy, stage, rows, settings)
    before, before_anchor = read_importance(first.directory / ARTEFACTS_NAME)
    importance, anchor = read_importance(stage.directory / ARTEFACTS_NAME)
    now = {released_name(name): weight.detach() for name, weight in policy.model.named_parameters()}
    fisher = {name: torch.stack([score[name].square() for score in scores]).mean(dim=0) for name in now}
    largest = max(float(value.max()) for value in importance.values())
    for name, weight in now.items():
        expected = (1.0 if gamma is None else gamma) * before[name] + fisher[name]
        assert (importance[name] - expected).abs().max() <= 1e-4 * largest
        if gamma is not None:
            assert torch.equal(anchor[name], weight)
    if gamma is None:
        expected_anchor = merged_penalty(before, before_anchor, fisher, now)[1]
        moved = max(float((now[name] - before_anchor[name]).abs().max()) for name in now)
        sure = {name: importance[name] > 1e-3 * largest for name in now}
        for name, value in anchor.items():
            assert ((value - expected_anchor[name]).abs() * sure[name]).max() < 0.05 * moved


@ARMS
def test_ewc_spares_what_mattered(first: Stage, rows: list[Example], tmp_path: Path, arm: Any) -> None:
    """The penalty holds the important weights more than the others."""
    start = {released_name(name): weight for name, weight in weights(first.directory / "checkpoint").items()}
    importance, _ = read_importance(first.directory / ARTEFACTS_NAME)
    damage = {}
    for strength in (1e-6, 1e4):
        stage = second(first, tmp_path / str(strength), arm(ewc=Ewc(**EWC | {"strength": strength}), epochs=3), rows)
        run(stage)
        end = {released_name(name): weight for name, weight in weights(stage.directory / "checkpoint").items()}
        moved = {name: (end[name] - start[name]).detach() for name in end}
        damage[strength] = sum(float((importance[name] * moved[name].square()).sum()) for name in end)
    assert damage[1e4] < 0.5 * damage[1e-6]


def test_a_first_stage_with_ewc_has_no_penalty_and_leaves_its_importance(
    base: Path, rows: list[Example], tmp_path: Path
) -> None:
    stage = make_stage(tmp_path / "stage", base, sft(ewc=Ewc(**EWC)), rows)
    assert {log.penalty for log in run(stage)} == {None}
    assert sorted(path.name for path in stage.directory.iterdir()) == [ARTEFACTS_NAME, "checkpoint", "train"]
    assert sorted(path.name for path in (stage.directory / ARTEFACTS_NAME).iterdir()) == [ANCHOR_NAME, IMPORTANCE_NAME]
    run(stage)  # killed after its artefacts, it writes them again


# --- LwF ---


@ARMS
def test_lwf_distils_the_previous_model_on_the_new_rows(
    base: Path, first: Stage, rows: list[Example], tmp_path: Path, arm: Any
) -> None:
    """Against the stock model, one row at a time; the answers are those of the previous model."""
    policy, previous = load_policy(base), load_policy(first.directory / "checkpoint")
    settings = Lwf(strength=0.3, temperature=3.0, max_new_tokens=5)
    stage = second(first, tmp_path / "stage", arm(micro_batch=2), rows)
    policy.model.zero_grad()
    value = Distillation(policy, previous, settings, stage).gradients(rows[:4], lambda loss: loss.backward())
    ours = {name: weight.grad.clone() for name, weight in policy.model.named_parameters() if weight.grad is not None}
    policy.model.zero_grad()
    losses = []
    for row in rows[:4]:
        prompt = encode_prompt(previous, row.images, user_text(row, "direct", "miniature"))
        ids = generate(previous, [prompt], max_new_tokens=5, temperature=0.0)[0][0].token_ids
        here, there = (
            each.model(**stock_inputs(each, prompt, ids)).logits[0][len(prompt.ids) - 1 : -1]
            for each in (policy, previous)
        )
        losses.append(-((there.detach() / 3).softmax(-1) * (here / 3).log_softmax(-1)).sum(-1))
    loss = 0.3 * torch.cat(losses).mean()
    loss.backward()
    assert value == pytest.approx(float(loss), rel=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in ours.values())
    for name, weight in policy.model.named_parameters():
        assert weight.grad is not None
        assert (ours[name] - weight.grad).abs().max() <= 3e-5 * scale, name


@ARMS
def test_lwf_keeps_the_model_near_its_start(first: Stage, rows: list[Example], tmp_path: Path, arm: Any) -> None:
    start = load_policy(first.directory / "checkpoint")
    settings = Lwf(strength=1.0, max_new_tokens=4)
    far = {}
    for strength in (1e-6, 30.0):
        lwf = {"strength": strength, "max_new_tokens": 4}
        stage = second(first, tmp_path / str(strength), arm(lwf=lwf, epochs=4), rows)
        logs = run(stage)
        assert all(log.penalty is not None and log.penalty > 0 for log in logs)
        end = load_policy(stage.directory / "checkpoint")
        far[strength] = Distillation(end, start, settings, stage).gradients(rows, lambda loss: None)
    assert far[30.0] < far[1e-6]


# --- averaging ---


@ARMS
def test_an_averaged_stage_publishes_the_average(first: Stage, rows: list[Example], tmp_path: Path, arm: Any) -> None:
    ends = {}
    for share in (None, 1.0, 0.25):
        average = None if share is None else Average(share=share)
        stage = second(first, tmp_path / str(share), arm(average=average), rows)
        run(stage)
        ends[share] = weights(stage.directory / "checkpoint")
    start = weights(first.directory / "checkpoint")
    for name, weight in ends[None].items():
        assert torch.equal(ends[1.0][name], weight)
        torch.testing.assert_close(ends[0.25][name], 0.75 * start[name] + 0.25 * weight)


def test_importance_is_that_of_the_published_average(first: Stage, rows: list[Example], tmp_path: Path) -> None:
    settings = Ewc(**EWC, gamma=1.0)
    stage = second(first, tmp_path / "stage", sft(ewc=settings, average=Average(share=0.5)), rows)
    run(stage)
    _, anchor = read_importance(stage.directory / ARTEFACTS_NAME)
    published = load_file(stage.directory / "checkpoint" / "model.safetensors")
    assert all(torch.equal(anchor[name], published[name]) for name in anchor)


# --- killed and gone on ---


@pytest.mark.parametrize(("arm", "dtype"), [(sft, "bfloat16"), (grpo, "float32")], ids=["sft", "grpo"])
def test_a_killed_stage_with_every_restraint_ends_with_the_same_bits(
    first: Stage, rows: list[Example], tmp_path: Path, arm: Any, dtype: str
) -> None:
    method = arm(
        epochs=3,
        replay={"rows_per_step": 2},
        ewc=EWC,
        l2={"strength": 0.1},
        lwf={"strength": 0.5, "max_new_tokens": 4},
        average={"share": 0.5},
    )
    whole = second(first, tmp_path / "whole", method, rows, dtype=dtype, save_every=2)
    run(whole)
    stage = second(first, tmp_path / "killed", method, rows, dtype=dtype, save_every=2)
    train_and_die(stage, at=4)
    assert [log.step for log in run(stage)] == [3, 4, 5, 6]
    left = [f"{ARTEFACTS_NAME}/{name}" for name in (IMPORTANCE_NAME, ANCHOR_NAME)]
    for name in ("checkpoint/model.safetensors", *left):
        assert (whole.directory / name).read_bytes() == (stage.directory / name).read_bytes()


def test_a_resume_point_of_another_history_is_not_used(
    first: Stage, rows: list[Example], old_rows: list[Example], tmp_path: Path
) -> None:
    stage = second(first, tmp_path / "stage", sft(epochs=2, replay={"rows_per_step": 2}), rows, save_every=1)
    train_and_die(stage, at=3)
    others = tmp_path / "others.parquet"
    write_split(others, old_rows[:3])
    past = replace(stage.history[0], data=(others,))
    assert [log.step for log in run(replace(stage, history=(past,)))] == [1, 2, 3, 4]
