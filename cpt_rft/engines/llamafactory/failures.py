"""The framework's known failures, each as one clear line with what to do about it."""

import re
import shutil
from pathlib import Path

from cpt_rft.errors import StageError, TrainingError, UserError

_TAIL = 400_000
# (what it prints, what that means, what to do). The first that is found anywhere in the output decides.
_KNOWN: tuple[tuple[str, str, str], ...] = (
    (
        r"CUDA out of memory|torch\.OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED",
        "a GPU ran out of memory",
        "use engine.deepspeed=zero3 or zero3_offload, a smaller method.micro_batch or engine.max_pixels",
    ),
    (
        r"DefaultCPUAllocator: (can't|not enough)|Cannot allocate memory|MemoryError",
        "the machine ran out of memory",
        "use fewer processes, or a smaller method.micro_batch",
    ),
    (
        r"Image features and image tokens do not match",
        "picture tokens were cut from a row",
        "raise engine.cutoff_len or lower engine.max_pixels",
    ),
    (
        r"Processor was not found|Failed to load processor",
        "the image processor of the checkpoint does not load in the framework's environment",
        "see the log for the true cause, often torchvision; make the environment anew with"
        " 'bash scripts/setup_llamafactory.sh'",
    ),
    (
        r"image file is truncated|cannot identify image file",
        "a picture of the stage's data was changed after it was checked",
        "delete the stage's .partial directory and give the same command again",
    ),
    (
        r"Template \S+ does not exist|does not support image input",
        "the framework does not know the chat template",
        "write 'template: qwen2_vl' into the YAML",
    ),
    (
        r"Some keys are not used by the HfArgumentParser: (.*)",
        "this LLaMA-Factory does not know a key of the YAML",
        "install the release that the lock names: 'bash scripts/setup_llamafactory.sh'",
    ),
    (
        r"ImportError: (\S+) is required|PackageNotFoundError: (.*)|ModuleNotFoundError: (.*)",
        "a package is missing in the framework's environment, or is of another version",
        "make it anew with 'bash scripts/setup_llamafactory.sh'",
    ),
    (
        r"SafetensorError|PytorchStreamReader failed|EOFError: Ran out of input",
        "a weight file is truncated",
        "run 'cpt-rft status --verify' to find which, and make that stage anew",
    ),
    (
        r"EADDRINUSE|Address already in use",
        "the port of the processes is taken",
        "export MASTER_PORT with a free one",
    ),
    (
        r"NCCL (error|timeout)|Watchdog caught collective operation timeout|Connection closed by peer",
        "the processes lost each other",
        "look for the first error in the log of each node; 'cpt-rft doctor' checks shared memory and ports",
    ),
    (
        r"number of devices in the Ray cluster",
        "the Ray cluster has fewer GPUs than processes are asked for",
        "lower engine.processes or engine.nodes, or let more nodes join the cluster",
    ),
)
_FULL = re.compile(
    r"No space left on device|os error 28|Disk quota exceeded|PytorchStreamWriter failed writing|File too large"
    r"|basic_ios::clear: iostream error"
)
_ROOM = 1 << 20  # with less, what the framework had to say may not have fitted into its log


def explain(status: int, output: str, log: Path) -> UserError:
    """What a failed run is to be reported as.

    Args:
        status: Exit status, negative for a signal.
        output: What it has printed.
        log: Where all of it is.
    """
    output = output[-_TAIL:]
    if _FULL.search(output) or shutil.disk_usage(log.parent).free < _ROOM:
        return StageError(
            f"The disk is full: LLaMA-Factory could not write below {log.parent}.",
            "free some space ('cpt-rft plan' prints what a run needs) and give the same command again",
        )
    for pattern, meaning, fix in _KNOWN:
        found = re.search(pattern, output)
        if found is not None:
            return TrainingError(
                f"LLaMA-Factory failed: {meaning} ({_line_of(output, found.start())}).", f"{fix}; log: {log}"
            )
    if status < 0 or re.search(r"Signal 9 \(SIGKILL\)", output):
        return TrainingError(
            f"LLaMA-Factory was killed (signal {-status if status < 0 else 9}).",
            f"if memory ran out, see 'cpt-rft plan'; then give the same command again: it goes on. Log: {log}",
        )
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"^(\[rank\d+\]: )?[\w.]*(Error|Exception)\b.*: ", line)]
    last = (errors or lines or ["it printed nothing"])[-1]
    return TrainingError(f"LLaMA-Factory failed with status {status}: {last[:300]}", f"see {log}")


def _line_of(text: str, place: int) -> str:
    start = text.rfind("\n", 0, place) + 1
    end = text.find("\n", place)
    return text[start : end if end >= 0 else None].strip()[:200]
