"""Manifests, and the files under them: whole or absent, hashed, locked."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cpt_rft import manifest as module
from cpt_rft.errors import CheckpointError, StageError
from cpt_rft.files import (
    DirectoryLock,
    atomic_path,
    discard_directory,
    explain_os_error,
    hash_tree,
    publish_directory,
    read_json,
    sha256_json,
    tree_problem,
    tree_sha256,
    write_json_atomic,
    write_text_atomic,
)
from cpt_rft.manifest import (
    Manifest,
    check_checkpoint,
    code_sha256,
    differences,
    make_provenance,
    read_manifest,
    write_manifest,
)
from tests.helpers.tiny_run import edited, in_child

IDENTITY = {"parent": "p", "tasks": ["a", "b"], "method": {"lr": 1e-4, "betas": [0.9, 0.999]}, "seed": 0}


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A directory with a checkpoint of two files and its manifest."""
    (tmp_path / "checkpoint" / "sub").mkdir(parents=True)
    (tmp_path / "checkpoint" / "weights").write_bytes(b"0123456789")
    (tmp_path / "checkpoint" / "sub" / "config").write_text("{}")
    provenance = make_provenance(
        tmp_path / "checkpoint", code=code_sha256(), started=0.0, train_seconds=1.5, parent_sha256="w"
    )
    write_manifest(tmp_path, Manifest(IDENTITY, provenance))
    return tmp_path


def test_a_manifest_reads_back(stage):
    manifest = read_manifest(stage)
    assert manifest.identity == IDENTITY
    assert manifest.identity_sha256 == sha256_json(IDENTITY)
    assert manifest.files == hash_tree(stage / "checkpoint")
    assert manifest.checkpoint_sha256 == tree_sha256(manifest.files)
    assert manifest.provenance["started"] == "1970-01-01T00:00:00Z"
    assert manifest.provenance["train_seconds"] == 1.5
    assert set(manifest.provenance["versions"]) >= {"python", "torch", "numpy"}
    assert manifest.provenance["code"] == code_sha256()


def test_the_order_of_keys_is_no_difference(stage):
    body = json.loads((stage / "manifest.json").read_text())
    (stage / "manifest.json").write_text(json.dumps(dict(reversed(body.items()))))
    assert read_manifest(stage).identity == IDENTITY


@pytest.mark.parametrize(
    "edit",
    [
        lambda body: body["identity"].update(seed=1),
        lambda body: body["identity"]["method"].update(lr=1.0),
        lambda body: body["provenance"].update(train_seconds=0.1),
        lambda body: body["provenance"]["files"].pop("weights"),
        lambda body: body.update(identity_sha256="0" * 64),
        lambda body: body.update(manifest_sha256="0" * 64),
        lambda body: body.update(note="hello"),
    ],
)
def test_a_manifest_edited_by_hand_is_noticed(stage, edit):
    with edited(stage / "manifest.json") as body:
        edit(body)
    with pytest.raises(CheckpointError, match="was edited by hand"):
        read_manifest(stage)


def test_an_identity_edited_with_its_hash_is_noticed_too(stage):
    with edited(stage / "manifest.json") as body:
        body["identity"]["seed"] = 1
        body["identity_sha256"] = sha256_json(body["identity"])
    with pytest.raises(CheckpointError, match="was edited by hand"):
        read_manifest(stage)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"manifest_sha256": 1}', "\xff"])
def test_what_is_no_manifest_is_said_to_be_none(stage, text):
    (stage / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="is not a manifest"):
        read_manifest(stage)


def test_a_missing_manifest(stage):
    (stage / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest.json is missing"):
        read_manifest(stage)


@pytest.mark.parametrize(
    ("spoil", "full", "words"),
    [
        (lambda folder: (folder / "weights").unlink(), False, "weights is missing"),
        (lambda folder: (folder / "weights").write_bytes(b"01234"), False, "has 5 bytes instead of 10"),
        (lambda folder: (folder / "weights").write_bytes(b"0123456789X"), False, "has 11 bytes instead of 10"),
        (lambda folder: (folder / "weights").write_bytes(b"012345678X"), True, "was changed"),
        (lambda folder: (folder / "extra").write_text(""), False, "does not belong to the checkpoint"),
    ],
)
def test_a_checkpoint_is_what_its_manifest_says(stage, spoil, full, words):
    files = read_manifest(stage).files
    check_checkpoint(stage / "checkpoint", files, full=True, fix="")
    spoil(stage / "checkpoint")
    with pytest.raises(CheckpointError, match=words):
        check_checkpoint(stage / "checkpoint", files, full=full, fix="")


def test_names_and_sizes_alone_do_not_see_a_changed_byte(stage):
    files = read_manifest(stage).files
    (stage / "checkpoint" / "weights").write_bytes(b"012345678X")
    assert tree_problem(stage / "checkpoint", files, full=False) is None


def test_differences_show_both_values():
    asked = {**IDENTITY, "method": {"lr": 2e-4, "betas": [0.9, 0.999]}, "new": "x" * 100}
    del asked["seed"]
    found = differences(IDENTITY, asked)
    assert found[0] == "method.lr is 0.0001 there, 0.0002 is asked for"
    assert found[1] == 'seed is 0 there, "absent" is asked for'
    assert found[2].startswith('new is "absent" there, "xxx') and found[2].endswith("... is asked for")
    assert differences(IDENTITY, dict(IDENTITY)) == []
    assert differences({"a": 1}, {"a": 2}, frozenset({"a"})) == []


def test_code_that_changed_during_a_stage_is_recorded(stage):
    provenance = make_provenance(stage / "checkpoint", code="before", started=0.0, train_seconds=0.0, parent_sha256="w")
    assert provenance["code"] == f"before+{code_sha256()}"


def test_the_code_hash_covers_what_changes_weights_and_nothing_else(tmp_path, monkeypatch):
    package = tmp_path / "cpt_rft"
    (package / "algos").mkdir(parents=True)
    for name in ("algos/sft.py", "manifest.py", "checkpoint.py", "prompts.py", "seeds.py", "cli.py"):
        (package / name).write_text("1")
    monkeypatch.setattr(module, "__file__", str(package / "manifest.py"))
    before = code_sha256()
    (package / "cli.py").write_text("2")
    assert code_sha256() == before
    (package / "algos" / "sft.py").write_text("2")
    assert code_sha256() != before


# --- files ---


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "note.txt"
    write_text_atomic(path, "old")

    def fail() -> None:
        with atomic_path(path) as partial:
            partial.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_canonical(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"b": 1, "a": "ü"})
    assert read_json(tmp_path / "a.json") == {"a": "ü", "b": 1}
    assert sha256_json({"b": 1, "a": 2}) == sha256_json({"a": 2, "b": 1})
    with pytest.raises(ValueError, match="JSON"):
        sha256_json({"a": float("nan")})
    (tmp_path / "b.json").write_text("[]")
    assert read_json(tmp_path / "b.json") == read_json(tmp_path / "none.json") == {}


def test_publish_and_discard(tmp_path):
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "a").write_text("a")
    publish_directory(tmp_path / "x.partial", tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    (tmp_path / ".x.trash").mkdir()  # of a process that was killed
    discard_directory(tmp_path / "x")
    discard_directory(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_never_published_over_another(tmp_path):
    for name in ("x", "x.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    with pytest.raises(OSError, match="not empty"):
        publish_directory(tmp_path / "x.partial", tmp_path / "x")
    assert (tmp_path / "x" / "a").read_text() == "x"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "file"), "The disk is full: file could not"),
        (OSError(122, "Disk quota exceeded"), "The disk is full: place could not"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "The disk is full: place"),
        (PermissionError(13, "Permission denied", "file"), r"file cannot be written \(Permission denied\)"),
        (OSError(30, "Read-only file system", "file"), r"file cannot be written \(Read-only file system\)"),
    ],
)
def test_errors_of_the_system_are_explained(error, words):
    outer = ValueError("outer")
    outer.__cause__ = error
    for raised in (error, outer):
        explained = explain_os_error(raised, Path("place"))
        assert isinstance(explained, StageError)
        with pytest.raises(StageError, match=words):
            raise explained


def test_other_errors_are_not_explained():
    assert explain_os_error(FileNotFoundError(2, "No such file"), Path("place")) is None
    assert explain_os_error(ValueError("x"), Path("place")) is None


# --- the lock ---


def test_the_lock_names_its_holder(tmp_path):
    with DirectoryLock(tmp_path), pytest.raises(StageError) as caught, DirectoryLock(tmp_path):
        pass
    assert f"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()} since 20" in str(caught.value)
    with DirectoryLock(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    def hold_and_die() -> None:
        DirectoryLock(tmp_path).__enter__()
        os.kill(os.getpid(), 9)

    assert in_child(hold_and_die) == -9
    with DirectoryLock(tmp_path, patience_s=0.0):
        assert read_json(tmp_path / ".lock")["pid"] == os.getpid()


def test_orphans_that_inherited_the_lock_are_waited_for(tmp_path):
    lock = DirectoryLock(tmp_path).__enter__()
    orphan = subprocess.Popen([sys.executable, "-c", "input()"], pass_fds=(lock.descriptor,), stdin=subprocess.PIPE)
    lock.__exit__(None, None, None)
    (tmp_path / ".lock").write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname()}))  # no such process
    with pytest.raises(StageError, match="is in use"), DirectoryLock(tmp_path, patience_s=0.2):
        pass
    orphan.communicate(b"\n")
    with DirectoryLock(tmp_path, patience_s=0.2):
        pass


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"pid": "x"}'])
def test_a_lock_file_that_names_nobody_is_still_a_lock(tmp_path, note):
    with DirectoryLock(tmp_path):
        (tmp_path / ".lock").write_text(note)
        with pytest.raises(StageError, match="is in use by process"), DirectoryLock(tmp_path, patience_s=0.1):
            pass
