"""Our DeepSpeed file for offload, taken by DeepSpeed itself, which compiles its Adam for the processor first."""

import os
import subprocess
from pathlib import Path

import pytest

from cpt_rft.engines.llamafactory.native import DEEPSPEED_FILES
from cpt_rft.engines.llamafactory.watch import check_zero
from tests.helpers.llamafactory import BASE, environment
from tests.helpers.tree import ROOT


@pytest.mark.campaign(name="deepspeed_offload")
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
