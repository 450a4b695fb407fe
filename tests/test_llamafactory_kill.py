"""SIGKILL of the driver and of the trainer at random moments: the next start ends with the same weights."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cpt_rft.engines import keeper
from cpt_rft.engines.llamafactory.native import OUT
from cpt_rft.engines.llamafactory.watch import TRAINER_LOG
from cpt_rft.engines.outside import mark_of
from cpt_rft.files import sha256_file
from tests.helpers.llamafactory import environment, whole_gathers
from tests.helpers.tree import ROOT

STEPS = 24
DRIVER = """
import json, sys
from pathlib import Path
from cpt_rft.engines.base import get_engine
from cpt_rft.errors import UserError
from tests.helpers.llamafactory import make_stage, sft
told = json.loads(sys.argv[2])
stage = make_stage(Path(sys.argv[1]), sft(**told["method"]), rows=4 * told["steps"], save_every=3, **told["engine"])
try:
    get_engine(stage.engine).train(stage, lambda line: None)
except UserError as error:
    sys.exit(f"error: {error}")
"""


@dataclass(frozen=True)
class Kind:
    """What is trained, beside what the helpers say."""

    steps: int = STEPS
    method: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)


def start(place: Path, kind: Kind) -> "subprocess.Popen[str]":
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, str(place), json.dumps(asdict(kind))]
    return subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)


def finish(place: Path, kind: Kind) -> tuple[int, str]:
    driver = start(place, kind)
    _, error = driver.communicate(timeout=900)
    return driver.returncode, error


def resumed_at(place: Path) -> list[int]:
    """The steps after which the framework says that it went on."""
    said = (place / "llamafactory" / "framework.log").read_text(errors="replace")
    return [int(step) for step in re.findall(r"Resuming training from checkpoint with .* global step (\d+)", said)]


def weights(place: Path, kind: Kind) -> str:
    """Train without a stop; returns what the weights are known by."""
    assert finish(place, kind) == (0, "")
    assert not resumed_at(place)
    return sha256_file(place / "checkpoint" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a run without a stop."""
    environment()
    return weights(tmp_path_factory.mktemp("whole") / "stage", Kind())


def kill_somewhere(place: Path, dice: random.Random, trainer: bool) -> bool:
    """Start, and kill the driver or a process of the framework at a random moment; returns whether one was hit."""
    directory = place / "llamafactory"
    driver = start(place, Kind())
    # After loading, at some step, or while the checkpoint is put together.
    wanted = dice.choice([0, *range(2, STEPS, 2), STEPS])
    log = place / "train" / "log.jsonl"
    while driver.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < wanted):
        time.sleep(0.01)
    time.sleep(dice.uniform(0, 1.0))
    victims = keeper.marked(mark_of(directory)) if trainer and directory.exists() else [driver.pid]
    hit = False
    for victim in dice.sample(victims, min(1, len(victims))):
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            hit = True
    _, error = driver.communicate(timeout=900)
    deadline = time.monotonic() + 20
    while keeper.marked(mark_of(directory)):
        assert time.monotonic() < deadline, "the framework outlives its driver"
        time.sleep(0.02)
    if trainer and hit and driver.returncode:
        assert error.startswith("error: LLaMA-Factory was killed (signal 9)."), error
    return hit


def check_one_kill(place: Path, kind: Kind, whole: str) -> None:
    """Kill the framework after a resume point; the next start goes on and ends as a run without a stop."""
    driver = start(place, kind)
    seen = place / "llamafactory" / OUT / TRAINER_LOG
    while not seen.exists() or len(seen.read_text().splitlines()) < 5:
        assert driver.poll() is None
        time.sleep(0.01)
    for victim in keeper.marked(mark_of(place / "llamafactory")):
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    _, error = driver.communicate(timeout=900)
    assert error.startswith("error: LLaMA-Factory was killed (signal 9).")
    assert finish(place, kind) == (0, "")
    assert resumed_at(place) and resumed_at(place)[0] >= 3
    assert sha256_file(place / "checkpoint" / "model.safetensors") == whole


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Kind, str]:
    """A short stage, and the weights of a run without a stop."""
    environment()
    return Kind(steps=12), weights(tmp_path_factory.mktemp("short") / "stage", Kind(steps=12))


@pytest.mark.full
def test_a_disk_that_is_full_while_a_resume_point_is_saved(tmp_path: Path, short: tuple[Kind, str]) -> None:
    """A real disk too small for two resume points, then one with room; about 45 seconds."""
    kind, whole = short
    source, mount = tmp_path / "source", tmp_path / "mount"
    source.mkdir()
    # A resume point of the miniature takes 15 MB, of which its largest file takes 10.
    helper = [sys.executable, "-m", "tests.helpers.small_disk", str(source), str(mount), "24000000:8000000"]
    command = [sys.executable, "-c", DRIVER, str(mount / "stage"), json.dumps(asdict(kind))]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*helper, *command], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["first"]["status"] == 1
    assert re.fullmatch(r"error: The disk is full: .* Fix: free some space .*\n", outcome["first"]["err"])
    assert (outcome["second"]["status"], outcome["second"]["err"]) == (0, "")
    stage = tmp_path / "result" / "stage"
    assert resumed_at(stage) == ([3] if outcome["tmpfs"] else [])  # never from the half of a resume point
    assert sha256_file(stage / "checkpoint" / "model.safetensors") == whole


@pytest.mark.campaign(name="resume_llamafactory")
@pytest.mark.parametrize(
    "kind",
    [
        Kind(12, {"micro_batch": 2, "schedule": "cosine", "warmup_ratio": 0.1}, {"dtype": "bfloat16"}),
        Kind(12, {"micro_batch": 2, "weight_decay": 0.1}, {"processes": 2}),
        Kind(12, {"lr": 1e-3}, {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}),
    ],
    ids=["bfloat16", "two_processes", "adapters_with_dropout"],
)
def test_whatever_is_trained_goes_on_with_the_same_bits(tmp_path: Path, kind: Kind) -> None:
    """Two minutes each."""
    environment()
    check_one_kill(tmp_path / "stage", kind, weights(tmp_path / "whole", kind))


@pytest.mark.campaign(name="resume_deepspeed")
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_under_deepspeed_too(tmp_path: Path, name: str) -> None:
    """Four minutes each."""
    place = str(whole_gathers(tmp_path / "environment")) if name == "zero3" else None
    kind = Kind(12, {"micro_batch": 2}, {"processes": 2, "deepspeed": name, "environment": place})
    environment()
    check_one_kill(tmp_path / "stage", kind, weights(tmp_path / "whole", kind))


def check_kills(tmp_path: Path, whole: str, seeds: range, record_property: Callable[[str, object], None]) -> None:
    hits, resumed = 0, 0
    for seed in seeds:
        place = tmp_path / str(seed) / "stage"
        hits += kill_somewhere(place, random.Random(seed), trainer=seed % 2 == 1)
        assert finish(place, Kind()) == (0, "")
        assert sha256_file(place / "checkpoint" / "model.safetensors") == whole, seed
        assert len((place / "train" / "log.jsonl").read_text().splitlines()) == STEPS
        assert not (place / "llamafactory" / OUT).exists()
        resumed += bool(resumed_at(place))
    record_property("kills", hits)
    record_property("stages that went on from a resume point", resumed)
    assert hits > len(seeds) // 2 and resumed


@pytest.mark.full
def test_three_kills(tmp_path: Path, whole: str, record_property: Callable[[str, object], None]) -> None:
    """About two minutes."""
    check_kills(tmp_path, whole, range(3), record_property)


@pytest.mark.campaign(name="kill_llamafactory")
def test_twenty_kills(tmp_path: Path, whole: str, record_property: Callable[[str, object], None]) -> None:
    check_kills(tmp_path, whole, range(20), record_property)
