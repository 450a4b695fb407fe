"""The local engine as a whole: it learns, repeats itself, survives being killed, and never saves broken weights."""

import ctypes
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cpt_rft.checkpoint import encode_prompts, load_policy
from cpt_rft.config.engine import LocalConfig
from cpt_rft.config.methods import GrpoMethod, SftMethod
from cpt_rft.data.example import Example
from cpt_rft.data.parquet import write_split
from cpt_rft.engines.base import Stage, resolve_engine
from cpt_rft.engines.local.batches import batches, stage_batches
from cpt_rft.engines.local.generate import generate
from cpt_rft.engines.local.runtime import prepare
from cpt_rft.errors import CheckpointError, ConfigError, TrainingError
from cpt_rft.miniature.world import make_rows
from cpt_rft.prompts import target_text, user_text
from tests.helpers.engine import TASK, grpo, make_base, make_stage, run, sft, weights
from tests.helpers.killed import train_and_die
from tests.helpers.tiny_run import unmeasured

LOG_KEYS = {
    *("step", "loss", "reward", "accuracy", "format", "kl", "length", "truncated", "grad_norm", "lr"),
    *(
        "zero_variance",
        "unscored",
        "skipped",
        "seconds",
        "tokens",
        "entropy",
        "rollout_gap",
        "rollout_gap_mean",
        "rounded_groups",
        "replayed",
        "shown",
        "difficulty",
        "penalty",
    ),
    *("memory_bytes", "energy_joules"),
    *("reward_variance", "all_right", "all_wrong", "grad_norm_right", "grad_norm_mixed", "grad_norm_wrong"),
}


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return make_rows(TASK, "train", 12, 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("train") / "base", scale=2.0)


@pytest.fixture(scope="module")
def taught(base: Path, rows: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has begun to learn the rows."""
    stage = make_stage(tmp_path_factory.mktemp("taught") / "stage", base, sft(epochs=12, lr=6e-3), rows)
    run(stage)
    return stage.directory / "checkpoint"


def read_log(stage: Stage) -> list[dict[str, float]]:
    return [json.loads(line) for line in (stage.directory / "train" / "log.jsonl").read_text().splitlines()]


def same_weights(one: Path, other: Path) -> bool:
    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("style", "dtype"), [("direct", "float32"), ("cot", "bfloat16")])
def test_sft_learns_a_small_set_by_heart(
    base: Path, rows: list[Example], tmp_path: Path, style: str, dtype: str
) -> None:
    method = sft(style=style, lr=8e-3, epochs=50, schedule="cosine", warmup_ratio=0.1, micro_batch=2)
    stage = make_stage(tmp_path / "stage", base, method, rows[:4], dtype=dtype)
    logs = run(stage)
    assert len(logs) == 50 and logs[-1].loss is not None and logs[-1].loss < 0.2
    policy = load_policy(stage.directory / "checkpoint")
    prompts = encode_prompts(policy, [(row.images, user_text(row, style, "miniature")) for row in rows[:4]])
    texts = [
        policy.tokenizer.decode(group[0].token_ids, skip_special_tokens=True)
        for group in generate(policy, prompts, max_new_tokens=48, temperature=0)
    ]
    answers = [target_text(row, style) for row in rows[:4]]
    assert sum(map(str.__eq__, texts, answers)) >= 3


def test_grpo_raises_the_reward(base: Path, taught: Path, rows: list[Example], tmp_path: Path) -> None:
    """The model says many things; one of them, wherever it is asked, is rewarded."""
    word = rows[0].answer
    asked = [replace(row, answer=word, references=(word,)) for row in rows]
    logs = run(make_stage(tmp_path / "stage", base, grpo(epochs=6, lr=2e-3, group=8), asked, parent=taught))
    rewards = [log.reward or 0.0 for log in logs]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3
    assert all(log.rollout_gap is not None and log.rollout_gap < 1e-3 for log in logs)


def test_the_log(base: Path, taught: Path, rows: list[Example], tmp_path: Path) -> None:
    for name, method in (("sft", sft()), ("grpo", grpo())):
        stage = make_stage(tmp_path / name, base, method, rows, parent=taught)
        logs, lines = run(stage), read_log(stage)
        assert [log.step for log in logs] == [line["step"] for line in lines] == [1, 2, 3]
        assert {log.steps for log in logs} == {3}
        assert all(set(line) == LOG_KEYS for line in lines)
        assert [json.loads(log.line()) for log in logs] == lines
        reported = {key for key, value in lines[0].items() if value is not None}
        assert reported >= {"loss", "grad_norm", "lr", "tokens", "length", "seconds", "skipped", "memory_bytes"}
        assert ("reward" in reported) == ("kl" in reported) == (name == "grpo")
        assert sorted(path.name for path in stage.directory.iterdir()) == ["checkpoint", "train"]


def test_a_rate_of_zero_moves_nothing(base: Path, taught: Path, rows: list[Example], tmp_path: Path) -> None:
    for name, method in (("sft", sft(weight_decay=0.1)), ("grpo", grpo(weight_decay=0.1))):
        frozen = method.model_copy(update={"lr": 0.0})
        stage = make_stage(tmp_path / name, base, frozen, rows[:4], parent=taught)
        run(stage)
        assert same_weights(stage.directory / "checkpoint", taught)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", [sft(epochs=4), grpo(epochs=4)], ids=["sft", "grpo"])
def test_a_killed_stage_ends_with_the_same_bits(
    taught: Path, base: Path, rows: list[Example], tmp_path: Path, method: SftMethod | GrpoMethod, dtype: str
) -> None:
    """12 steps; killed within step 8, after the resume point at 5; gone on; against a run left alone."""
    whole = make_stage(tmp_path / "whole", base, method, rows, parent=taught, dtype=dtype, save_every=5)
    run(whole)
    stage = make_stage(tmp_path / "killed", base, method, rows, parent=taught, dtype=dtype, save_every=5)
    train_and_die(stage, at=7)
    assert not (stage.directory / "checkpoint").exists()
    assert len(read_log(stage)) == 7
    assert [log.step for log in run(stage)] == list(range(6, 13))
    assert same_weights(whole.directory / "checkpoint", stage.directory / "checkpoint")
    lines = [[unmeasured(line) for line in read_log(each)] for each in (whole, stage)]
    assert lines[0] == lines[1]
    assert not (stage.directory / "resume").exists()


@pytest.mark.parametrize("damage", ["cut", "emptied", "other settings", "log lost"])
def test_a_useless_resume_point_costs_time_only(base: Path, rows: list[Example], tmp_path: Path, damage: str) -> None:
    whole = make_stage(tmp_path / "whole", base, sft(epochs=2), rows, save_every=2)
    run(whole)
    stage = make_stage(tmp_path / "stage", base, sft(epochs=2), rows, save_every=2)
    train_and_die(stage if damage != "other settings" else replace(stage, method=sft(epochs=2, lr=1e-2)), at=5)
    state = stage.directory / "resume" / "state.pt"
    if damage in ("cut", "emptied"):
        state.write_bytes(state.read_bytes()[: 1000 if damage == "cut" else 0])
    if damage == "log lost":
        (stage.directory / "train" / "log.jsonl").write_text("")
    assert [log.step for log in run(stage)] == list(range(1, 7))
    assert len(read_log(stage)) == 6
    assert same_weights(whole.directory / "checkpoint", stage.directory / "checkpoint")


def test_a_stage_killed_after_its_checkpoint_writes_it_again(base: Path, rows: list[Example], tmp_path: Path) -> None:
    stage = make_stage(tmp_path / "stage", base, sft(), rows)
    (stage.directory / "checkpoint").mkdir()
    (stage.directory / "checkpoint" / "junk").write_text("")
    run(stage)
    assert not (stage.directory / "checkpoint" / "junk").exists()
    load_policy(stage.directory / "checkpoint")


def test_seeds_decide_everything(base: Path, taught: Path, rows: list[Example], tmp_path: Path) -> None:
    def train(name: str, **changes: object) -> Path:
        stage = make_stage(tmp_path / name, base, grpo(), rows, parent=taught)
        run(replace(stage, **changes))  # type: ignore[arg-type]
        return stage.directory / "checkpoint"

    first = train("first")
    assert same_weights(first, train("again"))
    assert not same_weights(first, train("seed", seed=1))
    assert not same_weights(first, train("path", seed_path=("test", "grpo", 1, TASK)))


@pytest.mark.parametrize("method", [sft(lr=1e30, epochs=3), grpo(lr=1e30, epochs=3)], ids=["sft", "grpo"])
def test_broken_numbers_stop_the_stage(
    base: Path, taught: Path, rows: list[Example], tmp_path: Path, method: SftMethod
) -> None:
    stage = make_stage(tmp_path / "stage", base, method, rows, parent=taught, max_skipped_steps=2, save_every=1)
    with pytest.raises(TrainingError, match="not finite in 3 steps"):
        run(stage)
    assert not (stage.directory / "checkpoint").exists()
    assert [line["skipped"] for line in read_log(stage)] == [0, 1, 2]
    assert read_log(stage)[-1]["grad_norm"] is None


def test_broken_weights_are_not_saved(base: Path, rows: list[Example], tmp_path: Path) -> None:
    """The last step itself overflows, so that no loss shows it any more."""
    stage = make_stage(tmp_path / "stage", base, sft(lr=1e39), rows[:4])
    with pytest.raises(TrainingError, match="nothing was saved"):
        run(stage)
    assert not (stage.directory / "checkpoint").exists()


def test_the_reference_policy(base: Path, taught: Path, rows: list[Example], tmp_path: Path) -> None:
    def first_kl(name: str, where: Path, **changes: object) -> float | None:
        stage = make_stage(tmp_path / name, where, grpo(**changes), rows[:4], parent=taught)
        return run(stage)[0].kl

    from_base = first_kl("base", base)
    assert from_base is not None and from_base > 0.1
    assert first_kl("stage", base, kl_reference="stage") == pytest.approx(0.0, abs=1e-6)
    nowhere = tmp_path / "nowhere"
    assert first_kl("none", nowhere, kl_coef=0.0) is None  # no reference is loaded
    with pytest.raises(CheckpointError, match="nowhere"):
        first_kl("missing", nowhere)


def test_all_methods_see_the_same_rows(base: Path, rows: list[Example], tmp_path: Path) -> None:
    stages = [make_stage(tmp_path / m.name, base, m, rows) for m in (sft(epochs=3), grpo(epochs=3))]
    one, other = ([[row.id for row in batch] for batch in stage_batches(stage)] for stage in stages)
    assert one == other
    assert len(one) == 9 and {len(batch) for batch in one} == {4}
    for epoch in range(3):
        seen = [name for batch in one[epoch * 3 : epoch * 3 + 3] for name in batch]
        assert sorted(seen) == sorted(row.id for row in rows)
    assert one[:3] != one[3:6]


def test_checkpointing_ends_with_the_same_bits(base: Path, taught: Path, rows: list[Example], tmp_path: Path) -> None:
    stages = [
        make_stage(tmp_path / str(each), base, grpo(), rows, parent=taught, gradient_checkpointing=each)
        for each in (False, True)
    ]
    for stage in stages:
        run(stage)
    assert same_weights(*(stage.directory / "checkpoint" for stage in stages))


def test_batches_of_a_seed_and_of_a_remainder(rows: list[Example]) -> None:
    first = batches(rows, TASK, 0, 1, 5)
    assert [len(batch) for batch in first] == [5, 5, 2]
    assert first == batches(rows, TASK, 0, 1, 5)
    assert first != batches(rows, TASK, 1, 1, 5)
    assert first != batches(rows, "mini_textvqa", 0, 1, 5)


def test_joint_training_mixes_tasks_whatever_their_order(base: Path, rows: list[Example], tmp_path: Path) -> None:
    stage = make_stage(tmp_path / "stage", base, sft(joint=True, prompts_per_step=8), rows)
    second = tmp_path / "second.parquet"
    write_split(second, make_rows("mini_textvqa", "train", 12, 0))
    joint = replace(stage, tasks=(TASK, "mini_textvqa"), data=(*stage.data, second))
    turned = replace(joint, tasks=joint.tasks[::-1], data=joint.data[::-1])
    mixed = stage_batches(joint)
    assert mixed == stage_batches(turned)
    assert all(len({row.task for row in batch}) == 2 for batch in mixed)
    assert len(run(joint)) == 3


def test_what_the_machine_has_is_found_once() -> None:
    resolved = resolve_engine(LocalConfig(name="local"))
    assert resolved.dtype in ("float32", "bfloat16")
    assert resolved.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_engine(resolved) == resolved
    fixed = LocalConfig(name="local", dtype="bfloat16", device="cpu")
    assert resolve_engine(fixed) == fixed
    assert prepare(fixed) == (torch.bfloat16, "cpu")


def test_threads_are_set() -> None:
    before = torch.get_num_threads()
    prepare(LocalConfig(name="local", device="cpu", threads=2))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(ConfigError, match="the engine local is cuda, but this machine has no usable GPU"):
        prepare(LocalConfig(name="local", device="cuda"))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no such setting")
def test_memory_that_was_freed_is_used_again_without_a_page_fault() -> None:
    """Five tensors of 40 MB, more than is kept by default, made several times."""
    faults = """
import resource, sys, torch
from cpt_rft.engines.local.runtime import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(10_000_000) for _ in range(5)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    counts = [
        int(subprocess.run([sys.executable, "-c", faults, how], capture_output=True, text=True, check=True).stdout)
        for how in ("default", "kept")
    ]
    assert counts[1] < 0.3 * counts[0], counts
