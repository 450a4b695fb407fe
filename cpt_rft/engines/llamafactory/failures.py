"""LLaMA-Factory's known failures, each as one clear line with what to do about it."""

from pathlib import Path

from cpt_rft.engines import failures
from cpt_rft.engines.failures import Known
from cpt_rft.errors import UserError

_KNOWN = (
    Known(
        r"CUDA out of memory|torch\.OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED",
        "a GPU ran out of memory",
        "use engine.deepspeed=zero3 or zero3_offload, a smaller method.micro_batch or engine.max_pixels",
    ),
    Known(
        r"DefaultCPUAllocator: (can't|not enough)|Cannot allocate memory|MemoryError",
        "the machine ran out of memory",
        "use fewer processes, or a smaller method.micro_batch",
    ),
    Known(
        r"Image features and image tokens do not match",
        "picture tokens were cut from a row",
        "raise engine.cutoff_len or lower engine.max_pixels",
    ),
    Known(
        r"Processor was not found|Failed to load processor",
        "the image processor of the checkpoint does not load in the framework's environment",
        "see the log for the true cause, often torchvision; make the environment anew with"
        " 'bash scripts/setup_llamafactory.sh'",
    ),
    Known(
        r"image file is truncated|cannot identify image file",
        "a picture of the stage's data was changed after it was checked",
        "delete the stage's .partial directory and give the same command again",
    ),
    Known(
        r"Template \S+ does not exist|does not support image input",
        "the framework does not know the chat template",
        "write 'template: qwen2_vl' into the YAML",
    ),
    Known(
        r"Some keys are not used by the HfArgumentParser: (.*)",
        "this LLaMA-Factory does not know a key of the YAML",
        "install the release that the lock names: 'bash scripts/setup_llamafactory.sh'",
    ),
    Known(
        r"ImportError: (\S+) is required|PackageNotFoundError: (.*)|ModuleNotFoundError: (.*)",
        "a package is missing in the framework's environment, or is of another version",
        "make it anew with 'bash scripts/setup_llamafactory.sh'",
    ),
    Known(
        r"SafetensorError|PytorchStreamReader failed|EOFError: Ran out of input",
        "a weight file is truncated",
        "run 'cpt-rft status --verify' to find which, and make that stage anew",
    ),
    Known(
        r"EADDRINUSE|Address already in use",
        "the port of the processes is taken",
        "export MASTER_PORT with a free one",
    ),
    Known(
        r"NCCL (error|timeout)|Watchdog caught collective operation timeout|Connection closed by peer",
        "the processes lost each other",
        "look for the first error in the log of each node; 'cpt-rft doctor' checks shared memory and ports",
    ),
    Known(
        r"number of devices in the Ray cluster",
        "the Ray cluster has fewer GPUs than processes are asked for",
        "lower engine.processes or engine.nodes, or let more nodes join the cluster",
    ),
)


def explain(status: int, output: str, log: Path) -> UserError:
    """See `cpt_rft.engines.failures.explain`."""
    return failures.explain("LLaMA-Factory", _KNOWN, status, output, log)
