"""EasyR1's known failures, each as one clear line with what to do about it."""

from pathlib import Path

from cpt_rft.engines import failures
from cpt_rft.engines.failures import Known
from cpt_rft.errors import UserError

_KNOWN = (
    Known(
        r"CUDA out of memory|torch\.OutOfMemoryError|cumem_allocator",
        "a GPU ran out of memory",
        "lower engine.gpu_memory_utilization, micro_batch_update or max_pixels, or set engine.offload=true",
    ),
    Known(
        r"OutOfMemoryError: Task was killed due to the node running low on memory|ray\.exceptions\.OutOfMemoryError",
        "Ray ended a worker because the machine ran low on memory",
        "use a machine with more memory, or engine.offload=false; 'cpt-rft plan' prints what a run needs",
    ),
    Known(
        r"[Ii]mage features and image tokens do not match|features and tokens do not match",
        "picture tokens were cut from a prompt",
        "delete the stage's .partial directory and give the same command again",
    ),
    Known(
        r"No sample is kept after filtering",
        "its online filtering kept no row",
        "leave algorithm.online_filtering off; filter beforehand by 'cpt-rft filter'",
    ),
    Known(
        r"Total available GPUs .* is less than total desired GPUs",
        "the Ray cluster has fewer GPUs than workers are asked for",
        "lower engine.processes or engine.nodes, or let more nodes join the cluster; see 'cpt-rft doctor'",
    ),
    Known(
        r"Could not find any running Ray instance|Failed to connect to Ray cluster|ConnectionError: Ray",
        "the Ray cluster does not answer",
        "start it (docs/easyr1.md, several nodes), or set engine.ray_address=null for one of this machine alone",
    ),
    Known(
        r"ModuleNotFoundError: (.*)|PackageNotFoundError: (.*)|ImportError: (.*)",
        "a package is missing in the framework's environment, or is of another version",
        "make it anew with 'bash scripts/setup_easyr1.sh'",
    ),
    Known(
        r"ConfigKeyError|TupleConfig length",
        "this EasyR1, or its omegaconf, does not take the YAML",
        "use the pinned ones: 'bash scripts/setup_easyr1.sh'",
    ),
    Known(
        r"PytorchStreamReader failed|EOFError: Ran out of input|SafetensorError",
        "a weight file is truncated",
        "give the same command again: it goes on from the newest whole checkpoint",
    ),
    Known(
        r"NCCL (error|timeout)|Watchdog caught collective operation timeout",
        "the workers lost each other",
        "look for the first error in the log of each node; export NCCL_SOCKET_IFNAME with the network between them",
    ),
    Known(
        r"RayActorError|ActorDiedError|WorkerCrashedError|The actor (is dead|died)",
        "a worker of Ray died",
        "look for its last words in the log, above; then give the same command again: it goes on",
    ),
)


def explain(status: int, output: str, log: Path) -> UserError:
    """See `cpt_rft.engines.failures.explain`."""
    return failures.explain("EasyR1", _KNOWN, status, output, log)
