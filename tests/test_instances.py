"""Rows chosen by rollouts, and rows that a model wrote, in one stage: what is kept and what is trained on."""

import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cpt_rft.checkpoint import encode_prompts, load_policy
from cpt_rft.config.rollouts import Filter, Rollouts
from cpt_rft.data.example import Example
from cpt_rft.engines.base import ARTEFACTS_NAME, Source, Stage
from cpt_rft.engines.local.batches import stage_batches
from cpt_rft.engines.local.generate import generate
from cpt_rft.engines.local.grpo import GrpoObjective
from cpt_rft.engines.local.rollouts import LocalAttempt, chosen_rows
from cpt_rft.engines.local.rounds import train_rounds
from cpt_rft.engines.local.sft import SftObjective
from cpt_rft.engines.local.team import ALONE
from cpt_rft.errors import DataError
from cpt_rft.files import read_json, read_json_lines, sha256_file
from cpt_rft.methods.instances import KEPT_NAME, TRIES_NAME, Tried, answered, filtered, read_kept
from cpt_rft.miniature.world import make_rows
from cpt_rft.prompts import target_text, user_text
from cpt_rft.seeds import derive_seed
from tests.helpers.engine import TASK, grpo, make_base, make_stage, run, sft
from tests.helpers.instances import half_taught, is_right
from tests.helpers.tiny_run import in_child, kill_at_write

RULE: dict[str, Any] = {"rollouts": 4, "rule": "drop_zero_correct"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_taught(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return make_rows(TASK, "train", 12, 0)


def kept_of(stage: Stage) -> dict[str, list[Example]]:
    rows = {TASK: [*make_rows(TASK, "train", 12, 0)]}
    return chosen_rows(stage, rows, "x", LocalAttempt(stage, torch.float32, "cpu"))


def tries(stage: Stage) -> dict[str, int]:
    lines = read_json_lines(stage.directory / ARTEFACTS_NAME / TRIES_NAME)
    return {line["id"]: line["correct"] for line in lines}


def ids(rows: list[Example]) -> list[str]:
    return [row.id for row in rows]


# --- the rule, on counts made by hand ---


@pytest.mark.parametrize(("rule", "kept"), [("drop_zero_correct", [1, 2, 3, 4]), ("drop_zero_variance", [1, 2, 3])])
def test_a_rule_keeps_the_rows_that_it_names(rows: list[Example], rule: Any, kept: list[int]) -> None:
    tried = {row.id: Tried(count) for row, count in zip(rows[:6], [0, 1, 3, 2, 4, 0], strict=True)}
    assert filtered(rows[:6], tried, Filter(rollouts=4, rule=rule), seed=0) == [rows[place] for place in kept]


@pytest.mark.parametrize(("counts", "size"), [([0] * 8 + [1, 2, 3, 4], 4), ([0] * 3 + [2] * 9, 3)])
def test_controls_have_one_size_and_come_from_their_pool(rows: list[Example], counts: list[int], size: int) -> None:
    tried = {row.id: Tried(count) for row, count in zip(rows, counts, strict=True)}

    def drawn(control: Any, seed: int = 0) -> list[Example]:
        return filtered(rows, tried, Filter(**RULE, control=control), seed)

    sets = {control: drawn(control) for control in ("solvable", "unsolvable", "random")}
    assert {len(chosen) for chosen in sets.values()} == {size}
    assert all(tried[row.id].correct > 0 for row in sets["solvable"])
    assert all(tried[row.id].correct == 0 for row in sets["unsolvable"])
    for control, chosen in sets.items():
        assert chosen == sorted(chosen, key=lambda row: row.id) == drawn(control)
    assert len({tuple(ids(drawn("random", seed))) for seed in range(5)}) > 1


def test_a_response_takes_the_place_of_the_rationale_and_is_taught_as_it_stands(rows: list[Example]) -> None:
    tried = {rows[0].id: Tried(1, "<think> so </think> \\boxed{ it }"), rows[1].id: Tried(2, None)}
    (row,) = answered(rows[:2], tried, "grpo 12ab")
    assert (row.id, row.answer, row.rationale_source) == (rows[0].id, rows[0].answer, "rollouts of grpo 12ab")
    assert target_text(row, "cot") == target_text(row, "direct") == "<think> so </think> \\boxed{ it }"
    assert target_text(replace(row, rationale_source="drawn"), "direct") == row.answer


# --- a stage ---


def test_the_tries_are_those_of_training(base: Path, rows: list[Example], tmp_path: Path) -> None:
    """Prompt, temperature, length and score are GRPO's own; only the seed is another: that of the row."""
    method = grpo(filter=Filter(**RULE), temperature=1.3, max_new_tokens=5)
    stage = make_stage(tmp_path / "stage", base, method, rows)
    run(stage)
    policy = load_policy(base)
    objective = GrpoObjective(policy, None, method, stage.prompt_preset, stage.seed_path)
    for row in rows:
        prompt = encode_prompts(policy, [(row.images, user_text(row, method.style, stage.prompt_preset))], [row.id])
        seed = derive_seed("instances", 0, row.id)
        (group,) = generate(policy, prompt, group=4, max_new_tokens=5, temperature=1.3, seeds=[seed])
        assert tries(stage)[row.id] == sum(objective.score(row, each).strict >= 0.5 for each in group), row.id


def test_the_rows_trained_on_are_the_rows_kept(base: Path, rows: list[Example], tmp_path: Path) -> None:
    seen: list[str] = []
    stage = make_stage(tmp_path / "stage", base, grpo(filter=Filter(**RULE), epochs=2), rows)
    original = GrpoObjective.gradients

    def spy(self: GrpoObjective, step: int, batch: Any, backward: Any) -> Any:
        seen.extend(row.id for row in batch)
        return original(self, step, batch, backward)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GrpoObjective, "gradients", spy)
        logs = run(stage)
    kept = read_json(stage.directory / ARTEFACTS_NAME / KEPT_NAME)
    solvable = [name for name, count in tries(stage).items() if count]
    assert kept["ids"] == solvable and 0 < len(solvable) < len(rows)
    assert sorted(seen) == sorted([*solvable, *solvable])
    assert logs[-1].step == logs[-1].steps == len(logs) == -(-2 * len(solvable) // 4)
    assert kept["tasks"] == {TASK: {"rows": 12, "solvable": len(solvable), "kept": len(solvable)}}
    assert not (stage.directory / TRIES_NAME).exists() and not (stage.directory / KEPT_NAME).exists()


def test_arms_that_start_from_one_model_make_the_same_tries(base: Path, rows: list[Example], tmp_path: Path) -> None:
    kept = {}
    for control in ("solvable", "unsolvable", "random"):
        method = sft(name=control, filter=Filter(**RULE, control=control, max_new_tokens=6))
        stage = make_stage(tmp_path / control, base, method, rows)
        run(stage)
        kept[control] = read_json(stage.directory / ARTEFACTS_NAME / KEPT_NAME)["ids"]
        assert {len(each) for each in kept.values()} == {len(kept["solvable"])} != {0}
    assert not set(kept["solvable"]) & set(kept["unsolvable"])
    prints = {sha256_file(tmp_path / control / ARTEFACTS_NAME / TRIES_NAME) for control in kept}
    assert len(prints) == 1


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            grpo(filter=Filter(**RULE)),
            "mini_gqa: the filter of grpo (rule drop_zero_correct) keeps no row, so there is nothing to train on."
            " Fix: raise methods.grpo.filter.rollouts, take another rule or control, or drop the filter",
        ),
        (
            sft(rollouts=Rollouts(samples=2, max_new_tokens=3)),
            "mini_gqa: no row was got right in any of the tries of sft.rollouts, so there is nothing to train on."
            " Fix: raise methods.sft.rollouts.samples or max_new_tokens, or start from a better model",
        ),
    ],
)
def test_nothing_kept_is_one_clear_error(method: Any, words: str, rows: list[Example], tmp_path: Path) -> None:
    stage = make_stage(tmp_path / "stage", make_base(tmp_path / "untaught", scale=3.0), method, rows)
    with pytest.raises(DataError) as caught:
        run(stage)
    assert str(caught.value) == words


def bits(directory: Path) -> dict[str, str]:
    """Weights, tries, kept rows, and what is there at all."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "log.jsonl"]
    return {path.relative_to(directory).as_posix(): sha256_file(path) for path in files}


KILLED: list[tuple[Callable[[], Any], tuple[int, ...]]] = [
    (lambda: grpo(filter=Filter(**RULE)), (3, 6)),
    (lambda: sft(rollouts=Rollouts(samples=4, max_new_tokens=6, rounds=2)), (25, 62, 66)),
]


@pytest.mark.parametrize(("method", "numbers"), KILLED)
def test_killed_among_its_tries_a_stage_keeps_the_same_rows(
    base: Path, rows: list[Example], tmp_path: Path, method: Any, numbers: tuple[int, ...]
) -> None:
    whole = make_stage(tmp_path / "whole", base, method(), rows, save_every=1)
    run(whole)
    stage = make_stage(tmp_path / "stage", base, method(), rows, save_every=1)
    for number in numbers:
        shutil.rmtree(stage.directory, ignore_errors=True)
        stage.directory.mkdir()

        def work(number: int = number) -> None:
            kill_at_write(number, stage.directory)
            run(stage)

        assert in_child(work) == -signal.SIGKILL, number
        run(stage)
        assert bits(stage.directory) == bits(whole.directory), number


def test_a_torn_line_and_a_batch_that_is_not_whole_are_made_again(
    base: Path, rows: list[Example], tmp_path: Path
) -> None:
    """Whole batches are taken up as they are, the rest is written anew, and tries of another stage are not used."""
    stage = make_stage(tmp_path / "stage", base, grpo(filter=Filter(**RULE)), rows)
    kept = kept_of(stage)
    path = stage.directory / TRIES_NAME
    whole = path.read_text().splitlines(keepends=True)
    marked = [line.replace('"correct": ', '"correct": 1') for line in whole]
    path.write_text("".join([whole[0], *marked[1:5], *marked[5:7]]) + marked[7][:9])
    kept_of(stage)
    assert path.read_text() == "".join([whole[0], *marked[1:5], *whole[5:]])
    path.write_text("".join(['{"fingerprint": "y"}\n', *marked[1:]]))
    assert kept_of(stage) == kept
    assert path.read_text() == "".join(whole)


# --- rows that a model wrote ---


def test_self_sft_teaches_right_answers_of_the_start_only(base: Path, rows: list[Example], tmp_path: Path) -> None:
    method = sft(rollouts=Rollouts(samples=4, max_new_tokens=6))
    stage = make_stage(tmp_path / "stage", base, method, rows)
    taught = kept_of(stage)[TASK]
    assert taught and all(is_right(row, row.rationale or "") for row in taught)
    assert {row.rationale_source for row in taught} == {"rollouts of the start of the stage"}
    objective = SftObjective(load_policy(base), method, "miniature")
    for row in taught:
        assert objective.policy.tokenizer.decode(objective.target(row)[:-1]) == row.rationale
    batches = stage_batches(stage, {TASK: taught})
    assert sorted(row.id for batch in batches for row in batch) == sorted(ids(taught))


def test_a_source_makes_the_tries_instead_of_the_start(base: Path, rows: list[Example], tmp_path: Path) -> None:
    untaught = make_base(tmp_path / "untaught")
    method = sft(rollouts=Rollouts(samples=4, max_new_tokens=6))
    stage = replace(make_stage(tmp_path / "a", untaught, method, rows), source=Source(base, "teacher 1"))
    run(stage)
    plain = make_stage(tmp_path / "b", base, method, rows)
    run(plain)
    assert tries(stage) == tries(plain)
    assert read_kept(stage.directory / ARTEFACTS_NAME)[0]["source"] == "teacher 1"
    weights = [sha256_file(each.directory / "checkpoint" / "model.safetensors") for each in (stage, plain)]
    assert weights[0] != weights[1]


def test_every_round_tries_with_what_the_one_before_became(base: Path, rows: list[Example], tmp_path: Path) -> None:
    method = sft(lr=1e-3, rollouts=Rollouts(samples=4, max_new_tokens=6, rounds=2))
    stage = make_stage(tmp_path / "stage", base, method, rows)
    inner: list[Stage] = []

    def train(each: Stage, report: Any) -> None:
        from cpt_rft.engines.local.train import train_stage

        inner.append(each)
        train_stage(each, ALONE, report)
        shutil.copytree(each.directory / "checkpoint", tmp_path / each.directory.name)

    logs: list[Any] = []
    train_rounds(stage, logs.append, train)
    first, second = inner
    assert (first.parent, first.source) == (base, None)
    assert second.parent == first.directory / "checkpoint" and second.source is not None
    assert second.source.checkpoint == second.parent and second.seed != first.seed
    kept = read_kept(stage.directory / ARTEFACTS_NAME)
    assert [each["source"] for each in kept] == ["the start of the stage", "round 1 of this stage"]
    steps = [-(-each["tasks"][TASK]["kept"] // 4) for each in kept]
    lines = read_json_lines(stage.directory / "train" / "log.jsonl")
    assert [line["step"] for line in lines] == [log.step for log in logs] == list(range(1, sum(steps) + 1))
    assert logs[-1].step == logs[-1].steps
    assert not list(stage.directory.glob("round*")) and not list(stage.directory.glob(".round*"))
    final = sha256_file(stage.directory / "checkpoint" / "model.safetensors")
    assert final == sha256_file(tmp_path / "round2" / "model.safetensors")
    assert final != sha256_file(tmp_path / "round1" / "model.safetensors")
