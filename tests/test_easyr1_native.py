"""What EasyR1 is told, and which configurations and methods it is spared."""

import json
import shlex
import subprocess
from typing import Any

import pytest
import torch
import yaml

from cpt_rft.algos.losses import LOSSES
from cpt_rft.config.engine import EasyR1Config
from cpt_rft.config.load import load_experiment
from cpt_rft.config.methods import SftMethod
from cpt_rft.engines.easyr1 import native
from cpt_rft.engines.easyr1.machine import on_this_machine, planned
from cpt_rft.engines.easyr1.methods import NO_DUAL_CLIP, supported_method
from cpt_rft.engines.easyr1.rules import check, flattened
from cpt_rft.errors import ConfigError
from tests.helpers.easyr1_settings import SPEC, engine, grpo, make_files
from tests.helpers.tree import ROOT

PAPER = ROOT / "configs/experiments/paper_qwen2_5_vl_7b.yaml"


@pytest.fixture
def files(tmp_path) -> native.Files:
    return make_files(tmp_path)


def told(files: native.Files, method: Any, **changes: Any) -> dict[str, Any]:
    keys = native.settings(engine(**changes), method, files, SPEC, 3)
    check(keys)
    return dict(flattened(keys))


# --- the YAML ---------------------------------------------------------------------------------------------------------


def test_the_released_settings_in_the_frameworks_words(files):
    paper = load_experiment(PAPER, ["methods=[grpo_paper]", "rft_engine=easyr1_paper", "rft_engine.processes=8"])
    method, config = supported_method(paper.methods["grpo_paper"]), paper.rft_engine
    assert isinstance(config, EasyR1Config)
    keys = native.settings(config, method, files, SPEC.with_limits(*config.pixel_limits), 1)
    check(keys)
    found = dict(flattened(keys))
    # Source: RFTvsSFT@7d4f50e EasyR1/examples/config.yaml.
    released = {
        "data.rollout_batch_size": 512, "data.max_prompt_length": 4096, "data.max_response_length": 1024,
        "data.min_pixels": 200704, "data.max_pixels": 1003520, "data.seed": 1,
        "algorithm.adv_estimator": "grpo", "algorithm.disable_kl": False, "algorithm.use_kl_loss": True,
        "algorithm.kl_penalty": "low_var_kl", "algorithm.kl_coef": 0.01, "algorithm.kl_type": "fixed",
        "worker.actor.global_batch_size": 128, "worker.actor.ppo_epochs": 1, "worker.actor.max_grad_norm": 1.0,
        "worker.actor.clip_ratio_low": 0.2, "worker.actor.clip_ratio_high": 0.3, "worker.actor.clip_ratio_dual": 3.0,
        "worker.actor.loss_type": "default", "worker.actor.loss_avg_mode": "token",
        "worker.actor.model.freeze_vision_tower": False, "worker.actor.fsdp.torch_dtype": "bf16",
        "worker.actor.optim.lr": 1e-6, "worker.actor.optim.weight_decay": 0.01,
        "worker.actor.optim.betas": [0.9, 0.999],
        "worker.actor.optim.strategy": "adamw_bf16", "worker.actor.optim.lr_scheduler_type": "constant",
        "worker.actor.optim.lr_warmup_ratio": 0.0, "worker.rollout.n": 8, "worker.rollout.temperature": 1.0,
        "worker.rollout.top_p": 0.99, "worker.rollout.tensor_parallel_size": 2, "trainer.nnodes": 1,
        "trainer.n_gpus_per_node": 8,
    }  # fmt: skip
    assert {key: found[key] for key in released} == released


def test_every_default_that_is_a_trap_is_written_out(files, tmp_path):
    found = told(files, grpo())
    traps = {
        "data.train_files": f"{tmp_path}/train.parquet@train", "data.val_files": f"{tmp_path}/train.parquet@train[:1]",
        "data.image_dir": str(tmp_path), "data.val_batch_size": 1,
        "data.shuffle": False, "data.filter_overlong_prompts": False,
        "trainer.total_epochs": 1, "trainer.max_steps": None, "trainer.val_before_train": False, "trainer.val_freq": -1,
        "trainer.logger": ["console", "file"], "trainer.find_last_checkpoint": False, "trainer.save_limit": 3,
        "trainer.load_checkpoint_path": None, "trainer.save_checkpoint_path": f"{tmp_path}/out",
        "worker.actor.model.trust_remote_code": False, "worker.actor.ulysses_size": 1,
        "algorithm.online_filtering": False, "worker.reward.reward_function": f"{tmp_path}/reward.py:compute_score",
        "worker.reward.reward_function_kwargs": {
            "style": "cot", "longest": 1024, "records": f"{tmp_path}/rewards.jsonl",
        },
        "data.seed": 3, "worker.rollout.seed": 3, "worker.rollout.val_override_config": {"n": 1},
    }  # fmt: skip
    assert {key: found[key] for key in traps} == traps


def test_the_buffer_holds_the_longest_row_and_micro_batches_divide(files):
    assert told(files, grpo())["worker.rollout.max_num_batched_tokens"] == 8192
    assert told(files, grpo(max_prompt_tokens=9000))["worker.rollout.max_num_batched_tokens"] == 10024
    found = told(files, grpo(prompts_per_step=8, group=3, rollout_steps=1), micro_batch_update=2)
    assert found["worker.actor.micro_batch_size_per_device_for_update"] == 1  # of 3 completions a GPU
    assert found["worker.actor.micro_batch_size_per_device_for_experience"] == 12  # of 24


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"kl_estimator": "k1"}, {"kl_penalty": "kl", "disable_kl": False, "use_kl_loss": True}),
        ({"kl_estimator": "k2"}, {"kl_penalty": "mse"}),
        ({"kl_estimator": "abs"}, {"kl_penalty": "abs"}),
        ({"kl_in": "reward", "kl_coef": 0.02}, {"use_kl_loss": False, "disable_kl": False, "kl_coef": 0.02}),
        ({"kl_coef": 0.0}, {"disable_kl": True, "use_kl_loss": False}),
        ({"advantage": "rloo"}, {"adv_estimator": "rloo"}),
        ({"advantage": "remax"}, {"adv_estimator": "remax"}),
        ({"advantage": "reinforce_plus_plus"}, {"adv_estimator": "reinforce_plus_plus"}),
    ],
)
def test_estimators_and_penalties_by_the_frameworks_names(files, changes, wanted):
    found = told(files, grpo(**changes))
    assert {key: found[f"algorithm.{key}"] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ("default", "token", 0.2, 0.3, 3.0)),
        ({"loss": "dapo"}, ("default", "token", 0.2, 0.28, NO_DUAL_CLIP)),
        ({"loss": "grpo"}, ("default", "seq", 0.2, 0.2, NO_DUAL_CLIP)),
        ({"loss": "gspo"}, ("gspo", "seq", 3e-4, 4e-4, NO_DUAL_CLIP)),
        ({"loss": "gspo_token", "dual_clip": 4.0}, ("gspo_token", "seq", 3e-4, 4e-4, 4.0)),
        ({"loss": "cispo"}, ("cispo", "token", 1.0, 4.0, NO_DUAL_CLIP)),
        ({"loss": "sapo", "aggregate": "token"}, ("sapo", "token", 0.2, 0.2, NO_DUAL_CLIP)),
    ],
)
def test_losses_by_the_frameworks_names(files, changes, wanted):
    found = told(files, grpo(**changes))
    keys = ("loss_type", "loss_avg_mode", "clip_ratio_low", "clip_ratio_high", "clip_ratio_dual")
    assert tuple(found[f"worker.actor.{key}"] for key in keys) == wanted


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"mask_truncated": True}, "mask_truncated"),
        ({"entropy_coef": 0.1}, "entropy_coef"),
        ({"kl_ratio_correction": True}, "kl_ratio_correction"),
        ({"advantage_scale": "none"}, "advantage_scale none for grpo"),
        ({"advantage": "rloo", "advantage_scale": "batch"}, "advantage_scale batch for rloo"),
        ({"advantage_epsilon": 1e-4}, "advantage_epsilon 0.0001"),
        ({"loss": "dr_grpo"}, "aggregate constant"),
        ({"loss": "luspo"}, "aggregate sum"),
        ({"loss": "vespo"}, "loss with bound vespo and ratio token"),
        ({"loss": "rloo"}, "loss with bound clip and ratio sequence_sum"),
        ({"l2": {"strength": 1.0}}, "l2"),
        ({"lora": {"rank": 4, "alpha": 8.0, "targets": ("q_proj",)}}, "lora"),
        ({"replay": {"rows_per_step": 1}, "average": {"share": 0.5}}, "replay and no average"),
        ({"curriculum": {"rollouts": 2}, "rollout_steps": 1}, "curriculum"),
    ],
)
def test_what_the_framework_has_not_is_refused_by_name(changes, missing):
    with pytest.raises(ConfigError, match=f"EasyR1 has no {missing}, which grpo asks for"):
        supported_method(grpo(**changes))


def test_every_loss_is_either_told_or_refused():
    refused = set()
    for name in LOSSES:
        try:
            supported_method(grpo(loss=name))
        except ConfigError:
            refused.add(name)
    assert refused == {"dr_grpo", "rloo", "luspo", "vespo"}


def test_supervised_methods_and_methods_without_a_limit_are_refused(files):
    sft = SftMethod(kind="sft", name="sft", style="direct", lr=1e-4, prompts_per_step=4, micro_batch=4)
    with pytest.raises(ConfigError, match="sft is of the kind sft"):
        supported_method(sft)
    with pytest.raises(ConfigError, match="grpo has no max_prompt_tokens"):
        told(files, grpo(max_prompt_tokens=None))
    filtered = grpo(filter={"rollouts": 2, "rule": "drop_zero_correct"})
    assert supported_method(filtered) is filtered  # the rows are chosen before


def test_the_fixes_follow_the_method(tmp_path):
    def fixes(config: EasyR1Config, **changes: Any) -> dict[str, Any]:
        return native.fixes(config, grpo(**changes), tmp_path / "base", tmp_path / "rounded.jsonl")

    matched = {"reference": str(tmp_path / "base"), "exact_zero": True, "count_rounded": None}
    assert fixes(engine()) == {**matched, "device": "cuda", "ray_address": None}
    assert fixes(engine(ray_address="auto"), kl_reference="stage") == {
        **{"reference": None, "exact_zero": True, "count_rounded": None, "device": "cuda", "ray_address": "auto"}
    }
    paper = fixes(engine(), paper_rounding=True, kl_coef=0.0)
    assert (paper["reference"], paper["exact_zero"]) == (None, False)
    assert paper["count_rounded"] == str(tmp_path / "rounded.jsonl")


def test_what_is_written_reads_back_and_runs_by_hand(files, tmp_path):
    keys = native.settings(engine(threads=3), grpo(), files, SPEC, 0)
    fixes = native.fixes(engine(), grpo(), tmp_path, tmp_path / "rounded.jsonl")
    stage, environment = tmp_path / "a stage", tmp_path / "an env"
    stage.mkdir()
    native.write_native(stage, keys, fixes, engine(threads=3), environment)
    assert yaml.safe_load((stage / "train.yaml").read_text()) == keys
    assert json.loads((stage / "fixes.json").read_text()) == fixes
    (environment / "bin").mkdir(parents=True)
    python = environment / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$PWD|$*|$OMP_NUM_THREADS|${USE_MODELSCOPE_HUB-}|$HF_HUB_OFFLINE"\n')
    python.chmod(0o755)
    command = native.command(engine(), stage)
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin", "USE_MODELSCOPE_HUB": "1"}
    )
    assert done.stdout == f"{stage}|-m cpt_rft.engines.easyr1.entry train.yaml fixes.json|3||1\n"
    words = shlex.split(native.shown(engine(threads=3), stage))
    assert words[:3] == ["cd", str(stage), "&&"] and "OMP_NUM_THREADS=3" in words
    assert words[-5:] == ["python", "-m", "cpt_rft.engines.easyr1.entry", "train.yaml", "fixes.json"]


def test_without_a_gpu_no_cluster_is_joined(tmp_path):
    text = native.script(engine(device="cpu", dtype="float32", processes=1), tmp_path)
    assert "unset RAY_ADDRESS" in text and "CUDA_VISIBLE_DEVICES" not in text  # Ray would miss the GPUs it is told of
    assert "RAY_ADDRESS" not in native.script(engine(), tmp_path)


def test_a_stages_files_are_where_the_other_parts_look_for_them(tmp_path):
    files = native.Files.of(tmp_path, tmp_path / "model")
    names = {"data/train.parquet": files.train, "data/prompt.jinja": files.template, "rewards.jsonl": files.records}
    for name, path in {**names, "out": files.out, "model": files.model}.items():
        assert path == tmp_path / name
    assert files.reward == ROOT / "cpt_rft/engines/easyr1/reward.py"


def test_what_a_user_may_change_after_a_stop_does_not_make_a_stage_another(files, tmp_path):
    def decides(**changes: Any) -> dict[str, Any]:
        config = engine(**changes)
        keys = native.settings(config, grpo(), files, SPEC, 0)
        return native.deciding(keys, native.fixes(config, grpo(), tmp_path, tmp_path / "rounded.jsonl"))

    free = {"environment": "/e", "ray_address": "auto", "gpu_memory_utilization": 0.5, "enforce_eager": True}
    free |= {"offload": True, "save_every": 3}
    assert set(free) == EasyR1Config.FREE
    for key, value in free.items():
        assert decides(**{key: value}) == decides(), key
    for key, value in {"top_p": 0.9, "tensor_parallel": 4, "optimizer": "adamw_bf16", "micro_batch_update": 1}.items():
        assert decides(**{key: value}) != decides(), key


# --- the configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda:1"}, "Ray hands out the GPUs"),
        ({"device": "cpu", "processes": 2}, "without GPUs there is one worker"),
        ({"device": "cpu", "processes": 1, "ray_address": "auto"}, "on a Ray of its own"),
        ({"nodes": 2}, "with several nodes a Ray cluster must run"),
        ({"dtype": "float32"}, "attention on GPUs has no float32"),
        ({"gpu_memory_utilization": 1.0}, "less than 1"),
    ],
)
def test_what_ray_cannot_place_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        engine(**changes)


def test_keys_that_decide_no_weight_are_free():
    one = engine().identity()
    free = {"environment": "/e", "ray_address": "auto", "gpu_memory_utilization": 0.5, "offload": True, "save_every": 3}
    assert engine(**free, enforce_eager=True).identity() == one
    for key, value in {"top_p": 0.9, "optimizer": "adamw_bf16", "param_dtype": "bfloat16", "max_pixels": 9999}.items():
        assert engine(**{key: value}).identity() != one


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_auto_is_one_worker_here_and_the_gpus_of_a_cluster_must_be_told():
    here = on_this_machine(engine(device="auto", dtype="auto", processes="auto"))
    assert (here.device, here.processes) == ("cpu", 1)
    with pytest.raises(ConfigError, match="processes of the engine easyr1: without GPUs there is one worker"):
        on_this_machine(engine(device="auto", dtype="auto", processes=8))
    with pytest.raises(ConfigError, match="no usable GPU"):
        on_this_machine(engine())
    cluster = on_this_machine(engine(device="auto", dtype="auto", ray_address="auto", nodes=2))
    assert (cluster.device, cluster.dtype, cluster.processes) == ("cuda", "bfloat16", 8)
    with pytest.raises(ConfigError, match="auto, but the GPUs are those of the Ray cluster"):
        on_this_machine(engine(processes="auto", ray_address="auto"))
    assert planned(engine(dtype="auto")).dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"auto, but this machine has no GPU to count\..*rft_engine\.processes=N"):
        planned(engine(processes="auto"))
    with pytest.raises(ConfigError, match="dtype of the engine easyr1: the framework's attention"):
        planned(engine(device="auto", dtype="float32", ray_address="auto"))
