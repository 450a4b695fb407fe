"""The engine llamafactory without the framework: what it writes and what it refuses."""

import io
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from cpt_rft.checkpoint import encode_prompts, load_policy
from cpt_rft.config.engine import LlamaFactoryConfig, parse_engine
from cpt_rft.data.parquet import read_split, write_split
from cpt_rft.engines.base import resolve_engine
from cpt_rft.engines.environment import find_environment, lock_of, locked_versions
from cpt_rft.engines.llamafactory import COMMIT, RELEASE, native
from cpt_rft.engines.llamafactory.engine import on_this_machine, supported_method
from cpt_rft.engines.llamafactory.rows import write_rows
from cpt_rft.engines.local.batches import stage_batches
from cpt_rft.errors import ConfigError, DataError
from cpt_rft.prompts import target_text, user_text
from cpt_rft.vision import VisionSpec
from tests.helpers.engine import grpo
from tests.helpers.llamafactory import BASE, make_stage, sft
from tests.helpers.tree import ROOT

SPEC = VisionSpec.read(BASE)


def config(**changes: object) -> LlamaFactoryConfig:
    engine = parse_engine({"name": "llamafactory", "dtype": "float32", "device": "cpu", "processes": 1, **changes})
    assert isinstance(engine, LlamaFactoryConfig)
    return engine


# --- what is pinned ---------------------------------------------------------------------------------------------------


def test_the_submodule_is_pinned_to_the_release_of_the_lock():
    versions = locked_versions("llamafactory")
    assert versions["llamafactory"] == RELEASE
    assert versions["transformers"] != "5.6.0" and versions["deepspeed"] == "0.18.4" and "torchaudio" in versions
    assert "path = LLaMA-Factory\n" in (ROOT / ".gitmodules").read_text()
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-s", "LLaMA-Factory"], capture_output=True, text=True
        )
        assert listed.stdout.split()[:2] == ["160000", COMMIT]


def test_the_environment_is_known_by_its_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("CPT_RFT_ENVS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"Fix: make it with 'bash scripts/setup_llamafactory\.sh'"):
        find_environment("llamafactory", None)
    key = subprocess.run(["sha256sum", str(lock_of("llamafactory"))], capture_output=True, text=True).stdout[:12]
    place = tmp_path / f"llamafactory-{key}"
    (place / "bin").mkdir(parents=True)
    (place / "bin" / "python").touch()
    with pytest.raises(ConfigError):  # half made
        find_environment("llamafactory", None)
    (place / "ready").touch()
    assert find_environment("llamafactory", None) == place
    assert find_environment("llamafactory", str(place)) == place


# --- what it is told --------------------------------------------------------------------------------------------------


def test_every_default_that_is_a_trap_is_written_out():
    keys = native.settings(config(), sft(), BASE, SPEC, 0, None)
    wanted = {
        **{"finetuning_type": "full", "freeze_vision_tower": False, "freeze_multi_modal_projector": False},
        **{"template": "qwen2_vl", "do_train": True, "cutoff_len": 7168, "overwrite_output_dir": False},
        **{"disable_shuffling": True, "image_max_pixels": SPEC.max_pixels, "report_to": "none", "packing": False},
    }
    assert {key: keys[key] for key in wanted} == wanted
    assert "resume_from_checkpoint" not in keys and "deepspeed" not in keys
    lora = native.settings(config(lora={"rank": 4, "alpha": 8.0}, deepspeed="zero3"), sft(), BASE, SPEC, 0, "out/c")
    assert (lora["finetuning_type"], lora["lora_rank"], lora["deepspeed"]) == ("lora", 4, "deepspeed.json")
    assert lora["resume_from_checkpoint"] == "out/c"


@pytest.mark.parametrize(
    ("processes", "nodes", "micro", "steps"), [(1, 1, 1, 24), (8, 1, 1, 3), (12, 1, 1, 2), (4, 2, 3, 1)]
)
def test_processes_share_the_rows_of_a_step(processes, nodes, micro, steps):
    engine = config(processes=processes, nodes=nodes, launcher=["srun"])
    assert native.accumulation(engine, sft(prompts_per_step=24, micro_batch=micro)) == steps


def test_processes_that_do_not_divide_the_rows_of_a_step_are_refused():
    with pytest.raises(
        ConfigError, match=r"16 processes of 1 rows do not divide the 24 .* 1, 2, 3, 4, 6, 8, 12, 24 proc"
    ):
        native.settings(config(processes=16), sft(prompts_per_step=24, micro_batch=1), BASE, SPEC, 0, None)


def test_only_supervised_methods_are_taken():
    with pytest.raises(ConfigError, match="grpo is of the kind grpo"):
        supported_method(grpo())
    with pytest.raises(ConfigError, match="has no replay and no l2, which sft asks for"):
        supported_method(sft(replay={"rows_per_step": 1}, l2={"strength": 1.0}))
    with pytest.raises(ConfigError, match="has no rollouts, which sft asks for"):
        supported_method(sft(rollouts={"max_new_tokens": 3}))
    with pytest.raises(ConfigError, match="has no filter, which sft asks for"):
        supported_method(sft(filter={"rule": "drop_zero_correct", "max_new_tokens": 3}))


def test_several_nodes_need_an_address_and_take_their_rank_from_slurm(monkeypatch):
    engine = config(processes=8, nodes=2, launcher=["srun", "--ntasks-per-node=1"])
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        native.variables(engine)
    monkeypatch.setenv("MASTER_ADDR", "node0")
    assert native.variables(engine) | {"FORCE_TORCHRUN": "1", "NNODES": "2", "NPROC_PER_NODE": "8"} == native.variables(
        engine
    )
    assert "NODE_RANK:-${SLURM_NODEID:?" in native.script(engine, Path("/env"))
    assert native.shown(engine, Path("a b")).startswith("cd 'a b' && OMP_NUM_THREADS=1 ")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"nodes": 2}, "with several nodes it must say what starts the command"),
        ({"ray": True, "launcher": ["srun"]}, "Ray starts the processes itself"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        config(**changes)


def test_a_run_on_cpu_is_told_to_the_framework():
    """Else it refuses bfloat16, and several processes cannot load the optimizer's state when they go on."""
    keys = [
        native.settings(config(**changes), sft(), BASE, SPEC, 0, None)
        for changes in ({}, {"device": "cuda"}, {"deepspeed": "zero2"})
    ]
    assert [key.get("use_cpu") for key in keys] == [True, None, None]
    assert native.variables(config())["ACCELERATE_TORCH_DEVICE"] == "cpu"
    assert "ACCELERATE_TORCH_DEVICE" not in native.variables(config(device="cuda"))


@pytest.mark.parametrize("name", ["zero3", "zero3_offload"])
def test_weights_that_may_not_have_arrived_are_never_saved(name):
    """ZeRO-3 without GPUs; tests/test_llamafactory_deepspeed.py counts what this DeepSpeed gathers wrongly there."""
    with pytest.raises(ConfigError, match=rf"engine\.deepspeed is {name}, but on CPU .* garbage"):
        on_this_machine(config(deepspeed=name, processes=2))
    assert on_this_machine(config(deepspeed="zero2", processes=2)).processes == 2


def test_a_process_a_gpu_and_never_more(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert on_this_machine(config(device="cuda", processes="auto")).processes == 2
    assert on_this_machine(config(device="cpu", processes="auto")).processes == 1
    assert on_this_machine(config(device="cpu", processes=3)).processes == 3
    with pytest.raises(ConfigError, match="processes of the engine llamafactory is 3, but this machine has 2 GPUs"):
        on_this_machine(config(device="cuda", processes=3))
    rft = parse_engine({"name": "easyr1", "device": "cuda", "dtype": "bfloat16", "processes": 3})
    with pytest.raises(ConfigError, match="processes of the engine easyr1 is 3, but this machine has 2 GPUs"):
        resolve_engine(rft)


def test_ray_and_torchrun_are_never_asked_for_together():
    variables = native.variables(config(processes=4, ray=True))
    assert variables["USE_RAY"] == "1" and "FORCE_TORCHRUN" not in variables
    assert (
        native.settings(config(processes=4, ray=True), sft(micro_batch=1), BASE, SPEC, 0, None)["ray_num_workers"] == 4
    )


def test_workers_of_ray_find_everything_wherever_they_are(tmp_path):
    """They work in the folder in which the cluster was started."""
    engine = config(processes=2, ray=True, deepspeed="zero2")
    keys = native.settings(engine, sft(micro_batch=2), BASE, SPEC, 0, "out/checkpoint-3")
    native.write_native(tmp_path, keys, engine, tmp_path / "environment")
    written = yaml.safe_load((tmp_path / "train.yaml").read_text())
    names = {"dataset_dir": "data", "output_dir": "out", "resume_from_checkpoint": "out/checkpoint-3"}
    for key, name in {**names, "deepspeed": "deepspeed.json"}.items():
        assert written[key] == str(tmp_path / name)
    assert {**keys, **{key: written[key] for key in (*names, "deepspeed")}} == written


def test_a_folder_with_a_space_never_reaches_the_frameworks_command_line(tmp_path):
    place = tmp_path / "a folder"
    place.mkdir()
    engine = config(processes=2, deepspeed="zero2")
    native.write_native(
        place, native.settings(engine, sft(micro_batch=2), place / "model", SPEC, 0, None), engine, tmp_path / "an env"
    )
    script = (place / "train.sh").read_text()
    assert script.endswith("exec llamafactory-cli train train.yaml\n")
    keys = yaml.safe_load((place / "train.yaml").read_text())
    assert keys["model_name_or_path"] == str(place / "model")
    assert [keys[name] for name in ("dataset_dir", "output_dir", "deepspeed")] == ["data", "out", "deepspeed.json"]
    (tmp_path / "an env" / "bin").mkdir(parents=True)
    program = tmp_path / "an env" / "bin" / "llamafactory-cli"
    program.write_text('#!/bin/sh\npwd; echo "$*"; echo "$FORCE_TORCHRUN $NPROC_PER_NODE [$ALLOW_EXTRA_ARGS]"\n')
    program.chmod(0o755)
    command = native.command(engine, place)
    said = subprocess.run(
        command, capture_output=True, text=True, env={"ALLOW_EXTRA_ARGS": "1", "PATH": "/usr/bin:/bin"}
    )
    assert said.stdout.splitlines() == [str(place), "train train.yaml", "1 2 []"]


# --- the rows ---------------------------------------------------------------------------------------------------------


def test_rows_are_written_in_the_order_of_the_local_engine(tmp_path):
    stage = make_stage(tmp_path / "stage", sft(epochs=2), rows=10)
    written = write_rows(stage, BASE, SPEC, 7168, tmp_path / "data")
    steps = stage_batches(stage)
    rows = json.loads((tmp_path / "data/rows.json").read_text())
    assert [row["id"] for row in rows] == [row.id for step in steps for row in step]
    assert (written.rows, written.total, [len(step) for step in written.targets]) == (10, 20, [4, 4, 4, 4, 4])
    first = steps[0][0]
    assert [turn["content"] for turn in rows[0]["messages"]] == [
        user_text(first, "direct", "miniature"),
        target_text(first, "direct"),
    ]
    assert (tmp_path / "data" / rows[0]["images"][0]).read_bytes() == first.images[0]
    policy = load_policy(BASE)
    ids = policy.tokenizer.encode(target_text(first, "direct") + "<|im_end|>\n", add_special_tokens=False)
    assert written.targets[0][0] == len(ids)


def test_a_row_that_would_be_cut_is_refused_by_name_at_exactly_the_limit(tmp_path):
    stage = make_stage(tmp_path / "stage", sft(), rows=4)
    policy = load_policy(BASE)
    longest = 0
    for row in read_split(stage.data[0]):
        prompt = encode_prompts(policy, [(row.images, user_text(row, "direct", "miniature"))])[0]
        target = policy.tokenizer.encode(target_text(row, "direct") + "<|im_end|>\n", add_special_tokens=False)
        longest = max(longest, len(prompt.ids) + len(target))
    write_rows(stage, BASE, SPEC, longest + 1, tmp_path / "fits")
    with pytest.raises(
        DataError, match=rf"mini_gqa/train/\d+ has {longest} tokens, 9 of them for pictures, .*cutoff_len"
    ):
        write_rows(stage, BASE, SPEC, longest, tmp_path / "cut")


def picture(mode: str, colour: object, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (84, 84), colour).save(buffer, kind)  # type: ignore[arg-type]
    return buffer.getvalue()


def test_a_transparent_picture_is_stored_as_every_engine_sees_it_and_a_cut_one_is_named(tmp_path):
    stage = make_stage(tmp_path / "stage", sft(), rows=4)
    rows = read_split(stage.data[0])
    write_split(stage.data[0], [replace(row, images=(picture("RGBA", (255, 0, 0, 0), "PNG"),)) for row in rows])
    write_rows(stage, BASE, SPEC, 7168, tmp_path / "data")
    name = json.loads((tmp_path / "data/rows.json").read_text())[0]["images"][0]
    with Image.open(tmp_path / "data" / name) as stored:
        assert stored.mode == "RGB" and stored.getpixel((0, 0)) == (255, 255, 255)

    cut = replace(rows[2], images=(picture("RGB", "red", "JPEG")[:-60],))
    write_split(stage.data[0], [*rows[:2], cut, rows[3]])
    with pytest.raises(DataError, match=f"{rows[2].id}, picture 1 does not decode"):
        write_rows(stage, BASE, SPEC, 7168, tmp_path / "cut")
