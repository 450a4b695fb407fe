"""Our DeepSpeed files: LLaMA-Factory trains under ZeRO-2 and ZeRO-3, and DeepSpeed itself takes that for offload."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cpt_rft.config.engine import DeepSpeed
from cpt_rft.engines.environment import DEEPSPEED_FILES
from cpt_rft.engines.llamafactory.watch import check_zero
from tests.helpers.llamafactory import BASE, environment, make_stage, sft, whole_gathers
from tests.helpers.tree import ROOT
from tests.test_llamafactory_run import apart, run, weights

GATHERS = 40


@pytest.fixture(scope="module", autouse=True)
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One place for what DeepSpeed compiles: the lock of a build that was killed would be waited for for ever."""
    with pytest.MonkeyPatch.context() as patch:
        place = os.environ.get("TORCH_EXTENSIONS_DIR") or str(tmp_path_factory.mktemp("extensions"))
        patch.setenv("TORCH_EXTENSIONS_DIR", place)
        yield


def by_two(program: str, *arguments: object, **variables: str) -> str:
    """What a program of ``tests/engine_envs`` prints, run by two processes."""
    place = environment() / "bin"
    command = [str(place / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/engine_envs" / program), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{place}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **variables},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@contextmanager
def others_at_work() -> Iterator[None]:
    """Every core has something else to do, so that processes wait for each other."""
    others = [subprocess.Popen([sys.executable, "-I", "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of two processes without DeepSpeed."""
    stage = make_stage(tmp_path_factory.mktemp("plain") / "stage", sft(micro_batch=2), processes=2)
    return [line.loss or 0.0 for line in run(stage)], weights(stage.directory / "checkpoint")


@pytest.mark.campaign(name="deepspeed")
@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_it_trains_under_our_deepspeed_files(
    name: DeepSpeed,
    tmp_path: Path,
    plain: tuple[list[float], dict[str, torch.Tensor]],
    record_property: Callable[[str, object], None],
) -> None:
    """By the framework itself, two processes, the version of the lock: as two without it. A minute or two each."""
    place = str(whole_gathers(tmp_path / "environment")) if name != "zero2" else None
    stage = make_stage(tmp_path / name, sft(micro_batch=2), processes=2, deepspeed=name, environment=place)
    logs = run(stage)
    log = (stage.directory / "llamafactory" / "framework.log").read_text()
    check_zero(log, name)
    assert [line.loss for line in logs] == pytest.approx(plain[0], abs=1e-4)
    gap = apart(weights(stage.directory / "checkpoint"), plain[1], weights(BASE))
    record_property("gap of the weights", f"{gap:.1e}")
    assert gap <= 1e-3


@pytest.mark.campaign(name="deepspeed_gathers")
def test_without_gpus_gathered_weights_are_whole_only_if_all_are_waited_for(
    record_property: Callable[[str, object], None],
) -> None:
    """Why ZeRO-3 on CPU is refused, and what stands in for a later DeepSpeed in these tests; about three minutes."""
    wrong = {}
    for how, shim in (("as released", ""), ("all waited for", str(ROOT / "tests/engine_envs/whole_gathers"))):
        with others_at_work():
            said = by_two("deepspeed_gather.py", DEEPSPEED_FILES / "zero3.json", BASE, GATHERS, PYTHONPATH=shim)
        (wrong[how],) = map(int, re.findall(r"wrong gathers: (\d+) of", said))
        record_property(f"wrong gathers of {GATHERS}, {how}", wrong[how])
    assert wrong["all waited for"] == 0


@pytest.mark.campaign(name="deepspeed")
def test_deepspeed_takes_our_file_for_offload() -> None:
    """Two processes, and three minutes of a compiler unless TORCH_EXTENSIONS_DIR names a place that has its work."""
    said = by_two("deepspeed_initialize.py", DEEPSPEED_FILES / "zero3_offload.json", BASE)
    assert said.count("stage 3 loss") == 2
    check_zero(said, "zero3_offload")
