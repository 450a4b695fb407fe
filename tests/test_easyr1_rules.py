"""What is accepted for EasyR1 goes through the framework's own arithmetic, and what does not is refused by name."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cpt_rft.engines.easyr1 import native
from cpt_rft.engines.easyr1.rules import RULES, check, schema
from cpt_rft.errors import ConfigError
from tests.helpers.easyr1_settings import SEVEN_B, SPEC, engine, grpo, make_files

Json = dict[str, Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> native.Files:
    return make_files(tmp_path_factory.mktemp("easyr1"))


def told(files: native.Files, engine_changes: Json | None = None, **method_changes: Any) -> Json:
    return native.settings(engine(**(engine_changes or {})), grpo(**method_changes), files, SPEC, 0)


# --- thousands of generated experiments -------------------------------------------------------------------------------


class FailsError(Exception):
    """The framework would fail here, or do something else than it was told."""


def must(holds: bool, where: str) -> None:
    if not holds:
        raise FailsError(where)


def chunk(items: Sequence[int], parts: int) -> list[Sequence[int]]:
    """DataProto.chunk: equal parts or an assertion."""
    must(len(items) % parts == 0, f"{len(items)} items in {parts} chunks")
    size = len(items) // parts
    return [items[i * size : (i + 1) * size] for i in range(parts)]


def split(items: Sequence[int], size: int) -> list[Sequence[int]]:
    """DataProto.split: parts of one size or an assertion."""
    must(len(items) % size == 0, f"{len(items)} items in pieces of {size}")
    return chunk(items, len(items) // size)


def framework(keys: Json, rows: int) -> list[int]:
    """One rollout as EasyR1 at the pinned commit takes it apart, from its source; the size of every optimizer step."""
    data, actor, rollout = keys["data"], keys["worker"]["actor"], keys["worker"]["rollout"]
    gpus = keys["trainer"]["nnodes"] * keys["trainer"]["n_gpus_per_node"]
    size, n, micro = data["rollout_batch_size"], rollout["n"], actor["micro_batch_size_per_device_for_update"]
    # create_dataloader, with drop_last
    batches = [range(start, start + size) for start in range(0, rows, size) if start + size <= rows]
    must(len(batches) >= 1, "an empty data loader")
    # RayPPOTrainer.__init__
    must(size % actor["global_batch_size"] == 0, "rollout and global batch")
    must(size * n % actor["micro_batch_size_per_device_for_experience"] == 0, "micro-batch for experience")
    must(n > 1 or keys["algorithm"]["adv_estimator"] not in ("grpo", "rloo"), "a group of one")
    # FSDPWorker._init_dist_mesh: the batch of prompts becomes one of completions
    step = actor["global_batch_size"] * n if n > 1 else actor["global_batch_size"]
    share = step // gpus
    must(share > 0, "fewer completions than GPUs")
    must(share % micro == 0, "micro-batch of the update")
    # FSDPWorker._build_rollout, vLLMRollout and vLLM's ModelConfig
    parallel, heads, keys_values = rollout["tensor_parallel_size"], *SEVEN_B.values()
    must(gpus % parallel == 0, "tensor parallelism")
    must(heads % parallel == 0 and max(keys_values, parallel) % min(keys_values, parallel) == 0, "heads")
    must(rollout["max_num_batched_tokens"] >= data["max_prompt_length"] + data["max_response_length"], "buffer")
    # RayPPOTrainer._make_batch_data, repeat, and the dispatch of every call
    chunk(batches[0], gpus)
    shards = chunk(range(size * n), gpus)
    # DataParallelPPOActor.update_policy: one optimizer step a piece, all workers at once
    pieces = [split(shard, share) for shard in shards]
    steps = [sum(len(piece) for piece in together) for together in zip(*pieces, strict=True)]
    must(steps == [step] * (size // actor["global_batch_size"]), f"steps of {steps} instead of {step}")
    return steps


@st.composite
def asked(draw: st.DrawFn) -> tuple[Json, Json, int]:
    """Engine, method and rows; most numbers fit together, any of them may be wild."""
    wild = st.sampled_from([False] * 6 + [True])

    def number(fitting: Sequence[int], low: int, high: int) -> int:
        return draw(st.integers(low, high) if draw(wild) else st.sampled_from(fitting))

    per_node, nodes = number([1, 2, 4, 8], 1, 9), draw(st.sampled_from([1, 1, 2, 3]))
    gpus, group = per_node * nodes, number([2, 4, 8], 1, 9)
    step, steps = number([gpus, 2 * gpus, 3 * gpus], 1, 40), draw(st.integers(1, 4))
    completions, share = steps * step * group, max(1, step * group // gpus)
    advantage = draw(st.sampled_from(["grpo", "rloo", "remax", "reinforce_plus_plus"]))
    engine = {
        **{"processes": per_node, "nodes": nodes, "ray_address": "auto" if nodes > 1 else None},
        "tensor_parallel": number([size for size in (1, 2, 4) if gpus % size == 0], 1, 9),
        "micro_batch_update": number([size for size in range(1, share + 1) if share % size == 0], 1, 9),
        "micro_batch_experience": number([size for size in range(1, 33) if completions % size == 0], 1, 17),
    }
    method = {
        **{"prompts_per_step": step, "rollout_steps": steps, "advantage": advantage},
        "group": max(group, 2) if advantage in ("grpo", "rloo") else group,  # no method says one there
        **{"max_prompt_tokens": number([512, 9000], 1, 9000), "max_new_tokens": number([24], 1, 1024)},
    }
    return engine, method, number([steps * step, 200], 0, 200)


@given(asked())
@example(({"processes": 4}, {"prompts_per_step": 6, "rollout_steps": 2, "group": 1, "advantage": "remax"}, 12))
@settings(max_examples=2000)
def test_what_is_accepted_the_framework_can_do_and_nothing_else_is_refused(files, case):
    engine_changes, method_changes, rows = case
    keys = told(files, engine_changes, **method_changes)
    try:
        steps = framework(keys, rows)
    except FailsError as failure:
        with pytest.raises(ConfigError) as refused:
            check(keys, rows)
        assert any(refused.value.problem.startswith(f"EasyR1 needs {rule.text}, but ") for rule in RULES), failure
        return
    check(keys, rows)
    assert steps == [method_changes["prompts_per_step"] * method_changes["group"]] * method_changes["rollout_steps"]


# --- every rule by itself ---------------------------------------------------------------------------------------------


def changed(keys: Json, dotted: str, value: Any) -> Json:
    keys = copy.deepcopy(keys)
    place = keys
    *above, last = dotted.split(".")
    for key in above:
        place = place.setdefault(key, {})
    place[last] = value
    return keys


BREAKS = [
    ("worker.rollout.temperature", 0.0, "sizes and rates above 0, but worker.rollout.temperature is 0.0"),
    ("worker.rollout.gpu_memory_utilization", 1.5, "utilization and top_p of at most 1, but worker.rollout.gpu"),
    ("data.format_prompt", "/nowhere/x.jinja", "paths that exist, but data.format_prompt is /nowhere/x.jinja"),
    ("data.image_dir", "/nowhere", "paths that exist, but data.image_dir"),
    ("data.override_chat_template", "/nowhere", "paths that exist, but data.override_chat_template"),
    ("data.train_files", "/nowhere/a.parquet@train", "paths that exist, but data.train_files is /nowhere/a.parquet"),
    ("worker.actor.model.model_path", "/nowhere", "paths that exist, but worker.actor.model.model_path"),
    ("worker.actor.model.model_path", None, "paths that exist, but worker.actor.model.model_path is null"),
    ("worker.reward.reward_function", "/nowhere/r.py:f", "paths that exist, but worker.reward.reward_function is /now"),
    ("worker.reward.reward_function", None, "paths that exist, but worker.reward.reward_function is null"),
    ("worker.rollout.n", 1, "rollout.n above 1 for grpo and rloo, but grpo has 1"),
    ("algorithm.adv_estimator", "gae", "adv_estimator to be one that works, but it is gae"),
    ("algorithm.kl_penalty", "full", "kl_penalty to be one of single log-probabilities, but it is full"),
    ("worker.actor.ulysses_size", 2, "ulysses_size to be 1, but it is 2"),
    ("worker.actor.clip_ratio_low", 1.5, "clip_ratio_low from 0 to 1, .* but they are 1.5"),
    ("worker.actor.clip_ratio_dual", 1.0, "clip_ratio_dual above 1, but they are"),
    ("data.rollout_batch_size", 500, "rollout_batch_size % global_batch_size == 0, but 500 divided by 128 leaves 116"),
    ("data.mini_rollout_batch_size", 12, "prompts of a generation call % GPUs == 0, but 12 divided by 8 leaves 4"),
    ("data.mini_rollout_batch_size", 16, "max_try_make_batch, but it takes 32 and may take 20"),
    ("worker.rollout.tensor_parallel_size", 3, "GPUs % tensor_parallel_size == 0, but 8 divided by 3 leaves 2"),
    ("worker.rollout.tensor_parallel_size", 8, "heads that .* 8 parts of 28 heads and 4 key-value heads"),
    ("worker.rollout.max_num_batched_tokens", 5000, "max_num_batched_tokens >= .* but 5000 is less than 5120"),
    ("worker.actor.fsdp.enable_cpu_offload", True, "only without gradient accumulation, but a step has 128 and a"),
    ("worker.actor.micro_batch_size_per_device_for_update", 3, "micro_batch_size_per_device_for_update == 0, but 128"),
    ("worker.actor.micro_batch_size_per_device_for_experience", 3, "_for_experience == 0, but 4096 divided by 3"),
    ("trainer.save_limit", 2, r"save_limit of 3 or more \(2 with validation\), but it is 2"),
    ("trainer.save_model_only", True, "save_model_only to be false"),
]


@pytest.mark.parametrize(("key", "value", "message"), BREAKS)
def test_every_broken_rule_is_named_with_its_values(files, key, value, message):
    keys = told(files)
    check(keys, 512)
    with pytest.raises(ConfigError, match=message):
        check(changed(keys, key, value), 512)


def test_without_dynamic_batching_every_worker_splits_its_own_share(files):
    keys = changed(told(files, {"micro_batch_experience": 1024}), "worker.actor.dynamic_batching", False)
    with pytest.raises(ConfigError, match=r"without dynamic_batching .* but 512 divided by 1024 leaves 512"):
        check(keys)


def test_no_rule_is_without_a_case(files):
    named = set()
    for key, value, _ in BREAKS:
        with pytest.raises(ConfigError) as refused:
            check(changed(told(files), key, value), 512)
        named.add(refused.value.problem.removeprefix("EasyR1 needs ").partition(", but ")[0])
    assert {rule.text for rule in RULES} - named == {  # the tests below and above
        "exactly one '@' in a data path",
        "load_checkpoint_path to end in global_step_N",
        "as many rows as a rollout has prompts",
        "global_batch_size * n % GPUs == 0",
        "without dynamic_batching rollout_batch_size * n / GPUs % micro_batch_size_per_device_for_experience == 0",
    }


def test_a_rollout_needs_its_rows(files):
    check(told(files), 512)
    with pytest.raises(ConfigError, match=r"as many rows as a rollout has prompts, but there are 511 rows for 512"):
        check(told(files), 511)


def test_the_checkpoint_to_go_on_from_must_be_there_and_say_its_step(files, tmp_path):
    right = tmp_path / "global_step_20"
    right.mkdir()
    keys = native.settings(engine(), grpo(), files, SPEC, 0, right)
    check(keys)
    with pytest.raises(ConfigError, match=r"paths that exist, but trainer.load_checkpoint_path"):
        check(changed(keys, "trainer.load_checkpoint_path", str(tmp_path / "global_step_21")))
    for wrong in ("step_20", "global_step_20b", "old_global_step_20"):
        (tmp_path / wrong).mkdir()
        with pytest.raises(ConfigError, match=r"load_checkpoint_path to end in global_step_N"):
            check(changed(keys, "trainer.load_checkpoint_path", str(tmp_path / wrong)))


def test_an_at_sign_in_the_run_directory_is_refused(tmp_path):
    place = tmp_path / "me@home"
    place.mkdir()
    with pytest.raises(ConfigError, match=r"exactly one '@' in a data path"):
        check(told(make_files(place)))


# --- keys and values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("worker.rollout.temprature", 1.0, "no key 'worker.rollout.temprature' .* is 'worker.rollout.temperature'"),
        ("worker.actor.kl_coef", 0.1, "no key 'worker.actor.kl_coef' that may be set"),  # overwritten by the framework
        ("extra", 1, "no key 'extra'"),
        ("data.rollout_batch_size", 1.5, "data.rollout_batch_size takes int, not 1.5"),
        ("data.rollout_batch_size", True, "data.rollout_batch_size takes int, not True"),
        ("data.shuffle", 1, "data.shuffle takes bool, not 1"),
        ("worker.actor.optim.lr", "1e-6", "worker.actor.optim.lr takes float, not '1e-6'"),
        ("worker.actor.optim.lr", float("nan"), "worker.actor.optim.lr takes float, not nan"),
        ("worker.actor.optim.betas", [0.9, 0.99, 0.999], r"worker.actor.optim.betas takes tuple\[float, float\]"),
        ("trainer.logger", "console", r"trainer.logger takes Tuple\[str\], not 'console'"),
        ("trainer.logger", ["console", "wandbb"], "trainer.logger takes .*wandb"),
        ("worker.actor.loss_type", "defalt", "worker.actor.loss_type takes \"default\", \"gspo\""),
        ("worker.rollout.val_override_config", 1, r"val_override_config takes dict\[str, Any\], not 1"),
        ("data.max_prompt_length", None, "data.max_prompt_length takes int, not None"),
    ],
)  # fmt: skip
def test_keys_and_values_that_the_framework_has_not_are_refused(files, key, value, message):
    with pytest.raises(ConfigError, match=message):
        check(changed(told(files), key, value))


def test_the_schema_names_its_source_and_holds_no_key_that_the_framework_sets_itself():
    assert schema()["worker.rollout.n"] == {"type": "int", "default": 1}
    assert "worker.actor.global_batch_size_per_device" not in schema()
    assert "b44b311b669bf1fd1aa2fc36f2251482ba33cb16" in Path(native.__file__).with_name("schema.json").read_text()
