"""What a user can get wrong: one clear line with the fix, nothing half-written taken for whole, and a way on."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cpt_rft.data.parquet import SCHEMA
from cpt_rft.errors import CheckpointError
from cpt_rft.files import DirectoryLock
from cpt_rft.sequence.job import Job, preflight
from cpt_rft.sequence.worker import do_order
from tests.helpers.tiny_run import Tiny, content, edited, flip_last_byte, in_child, one_line_error, prepared, reference


@pytest.fixture
def tiny(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Tiny:
    """Prepared, nothing trained."""
    return prepared(tmp_path_factory.getbasetemp()).copy(tmp_path)


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Tiny:
    """Complete."""
    return reference(tmp_path_factory.getbasetemp()).copy(tmp_path)


def work(tiny: Tiny, job: Job) -> list[dict]:
    """What a worker reports of a job."""
    events: list[dict] = []
    do_order({"directory": str(tiny.directory), "job": job.as_json()}, events.append)
    return events


def goes_on(tiny: Tiny, before: dict[str, str]) -> None:
    """The next correct command ends where it would have ended."""
    tiny.finish()
    status, _, err = tiny.command("run")
    assert status == 0, err
    assert content(tiny.directory) == before


# --- names ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tasks=[mini_gqa, mini_superclever]"], "unknown task 'mini_superclever', the nearest is 'mini_superclevr'"),
        (["tasks=[mini_gqa, mini_gqa]"], "'mini_gqa' is listed twice"),
        (["methods=[sft, gpro]"], "unknown method 'gpro', the nearest is 'grpo'"),
        (["--method", "sfft"], "unknown method 'sfft', the nearest is 'sft'"),
        (["--task", "mini_gqua"], "unknown task 'mini_gqua', the nearest is 'mini_gqa'"),
        (["--seed", "4"], "unknown seed 4"),
        (["--order", "1"], "unknown order 1"),
        (["metod.lr=1"], "unknown key 'metod', the nearest is 'methods'"),
        (["method.learning_rate=1"], "unknown key 'method.learning_rate'"),
    ],
)
def test_unknown_and_repeated_names(tiny, arguments, words):
    assert words in one_line_error(tiny.command("run", *arguments))


def test_a_mistyped_key_names_file_and_line(tiny):
    lines = tiny.file.read_text().splitlines()
    tiny.file.write_text("\n".join([*lines[:3], "taskz: [mini_gqa]", *lines[4:]]))
    assert f"{tiny.file}:4: unknown key 'taskz', the nearest is 'tasks'" in one_line_error(tiny.command("run"))


# --- checkpoints ---


def test_a_missing_base_model(tiny):
    shutil.rmtree(tiny.base)
    line = one_line_error(tiny.command("run"))
    assert f"The base model {tiny.base} is missing" in line and "cpt-rft pretrain" in line


def test_a_base_model_that_is_cut_short(tiny):
    weights = tiny.base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors has" in one_line_error(tiny.command("run"))
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        preflight(tiny.experiment(), tiny.base)  # what a first run does before it writes anything


def test_a_base_model_that_was_exchanged(tiny):
    weights = tiny.base / "model.safetensors"
    flip_last_byte(weights)
    last = work(tiny, Job("base"))[-1]
    assert last["event"] == "error"
    assert "was changed" in last["problem"] and "output=DIRECTORY" in last["fix"]


@pytest.mark.parametrize("cut", [0, 1000, None])
def test_a_parent_that_is_missing_or_cut_short(own, cut):
    before = content(own.directory)
    stage = own.directory / "sft/order0/seed0/1_mini_gqa"
    shutil.rmtree(stage.with_name("2_mini_superclevr"))
    weights = stage / "checkpoint/model.safetensors"
    weights.unlink() if cut is None else weights.write_bytes(weights.read_bytes()[:cut])
    line = one_line_error(own.command("run"))
    assert str(weights) in line and f"delete {stage}" in line
    assert not stage.with_name("2_mini_superclevr").exists()
    shutil.rmtree(stage)  # what the line says
    goes_on(own, before)


def test_a_parent_whose_bytes_changed_is_noticed_at_the_hand_over(own):
    stage = own.directory / "sft/order0/seed0/1_mini_gqa"
    shutil.rmtree(stage.with_name("2_mini_superclevr"))
    weights = stage / "checkpoint/model.safetensors"
    flip_last_byte(weights)
    last = work(own, Job("chain", "sft", 0, 0, ("mini_superclevr",)))[-1]
    assert "was changed" in last["problem"] and f"delete {stage}" in last["fix"]


def test_a_manifest_edited_by_hand(own):
    path = own.directory / "grpo/order0/seed0/1_mini_gqa/manifest.json"
    before = path.read_text()
    with edited(path) as manifest:
        manifest["identity"]["method"]["lr"] = 1e-9
    assert f"{path} was edited by hand" in one_line_error(own.command("run"))
    status, out, _ = own.command("status", "--json")
    assert status == 2
    states = {(row["chain"], row["stage"]): row["state"] for row in json.loads(out)["stages"]}
    assert states["grpo seed0", "1_mini_gqa"] == "broken"
    assert states["sft seed0", "1_mini_gqa"] == "done"
    path.write_text(before)
    assert own.command("run")[0] == 0


# --- the run directory ---


def test_another_configuration(own):
    line = one_line_error(own.command("run", "method.lr=0.5"))
    assert "methods.joint.lr is 0.0002 there, 0.5 is asked for" in line and "output=DIRECTORY" in line


def test_two_runs_in_one_directory(tiny):
    with DirectoryLock(tiny.directory):
        assert f"is in use by process {os.getpid()} on" in one_line_error(tiny.command("run"))


def test_a_run_directory_that_is_a_file(tiny):
    shutil.rmtree(tiny.directory)
    tiny.directory.write_text("")
    assert "is not a directory" in one_line_error(tiny.command("run"))


def without_superpowers() -> None:
    """Root may write anywhere; let this process be as others are."""

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = Header(0x20080522, 0), (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    assert libc.capget(ctypes.byref(header), sets) == 0
    for place in range(3):
        sets[place] &= ~0b111  # CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH
    assert libc.capset(ctypes.byref(header), sets) == 0


@pytest.mark.parametrize("shut", ["", "grpo/order0/seed0", "data"])
def test_a_read_only_run_directory(tiny, shut, tmp_path):
    (tiny.directory / "grpo/order0/seed0").mkdir(parents=True)
    shutil.rmtree(tiny.directory / "data" / "mini_pope")
    (tiny.directory / "data" / "data.lock.json").unlink()
    (tiny.directory / shut).chmod(0o555)
    answer = tmp_path / "answer.json"

    def work_in_it() -> None:
        without_superpowers()
        if shut == "grpo/order0/seed0":
            (tiny.directory / "data" / "data.lock.json").unlink(missing_ok=True)
            tiny.prepare()
            answer.write_text(json.dumps(work(tiny, Job("chain", "grpo", 0, 0, ("mini_gqa",)))[-1]))
        else:
            answer.write_text(json.dumps(tiny.command("run")))

    assert in_child(work_in_it) == 0
    found = json.loads(answer.read_text())
    line = f"{found['problem']} {found['fix']}" if isinstance(found, dict) else one_line_error(tuple(found))
    assert "cannot be written (Permission denied)" in line and "output=DIRECTORY" in line
    assert str(tiny.directory / shut) in line


def test_a_full_disk(tiny, tmp_path, tmp_path_factory):
    """The real command on a real small disk (or under a limit on file sizes), then with room."""
    source, mount = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    shutil.move(tiny.directory, source / "run")
    file = tmp_path / "small.yaml"
    file.write_text(tiny.file.read_text().replace(f"output: {tiny.directory}", f"output: {mount / 'run'}"))
    command = [sys.executable, "-m", "cpt_rft.cli", "run", str(file), "workers=1", "--method", "sft"]
    helper = [sys.executable, "-m", "tests.helpers.small_disk", str(source), str(mount), "400000", *command]
    done = subprocess.run(helper, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    lines = [line for line in outcome["first"]["err"].splitlines() if line.startswith("error: ")]
    assert outcome["first"]["status"] == 2 and len(lines) == 1, outcome["first"]
    assert "The disk is full: " in lines[0] and " Fix: free some space" in lines[0]
    assert "Traceback" not in outcome["first"]["err"]
    assert outcome["second"]["status"] == 0, outcome["second"]
    whole = content(reference(tmp_path_factory.getbasetemp()).directory)
    found = content(tmp_path / "result" / "run")
    for name in whole:
        if name.startswith("sft/"):
            assert found[name] == whole[name], name
    assert {name for name in found if name.startswith("sft/")} == {name for name in whole if name.startswith("sft/")}


# --- rows ---


def spoil(tiny: Tiny, change: dict) -> Path:
    """Change columns of the third training row of a task."""
    path = tiny.directory / "data/mini_gqa/train.parquet"
    records = pq.read_table(path).to_pylist()
    records[2] |= change
    pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), path)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": [{"bytes": b"no picture", "path": "a.png"}]}, "Picture a.png does not decode"),
        ({"answer": " "}, "the answer is empty"),
        ({"answer": None}, "the answer is empty"),
    ],
)
def test_rows_that_cannot_be_used(tiny, change, words, tmp_path_factory):
    before = content(tiny.directory)
    path = spoil(tiny, change)
    last = work(tiny, Job("chain", "sft", 0, 0, ("mini_gqa",)))[-1]
    assert last["event"] == "error" and not last["everyone"]
    assert str(path) in last["problem"] and "row 2" in last["problem"] and words in last["problem"]
    assert last["fix"]
    shutil.rmtree(tiny.directory / "data")
    assert tiny.command("prepare")[0] == 0
    assert {name: value for name, value in content(tiny.directory).items() if name in before} == before


def test_a_picture_cut_short_in_the_file_itself(tiny):
    path = tiny.directory / "data/mini_gqa/train.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    last = work(tiny, Job("chain", "sft", 0, 0, ("mini_gqa",)))[-1]
    assert "is not a readable parquet file" in last["problem"]


# --- what is no error of the user ---


def test_a_bug_is_reported_with_its_traceback(tiny):
    events: list[dict] = []
    do_order({"directory": str(tiny.directory), "job": {"kind": "unheard of"}}, events.append)
    assert events[-1]["event"] == "bug" and "Traceback" in events[-1]["traceback"]
