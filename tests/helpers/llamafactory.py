"""LLaMA-Factory's environment for the full tests, and stages for its engine."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from cpt_rft.config.engine import parse_engine
from cpt_rft.config.methods import SftMethod
from cpt_rft.data.parquet import write_split
from cpt_rft.engines.base import Stage
from cpt_rft.engines.environment import find_environment
from cpt_rft.miniature.world import make_rows
from tests.helpers.tree import ROOT

TASK = "mini_gqa"
BASE = ROOT / "cpt_rft" / "miniature" / "base"


@cache
def environment() -> Path:
    """The environment, made by the script that users call, then given what a machine without CUDA lacks."""
    subprocess.run(["bash", str(ROOT / "scripts/setup_llamafactory.sh")], check=True, capture_output=True)
    path = find_environment("llamafactory", None)
    if not (path / "repaired").exists():
        shims = ROOT / "tests/engine_envs/install_cpu_shims.py"
        subprocess.run([str(path / "bin/python"), str(shims)], check=True, capture_output=True)
        (path / "repaired").touch()
    return path


def whole_gathers(folder: Path) -> Path:
    """The environment by another name, in which DeepSpeed's ZeRO-3 is sound on CPU (engine_envs/whole_gathers)."""
    real, shim = environment() / "bin", ROOT / "tests/engine_envs/whole_gathers"
    (folder / "bin").mkdir(parents=True)
    for name in ("python", "llamafactory-cli"):
        program = folder / "bin" / name
        program.write_text(
            f'#!/bin/sh\nexport PATH="{real}:$PATH" PYTHONPATH="{shim}"\nexec "{real / name}" "$@"\n', encoding="utf-8"
        )
        program.chmod(0o755)
    return folder


def sft(**changes: Any) -> SftMethod:
    """A short supervised method."""
    settings = {"kind": "sft", "name": "sft", "style": "direct", "lr": 1e-4, "prompts_per_step": 4, "micro_batch": 4}
    return SftMethod(**{**settings, **changes})


def make_stage(directory: Path, method: SftMethod, *, rows: int = 16, parent: Path = BASE, **engine: Any) -> Stage:
    """A stage on one task of the miniature; ``engine`` changes the engine, llamafactory on CPU unless it names one."""
    directory.mkdir(parents=True, exist_ok=True)
    data = directory.parent / f"{directory.name}.parquet"
    write_split(data, make_rows(TASK, "train", rows, 0))
    alone = {"processes": 1} if engine.get("name", "llamafactory") == "llamafactory" else {}
    settings = {"name": "llamafactory", "dtype": "float32", "device": "cpu", **alone, **engine}
    return Stage(
        directory=directory,
        parent=parent,
        base=BASE,
        tasks=(TASK,),
        data=(data,),
        method=method,
        engine=parse_engine(settings),
        prompt_preset="miniature",
        seed=0,
        seed_path=("test", method.name, 0, TASK),
    )


def own_venv(folder: Path) -> dict[str, str]:
    """Variables under which the run scripts use this very interpreter as their environment, already set up."""
    venv = folder / "venv"
    (venv / "bin").mkdir(parents=True)
    for name, words in (("python", ""), ("cpt-rft", "-m cpt_rft.cli ")):
        program = venv / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
        program.chmod(0o755)
    text = f"{ROOT} local\n".encode() + (ROOT / "pyproject.toml").read_bytes()
    stamp = subprocess.run(["cksum"], input=text, capture_output=True, check=True).stdout
    (venv / "cpt-rft-local.stamp").write_bytes(stamp)
    return {**os.environ, "CPT_RFT_VENV": str(venv), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
