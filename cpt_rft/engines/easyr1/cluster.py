"""Whether a Ray cluster has what EasyR1 will ask it for, found out before it is asked.

The framework asks for one placement group a node (all of a node's workers together, a GPU and a CPU each), one CPU for
its runner and one for each of its two reward actors. With too few GPUs it fails after the processor and the data are
loaded; with too few CPUs it waits for ever, without a word.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cpt_rft.config.engine import EasyR1Config
from cpt_rft.engines.easyr1.native import REWARD_CPUS
from cpt_rft.engines.environment import environment_variables
from cpt_rft.errors import StageError

TIMEOUT_S = 60.0
_NO_CLUSTER = 3
_TOKEN = "InvalidAuthToken"
_TOKEN_FIX = "export RAY_AUTH_MODE=token, with the same ~/.ray/auth_token on all machines (docs/easyr1.md)"
# Runs in EasyR1's environment; what is free is known to Ray's own state only, as the framework reads it too.
_ASK = f"""
import json, sys
import ray
try:
    ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
except ConnectionError as error:
    print(error, file=sys.stderr)
    sys.exit({_NO_CLUSTER})
from ray._private import state
free = state.available_resources_per_node()
nodes = [(node["NodeManagerAddress"], free.get(node["NodeID"], {{}})) for node in ray.nodes() if node["Alive"]]
print("\\n" + json.dumps([[name, has.get("GPU", 0), has.get("CPU", 0)] for name, has in nodes]))
"""


@dataclass(frozen=True)
class Node:
    """What is free on a machine of a cluster.

    Attributes:
        address: Its name.
        gpus: GPUs that no other job has.
        cpus: The same of CPUs, as Ray counts them.
    """

    address: str
    gpus: float
    cpus: float


@dataclass(frozen=True)
class Demand:
    """What the framework will ask for.

    Attributes:
        nodes: Machines with workers.
        workers: GPUs, and CPUs, on each of them.
        others: CPUs of the runner and of the reward actors, which Ray may put on any machine.
    """

    nodes: int
    workers: int
    others: int

    @classmethod
    def of(cls, engine: EasyR1Config) -> "Demand":
        """Of an engine whose ``auto`` is resolved."""
        assert engine.processes != "auto"
        return cls(engine.nodes, engine.processes, 1 + 2 * REWARD_CPUS)

    @property
    def cpus(self) -> int:
        """CPUs in all."""
        return self.nodes * self.workers + self.others


def check_cluster(engine: EasyR1Config, environment: Path) -> str:
    """Refuse a cluster, or this machine, that lacks what will be asked for; returns what there is, in words.

    Args:
        engine: How to compute, ``auto`` resolved.
        environment: EasyR1's environment, whose Ray is asked.

    Raises:
        StageError: There is no cluster where there should be one, it does not answer, or it has too little.
    """
    if engine.device == "cpu":
        return "a Ray of its own, with as many CPUs as will be asked for"
    nodes = free_nodes(environment, engine.ray_address)
    if nodes is None:
        nodes = [this_machine()]
    text = "; ".join(f"{node.address}: {node.gpus:g} GPUs and {node.cpus:g} CPUs free" for node in nodes)
    lacking = shortage(nodes, Demand.of(engine))
    if lacking:
        raise StageError(f"EasyR1 {lacking}; there are {text}.", _FIX)
    return text


_FIX = (
    "start Ray on more machines, or with more CPUs (ray start --num-cpus=N; of a Slurm job: --cpus-per-task),"
    " wait until other jobs have ended, or ask for less by nodes and processes of the engine"
)


def shortage(nodes: Sequence[Node], demand: Demand) -> str | None:
    """What the framework would wait or fail for; none if it can start whatever Ray puts where.

    >>> shortage([Node("a", 8, 11)], Demand(1, 8, 3))
    >>> shortage([Node("a", 8, 10)], Demand(1, 8, 3))
    'asks for 11 CPUs on each of 1 machines with 8 GPUs (8 for workers, 3 that may land on any), and 0 have them'
    """
    with_gpus = [node for node in nodes if node.gpus >= demand.workers]
    if len(with_gpus) < demand.nodes:
        return f"asks for {demand.nodes} machines with {demand.workers} GPUs each, and {len(with_gpus)} have them"
    needed = demand.workers + demand.others
    whole = [node for node in with_gpus if node.cpus >= needed]
    if len(whole) < demand.nodes:
        return (
            f"asks for {needed} CPUs on each of {demand.nodes} machines with {demand.workers} GPUs"
            f" ({demand.workers} for workers, {demand.others} that may land on any), and {len(whole)} have them"
        )
    return None


def this_machine() -> Node:
    """What a Ray of its own would find here."""
    import torch

    return Node("this machine", torch.cuda.device_count(), os.cpu_count() or 1)


def free_nodes(environment: Path, address: str | None, timeout_s: float = TIMEOUT_S) -> list[Node] | None:
    """What is free on every machine of a running cluster.

    Args:
        environment: EasyR1's environment.
        address: Of the cluster; none for one that runs on this machine or that RAY_ADDRESS names, if there is any.
        timeout_s: Time to answer.

    Returns:
        None where no cluster runs and none has to.

    Raises:
        StageError: There is no cluster at the address, it does not answer in time, or Ray fails.
    """
    command = [str(environment / "bin" / "python"), "-I", "-c", _ASK, address or "auto"]
    named = address or os.environ.get("RAY_ADDRESS") or "auto"
    status = "look with 'ray status' on this machine; start it with 'ray start --head', then --address on the others"
    try:
        done = subprocess.run(
            command, env=environment_variables(environment), capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise StageError(f"The Ray cluster at {named} did not answer in {timeout_s:g} s.", status) from None
    if _TOKEN in done.stderr:
        raise StageError(f"The Ray cluster at {named} wants a token.", _TOKEN_FIX)
    if done.returncode == _NO_CLUSTER:
        if address is None and "RAY_ADDRESS" not in os.environ:
            return None
        raise StageError(f"No Ray cluster runs at {named}.", status)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise StageError(f"Ray in {environment} failed: {last}.", "bash scripts/setup_easyr1.sh, or mend the cluster")
    return [Node(name, gpus, cpus) for name, gpus, cpus in json.loads(done.stdout.strip().splitlines()[-1])]
