"""The pool against workers that behave badly: stand-ins that speak its language, or do not."""

import json
import sys
from pathlib import Path

import pytest

from cpt_rft.errors import UserError
from cpt_rft.sequence import pool as module
from cpt_rft.sequence.job import Job
from cpt_rft.sequence.pool import Pool, WorkerBugError
from tests.helpers.tiny_run import one_line_error, prepared

DONE = {"event": "done", "answer": {"x": 1}}
ERROR = {"event": "error", "problem": "It broke.", "fix": "mend it", "everyone": False, "traceback": "Trace"}


class Board:
    """Remembers what would be shown."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def update(self, label: str, share: float, text: str, *, part: bool = False) -> None:
        self.lines.append(f"{label} {share} {text}")

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def pool_of(tmp_path, monkeypatch):
    """A pool whose workers answer every order with given lines, or run a line of shell."""

    def make(*events: dict, shell: str = "", debug: bool = False) -> Pool:
        answers = "\n".join(f"echo '{json.dumps(event)}'" for event in events)
        loop = f'while read -r order; do [ "$order" = null ] && exit 0\n{answers}\ndone'
        program = tmp_path / "worker"
        program.write_text(f"#!/bin/sh\n{shell or loop}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return Pool(tmp_path, 1, lock=1, debug=debug)  # any open descriptor will do

    return make


def jobs(count: int) -> list[Job]:
    return [Job("chain", "sft", 0, seed, ("a",)) for seed in range(count)]


def run(pool: Pool, count: int = 3, workers: int = 2) -> list[str]:
    board = Board()
    pool.run(jobs(count), workers, board)
    assert pool.running == []
    return board.lines


def test_workers_take_one_job_after_another(pool_of):
    pool = pool_of({"event": "progress", "share": 0.5, "text": "half"}, DONE)
    assert sorted(run(pool)) == [f"sft seed{n} {text}" for n in range(3) for text in ("0.0 starting", "0.5 half")]
    assert pool.started == 2


def test_a_job_waits_for_the_one_that_it_comes_after(pool_of, tmp_path):
    """Two workers, and yet one of them has nothing to do until the source is done, whatever the order of the list."""
    ended = tmp_path / "ended"
    shell = "\n".join(
        (
            'while read -r order; do [ "$order" = null ] && exit 0',
            f"""case "$order" in *'"method": "teacher"'*) sleep 0.3; echo teacher;; *) echo pupil;; esac >> {ended}""",
            f"echo '{json.dumps(DONE)}'",
            "done",
        )
    )
    pool, board = pool_of(shell=shell), Board()
    pupils = [Job("chain", "pupil", 0, seed, ("a",), after=f"teacher seed{seed}") for seed in range(2)]
    teachers = [Job("chain", "teacher", 0, seed, ("a",)) for seed in range(2)]
    pool.run([*pupils, teachers[0]], 2, board)
    # The pupil of the teacher that is not to be trained starts at once, the other one waits.
    assert [line.split(" 0.0")[0] for line in board.lines] == ["pupil seed1", "teacher seed0", "pupil seed0"]
    assert sorted(ended.read_text().split()[:2]) == ["pupil", "teacher"] and ended.read_text().endswith("pupil\n")
    assert pool.running == [] and pool.started <= 3


def test_a_failing_chain_does_not_stop_the_others(pool_of):
    pool = pool_of({"event": "part", "share": 1.0, "text": "went on"}, ERROR)
    board = Board()
    with pytest.raises(UserError, match=r"It broke\. Fix: mend it"):
        pool.run(jobs(3), 2, board)
    assert len([line for line in board.lines if "went on" in line]) == 3
    assert board.lines.count("error: It broke. Fix: mend it") == 2


def test_what_concerns_everyone_stops_everything(pool_of):
    pool = pool_of({**ERROR, "everyone": True})
    with pytest.raises(UserError, match="It broke"):
        run(pool, count=8)
    assert pool.running == []


def test_debug_shows_the_workers_traceback(pool_of, capsys):
    with pytest.raises(UserError):
        run(pool_of(ERROR, debug=True), count=1)
    assert "Trace" in capsys.readouterr().err


def test_a_workers_bug_is_no_users_error(pool_of):
    with pytest.raises(WorkerBugError, match="ZeroDivisionError"):
        run(pool_of({"event": "bug", "traceback": "ZeroDivisionError"}))


def test_a_worker_that_is_killed_is_missed_and_the_rest_is_done(pool_of):
    pool = pool_of(shell="kill -9 $$")
    with pytest.raises(UserError, match=r"The worker of sft seed\d was killed by signal 9. Fix: if memory ran out"):
        run(pool)
    assert pool.started == 3


def test_a_worker_that_ends_without_a_word_leaves_its_log(pool_of):
    with pytest.raises(WorkerBugError, match=r"(?s)ended with status 3.*some last words"):
        run(pool_of(shell="echo some last words >&2; exit 3"))


def test_a_question_has_one_answer(pool_of):
    pool = pool_of({"event": "progress", "share": 0.5, "text": ""}, DONE)
    assert pool.ask({"question": 1}) == {"x": 1}
    pool = pool_of(ERROR)
    with pytest.raises(UserError, match="It broke"):
        pool.ask({"question": 1})
    pool = pool_of(shell="kill -9 $$")
    with pytest.raises(UserError, match="killed by signal 9"):
        pool.ask({"question": 1})
    assert pool.running == []


def test_cores_respect_a_containers_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: set(range(8)))
    real = module.Path
    monkeypatch.setattr(module, "Path", lambda name: tmp_path / "quota" if "cgroup" in str(name) else real(name))
    for text, cores in (("max 100000", 8), ("150000 100000", 1), ("400000 100000", 4), ("10000 100000", 1)):
        (tmp_path / "quota").write_text(text)
        assert module._cores() == cores


def test_a_first_run_checks_the_base_before_it_writes_anything(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
):
    """With a real worker, the real command."""
    tiny = prepared(tmp_path_factory.getbasetemp()).copy(tmp_path)
    (tiny.directory / "config.json").unlink()
    (tiny.directory / "base" / "checkpoint.json").unlink()
    weights = tiny.base / "model.safetensors"
    body = weights.read_bytes()
    weights.write_bytes(body[:-1000])
    status, out, err = tiny.command("run")
    assert str(weights) in one_line_error((status, out, "\n".join(err.splitlines()[1:])))
    assert err.startswith(f"checking {tiny.base}")
    assert not (tiny.directory / "config.json").exists()
    assert not (tiny.directory / "base" / "checkpoint.json").exists()
