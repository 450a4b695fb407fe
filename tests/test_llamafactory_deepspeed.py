"""Our DeepSpeed files: LLaMA-Factory trains under ZeRO-2 and ZeRO-3, and DeepSpeed itself takes that for offload."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from cpt_rft.config.engine import DeepSpeed
from cpt_rft.engines.llamafactory.native import DEEPSPEED_FILES
from cpt_rft.engines.llamafactory.watch import check_zero
from tests.helpers.llamafactory import BASE, environment, make_stage, sft
from tests.helpers.tree import ROOT
from tests.test_llamafactory_run import run, weights


@pytest.mark.campaign(name="deepspeed")
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_it_trains_under_our_deepspeed_files(name: DeepSpeed, tmp_path: Path) -> None:
    """By the framework itself, two processes, the version of the lock. About 40 seconds each."""
    stage = make_stage(tmp_path / name, sft(micro_batch=2), processes=2, deepspeed=name)
    logs = run(stage)
    log = (stage.directory / "llamafactory" / "framework.log").read_text()
    check_zero(log, name)
    assert len(logs) == 4 and logs[-1].loss < logs[0].loss
    assert not torch.equal(weights(stage.directory / "checkpoint")["lm_head.weight"], weights(BASE)["lm_head.weight"])


@pytest.mark.campaign(name="deepspeed")
def test_deepspeed_takes_our_file_for_offload(tmp_path: Path) -> None:
    """Two processes; the compiler alone takes ten minutes on a busy machine."""
    program = ROOT / "tests/engine_envs/deepspeed_initialize.py"
    command = [str(environment() / "bin/torchrun"), "--standalone", "--nproc_per_node", "2", str(program)]
    variables = {**os.environ, "PATH": f"{environment() / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    # The lock of a build that was killed would be waited for for ever.
    variables["TORCH_EXTENSIONS_DIR"] = str(tmp_path)
    files = [str(DEEPSPEED_FILES / "zero3_offload.json"), str(BASE)]
    done = subprocess.run([*command, *files], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("stage 3 loss") == 2
    check_zero(done.stdout, "zero3_offload")
