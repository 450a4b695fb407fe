"""EasyR1's environment for the full tests, and stages of the miniature for it, written by hand."""

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from cpt_rft.data.export import _easyr1_table
from cpt_rft.engines.environment import environment_variables, find_environment
from cpt_rft.errors import ConfigError
from cpt_rft.miniature.world import make_rows
from cpt_rft.prompts import PRESETS
from tests.helpers.tree import ROOT

BASE = ROOT / "cpt_rft" / "miniature" / "base"
REWARD = """
import json
from cpt_rft.scoring import reward, score

def compute_score(reward_inputs):
    found = []
    for each in reward_inputs:
        truth = json.loads(each["ground_truth"])
        told = {key: truth[key] for key in ("answer", "references", "kind")}
        mark = score(each["response"], **told, style="direct")
        found.append({"overall": reward(mark, "direct"), "accuracy": mark.strict, "format": mark.format})
    return found
"""


@cache
def environment() -> Path:
    """EasyR1's environment for this machine, as the set-up script leaves it; a test without it is skipped."""
    if not (ROOT / "EasyR1" / "setup.py").is_file():
        pytest.skip("EasyR1 is not checked out (git submodule update --init EasyR1)")
    try:
        return find_environment("easyr1", None, lock="easyr1_cpu")
    except ConfigError as error:
        pytest.skip(str(error))


def variables(cache: Path) -> dict[str, str]:
    """For a process in that environment: EasyR1 and our code of this very checkout, whichever made the environment."""
    here = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'EasyR1'}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return environment_variables(environment()) | here | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache)}


def write_stage(
    directory: Path,
    *,
    task: str = "mini_gqa",
    rows: int = 16,
    reward: str = REWARD,
    fixes: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write what EasyR1 needs for a stage of the miniature, and what our entry needs beside it.

    Args:
        directory: Gets the files.
        task: A task of the miniature.
        rows: How many of its training rows.
        reward: The reward file.
        fixes: What ``fixes.json`` says instead of the defaults.
        changes: Values of the framework's keys by their dotted names, with ``__`` for the dot.
    """
    directory.mkdir(parents=True)
    train = directory / "train.parquet"
    pq.write_table(_easyr1_table(make_rows(task, "train", rows, 0), "miniature"), train)
    (directory / "prompt.jinja").write_text("{{ content }}" + PRESETS["miniature"].direct)
    (directory / "reward.py").write_text(reward)
    keys: dict[str, Any] = {
        "data.train_files": f"{train}@train",
        "data.val_files": f"{train}@train[:1]",
        "data.prompt_key": "problem",
        "data.answer_key": "answer",
        "data.image_key": "images",
        "data.max_prompt_length": 128,
        "data.max_response_length": 8,
        "data.rollout_batch_size": 8,
        "data.val_batch_size": 1,
        "data.format_prompt": str(directory / "prompt.jinja"),
        "data.shuffle": False,
        "data.min_pixels": 3136,
        "data.max_pixels": 1003520,
        "data.filter_overlong_prompts": False,
        "algorithm.adv_estimator": "grpo",
        "algorithm.use_kl_loss": True,
        "algorithm.kl_penalty": "low_var_kl",
        "algorithm.kl_coef": 1e-2,
        "worker.actor.global_batch_size": 8,
        "worker.actor.micro_batch_size_per_device_for_update": 32,
        "worker.actor.micro_batch_size_per_device_for_experience": 32,
        "worker.actor.padding_free": False,
        "worker.actor.dynamic_batching": False,
        "worker.actor.use_torch_compile": False,
        "worker.actor.model.model_path": str(BASE),
        "worker.actor.optim.lr": 1e-4,
        "worker.rollout.n": 4,
        "worker.rollout.tensor_parallel_size": 1,
        "worker.reward.reward_function": f"{directory / 'reward.py'}:compute_score",
        "worker.reward.num_cpus": 1,
        "trainer.total_epochs": 1,
        "trainer.logger": ["console", "file"],
        "trainer.nnodes": 1,
        "trainer.n_gpus_per_node": 1,
        "trainer.val_before_train": False,
        "trainer.val_freq": -1,
        "trainer.save_freq": 1,
        "trainer.save_limit": 2,
        "trainer.find_last_checkpoint": False,
        "trainer.save_checkpoint_path": str(directory / "out"),
    }
    keys |= {name.replace("__", "."): value for name, value in changes.items()}
    nested: dict[str, Any] = {}
    for key, value in keys.items():
        *sections, last = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    (directory / "train.yaml").write_text(yaml.safe_dump(nested))
    said = {"reference": str(BASE), "exact_zero": True, "count_rounded": None, "device": "cpu", "ray_address": None}
    (directory / "fixes.json").write_text(json.dumps(said | (fixes or {})))
    return directory


def run_stage(
    directory: Path, module: str = "cpt_rft.engines.easyr1.entry", timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run our entry on a stage; its output is also in ``framework.log`` beside the stage's files."""
    python = environment() / "bin" / "python"
    command = [str(python), "-m", module, "train.yaml", "fixes.json"]
    done = subprocess.run(
        command,
        cwd=directory,
        env=variables(directory / "cache"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    (directory / "framework.log").write_text(done.stdout)
    return done


def log_of(directory: Path) -> list[dict[str, Any]]:
    """The framework's log, a record a step."""
    lines = (directory / "out" / "experiment_log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
