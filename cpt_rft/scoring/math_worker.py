r"""The only place where a model's text meets a computer algebra system: a process that can do nothing else.

Run as a script by `math_equality`. It imports the libraries once and then forks; the fork answers, and a new one
takes its place when it dies, is killed or has answered `PAIRS_A_FORK` pairs, so that neither time nor memory nor
anything that a text does to the libraries' state can outlast a few pairs.

One line of JSON in: ``{"id": text, "judge": name, "pairs": [[candidate, reference], ...]}``. One line out for every
pair: ``[id, true]``, ``[id, false]`` or ``[id, null]`` (gave up), then ``[id, "stay"]``, or ``[id, "leave"]`` before a
new fork takes over. Every new fork says ``{"ready": pid}``.
"""

import gc
import json
import os
import resource
import signal
import site
import sys
import sysconfig
from collections.abc import Callable
from types import FrameType
from typing import IO, Any

PAIRS_A_FORK = 512
# Processor time for one pair, so that a busy machine changes no score: first an exception, then the kernel's kill,
# since a computation inside C hears no exception.
CPU_SECONDS = 0.25
KILL_SECONDS = 0.4
REPEAT_SECONDS = 0.05  # the libraries catch every exception, so the alarm rings until they are out
MEMORY_BYTES = 1 << 30
GARBAGE = 20_000  # objects between two collections; a pair makes thousands, and a tenth of its time went into looking
DESCRIPTORS = 16
OVER, BROKEN, RETIRE = 0, 1, 2  # exit codes of a fork: no more input, a line that is none, others' turn
# Every fork starts with what these have made the libraries import and store.
_WARM_UP = (
    ("\\frac{1}{2}", "0.5"), ("2 \\sqrt { 3 }", "\\sqrt{12}"), ("(1, 2)", "[1, 2]"), ("x^2+1=0", "1 < x"),
    ("\\frac{\\sqrt{5}}{3} + \\pi", "\\pi+1"), ("\\sqrt{2} / 3", "\\frac{2}{3\\sqrt{2}}"), ("12\\text{ cm}", "12.5"),
    ("\\sin(30^\\circ)", "\\cos x"), ("x=4", "3 \\times 10^{2}"), ("\\{1, 2\\}", "1, 2"), ("5 \\%", "-7x"),
)  # fmt: skip
#: All that a comparison may do, by the names of Python's audit events; files are read from the libraries only.
_ALLOWED = frozenset({
    "import", "compile", "exec", "marshal.loads", "code.__new__", "function.__new__", "object.__getattr__",
    "object.__setattr__", "object.__delattr__", "sys._getframe", "builtins.id", "sys.unraisablehook",
})  # fmt: skip
Judge = Callable[[str, str], bool]


class OutOfTimeError(BaseException):
    """The alarm rang; no library may take it for an error of its own."""


def judges() -> dict[str, Judge]:
    """What can be asked, by name: functions of (candidate, reference)."""
    import math_verify
    from mathruler import grader

    def verify(candidate: str, reference: str) -> bool:
        gold = math_verify.parse(f"${reference}$", parsing_timeout=None)
        given = math_verify.parse(f"${candidate}$", parsing_timeout=None)
        return bool(math_verify.verify(gold, given, timeout_seconds=None))

    return {"math_verify": verify, "mathruler": grader.grade_answer}


def main() -> None:
    """Import, warm up, then keep one fork alive until the input ends."""
    asked = judges()
    for judge in asked.values():
        for candidate, reference in _WARM_UP:
            judge(candidate, reference)
    gc.collect()
    gc.freeze()  # what is there stays shared between the forks
    gc.set_threshold(GARBAGE)
    while True:
        pid = os.fork()
        if pid == 0:
            os._exit(_fork(asked))
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == OVER:
            return


def _fork(asked: dict[str, Judge]) -> int:
    """Shut every door, then answer; returns the exit code."""
    lines, replies = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.close(nothing)
    signal.signal(signal.SIGVTALRM, _ring)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    shut_doors()
    try:
        return _answer(asked, lines, replies)
    except BrokenPipeError:
        return OVER
    except ValueError:
        return BROKEN


def _answer(asked: dict[str, Judge], lines: IO[str], replies: IO[str]) -> int:
    _say(replies, {"ready": os.getpid()})
    answered = 0
    while answered < PAIRS_A_FORK:
        line = lines.readline()
        if not line:
            return OVER
        message = json.loads(line)
        for candidate, reference in message["pairs"]:
            _say(replies, [message["id"], _judge(asked[message["judge"]], candidate, reference)])
            answered += 1
        _say(replies, [message["id"], "stay" if answered < PAIRS_A_FORK else "leave"])
    return RETIRE


def _say(replies: IO[str], what: object) -> None:
    print(json.dumps(what), file=replies, flush=True)


_rung = False


def _ring(number: int, frame: FrameType | None) -> None:
    global _rung
    _rung = True
    raise OutOfTimeError


def _judge(judge: Judge, candidate: str, reference: str) -> bool | None:
    """The verdict, or none if time or memory ran out, whatever the library made of that."""
    global _rung
    _rung = False
    verdict: bool | None = None
    try:
        signal.setitimer(signal.ITIMER_PROF, KILL_SECONDS)
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS, REPEAT_SECONDS)
        verdict = bool(judge(candidate, reference))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
    except (OutOfTimeError, MemoryError):
        verdict = None
    except BaseException:  # a text that a library chokes on equals nothing
        verdict = False
    finally:
        _silence()
    return None if _rung else verdict


def _silence() -> None:
    """Stop both alarms, even if the first rings once more on the way."""
    signal.setitimer(signal.ITIMER_PROF, 0.0)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
    except OutOfTimeError:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)


def shut_doors() -> None:
    """From here on: no new file but those of the libraries, no socket, no process, bounded memory, for good."""
    limits = {"CORE": 0, "FSIZE": 0, "NOFILE": DESCRIPTORS, "AS": MEMORY_BYTES}
    for name, most in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        try:
            resource.setrlimit(number, (most, most) if hard == resource.RLIM_INFINITY else (min(most, hard),) * 2)
        except (ValueError, OSError):  # macOS knows no limit of memory; the parent's deadline holds
            if name != "AS":
                raise
    sys.addaudithook(_refuse)


_LIBRARIES = tuple(
    os.path.realpath(path) + os.sep
    for path in {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {*site.getsitepackages(), site.getusersitepackages()}
)


def _refuse(event: str, details: tuple[Any, ...]) -> None:
    if event in ("open", "os.listdir"):
        path = details[0]
        flags = details[2] if event == "open" else 0
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        if isinstance(path, str) and not writes and (os.path.realpath(path) + os.sep).startswith(_LIBRARIES):
            return
    elif event in _ALLOWED:
        return
    raise PermissionError(f"{event} is refused here")


if __name__ == "__main__":
    main()
