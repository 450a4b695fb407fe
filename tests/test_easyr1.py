"""The engine easyr1 without the framework: the reward that it loads, the rows, its log, where it goes on, the merge."""

import importlib.util
import inspect
import json
import math
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from jinja2 import Template

from cpt_rft.config.engine import parse_engine
from cpt_rft.config.methods import GrpoMethod
from cpt_rft.data.example import Example
from cpt_rft.data.export import ground_truth
from cpt_rft.data.tokens import PromptCounter
from cpt_rft.engines.base import Stage
from cpt_rft.engines.easyr1 import failures, reward
from cpt_rft.engines.easyr1.merge import check_generation, check_shards
from cpt_rft.engines.easyr1.resume import archive_logs, is_whole, kept_lines, open_out, shard_name
from cpt_rft.engines.easyr1.rows import CANARY, TEMPLATE, TRAIN, WrittenRows, write_rows
from cpt_rft.engines.easyr1.watch import FRAMEWORK_LOG, Follower, Heartbeat, check_start
from cpt_rft.engines.local.batches import batches
from cpt_rft.errors import CheckpointError, DataError, TrainingError
from cpt_rft.miniature.world import make_rows
from cpt_rft.prompts import user_text
from cpt_rft.scoring import reward as scored_reward
from cpt_rft.scoring import score
from cpt_rft.vision import VisionSpec

BASE = Path(__file__).parents[1] / "cpt_rft" / "miniature" / "base"
SPEC = VisionSpec.read(BASE)
ROWS = make_rows("mini_scienceqa", "train", 10, 0)


def grpo(**changes: Any) -> GrpoMethod:
    stated = {"kind": "grpo", "name": "grpo", "style": "cot", "lr": 1e-4, "prompts_per_step": 4, "micro_batch": 2}
    return GrpoMethod(**{**stated, "group": 4, "max_new_tokens": 24, "max_prompt_tokens": 128, **changes})


# --- the reward -------------------------------------------------------------------------------------------------------


def loaded() -> ModuleType:
    """The reward file as the framework loads it: by its path, under a name of its own, in no package."""
    spec = importlib.util.spec_from_file_location("custom_reward_fn", reward.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asked(response: str, row: int = 0, length: int = 9) -> dict[str, Any]:
    return {"response": response, "response_length": length, "ground_truth": ground_truth(ROWS[row])}


def test_the_reward_is_the_score_of_evaluation(tmp_path: Path) -> None:
    module = loaded()
    assert module.REWARD_TYPE == "batch"
    records = tmp_path / "rewards.jsonl"
    compute = partial(module.compute_score, style="cot", longest=24, records=str(records))
    right = f"<think> a </think> \\boxed{{ {ROWS[0].answer} }}"
    responses = [right, f"\\boxed{{{ROWS[1].answer}}}", "<think>", "", "\ud800\x00" * 50]
    entries = [asked(text, number) for number, text in enumerate(responses)]
    found = compute(entries)
    for row, text, numbers in zip(ROWS, responses, found, strict=False):
        told = {"answer": row.answer, "references": row.references, "kind": row.kind, "options": row.options}
        mark = score(text, **told, style="cot")
        assert numbers["overall"] == scored_reward(mark, "cot") and numbers["accuracy"] == mark.strict
        assert (numbers["format"], numbers["lenient"], numbers["failed"]) == (mark.format, mark.lenient, 0.0)
    assert found[0]["overall"] == 1.0 and found[1]["overall"] == pytest.approx(0.9)
    compute([asked(right, length=24)])
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert [line["call"] for line in lines] == [1] * 5 + [2]
    assert [line["id"] for line in lines[:5]] == [row.id for row in ROWS[:5]] and lines[0]["response"] == right
    assert [line["truncated"] for line in lines] == [0.0] * 5 + [1.0] and lines[5]["status"] == "truncated"


@pytest.mark.parametrize(
    "truth", ["", "no JSON", "[]", '{"id": "a"}', None, json.dumps({"id": 1, "task": 2, "kind": "x"})]
)
def test_a_broken_row_earns_nothing_and_ends_nothing(truth: Any, tmp_path: Path) -> None:
    records = tmp_path / "rewards.jsonl"
    entries = [asked("\\boxed{A}"), {**asked("\\boxed{A}"), "ground_truth": truth}]
    good, broken = reward.compute_score(entries, style="cot", longest=24, records=str(records))
    assert broken["failed"] == 1.0 and broken["overall"] == 0.0 and good["failed"] == 0.0
    assert "error" in json.loads(records.read_text().splitlines()[1])


def test_every_response_has_the_same_numeric_keys() -> None:
    found = reward.compute_score([asked("\\boxed{A}"), asked("")], style="direct", longest=24)
    assert {tuple(numbers) for numbers in found} == {tuple(found[0])} and next(iter(found[0])) == "overall"
    assert all(type(value) is float and math.isfinite(value) for numbers in found for value in numbers.values())
    assert not any("/" in key for key in found[0])


# --- the rows ---------------------------------------------------------------------------------------------------------


def stage(directory: Path, method: GrpoMethod) -> Stage:
    """As much of a stage as its rows need; its engine is not looked at."""
    engine = parse_engine({"name": "easyr1", "device": "cpu", "dtype": "float32", "processes": 1})
    return Stage(
        directory=directory, parent=BASE, base=BASE, tasks=("mini_scienceqa",), data=(), method=method, engine=engine,
        prompt_preset="miniature", seed=3, seed_path=("test",),
    )  # fmt: skip


def test_rows_stand_in_the_order_of_the_local_engine_and_fill_the_last_rollout(tmp_path: Path) -> None:
    method = grpo(epochs=2, rollout_steps=2)  # 20 rows, 8 a rollout
    written = write_rows(stage(tmp_path, method), method, {"mini_scienceqa": ROWS}, BASE, SPEC, tmp_path)
    assert written == WrittenRows(rows=10, rollouts=3, repeated=4)
    table = pq.read_table(tmp_path / TRAIN)
    order = [row.id for step in batches(ROWS, "mini_scienceqa", 3, 2, 4) for row in step]
    ids = [json.loads(text)["id"] for text in table["answer"].to_pylist()]
    assert ids == order + order[:4]
    by_id = {row.id: row for row in ROWS}
    template = Template((tmp_path / TEMPLATE).read_text())
    for name, problem, images in zip(ids, table["problem"].to_pylist(), table["images"].to_pylist(), strict=True):
        assert template.render(content=problem) == user_text(by_id[name], "cot", "miniature")
        assert [(tmp_path / image).read_bytes()[:4] for image in images] == [b"\x89PNG"] * problem.count("<image>")
    canaries = json.loads((tmp_path / CANARY).read_text())
    assert len(canaries) == 10 and "<image>" not in canaries[0]["user"]


def test_a_row_that_the_framework_would_choke_on_is_refused(tmp_path: Path) -> None:
    def worded(problem: str) -> Example:
        return replace(ROWS[0], meta={"problems": {"miniature": problem}})

    prompt = PromptCounter(BASE)(
        user_text(ROWS[0], "cot", "miniature"), [SPEC.image_tokens(84, 84)] * len(ROWS[0].images)
    )
    for row, limit, words in (
        (ROWS[0], prompt - 1, f"its prompt has {prompt} tokens"),
        (worded("<image><image>?"), 128, "2 <image> tags for 1 pictures"),
        (worded("<image> <|image_pad|>"), 128, "reserved token <|image_pad|>"),
    ):
        method = grpo(max_prompt_tokens=limit)
        with pytest.raises(DataError, match=words.replace("|", r"\|")):
            write_rows(stage(tmp_path, method), method, {"mini_scienceqa": [row]}, BASE, SPEC, tmp_path)
    method = grpo(max_prompt_tokens=prompt)
    write_rows(stage(tmp_path, method), method, {"mini_scienceqa": ROWS[:1]}, BASE, SPEC, tmp_path)


# --- the log ----------------------------------------------------------------------------------------------------------


def entry(step: int, **changes: Any) -> dict[str, Any]:
    """A line of the framework's log (the facts' harness made such lines)."""
    return {
        "step": step,
        "reward": {"overall": 0.2 * step, "accuracy": 0.1, "format": 0.3, "truncated": 0.25, "failed": 0.125},
        "actor": {"pg_loss": -0.5, "kl_loss": 0.01, "entropy_loss": 0.7, "grad_norm": float("nan"), "lr": 1e-6},
        "response_length": {"mean": 5.5},
        "timing_s": {"step": 12.5},
        "cpt_rft": {"zero_variance": 0.5, "reward_variance": 0.04, "rounded_groups": 1},
        **changes,
    }


def write_log(path: Path, *steps: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry(step)) + "\n" for step in steps))


def test_the_log_in_our_terms(tmp_path: Path) -> None:
    method, written = grpo(rollout_steps=2), WrittenRows(8, 3, 0)
    follower = Follower(tmp_path, written, method, 0)
    assert list(follower.new_steps()) == []
    with (tmp_path / FRAMEWORK_LOG).open("w") as file:
        file.write(json.dumps(entry(1)) + "\n" + json.dumps(entry(2))[:40])
    (line,) = follower.new_steps()
    assert (line.step, line.steps, line.loss, line.kl, line.entropy, line.lr) == (1, 3, -0.5, 0.01, 0.7, 1e-6)
    assert line.grad_norm is None and line.seconds == 12.5 and line.length == 5.5
    assert line.tokens == round(5.5 * 2 * 4 * 4) and line.unscored == 0.125 * 32
    assert (line.zero_variance, line.reward_variance, line.rounded_groups) == (0.5, 0.04, 1)
    assert (line.reward, line.accuracy, line.format, line.truncated) == (0.2, 0.1, 0.3, 0.25)
    write_log(tmp_path / FRAMEWORK_LOG, 1, 2)
    assert [line.step for line in follower.new_steps()] == [2]
    write_log(tmp_path / FRAMEWORK_LOG, 1, 2, 7)
    with pytest.raises(TrainingError, match="is at step 7; step 3 of 3 was expected"):
        list(follower.new_steps())


def test_training_has_begun_only_with_all_rows() -> None:
    assert not check_start("loading", WrittenRows(8, 3, 0))
    assert check_start("Size of train dataloader: 3\nTotal training steps: 3\n", WrittenRows(8, 3, 0))
    with pytest.raises(TrainingError, match="will make 2 rollouts, 3 were written"):
        check_start("Total training steps: 2\n", WrittenRows(8, 3, 0))


def test_a_run_that_is_silent_is_ended(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path / "log")
    heartbeat.check(tmp_path / "log", patience_s=60)
    with pytest.raises(TrainingError, match="has written nothing for"):
        heartbeat.check(tmp_path / "log", patience_s=-1e-9)
    (tmp_path / "log").write_text("alive")
    heartbeat.check(tmp_path / "log", patience_s=-1e-9)


@pytest.mark.parametrize(
    ("said", "meaning"),
    [
        ("ValueError: Total available GPUs 4 is less than total desired GPUs 8.", "fewer GPUs than workers"),
        ("RuntimeError: No sample is kept after filtering. Please check your data.", "online filtering kept no row"),
        ("omegaconf.errors.ConfigKeyError: Key 'x' not in 'DataConfig'", "does not take the YAML"),
        ("ray.exceptions.ActorDiedError: The actor died unexpectedly", "a worker of Ray died"),
        ("OSError: [Errno 28] No space left on device", "The disk is full"),
        ("nothing of note", "failed with status 1: nothing of note"),
    ],
)
def test_known_failures_are_one_line(said: str, meaning: str, tmp_path: Path) -> None:
    assert meaning in failures.explain(1, f"before\n{said}\n", tmp_path / "framework.log").problem


# --- where a stage goes on --------------------------------------------------------------------------------------------


def save_step(out: Path, step: int, processes: int = 2) -> Path:
    """A checkpoint with the files of the framework, in small."""
    actor = out / f"global_step_{step}" / "actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "huggingface" / "config.json").write_text("{}")
    for part in ("model", "optim", "extra_state"):
        for rank in range(processes):
            torch.save({"weight": torch.full((64,), float(rank))}, actor / shard_name(part, processes, rank))
    torch.save({}, out / f"global_step_{step}" / "dataloader.pt")
    return actor


def test_it_goes_on_from_the_newest_whole_checkpoint_that_was_logged(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert open_out(out, {"lr": 1}, 2) == 0
    for step in (2, 4, 6, 8):
        save_step(out, step)
    write_log(out / FRAMEWORK_LOG, 1, 2, 3, 4, 5, 6)  # killed after it saved 8, before it logged it
    whole = (out / "global_step_6" / "actor" / shard_name("optim", 2, 1)).read_bytes()
    (out / "global_step_6" / "actor" / shard_name("optim", 2, 1)).write_bytes(whole[:-30])
    assert open_out(out, {"lr": 1}, 2) == 4
    assert sorted(path.name for path in out.iterdir()) == ["global_step_4"]
    lines = kept_lines(tmp_path / "logs", 4, 9, grpo())
    assert [line.step for line in lines] == [1, 2, 3, 4] and {line.steps for line in lines} == {9}
    assert open_out(out, {"lr": 2}, 2) == 0 and not list(out.iterdir()) and not (tmp_path / "logs").exists()


def test_logs_of_every_start_are_kept_and_the_later_counts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    open_out(out, {}, 2)
    (tmp_path / "rewards.jsonl").write_text("{}\n")
    write_log(out / FRAMEWORK_LOG, 1, 2, 3)
    archive_logs(out)
    changed = entry(3) | {"timing_s": {"step": 99.0}}
    (out / FRAMEWORK_LOG).write_text(json.dumps(entry(2)) + "\n" + json.dumps(changed) + "\n" + '{"step": 4, "rew')
    archive_logs(out)
    archive_logs(out)
    kept = sorted(path.relative_to(tmp_path / "logs").as_posix() for path in (tmp_path / "logs").rglob("*.jsonl"))
    assert kept == [f"1/{FRAMEWORK_LOG}", "1/rewards.jsonl", f"2/{FRAMEWORK_LOG}"]
    assert [line.seconds for line in kept_lines(tmp_path / "logs", 3, 4, grpo())] == [12.5, 12.5, 99.0]


def test_a_checkpoint_of_another_number_of_workers_is_not_whole(tmp_path: Path) -> None:
    save_step(tmp_path, 2)
    assert is_whole(tmp_path / "global_step_2", 2) and not is_whole(tmp_path / "global_step_2", 4)
    (tmp_path / "global_step_2" / "dataloader.pt").unlink()
    assert not is_whole(tmp_path / "global_step_2", 2)


# --- the merge --------------------------------------------------------------------------------------------------------


def test_the_merge_takes_all_shards_and_each_in_its_place(tmp_path: Path) -> None:
    actor = save_step(tmp_path, 2)
    first, second = (actor / shard_name("model", 2, rank) for rank in range(2))
    check_shards(actor, 2)
    data = second.read_bytes()

    second.unlink()
    with pytest.raises(CheckpointError, match=r"rank_1\.pt is not there"):
        check_shards(actor, 2)
    second.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"rank_1\.pt is cut short"):
        check_shards(actor, 2)
    second.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"rank_1\.pt is cut short"):
        check_shards(actor, 2)
    second.write_bytes(first.read_bytes())
    first.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank_0\.pt was saved as model_world_size_2_rank_1\.pt"):
        check_shards(actor, 2)
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    check_shards(actor, 2)
    torch.save({}, actor / shard_name("model", 4, 0))
    with pytest.raises(CheckpointError, match="of another number of processes than 2"):
        check_shards(actor, 2)
    assert zipfile.is_zipfile(first)


def test_the_merged_weights_must_end_their_answers_as_before(tmp_path: Path) -> None:
    parent, merged = tmp_path / "parent", tmp_path / "merged"
    for directory in (parent, merged):
        directory.mkdir()
    told = {"eos_token_id": [1, 2], "pad_token_id": 3, "do_sample": False}
    (parent / "generation_config.json").write_text(json.dumps(told))
    kept = {"eos_token_id": [1, 2], "pad_token_id": 3, "transformers_version": "0"}
    (merged / "generation_config.json").write_text(json.dumps(kept))
    check_generation(merged, parent)  # a default may be left out
    for wrong in ({**kept, "eos_token_id": 1}, {"pad_token_id": 3}, {**kept, "temperature": 0.1}):
        (merged / "generation_config.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="the parent has"):
            check_generation(merged, parent)


def test_the_reward_takes_what_the_framework_binds() -> None:
    bound = set(inspect.signature(reward.compute_score).parameters) - {"reward_inputs"}
    assert bound == {"style", "longest", "preset", "records"}
