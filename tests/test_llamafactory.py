"""The engine llamafactory without the framework: what it writes, what it refuses, where it goes on."""

import io
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from cpt_rft.checkpoint import encode_prompts, load_policy
from cpt_rft.config.engine import LlamaFactoryConfig, parse_engine
from cpt_rft.data.parquet import read_split, write_split
from cpt_rft.engines.base import StepLog
from cpt_rft.engines.environment import find_environment, lock_of, locked_versions
from cpt_rft.engines.llamafactory import COMMIT, RELEASE, native
from cpt_rft.engines.llamafactory.engine import supported_method
from cpt_rft.engines.llamafactory.failures import explain
from cpt_rft.engines.llamafactory.finish import assemble, start_checkpoint
from cpt_rft.engines.llamafactory.resume import kept_lines, open_out
from cpt_rft.engines.llamafactory.rows import WrittenRows, write_rows
from cpt_rft.engines.llamafactory.watch import Follower, check_start, check_zero, merge_history
from cpt_rft.engines.local.batches import stage_batches
from cpt_rft.errors import CheckpointError, ConfigError, DataError, StageError, TrainingError
from cpt_rft.prompts import target_text, user_text
from cpt_rft.vision import VisionSpec
from tests.helpers.engine import grpo
from tests.helpers.llamafactory import BASE, make_stage, sft
from tests.helpers.tree import ROOT

SPEC = VisionSpec.read(BASE)
WRITTEN = WrittenRows(8, ((3, 3, 3, 3), (3, 4, 3, 3)))


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


def test_ray_and_torchrun_are_never_asked_for_together():
    variables = native.variables(config(processes=4, ray=True))
    assert variables["USE_RAY"] == "1" and "FORCE_TORCHRUN" not in variables
    assert (
        native.settings(config(processes=4, ray=True), sft(micro_batch=1), BASE, SPEC, 0, None)["ray_num_workers"] == 4
    )


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


# --- the log ----------------------------------------------------------------------------------------------------------

STARTED = "***** Running training *****\n  Num examples = {}\n  x\n  Total train batch size (w. parallel) = {}\n"


def test_training_has_begun_only_with_all_rows_and_all_processes():
    assert not check_start("loading", WRITTEN, 4)
    assert check_start(STARTED.format("8", "4"), WRITTEN, 4)
    with pytest.raises(TrainingError, match=r"trains on 7 rows, 8 were written\. It says: .*Dropped invalid"):
        check_start("[WARNING] Dropped invalid example: []\n" + STARTED.format("7", "4"), WRITTEN, 4)
    with pytest.raises(TrainingError, match="takes 2 rows a step instead of 4"):
        check_start(STARTED.format("8", "2"), WRITTEN, 4)
    large = WrittenRows(1280, ((1,) * 1280,))
    assert check_start(STARTED.format("1,280", "1,280"), large, 1280)


@pytest.mark.parametrize(
    ("log", "fits"),
    [
        ("", "none"),
        ("After initializing ZeRO optimizer\n", "zero2"),
        ("Stage 3 initialize beginning\nAfter initializing ZeRO optimizer\n", "zero3"),
    ],
)
def test_the_stage_of_zero_is_read_from_the_log(log, fits):
    for wanted in ("none", "zero2", "zero3"):
        if wanted == fits:
            check_zero(log, wanted)
        else:
            with pytest.raises(TrainingError, match=f"engine.deepspeed is {wanted}, but the framework's log shows"):
                check_zero(log, wanted)


def entry(step: int, total: int = 2) -> str:
    return json.dumps({"current_steps": step, "total_steps": total, "loss": 1.0 + step, "lr": 0.1}) + "\n"


def test_steps_are_followed_as_they_are_written(tmp_path):
    follower = Follower(tmp_path, WRITTEN, 0)
    assert list(follower.new_steps()) == []
    log = tmp_path / "trainer_log.jsonl"
    log.write_text(entry(1) + entry(2)[:10])
    (first,) = follower.new_steps()
    assert (first.step, first.steps, first.loss, first.tokens, first.length) == (1, 2, 2.0, 12, 3.0)
    log.write_text(entry(1) + entry(2) + '{"current_steps": 2, "total_steps": 2, "epoch": 1.0}\n')
    (second,) = follower.new_steps()
    assert (second.step, second.tokens) == (2, 13)


@pytest.mark.parametrize("line", [entry(2), entry(1, total=5)])
def test_a_run_that_goes_on_from_something_else_is_stopped(tmp_path, line):
    """What a used output directory does to the framework: it resumes the previous task without a word."""
    follower = Follower(tmp_path, WRITTEN, 0)
    (tmp_path / "trainer_log.jsonl").write_text(line)
    with pytest.raises(TrainingError, match="so it goes on from something else"):
        list(follower.new_steps())


def test_gradient_norms_are_filled_in_at_the_end(tmp_path):
    follower = Follower(tmp_path, WRITTEN, 0)
    (tmp_path / "trainer_log.jsonl").write_text(entry(1))
    lines = list(follower.new_steps())
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 1, "loss": 2.0, "grad_norm": 7.5}]})
    )
    merge_history(tmp_path / "log.jsonl", tmp_path, lines)
    assert json.loads((tmp_path / "log.jsonl").read_text())["grad_norm"] == 7.5


# --- going on ---------------------------------------------------------------------------------------------------------


def resume_point(out: Path, step: int) -> Path:
    """A checkpoint of the framework's trainer after some step."""
    place = out / f"checkpoint-{step}"
    shutil.copytree(BASE, place)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"x": torch.zeros(4)}, place / name)
    (place / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return place


def break_file(name: str):
    def cut(place: Path) -> None:
        (place / name).write_bytes((place / name).read_bytes()[:-30])

    return cut


DAMAGES = {
    "weights cut": break_file("model.safetensors"),
    "optimizer cut": break_file("optimizer.pt"),
    "no noise": lambda place: (place / "rng_state.pth").unlink(),
    "no state": lambda place: (place / "trainer_state.json").unlink(),
    "state cut": break_file("trainer_state.json"),
    "shards of one process": lambda place: (place / f"global_step{place.name[-1]}").mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_training_goes_on_from_the_newest_whole_checkpoint(tmp_path, damage):
    out = tmp_path / "out"
    assert open_out(out, {"lr": 1}, 1, lora=False) == 0
    resume_point(out, 2)
    DAMAGES[damage](resume_point(out, 4))
    (out / "trainer_log.jsonl").write_text(entry(1) + entry(2) + entry(3) + '{"current')
    (out / "model.safetensors").write_bytes(b"left over")
    assert open_out(out, {"lr": 1}, 1, lora=False) == 2
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-2", "trainer_log.jsonl"]
    assert (out / "trainer_log.jsonl").read_text() == entry(1) + entry(2)


def test_what_another_configuration_left_is_never_gone_on_with(tmp_path):
    out = tmp_path / "out"
    open_out(out, {"lr": 1}, 1, lora=False)
    resume_point(out, 2)
    assert open_out(out, {"lr": 2}, 1, lora=False) == 0
    assert list(out.iterdir()) == []


def test_our_log_is_cut_to_the_step_that_is_gone_on_from(tmp_path):
    log = tmp_path / "log.jsonl"
    line = StepLog(1, 9, 1.0, 0.1, None, 0, 1.0, 3, 3.0)
    log.write_text("".join(f"{line.line()}\n" for _ in range(3)))
    assert [kept.steps for kept in kept_lines(log, 2, 9)] == [9, 9]
    assert kept_lines(log, 4, 9) == [] and kept_lines(tmp_path / "none", 0, 9) == []


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def shards(out: Path) -> None:
    """The base's weights in two files and an index."""
    out.mkdir()
    state = load_file(BASE / "model.safetensors")
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, out / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").write_text("{}")


def test_a_checkpoint_has_the_frameworks_weights_and_the_parents_other_files(tmp_path):
    shards(tmp_path / "out")
    assemble(tmp_path / "out", BASE, tmp_path / "checkpoint")
    load_policy(tmp_path / "checkpoint")
    for path in BASE.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "checkpoint" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda out: (out / "model-00002-of-00002.safetensors").unlink(),
            "model-00002-of-00002.safetensors is missing",
        ),
        (lambda out: break_file("model-00001-of-00002.safetensors")(out), "is truncated or not a safetensors file"),
        (lambda out: shutil.copy(BASE / "model.safetensors", out), "model.safetensors belongs to no index"),
    ],
)
def test_a_missing_a_cut_and_a_left_over_shard_are_refused(tmp_path, damage, says):
    shards(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(CheckpointError, match=says):
        assemble(tmp_path / "out", BASE, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_another_pixel_budget_is_stated_by_both_forms_of_the_processor(tmp_path):
    assert start_checkpoint(BASE, SPEC, tmp_path / "start") == BASE
    other = SPEC.with_limits(6272, 50176)
    start = start_checkpoint(BASE, other, tmp_path / "start")
    assert VisionSpec.read(start) == other
    load_policy(start)


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "kind", "problem", "fix"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", TrainingError, "a GPU ran out of memory", "zero3"),
        (
            "ValueError: Image features and image tokens do not match, tokens: 0",
            TrainingError,
            "were cut",
            "cutoff_len",
        ),
        ("ValueError: Template qwen2_5_vl does not exist.", TrainingError, "chat template", "qwen2_vl"),
        ("OSError: [Errno 28] No space left on device", StageError, "The disk is full", "cpt-rft plan"),
        ("OSError: image file is truncated (3 bytes)", TrainingError, "a picture", "delete"),
        ("safetensors_rust.SafetensorError: Error while", TrainingError, "weight file is truncated", "--verify"),
        ("EADDRINUSE: address already in use", TrainingError, "port", "MASTER_PORT"),
        (
            "Traceback:\nKeyError: 'conversations'\nsome line",
            TrainingError,
            "status 1: KeyError: 'conversations'",
            "see",
        ),
    ],
)
def test_a_known_failure_is_one_line_with_its_fix(said, kind, problem, fix):
    error = explain(1, f"many lines\n{said}\n", Path("framework.log"))
    assert isinstance(error, kind) and problem in error.problem and fix in error.fix
    assert "\n" not in str(error)


def test_a_killed_framework_is_told_apart():
    assert "was killed (signal 9)" in explain(-9, "", Path("log")).problem
    assert "was killed (signal 9)" in explain(1, "Signal 9 (SIGKILL) received by PID 7", Path("log")).problem
    assert "it printed nothing" in explain(3, "", Path("log")).problem
