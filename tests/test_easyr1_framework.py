"""Our schema, our settings and our cluster's preflight against EasyR1 itself and a real Ray."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from cpt_rft.engines.easyr1 import native
from cpt_rft.engines.easyr1.cluster import free_nodes
from cpt_rft.engines.easyr1.rules import check, flattened, schema
from cpt_rft.engines.environment import environment_variables
from cpt_rft.errors import ConfigError
from tests.helpers.easyr1 import environment
from tests.helpers.easyr1_settings import SPEC, engine, grpo, make_files
from tests.helpers.tree import ROOT

Json = dict[str, Any]
pytestmark = pytest.mark.full
# Prints every key that a user may set with its default, and what the framework makes of each file: its whole
# configuration, or the name of the error that refuses it.
ASK = """
import dataclasses, json, sys
from pathlib import Path
from cpt_rft.engines.easyr1.stand_in import stand_in
stand_in()
from verl.trainer.config import PPOConfig
from cpt_rft.engines.easyr1.entry import read_config
def walk(value, above):
    for field in dataclasses.fields(value):
        inner, key = getattr(value, field.name), f"{above}{field.name}"
        if dataclasses.is_dataclass(inner):
            yield from walk(inner, f"{key}.")
        elif field.init:
            yield key, inner
found = []
for name in sys.argv[1:]:
    try:
        found.append(read_config(Path(name)).to_dict())
    except Exception as error:
        found.append(type(error).__name__)
print()
print(json.dumps({"keys": dict(walk(PPOConfig(), "")), "found": found}))
"""
# Holds one of four GPUs and two of six CPUs of a cluster of its own until its input ends.
CLUSTER = """
import sys, ray
context = ray.init(address="local", num_gpus=4, num_cpus=6, include_dashboard=False, log_to_driver=False)
@ray.remote(num_gpus=1, num_cpus=2)
class Other:
    def here(self):
        return True
other = Other.remote()
ray.get(other.here.remote())
print("at", context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


RIGHT = [
    (engine(), grpo()),
    (engine(nodes=2, ray_address="auto", offload=True, top_p=0.99), grpo(advantage="remax", kl_coef=0.0)),
    (engine(param_dtype="bfloat16", optimizer="adamw_bf16"), grpo(loss="gspo", kl_in="reward", style="direct")),
    (engine(device="cpu", dtype="float32", processes=1), grpo(advantage="rloo", schedule="cosine", group=2)),
]
WRONG = [
    ("worker.rollout.temprature", 1.0),
    ("data.rollout_batch_size", "abc"),
    ("data.rollout_batch_size", 1.5),
    ("data.shuffle", "maybe"),
    ("trainer.logger", "console"),
    ("data.max_prompt_length", None),
]


@dataclass(frozen=True)
class Asked:
    """What was told, and what the framework says of it.

    Attributes:
        keys: The framework's keys that a user may set, with their defaults.
        told: Settings that should be taken, then those that should not.
        found: What it makes of each.
    """

    keys: Json
    told: list[Json]
    found: list[Any]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    place = tmp_path_factory.mktemp("easyr1")
    files = make_files(place)
    told = [native.settings(*case, files, SPEC, 7) for case in RIGHT]
    told += [native.nested({**dict(flattened(told[0])), key: value}) for key, value in WRONG]
    names = []
    for number, keys in enumerate(told):
        (place / str(number)).mkdir()
        native.write_native(place / str(number), keys, {}, engine(), environment())
        names.append(str(place / str(number) / native.YAML))
    variables = environment_variables(environment()) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [str(environment() / "bin" / "python"), "-c", ASK, *names]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    return Asked(answer["keys"], told, answer["found"])


def test_the_schema_is_that_of_the_pinned_framework(asked):
    assert {key: entry["default"] for key, entry in schema().items()} == asked.keys


def test_the_framework_takes_every_value_as_it_was_told(asked):
    for keys, taken in zip(asked.told[: len(RIGHT)], asked.found, strict=False):
        check(keys)
        wanted, seen = dict(flattened(keys)), dict(flattened(taken))
        function = wanted.pop("worker.reward.reward_function")
        assert function == f"{seen['worker.reward.reward_function']}:{seen['worker.reward.reward_function_name']}"
        assert {key: seen[key] for key in wanted} == wanted


def test_what_the_framework_refuses_to_read_is_refused_before(asked):
    for keys, taken in zip(asked.told[len(RIGHT) :], asked.found[len(RIGHT) :], strict=True):
        assert isinstance(taken, str)
        with pytest.raises(ConfigError, match="EasyR1"):
            check(keys)


def test_a_real_cluster_is_asked_what_is_free(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    variables = environment_variables(environment()) | {"OMP_NUM_THREADS": "1"}
    variables.pop("RAY_ADDRESS", None)
    command = [str(environment() / "bin" / "python"), "-c", CLUSTER]
    with subprocess.Popen(command, env=variables, stdin=-1, stdout=-1, stderr=sys.stderr, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            address = next(line for line in process.stdout if line.startswith("at ")).split()[1]
            free = free_nodes(environment(), address)
        finally:
            process.stdin.close()
    assert free is not None and [(node.gpus, node.cpus) for node in free] == [(3, 4)]
