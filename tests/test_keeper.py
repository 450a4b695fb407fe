"""What a framework starts never outlives whoever started it, however that one ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cpt_rft.engines import keeper
from cpt_rft.engines.outside import end_leftovers, mark_of, running

# A launcher as torchrun is one: its workers are in sessions of their own and ignore what a polite end asks for.
TREE = "trap '' TERM INT HUP; setsid sh -c 'trap \"\" TERM; echo up; sleep 300' & setsid sleep 300 & wait"
DRIVER = """
import signal, sys, time
from pathlib import Path
from cpt_rft.engines.outside import running
place = Path(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
with running(["sh", "-c", sys.argv[2]], place, {"PATH": "/usr/bin:/bin"}, place / "log"):
    time.sleep(300)
"""


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def up(place: Path) -> bool:
    return (
        (place / "log").exists() and b"up" in (place / "log").read_bytes() and len(keeper.marked(mark_of(place))) >= 3
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_driver_ends(tmp_path, number):
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path), TREE], stderr=subprocess.DEVNULL)
    until(lambda: up(tmp_path))
    driver.send_signal(number)
    driver.wait(20)
    until(lambda: not keeper.marked(mark_of(tmp_path)))


def test_nothing_is_left_when_the_command_itself_ends(tmp_path):
    command = ["sh", "-c", "setsid sleep 300 & setsid sleep 300 & sleep 0.1; exit 7"]
    with running(command, tmp_path, {"PATH": "/usr/bin:/bin"}, tmp_path / "log") as process:
        assert process.wait(20) == 7
    assert keeper.marked(mark_of(tmp_path)) == []


def test_a_killed_command_is_reported_as_killed(tmp_path):
    with running(["sh", "-c", "kill -9 $$"], tmp_path, {"PATH": "/usr/bin:/bin"}, tmp_path / "log") as process:
        assert process.wait(20) == -signal.SIGKILL


def test_leftovers_of_a_killed_keeper_are_ended_by_the_next_start(tmp_path):
    environment = {**os.environ, keeper.VARIABLE: mark_of(tmp_path)}
    orphan = subprocess.Popen(["sleep", "300"], env=environment, start_new_session=True)
    until(lambda: keeper.marked(mark_of(tmp_path)) == [orphan.pid])
    end_leftovers(tmp_path)
    assert orphan.wait(5) == -signal.SIGKILL
