"""EasyR1 itself, on CPU with our worker: its entry, configuration, data, rewards, fit(), checkpoints and resume.

About ten minutes in all, most of them for processes to start. Skipped where EasyR1 is not checked out or has no
environment.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from cpt_rft.checkpoint import load_policy
from tests.helpers.easyr1 import BASE, ROOT, environment, log_of, run_stage, variables, write_stage

pytestmark = pytest.mark.full
LONG = {
    "task": "mini_pathvqa",
    "rows": 640,
    "data__rollout_batch_size": 16,
    "worker__actor__global_batch_size": 16,
    "worker__rollout__n": 8,
    "worker__actor__micro_batch_size_per_device_for_update": 128,
    "worker__actor__micro_batch_size_per_device_for_experience": 128,
    "worker__actor__optim__weight_decay": 0.0,
    "trainer__save_freq": 40,
}
#: Every response is worth 0.7, and seven of them: float32 rounds their mean.
EQUAL = "def compute_score(reward_inputs):\n    return [{'overall': 0.7, 'accuracy': 1.0} for _ in reward_inputs]\n"


@pytest.fixture(scope="module", autouse=True)
def made() -> Path:
    return environment()


def run(directory: Path, **settings: Any) -> list[dict[str, Any]]:
    """The log of a stage that must not fail."""
    done = run_stage(write_stage(directory, **settings))
    assert done.returncode == 0, done.stdout[-4000:]
    return log_of(directory)


def check(program: str, stage: Path) -> dict[str, Any]:
    """What a program in EasyR1's environment says of a stage's configuration."""
    command = [str(environment() / "bin" / "python"), str(ROOT / "tests/engine_envs" / program), str(stage)]
    done = subprocess.run(
        command, env=variables(stage / "cache"), cwd=stage, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return found


def shard(directory: Path, step: int, kind: str = "model") -> dict[str, Any]:
    found: dict[str, Any] = torch.load(
        directory / f"out/global_step_{step}/actor/{kind}_world_size_1_rank_0.pt", weights_only=True
    )
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def base_weights() -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in load_policy(BASE).model.state_dict().items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage of GRPO on one task, and what EasyR1's own merge makes of it."""
    directory = tmp_path_factory.mktemp("trained") / "stage"
    run(directory, **LONG)
    actor = directory / "out/global_step_40/actor"
    merge = [str(environment() / "bin" / "python"), str(ROOT / "EasyR1/scripts/model_merger.py"), "--local_dir"]
    done = subprocess.run([*merge, str(actor)], capture_output=True, text=True, env=variables(directory))
    assert done.returncode == 0 and "Cannot find key" not in done.stdout, done.stdout + done.stderr
    return directory


def test_grpo_learns_a_task(trained: Path) -> None:
    accuracy = [record["reward"]["accuracy"] for record in log_of(trained)]
    assert len(accuracy) == 40
    assert sum(accuracy[-8:]) / 8 > sum(accuracy[:8]) / 8 + 0.1
    last = log_of(trained)[-1]
    assert {"zero_variance", "reward_variance", "rounded_groups"} <= last["cpt_rft"].keys()
    assert last["cpt_rft"]["groups"] == 16 and last["actor"]["kl_loss"] > 0


def test_the_frameworks_merge_reads_what_our_worker_saves(trained: Path) -> None:
    weights = shard(trained, 40)
    assert not same(weights, base_weights())
    merged = load_policy(trained / "out/global_step_40/actor/huggingface").model.state_dict()
    assert same(
        {name: value.bfloat16() for name, value in weights.items()}, {k: v.bfloat16() for k, v in merged.items()}
    )
    tracker = json.loads((trained / "out/checkpoint_tracker.json").read_text())
    assert tracker["last_global_step"] == 40


def test_the_penalty_of_the_next_task_pulls_to_the_base(trained: Path, tmp_path: Path) -> None:
    """Broken without the fix: the start of the stage is its own reference, and the first step has no penalty."""
    start = str(trained / "out/global_step_40/actor/huggingface")
    later = {"task": "mini_pathvqa", "rows": 8, "worker__actor__model__model_path": start}
    mended = run(tmp_path / "base", **later)
    assert mended[0]["actor"]["kl_loss"] > 0.01
    theirs = run(tmp_path / "own", **later, fixes={"reference": None})
    assert theirs[0]["actor"]["kl_loss"] < 1e-6


@pytest.mark.parametrize(
    ("estimator", "settings"),
    [
        ("rloo", {"algorithm__use_kl_loss": False, "algorithm__kl_penalty": "kl"}),  # the penalty in the reward
        (
            "remax",
            {"worker__actor__model__freeze_vision_tower": True, "worker__actor__optim__lr_scheduler_type": "cosine"},
        ),
    ],
)
def test_a_resumed_stage_ends_as_if_it_had_never_stopped(
    estimator: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"rows": 32, "algorithm__adv_estimator": estimator, "trainer__save_freq": 2, **settings}
    whole = run(tmp_path / "whole", **settings, trainer__save_limit=-1)
    assert [record["step"] for record in whole] == [1, 2, 3, 4]
    shutil.copytree(tmp_path / "whole/out/global_step_2", tmp_path / "kept/global_step_2")
    rest = run(tmp_path / "rest", **settings, trainer__load_checkpoint_path=str(tmp_path / "kept/global_step_2"))
    assert [record["step"] for record in rest] == [3, 4]
    for one, other in zip(whole[2:], rest, strict=True):
        assert all(one[part] == other[part] for part in ("reward", "actor", "critic", "response_length", "cpt_rft"))
    assert same(shard(tmp_path / "whole", 4), shard(tmp_path / "rest", 4))
    moments = [shard(tmp_path / name, 4, "optim")["adam"]["state"][0]["exp_avg"] for name in ("whole", "rest")]
    assert torch.equal(*moments)
    early, late, base = shard(tmp_path / "whole", 2), shard(tmp_path / "whole", 4), base_weights()
    moved = {name for name in base if not torch.equal(early[name], late[name])}
    assert any(name.startswith("model.language_model.") for name in moved)
    assert any(name.startswith("model.visual.") for name in moved) is (estimator == "rloo")
    if estimator == "rloo":
        assert whole[1]["actor"]["kl_penalty"] != 0.0 and "kl_loss" not in whole[1]["actor"]
    else:
        rates = [record["actor"]["lr"] for record in whole]
        assert rates[0] == 1e-4 and rates == sorted(rates, reverse=True) and rates[-1] < 5e-5


def test_remax_stops_in_the_first_step_without_our_fix(tmp_path: Path) -> None:
    stage = write_stage(tmp_path / "stage", algorithm__adv_estimator="remax")
    done = run_stage(stage, module="tests.engine_envs.easyr1_unmended")
    assert done.returncode != 0
    assert "temperature in dict1 and dict2 are not the same object" in done.stdout


def test_equal_rewards_move_nothing_unless_the_papers_rounding_is_asked_for(tmp_path: Path) -> None:
    counted = tmp_path / "rounded.jsonl"
    settings = {
        "rows": 8,
        "reward": EQUAL,
        "algorithm__disable_kl": True,
        "worker__rollout__n": 7,
        "worker__actor__micro_batch_size_per_device_for_update": 56,
        "worker__actor__micro_batch_size_per_device_for_experience": 56,
        "worker__actor__optim__weight_decay": 0.0,
    }
    (exact,) = run(tmp_path / "exact", **settings)
    assert exact["cpt_rft"]["zero_variance"] == 1.0 and exact["cpt_rft"]["rounded_groups"] == 0
    assert exact["critic"]["advantages"] == {"mean": 0.0, "max": 0.0, "min": 0.0}
    assert exact["actor"]["grad_norm"] == 0.0
    assert same(shard(tmp_path / "exact", 1), base_weights())
    (paper,) = run(tmp_path / "paper", **settings, fixes={"exact_zero": False, "count_rounded": str(counted)})
    assert paper["cpt_rft"]["rounded_groups"] == 8
    assert 0.01 < paper["critic"]["advantages"]["mean"] < 0.06
    assert not same(shard(tmp_path / "paper", 1), base_weights())
    (line,) = [json.loads(text) for text in counted.read_text().splitlines()]
    assert line["step"] == 1 and line["rounded_groups"] == line["groups"] == 8
    assert line["largest_rounded"] == pytest.approx(paper["critic"]["advantages"]["max"])


def test_our_worker_equals_the_frameworks_actor(tmp_path: Path) -> None:
    """Log-probabilities, loss, penalty, clip and the weights after a step, against DataParallelPPOActor itself."""
    stage = write_stage(tmp_path / "stage", worker__actor__micro_batch_size_per_device_for_update=8)
    found = check("easyr1_worker.py", stage)
    assert found["logprobs"] < 1e-5
    assert found["clipped"] > 0.05 and found["clipping"] == 0.0
    assert found["penalty"] > 1e-3 and found["kl_loss"] < 1e-6
    assert found["pg_loss"] < 1e-6 and found["grad_norm"] < 1e-3
    # The first step of AdamW is the sign of the gradient: where that is almost zero, rounding decides.
    assert found["step"] > 9e-5 and found["weights"] < 1e-3 * found["step"]


def test_the_fixes_mend_the_frameworks_own_functions(tmp_path: Path) -> None:
    found = check("easyr1_fixes.py", write_stage(tmp_path / "stage"))
    assert found["framework_paths"] == {"actor": str(BASE), "ref": str(BASE)}
    assert found["paths"] == {"actor": str(BASE), "ref": "elsewhere"}
    assert found["outer"] == found["framework_outer"] and found["outer"]["plain"]
    assert not found["naive_outer"]["plain"]  # a plain subclass could not be made by the framework
    assert all(value > 0.05 for row in found["grpo_before"] for value in row)
    assert found["grpo"] == [[0.0] * 3] * 7
    assert found["mixed"] == found["mixed_before"]
    assert found["remax_before"].startswith("RuntimeError: The size of tensor a")
    assert found["remax"] == [[0.75] * 3, [-0.25] * 3]
    assert found["lora"].startswith("ConfigError: With an adapter")
