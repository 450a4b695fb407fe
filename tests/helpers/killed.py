"""A stage that dies in the middle of its training."""

import os
import signal

from cpt_rft.engines.base import Stage, StepLog, get_engine


def train_and_die(stage: Stage, at: int) -> None:
    """Train in a child process that kills itself, without any goodbye, when step ``at`` is reported."""

    def report(log: StepLog) -> None:
        if log.step == at:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            get_engine(stage.engine).train(stage, report)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
