"""The sandbox: what it answers is what the libraries answer, and nothing that a text does gets out of it."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import math_verify
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mathruler.grader import grade_answer

from cpt_rft.scoring import math_equality, math_worker
from cpt_rft.scoring.math_equality import cheap_verdict, counts, verdict, verdicts
from tests.helpers.busy import timed

ROOT = Path(__file__).parents[1]
JUDGES = ("math_verify", "mathruler")
PAIRS = [  # candidate, reference: harmless, of every sort that the libraries know
    ("\\frac{2}{4}", "\\frac{1}{2}"), ("0.5", "\\frac{1}{2}"), ("6", "5"),
    ("8 \\sqrt { 2 }", "\\sqrt{128}"), ("7.07", "5\\sqrt{2}"),
    ("4 \\frac { 4 } { 11 }", "\\frac{48}{11}"), ("\\sqrt { 26 } / 26", "\\frac{1}{\\sqrt{26}}"), ("(1,2)", "(1, 2)"),
    ("[1, 2)", "(1, 2)"), ("\\{1, 2\\}", "\\{2, 1\\}"), ("x = 12", "12"), ("12^\\circ", "12"), ("50\\%", "50"),
    ("\\sin^2 x + \\cos^2 x", "1"), ("\\log_2 8", "3"), ("e^{i\\pi}", "-1"), ("\\int_0^1 x\\,dx", "\\frac{1}{2}"),
    ("x^2 - 1", "(x-1)(x+1)"), ("1 < x < 2", "(1, 2)"), ("y = 2x", "2x = y"), ("3\\text{ cm}", "3"), ("-3", "3"),
    ("\\begin{pmatrix}1 & 2\\\\3 & 4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"), ("10\\pi", "31.4"),
    ("\\sum_{i=1}^{4} i", "10"), ("\\binom{5}{2}", "10"), ("|{-3}|", "3"), ("2 \\times 10^{3}", "2000"), ("B", "B."),
    ("\\text{red}", "red"), ("1/2, 1/3", "1/3, 1/2"), ("a+b", "b+a"), ("xy", "yx"), ("one half", "0.5"), ("", "0"),
]  # fmt: skip


def directly(candidate, reference, judge):
    """The library itself, in this process: the pairs above are ours."""
    if judge == "mathruler":
        return grade_answer(candidate, reference)
    return math_verify.verify(math_verify.parse(f"${reference}$"), math_verify.parse(f"${candidate}$"))


@pytest.mark.parametrize("judge", JUDGES)
def test_the_sandbox_answers_what_the_library_answers(judge):
    assert verdicts(PAIRS, judge) == [directly(*pair, judge) for pair in PAIRS]


@given(st.integers(-999, 999), st.integers(-999, 999), st.integers(0, 4), st.sampled_from(JUDGES))
@settings(max_examples=40)
def test_cheap_verdicts_on_decimals_are_those_of_the_library(one, other, places, judge):
    first, second = (f"{value / 10**places:.{places}f}" for value in (one, other))
    for pair in ((first, second), (first, first + ("0" if places else ".0"))):
        assert cheap_verdict(*pair, judge) == directly(*pair, judge)


words = st.lists(
    st.sampled_from(["red", "Red", "a", "ab", "dog", "god", "inch", "or", "seconds", "x"]), min_size=1, max_size=3
).map(" ".join)


@given(words, words)
def test_cheap_verdicts_on_words_are_those_of_mathruler(one, other):
    cheap = cheap_verdict(one, other, "mathruler")
    assert cheap is None or cheap == directly(one, other, "mathruler")


HOSTILE = [
    "9**9**9**9", "2**2**2**2**2**2", "9**9**9", "(" * 400,
    "factorial(10**9)", "1e10000000", "10^{10^{10}}", "{" * 400,
    "\\frac{" * 80, "x" * 490, "[1]*10**10", "(0,)*10**10", "exit()", "a\nb", "\x00", "\ud800", "print(1)", "1/0",
]  # fmt: skip


@pytest.mark.parametrize("judge", JUDGES)
def test_hostile_texts_equal_nothing_within_a_second(judge):
    verdict("x+1", "1+x", judge)
    for text in HOSTILE:
        seconds, given = timed(partial(verdict, text, "12.5x", judge), enough=0.9)
        assert not given, text
        assert seconds < 1.0, text
    assert verdict("x+3", "3+x", judge) is True


def test_giving_up_is_counted_and_not_remembered():
    before = counts()
    assert verdict("9**9**9", "12.5x", "mathruler") is None
    assert verdict("9**9**9", "12.5x", "mathruler") is None
    assert verdict("x" * 501, "y", "mathruler") is None
    after = counts()
    assert (after.gave_up - before.gave_up, after.too_long - before.too_long) == (2, 1)
    assert (after.computed - before.computed, after.cached - before.cached) == (2, 0)


def test_a_pair_is_computed_once():
    verdict("x+41", "41+x", "math_verify")
    before = counts()
    assert verdicts([("x+41", "41+x"), ("x+41", "41+x"), ("41", "41.0")], "math_verify") == [True, True, True]
    assert counts() == before._replace(cached=before.cached + 1, cheap=before.cheap + 1)


def test_a_slow_pair_costs_itself_only():
    pairs = [("x+1", "1+x"), ("9**9**9", "x"), ("2x", "x*2"), ("1e10000000", "x"), ("x+5", "5+x")]
    assert verdicts(pairs, "mathruler") == [True, None, True, None, True]


def test_many_pairs_outlast_many_forks():
    number = 3 * math_worker.PAIRS_A_FORK
    pairs = [(f"x+{value}", f"{value}+x" if value % 3 else f"{value}-x") for value in range(1, number)]
    assert verdicts(pairs, "mathruler") == [bool(value % 3) for value in range(1, number)]


def test_a_killed_fork_and_a_killed_worker_are_replaced():
    verdict("y+7", "7+y", "mathruler")
    worker = math_equality._POOL.idle[-1]
    first = worker.fork
    os.kill(first, signal.SIGKILL)
    time.sleep(0.3)
    assert verdicts([("y+9", "9+y"), ("y+10", "11+y")], "mathruler") == [True, False]
    assert worker.fork != first
    os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    assert verdict("y+12", "12+y", "mathruler") is None
    assert verdict("y+12", "12+y", "mathruler") is True


def test_what_a_dead_fork_was_asked_is_not_taken_for_the_next_answer():
    """The fork dies before it reads the question, so its successor answers that one first."""
    verdict("v+1", "1+v", "mathruler")
    worker = math_equality._POOL.idle[-1]
    os.kill(worker.process.pid, signal.SIGSTOP)
    os.kill(worker.fork, signal.SIGKILL)
    threading.Timer(0.3, os.kill, (worker.process.pid, signal.SIGCONT)).start()
    pairs = [(f"v+{value}", f"{value + value % 2}+v") for value in range(2, 16)]
    expected = [not value % 2 for value in range(2, 16)]
    assert verdicts(pairs, "mathruler") == [None, *expected[1:]]


def test_only_a_line_that_bears_the_name_of_the_question_answers_it():
    """What an evaluated text wrote, or a dead fork left, stands before the reply."""
    verdict("w+1", "1+w", "mathruler")
    worker = math_equality._POOL.idle[-1]
    assert not worker.buffer
    worker.buffer = b'["another", true]\ntrue\n["asked", false]\n'
    assert worker._reply("asked") is False


def test_a_fork_of_this_process_has_workers_of_its_own():
    verdict("x+21", "21+x", "mathruler")
    pid = os.fork()
    if pid == 0:
        math_equality._POOL.cache.clear()
        right = verdicts([("x+21", "21+x"), ("x+22", "21+x")], "mathruler") == [True, False]
        math_equality.close()
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert verdict("x+23", "23+x", "mathruler") is True


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)"])
def test_no_worker_outlives_its_process(end):
    code = f"""
import json, os
from cpt_rft.scoring import math_equality
math_equality.verdict("x+1", "1+x", "mathruler")
(worker,) = math_equality._POOL.started
print(json.dumps([worker.process.pid, worker.fork]), flush=True)
{end}
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    workers = json.loads(done.stdout)
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) == 2
    assert not any(map(alive, workers))


def test_the_protocol_is_one_line_a_pair():
    replies = io.StringIO()
    question = {"id": "q", "judge": "same", "pairs": [["a\n", "a\n"], ["a", "b"]]}
    lines = io.StringIO(json.dumps(question) + "\n")
    assert math_worker._answer({"same": str.__eq__}, lines, replies) == math_worker.OVER
    ready, *answers = map(json.loads, replies.getvalue().splitlines())
    assert ready == {"ready": os.getpid()}
    assert answers == [["q", True], ["q", False], ["q", "stay"]]


def swallows_every_exception(candidate, reference):
    try:
        while True:
            pass
    except BaseException:
        return True


def runs_out_of_memory(candidate, reference):
    raise MemoryError


def fails(candidate, reference):
    raise SystemExit


@pytest.mark.parametrize(
    ("judge", "expected"),
    [(str.__eq__, True), (fails, False), (runs_out_of_memory, None), (swallows_every_exception, None)],
)
def test_a_verdict_whatever_the_library_does(judge, expected):
    before = signal.signal(signal.SIGVTALRM, math_worker._ring)
    try:
        assert math_worker._judge(judge, "a", "a") is expected
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == signal.getitimer(signal.ITIMER_PROF)[0] == 0.0
    finally:
        signal.signal(signal.SIGVTALRM, before)


ATTEMPTS = {
    "write a file": "open('made', 'w')",
    "change a library": "open(os.__file__, 'r+')",
    "append to a file": "open('there', 'a')",
    "read a file": "open('there')",
    "read a system file": "open('/etc/passwd')",
    "leave the libraries": "open(os.path.join(os.path.dirname(os.__file__), '..', '..', '..', '..', 'etc', 'passwd'))",
    "delete": "os.remove('there')",
    "make a directory": "os.mkdir('made')",
    "rename": "os.rename('there', 'made')",
    "look around": "os.scandir('.')",
    "list names": "os.listdir('.')",
    "run a program": "subprocess.run(['true'])",
    "run a shell": "os.system('true')",
    "fork": "os.fork()",
    "become another program": "os.execv('/bin/true', ['true'])",
    "open a socket": "socket.socket()",
    "look up a name": "socket.getaddrinfo('localhost', 80)",
    "send a signal": "os.kill(os.getppid(), 0)",
    "call C": "ctypes.CDLL(None)",
    "take memory": "bytearray(4 << 30)",
}


def test_the_doors_are_shut(tmp_path):
    """In a process that has shut its doors as a fork does, every attempt fails; reading a library does not."""
    (tmp_path / "there").write_text("kept")
    code = f"""
import ctypes, json, os, socket, subprocess, sys
from cpt_rft.scoring import math_worker
attempts, outcome = {ATTEMPTS!r}, {{}}
math_worker.shut_doors()
for name, what in attempts.items():
    try:
        eval(what)
        outcome[name] = "done"
    except (PermissionError, MemoryError) as error:
        outcome[name] = type(error).__name__
import wave  # a library not read yet
print(json.dumps([outcome, open(os.__file__).readline()]))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    outcome, line = json.loads(done.stdout)
    assert set(outcome) == set(ATTEMPTS)
    assert set(outcome.values()) == {"PermissionError", "MemoryError"}
    assert outcome["take memory"] == "MemoryError"
    assert line.startswith(('r"""', '"""', "r'''"))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "kept"


@pytest.mark.skipif(not Path("/proc/self/limits").is_file(), reason="the system does not tell limits of others")
def test_the_fork_that_answers_has_shut_its_doors():
    verdict("z+1", "1+z", "mathruler")
    lines = Path(f"/proc/{math_equality._POOL.idle[-1].fork}/limits").read_text().splitlines()
    limits = {line[:25].strip(): line[25:].split()[:2] for line in lines}
    assert limits["Max file size"] == limits["Max core file size"] == ["0", "0"]
    assert limits["Max open files"] == [str(math_worker.DESCRIPTORS)] * 2
    assert limits["Max address space"] == [str(math_worker.MEMORY_BYTES)] * 2


def test_the_worker_never_imports_torch():
    code = "import math_worker, sys; math_worker.judges(); print(*sys.modules)"
    folder = ROOT / "cpt_rft" / "scoring"
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.append({str(folder)!r}); {code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert {"sympy", "math_verify"} <= set(done.stdout.split())
    assert not {"torch", "transformers", "cpt_rft"} & set(done.stdout.split())
