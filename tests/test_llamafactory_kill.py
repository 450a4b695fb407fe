"""SIGKILL of the driver and of the trainer at random moments: the next start ends with the same weights."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cpt_rft.engines import keeper
from cpt_rft.engines.llamafactory.native import OUT
from cpt_rft.engines.outside import mark_of
from cpt_rft.files import sha256_file
from tests.helpers.llamafactory import environment
from tests.helpers.tree import ROOT

STEPS = 24
DRIVER = f"""
import sys
from pathlib import Path
from cpt_rft.engines.base import get_engine
from cpt_rft.errors import UserError
from tests.helpers.llamafactory import make_stage, sft
stage = make_stage(Path(sys.argv[1]), sft(), rows={4 * STEPS}, save_every=3)
try:
    get_engine(stage.engine).train(stage, lambda line: None)
except UserError as error:
    sys.exit(f"error: {{error}}")
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a run without a stop."""
    environment()
    place = tmp_path_factory.mktemp("whole") / "stage"
    assert finish(place) == (0, "")
    return sha256_file(place / "checkpoint" / "model.safetensors")


def kill_somewhere(place: Path, dice: random.Random, trainer: bool) -> bool:
    """Start, and kill the driver or a process of the framework at a random moment; returns whether one was hit."""
    directory = place / "llamafactory"
    driver = start(place)
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


def check_kills(tmp_path: Path, whole: str, seeds: range) -> None:
    hits = 0
    for seed in seeds:
        place = tmp_path / str(seed) / "stage"
        hits += kill_somewhere(place, random.Random(seed), trainer=seed % 2 == 1)
        assert finish(place) == (0, "")
        assert sha256_file(place / "checkpoint" / "model.safetensors") == whole, seed
        assert len((place / "train" / "log.jsonl").read_text().splitlines()) == STEPS
        assert not (place / "llamafactory" / OUT).exists()
    assert hits > len(seeds) // 2


@pytest.mark.campaign(name="kill_llamafactory_3")
def test_three_kills(tmp_path: Path, whole: str) -> None:
    """About 80 seconds. Red when last run: see docs/llamafactory.md."""
    check_kills(tmp_path, whole, range(3))


@pytest.mark.campaign(name="kill_llamafactory")
def test_twenty_kills(tmp_path: Path, whole: str) -> None:
    check_kills(tmp_path, whole, range(20))
