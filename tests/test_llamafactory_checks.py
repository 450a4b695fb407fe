"""The engine llamafactory without the framework: what it reads from a log, where it goes on, what it publishes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cpt_rft.checkpoint import load_policy
from cpt_rft.engines.base import StepLog
from cpt_rft.engines.handover import assemble, start_checkpoint
from cpt_rft.engines.llamafactory.failures import explain
from cpt_rft.engines.llamafactory.resume import kept_lines, make_loadable, open_out
from cpt_rft.engines.llamafactory.rows import WrittenRows
from cpt_rft.engines.llamafactory.watch import Follower, check_start, check_zero, merge_history
from cpt_rft.errors import CheckpointError, StageError, TrainingError
from cpt_rft.vision import VisionSpec
from tests.helpers.llamafactory import BASE

SPEC = VisionSpec.read(BASE)
WRITTEN = WrittenRows(8, ((3, 3, 3, 3), (3, 4, 3, 3)))


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


def test_weights_that_the_framework_leaves_out_when_it_goes_on_are_not_passed_over():
    said = "[WARNING] There were unexpected keys in the checkpoint model loaded: ['model.layers.0'].\n"
    with pytest.raises(TrainingError, match="left out weights of the resume point"):
        check_start(said + STARTED.format("8", "4"), WRITTEN, 4)
    # A tied output layer is not stored.
    tied = "[WARNING] There were missing keys in the checkpoint model loaded: ['lm_head.weight'].\n"
    assert check_start(tied + STARTED.format("8", "4"), WRITTEN, 4)


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


@pytest.mark.parametrize("files", ["one", "two"])
def test_a_resume_point_is_loaded_whole_by_the_names_that_the_model_has_in_memory(tmp_path, files):
    """As the framework's trainer loads it: straight into the model, without the renaming of ``from_pretrained``."""
    shutil.copytree(BASE, tmp_path / "point") if files == "one" else shards(tmp_path / "point")
    model = load_policy(BASE).model
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):  # the second start finds it as the first one left it
        make_loadable(tmp_path / "point")
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    found = {}
    for path in (tmp_path / "point").glob("*.safetensors"):
        found |= dict.fromkeys(load_file(path), path.name)
        assert not model.load_state_dict(load_file(path), strict=False).unexpected_keys
    assert found.keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    if files == "two":
        index = json.loads((tmp_path / "point" / "model.safetensors.index.json").read_text())
        assert index == {"metadata": {}, "weight_map": found}
    with safe_open(tmp_path / "point" / path.name, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_another_configuration_left_is_never_gone_on_with(tmp_path):
    out = tmp_path / "out"
    open_out(out, {"lr": 1}, 1, lora=False)
    resume_point(out, 2)
    assert open_out(out, {"lr": 2}, 1, lora=False) == 0
    assert list(out.iterdir()) == []


def test_our_log_is_cut_to_the_step_that_is_gone_on_from_and_filled_up(tmp_path):
    """A driver that was killed may have seen fewer steps than the framework's checkpoint holds."""
    log = tmp_path / "log.jsonl"
    line = StepLog(1, 2, 9.0, 0.1, None, 0, 1.0, 3, 3.0)
    log.write_text(f"{line.line()}\n")
    (tmp_path / "trainer_log.jsonl").write_text(entry(1) + entry(2))
    assert [(kept.step, kept.loss) for kept in kept_lines(log, 2, tmp_path, WRITTEN)] == [(1, 9.0), (2, 3.0)]
    assert [kept.step for kept in kept_lines(log, 1, tmp_path, WRITTEN)] == [1]
    assert kept_lines(log, 0, tmp_path, WRITTEN) == []


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def shards(out: Path) -> None:
    """The base's weights in two files and an index."""
    out.mkdir()
    state = load_file(BASE / "model.safetensors")
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, out / file, metadata={"format": "pt"})
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
        ("RuntimeError: basic_ios::clear: iostream error", StageError, "The disk is full", "cpt-rft plan"),
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


def test_a_full_disk_is_told_even_if_the_framework_could_not_say_so(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 4096))  # type: ignore[attr-defined]
    assert "The disk is full" in explain(1, "Saving model checkpoint to out/che", Path("framework.log")).problem


def test_a_killed_framework_is_told_apart():
    assert "was killed (signal 9)" in explain(-9, "", Path("log")).problem
    assert "was killed (signal 9)" in explain(1, "Signal 9 (SIGKILL) received by PID 7", Path("log")).problem
    assert "it printed nothing" in explain(3, "", Path("log")).problem
