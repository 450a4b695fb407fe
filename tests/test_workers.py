"""Functions that other processes call: where, how often, and what becomes of errors, deaths and interrupts."""

import os
import time
from pathlib import Path

import pytest

from cpt_rft.data.workers import run_in_processes
from cpt_rft.errors import DataError


def test_every_call_is_made_by_one_of_so_many_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with run_in_processes(os.system, 2) as call:
        for number in range(6):
            call(f"echo printed; echo $PPID > {tmp_path}/{number}")  # the shell's parent is the process that called
    pids = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert len(pids) == 6
    assert len(set(pids)) == 2 and os.getpid() not in pids
    assert capfd.readouterr() == ("", "printed\n" * 6)  # and is not taken for an answer


def test_large_arguments_arrive_whole(tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    with run_in_processes(Path.write_bytes, 1) as call:
        call(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == data


def test_an_error_of_the_function_is_raised() -> None:
    with pytest.raises(ValueError, match=r"invalid literal for int.*'two'"), run_in_processes(int, 2) as call:
        for text in ("1", "two", "3"):
            call(text)


@pytest.mark.parametrize(
    ("command", "how"), [("kill -9 $PPID", "was killed by signal 9"), ("kill $PPID", "was killed by signal 15")]
)
def test_a_death_is_an_error_with_a_fix(command: str, how: str) -> None:
    with pytest.raises(DataError, match=f"rows {how}. Fix: .*--processes 1"), run_in_processes(os.system, 1) as call:
        call(command)


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (4,)

    def __call__(self, data: bytes) -> None:
        """Never called."""


def test_a_death_before_all_is_handed_over_is_an_error_too() -> None:
    with pytest.raises(DataError, match="ended with status 4"), run_in_processes(Deadly(), 1) as call:
        call(bytes(10_000_000))


def test_an_interrupt_ends_the_processes_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), run_in_processes(time.sleep, 1) as call:
        call(60)
        raise KeyboardInterrupt
    assert time.monotonic() - start < 30
