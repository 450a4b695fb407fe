"""Killed at any write, stopped by Ctrl-C, killed with its workers: the same command ends with the same bits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.tiny_run import Tiny, content, in_child, is_change, kill_at_write, prepared, reference

SOME_WRITES = (8, 14, 17, 28, 32, 34, 36, 47)


@pytest.fixture
def tiny(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Tiny:
    return prepared(tmp_path_factory.getbasetemp()).copy(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return content(reference(tmp_path_factory.getbasetemp()).directory)


def chain_of(prints: dict[str, str], method: str) -> dict[str, str]:
    return {name: value for name, value in prints.items() if name.startswith(f"{method}/")}


def killed_at(tiny: Tiny, number: int) -> int:
    def work() -> None:
        kill_at_write(number, tiny.directory)
        tiny.finish("grpo")

    return in_child(work)


@pytest.mark.parametrize("number", SOME_WRITES)
def test_killed_before_a_write_and_started_again_the_bits_are_the_same(tiny, whole, number):
    assert killed_at(tiny, number) == -signal.SIGKILL
    assert chain_of(content(tiny.directory), "grpo") != chain_of(whole, "grpo")
    assert in_child(lambda: tiny.finish("grpo")) == 0
    assert chain_of(content(tiny.directory), "grpo") == chain_of(whole, "grpo")


@pytest.mark.full
def test_killed_before_every_write_in_turn_the_bits_are_the_same(tmp_path_factory, tmp_path, whole):
    source = prepared(tmp_path_factory.getbasetemp())
    for number in range(1, 1000):
        tiny = source.copy(tmp_path / str(number))
        status = killed_at(tiny, number)
        tiny.finish("grpo")
        assert chain_of(content(tiny.directory), "grpo") == chain_of(whole, "grpo"), number
        if status == 0:
            assert number > 60
            return
        assert status == -signal.SIGKILL


def test_a_stage_killed_over_and_over_gets_on(tiny, whole):
    """No start is given more than 40 writes, a third of what the chain needs."""
    starts = 1
    while killed_at(tiny, 40) != 0:
        starts += 1
        assert starts < 10
    assert starts > 2
    assert chain_of(content(tiny.directory), "grpo") == chain_of(whole, "grpo")


def test_changes_of_files_are_seen(tmp_path):
    """The watch that the tests above rely on."""
    assert is_change("os.rename", (str(tmp_path / "a"), str(tmp_path / "b")), tmp_path)
    assert is_change("open", (str(tmp_path / "a"), "w", os.O_WRONLY), tmp_path)
    assert not is_change("open", (str(tmp_path / "a"), "r", os.O_RDONLY), tmp_path)
    assert not is_change("os.rename", ("elsewhere", "b"), tmp_path)


def start(tiny: Tiny) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "cpt_rft.cli", "run", str(tiny.file), "workers=2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(pattern: str, directory: Path, lines: int) -> None:
    """Until some log has so many lines."""
    deadline = time.monotonic() + 90
    while not any(len(path.read_text().splitlines()) >= lines for path in directory.glob(pattern)):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def workers_of(session: int) -> list[int]:
    """Processes of a session that are not zombies."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, owner = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(owner) == session and state != "Z":
            found.append(int(entry.name))
    return found


def test_ctrl_c_then_sigkill_then_the_same_command(tiny, whole):
    """The real command with real workers, against a run that was made in one process without a stop."""
    logs = "*/order0/seed0/1_*.partial/train/log.jsonl"
    process = start(tiny)
    wait_for(logs, tiny.directory, 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1] == f"Stopped; nothing is lost. Go on with: cpt-rft run {tiny.file} workers=2"
    assert workers_of(process.pid) == []

    process = start(tiny)
    wait_for("*/order0/seed0/2_*.partial/train/log.jsonl", tiny.directory, 1)
    process.kill()
    process.communicate()
    again = start(tiny)  # at once: the lock is waited for until the orphans have ended
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert workers_of(process.pid) == []
    assert content(tiny.directory) == whole
