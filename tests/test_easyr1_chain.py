"""Whole chains by EasyR1's own trainer with our worker on CPU, and SIGKILL of each of its processes.

About fifteen minutes in all. Skipped where EasyR1 is not checked out or has no environment.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpt_rft.engines import keeper
from cpt_rft.engines.outside import mark_of
from cpt_rft.files import read_json, sha256_file
from tests.helpers.easyr1 import environment
from tests.helpers.llamafactory import own_venv
from tests.helpers.tree import ROOT

pytestmark = pytest.mark.full
TASKS = ("mini_textvqa", "mini_pathvqa")
EXPERIMENT = """
name: easy
base_model: cpt_rft/miniature/base
output: {output}
tasks: [mini_textvqa, mini_pathvqa]
methods:
  grpo: {{max_prompt_tokens: 128}}
  rloo: {{max_prompt_tokens: 128}}
  remax: {{max_prompt_tokens: 128, group: 4}}
  rif_grpo: {{max_prompt_tokens: 128}}
engine: {{name: easyr1, dtype: float32, device: cpu, processes: 1, micro_batch_update: {micro}, save_every: 8}}
data: {{train: 320, dev: 80, test: 80}}
evaluation: {{split: dev, styles: [cot], max_new_tokens: 24, base_samples: 0}}
"""


@pytest.fixture(scope="module", autouse=True)
def made() -> Path:
    return environment()


@pytest.mark.parametrize(("method", "micro"), [("grpo", 128), ("rloo", 128), ("remax", 64), ("rif_grpo", 128)])
def test_a_chain_of_two_tasks_learns_both(method: str, micro: int, tmp_path: Path) -> None:
    """About three minutes each: training, guarded merge, hand-over, canary, evaluation."""
    file = tmp_path / "easy.yaml"
    file.write_text(EXPERIMENT.format(output=tmp_path / "run", micro=micro))
    variables = own_venv(tmp_path)
    for script in (["run_sequence.sh", str(file), method], ["report.sh", str(tmp_path / "run")]):
        command = ["bash", str(ROOT / "scripts" / script[0]), *script[1:]]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    matrix = read_json(tmp_path / "run" / "results.json")["methods"][method]["seeds"]["0"]["matrix"]
    assert matrix[1][0] >= matrix[0][0] + 15 and matrix[2][1] >= matrix[0][1] + 15, matrix
    for number, task in enumerate(TASKS, 1):
        stage = tmp_path / "run" / method / "order0" / "seed0" / f"{number}_{task}"
        lines = [json.loads(line) for line in (stage / "train" / "log.jsonl").read_text().splitlines()]
        kept = read_json(stage / "manifest.json")["provenance"].get("kept")
        rows = kept[0]["tasks"][task]["kept"] if kept else 320
        assert [line["step"] for line in lines] == list(range(1, -(-rows // 16) + 1))
        assert bool(kept) == (method == "rif_grpo")
        start, end = lines[:4], lines[-4:]
        assert sum(line["reward"] for line in end) > sum(line["reward"] for line in start)
        left = {path.name for path in (stage / "easyr1").iterdir()}
        assert {"train.yaml", "fixes.json", "train.sh", "data", "logs", "framework.log"} <= left and "out" not in left
        samples = (stage / "easyr1" / "logs" / "1" / "rewards.jsonl").read_text().splitlines()
        group = 5 if method == "remax" else 8  # with the greedy completion
        assert len(samples) == len(lines) * 16 * group


ROLLOUTS = 9
DRIVER = """
import sys
from pathlib import Path
from cpt_rft.config.engine import parse_engine
from cpt_rft.config.methods import GrpoMethod
from cpt_rft.data.parquet import write_split
from cpt_rft.engines.base import Stage, get_engine
from cpt_rft.errors import UserError
from cpt_rft.miniature.world import make_rows
from tests.helpers.llamafactory import BASE
place = Path(sys.argv[1])
place.mkdir(parents=True, exist_ok=True)
data = place.parent / "rows.parquet"
if not data.exists():
    write_split(data, make_rows("mini_gqa", "train", 36, 0))
method = GrpoMethod(kind="grpo", name="grpo", style="direct", lr=1e-4, prompts_per_step=4, micro_batch=4, group=4,
                    max_new_tokens=6, max_prompt_tokens=128)
engine = {"name": "easyr1", "dtype": "float32", "device": "cpu", "processes": 1, "save_every": 2}
stage = Stage(place, BASE, BASE, ("mini_gqa",), (data,), method, parse_engine(engine), "miniature", 0, ("kill",))
try:
    get_engine(stage.engine).train(stage, lambda line: None)
except UserError as error:
    sys.exit(f"error: {error}")
"""


def start(place: Path) -> "subprocess.Popen[str]":
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(place)], env=variables, stderr=subprocess.PIPE, text=True
    )


def finish(place: Path) -> tuple[int, str]:
    driver = start(place)
    _, error = driver.communicate(timeout=900)
    return driver.returncode, error


def find(directory: Path, name: str) -> list[int]:
    """The processes of a stage whose command line has a name, by which Ray calls its actors."""
    return [
        process
        for process in keeper.marked(mark_of(directory))
        if name in Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a run without a stop."""
    place = tmp_path_factory.mktemp("whole") / "stage"
    assert finish(place) == (0, "")
    return sha256_file(place / "checkpoint" / "model.safetensors")


@pytest.mark.parametrize("victim", ["driver", "ray::Runner", "ray::WorkerDict", "raylet"])
def test_whoever_is_killed_the_next_start_goes_on_and_ends_with_the_same_bits(
    victim: str, whole: str, tmp_path: Path
) -> None:
    """About two minutes each."""
    place = tmp_path / "stage"
    directory = place / "easyr1"
    log = place / "train" / "log.jsonl"
    dice = random.Random(victim)
    driver = start(place)
    wanted = dice.randint(3, 6)
    while driver.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < wanted):
        time.sleep(0.01)
    time.sleep(dice.uniform(0, 0.5))
    for process in [driver.pid] if victim == "driver" else find(directory, victim):
        os.kill(process, signal.SIGKILL)
    _, error = driver.communicate(timeout=900)
    assert driver.returncode, "it was over before it was killed"
    assert victim == "driver" or error.startswith("error: EasyR1 "), error
    deadline = time.monotonic() + 30
    while keeper.marked(mark_of(directory)):
        assert time.monotonic() < deadline, "the framework outlives its driver"
        time.sleep(0.05)
    assert finish(place) == (0, "")
    assert sha256_file(place / "checkpoint" / "model.safetensors") == whole
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, ROLLOUTS + 1))
    starts = sorted(path.name for path in (directory / "logs").iterdir())
    assert starts == ["1", "2"]
    first = (directory / "logs" / "1" / "experiment_log.jsonl").read_text().splitlines()
    second = (directory / "logs" / "2" / "experiment_log.jsonl").read_text().splitlines()
    assert json.loads(second[0])["step"] > 1, "it began anew"
    assert len(first) >= wanted
