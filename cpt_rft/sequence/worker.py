"""A worker: a fresh interpreter that does one job after another and reports in JSON lines.

Standard input brings a job a line, and null for the end. It is also a life line: when the parent ends, however it
ends, the pipe closes and the worker ends too. Standard output carries the reports and nothing else.
"""

import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

from cpt_rft.config.schema import Experiment
from cpt_rft.errors import StageError, UserError
from cpt_rft.files import explain_os_error
from cpt_rft.sequence.job import Emit, Job, do_job, preflight


def main() -> int:
    """Do jobs until there are no more; returns the exit status."""
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    orders: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    while (order := orders.get()) is not None:
        do_order(order, lambda event: _send(reports, event))
    return 0


def do_order(order: dict[str, Any], emit: Emit) -> None:
    """Do one order; whatever happens, the last event tells how it ended."""
    place = Path(order["directory"])
    try:
        if "preflight" in order:
            experiment = Experiment.model_validate_json(json.dumps(order["preflight"]))
            answer = preflight(experiment, Path(order["base"]))
        else:
            do_job(place, Job.from_json(order["job"]), emit)
            answer = {}
    except Exception as error:
        trace = traceback.format_exc()
        user = error if isinstance(error, UserError) else explain_os_error(error, place)
        if user is None:
            emit({"event": "bug", "traceback": trace})
        else:
            # A full disk or a lost directory concerns every worker.
            everyone = isinstance(user, StageError)
            emit({"event": "error", "problem": user.problem, "fix": user.fix, "everyone": everyone, "traceback": trace})
    else:
        emit({"event": "done", "answer": answer})


def _send(stream: TextIO, event: dict[str, Any]) -> None:
    try:
        stream.write(json.dumps(event) + "\n")
        stream.flush()
    except BrokenPipeError:
        os._exit(1)


def _listen(orders: "queue.Queue[dict[str, Any] | None]") -> None:
    # Unbuffered: a thread that waits inside a buffered reader would hold its lock when the interpreter ends.
    with open(0, "rb", buffering=0, closefd=False) as pipe:
        for line in pipe:
            orders.put(json.loads(line))
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
