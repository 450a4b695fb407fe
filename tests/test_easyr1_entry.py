"""What runs inside EasyR1's environment: its pin and locks, what may not be in it, and fixes that need no EasyR1."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpt_rft.algos.grpo import paper_group_advantages
from cpt_rft.engines.easyr1 import COMMIT, VERSION
from cpt_rft.engines.easyr1 import fixes as mend
from cpt_rft.engines.easyr1.fixes import Fixes
from cpt_rft.engines.easyr1.groups import group_numbers, side_by_side
from cpt_rft.engines.easyr1.packages import check_packages
from cpt_rft.engines.easyr1.stand_in import refuse_what_needs_a_gpu, stand_in
from cpt_rft.engines.environment import find_environment, locked_versions
from cpt_rft.errors import ConfigError
from tests.helpers.tree import ROOT
from tests.test_scripts import Machine

VECTORS = json.loads((ROOT / "tests/vectors/easyr1_vectors.json").read_text())["cases"]
FIXES = {"reference": None, "exact_zero": True, "count_rounded": None, "device": "cpu", "ray_address": None}


# --- pin, locks, set-up -----------------------------------------------------------------------------------------------


def test_the_submodule_is_pinned() -> None:
    modules = (ROOT / ".gitmodules").read_text()
    assert "path = EasyR1\n\turl = https://github.com/hiyouga/EasyR1.git\n" in modules
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-s", "EasyR1"], capture_output=True, text=True)
        assert listed.stdout.split()[:2] == ["160000", COMMIT]


def test_the_locks_hold_what_is_known_to_work() -> None:
    gpu, cpu = locked_versions("easyr1"), locked_versions("easyr1_cpu")
    for versions in (gpu, cpu):
        check_packages(versions | {"verl": VERSION})
        assert versions["transformers"] == "4.56.2" and versions["omegaconf"] == "2.3.0"
        assert {"ray", "tensordict", "torchdata", "codetiming", "peft", "einops", "qwen-vl-utils"} <= versions.keys()
        assert {"pydantic", "rich", "scipy", "math-verify", "mathruler", "pylatexenc"} <= versions.keys()  # ours
        assert not {"flash-attn", "deepspeed", "verl"} & versions.keys()
    assert (gpu["vllm"], gpu["torch"]) == ("0.11.0", "2.8.0") and gpu["numpy"].startswith("1.")
    assert int(gpu["pyarrow"].split(".")[0]) < 22  # later ones do not import beside numpy 1
    assert "vllm" not in cpu and not any(name.startswith(("nvidia", "cuda")) for name in cpu)


def test_an_environment_may_have_a_lock_of_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPT_RFT_ENVS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"easyr1_cpu-\w{12}\. Fix: make it with 'bash scripts/setup_easyr1\.sh'"):
        find_environment("easyr1", None, lock="easyr1_cpu")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"omegaconf": "2.4.0"}, "omegaconf 2.4.0 refuses EasyR1's list of loggers"),
        ({"omegaconf": "2.4.0.dev4"}, "install omegaconf==2.3.0"),
        ({"vllm": "0.12.0"}, "install vllm==0.11.0 with torch==2.8.0"),
        ({"vllm": "0.10.2"}, "fails with 0.10.2"),
        ({"transformers": "5.0.0"}, "below 5, not 5.0.0"),
        ({"transformers": "4.53.3"}, "install transformers==4.56.2"),
        ({"transformers": None}, "not none"),
        ({"deepspeed": "0.18.4"}, "'0 active drivers'"),
        ({"verl": "0.6.1"}, "verl 0.6.1 is installed, another package"),
        ({"verl": None}, "it is missing. Fix: make the environment again with 'bash scripts/setup_easyr1.sh'"),
    ],
)
def test_what_is_known_to_fail_is_refused_with_the_fix(changes: dict[str, str | None], says: str) -> None:
    good = {"verl": VERSION, "omegaconf": "2.3.0", "vllm": "0.11.0+cu129", "transformers": "4.57.6"}
    check_packages(good)
    with pytest.raises(ConfigError) as refusal:
        check_packages({name: version for name, version in (good | changes).items() if version is not None})
    assert says in str(refusal.value)


def test_the_check_runs_in_any_environment(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cpt_rft.engines.easyr1.packages"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("EasyR1's package is called verl")


def test_without_the_submodule_the_set_up_says_how_to_get_it(tmp_path: Path) -> None:
    result = Machine(tmp_path).run("setup_easyr1.sh")
    assert result.returncode == 2
    assert "EasyR1 is not checked out" in result.stderr and "Fix: git submodule update --init EasyR1" in result.stderr


@pytest.mark.parametrize(("gpu", "lock"), [(False, "easyr1_cpu"), (True, "easyr1")])
def test_the_set_up_takes_the_lock_of_the_machine(gpu: bool, lock: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path, gpu=gpu)
    for folder in ("scripts/engine_envs", "tests/engine_envs"):
        shutil.copytree(ROOT / folder, machine.project / folder)
    machine.write_program(machine.project / "EasyR1/setup.py", "")
    result = machine.run("setup_easyr1.sh")
    assert result.returncode == 0, result.stderr
    calls = machine.calls()
    assert any(f"--no-deps -r {machine.project}/scripts/engine_envs/{lock}.lock" in call for call in calls)
    assert any("--no-deps --editable" in call and call.endswith(f"--editable {machine.project}") for call in calls)
    assert any("cpt_rft.engines.easyr1.packages" in call for call in calls)
    assert any("install_cpu_shims" in call for call in calls) is not gpu
    assert ("flash-attn==2.8.3" in result.stderr) is gpu
    assert "hiyouga/verl:ngc-th2.8.0-cu12.9-vllm0.11.0" in result.stderr
    assert machine.run("setup_easyr1.sh", "now").stderr.startswith("usage: scripts/setup_easyr1.sh")


# --- the file of fixes ------------------------------------------------------------------------------------------------


def test_fixes_are_read_from_their_file(tmp_path: Path) -> None:
    (tmp_path / "fixes.json").write_text(json.dumps(FIXES | {"reference": "base"}))
    assert Fixes.read(tmp_path / "fixes.json").reference == "base"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (json.dumps(FIXES | {"device": "tpu"}), "device: Input should be 'cuda' or 'cpu'"),
        (json.dumps(FIXES | {"exact": True}), "exact: Extra inputs are not permitted"),
        (json.dumps({key: FIXES[key] for key in FIXES if key != "reference"}), "reference: Field required"),
        (json.dumps(FIXES | {"exact_zero": "yes"}), "exact_zero: Input should be a valid boolean"),
        ("{", "the file: Invalid JSON"),
    ],
)
def test_a_broken_file_of_fixes_is_named(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "fixes.json").write_text(text)
    with pytest.raises(ConfigError) as refusal:
        Fixes.read(tmp_path / "fixes.json")
    assert f"fixes.json: {says}" in str(refusal.value)


# --- ReMax ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [case["name"] for case in VECTORS if "intended" in case["name"]])
def test_remax_is_what_the_source_means(name: str) -> None:
    case = next(case for case in VECTORS if case["name"] == name)
    inputs = {
        key: torch.tensor(case["inputs"][key]) for key in ("token_level_rewards", "reward_baselines", "response_mask")
    }
    advantages, returns = mend.remax_estimate(**inputs, index=None, gamma=1.0)
    torch.testing.assert_close(advantages, torch.tensor(case["outputs"]["advantages"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(returns, torch.tensor(case["outputs"]["returns"]), rtol=1e-5, atol=1e-6)


def test_the_settings_of_the_greedy_call_leave_the_batch() -> None:
    def make_batch(self: Any, metrics: dict[str, Any]) -> Any:
        return SimpleNamespace(meta_info={"temperature": 0, "n": 1, "min_pixels": metrics["pixels"]})

    assert mend.without_greedy_settings(make_batch)(None, {"pixels": 7}).meta_info == {"min_pixels": 7}


# --- groups of equal rewards ------------------------------------------------------------------------------------------


def tokens(rewards: list[float]) -> torch.Tensor:
    """Rewards at the second of three tokens."""
    return torch.nn.functional.pad(torch.tensor(rewards)[:, None], (1, 1))


def rounding_estimate(*, token_level_rewards: torch.Tensor, index: list[str], **_: Any) -> tuple[Any, Any]:
    """As EasyR1's GRPO, whose vectors `paper_group_advantages` is tested against; groups of seven, interleaved."""
    rewards = token_level_rewards.sum(-1)
    found = torch.zeros_like(token_level_rewards)
    for uid in set(index):
        places = [place for place, each in enumerate(index) if each == uid]
        found[places] = paper_group_advantages(rewards[places][None])[0][0][:, None].expand(-1, 3)
    return found, found


REWARDS = [value for pair in zip([0.7] * 7, [0.0, 1.0, 0.7, 0.7, 0.7, 0.7, 0.7], strict=True) for value in pair]
UIDS = ["equal", "mixed"] * 7


def test_equal_rewards_have_an_advantage_of_exactly_zero() -> None:
    before, _ = rounding_estimate(token_level_rewards=tokens(REWARDS), index=UIDS)
    assert before[0].abs().max() > 0.05
    inputs = {"token_level_rewards": tokens(REWARDS), "index": UIDS, "response_mask": None, "gamma": 1.0}
    after, returns = mend.exactly_zero(rounding_estimate)(**inputs)
    assert (after[0::2] == 0).all() and torch.equal(after, returns)
    assert torch.equal(after[1::2], before[1::2]) and (after[1::2] != 0).all()


def test_groups_that_rounding_moves_are_counted() -> None:
    advantages, _ = rounding_estimate(token_level_rewards=tokens(REWARDS), index=UIDS)
    scores = torch.tensor(REWARDS)
    told = group_numbers(scores, scores, advantages, UIDS)
    assert told["groups"] == 2 and told["zero_variance"] == 0.5 and told["rounded_groups"] == 1
    assert told["largest_rounded"] == pytest.approx(float(advantages[0].abs().max()))
    assert told["reward_variance"] == pytest.approx(float(torch.tensor(REWARDS[1::2]).double().var()) / 2)
    zeroed = advantages * torch.tensor([0.0, 1.0] * 7)[:, None]
    assert group_numbers(scores, scores, zeroed, UIDS)["rounded_groups"] == 0
    # With the penalty in the reward, what is compared differs within the group, and its advantage is right.
    penalised = scores - 0.01 * torch.arange(14)
    told = group_numbers(scores, penalised, advantages, UIDS)
    assert told["rounded_groups"] == 0 and told["zero_variance"] == 0.5


@dataclass
class Batch:
    """What the trainer's numbers are computed from."""

    batch: dict[str, torch.Tensor]
    non_tensor_batch: dict[str, Any]


def batch_of(uids: list[str]) -> Batch:
    advantages, _ = rounding_estimate(token_level_rewards=tokens(REWARDS), index=UIDS)
    rewards = {f"token_level_{name}": tokens(REWARDS) for name in ("scores", "rewards")}
    return Batch({**rewards, "advantages": advantages, "response_mask": torch.ones(14, 3)}, {"uid": uids})


def test_our_numbers_stand_beside_the_frameworks() -> None:
    def data_metrics(batch: Any, use_critic: bool = False) -> dict[str, Any]:
        return {"critic/score/mean": 0.5}

    compared = mend.with_group_numbers(data_metrics, compared=True)(batch=batch_of(UIDS), use_critic=False)
    assert compared["critic/score/mean"] == 0.5 and compared["cpt_rft/rounded_groups"] == 1
    other = mend.with_group_numbers(data_metrics, compared=False)(batch=batch_of(UIDS))  # ReMax: no zero is expected
    assert other["cpt_rft/zero_variance"] == 0.5 and "cpt_rft/rounded_groups" not in other
    alone = mend.with_group_numbers(data_metrics, compared=False)(batch=batch_of([str(row) for row in range(14)]))
    assert alone == {"critic/score/mean": 0.5}


def test_the_count_outlives_a_restart(tmp_path: Path) -> None:
    class Tracker:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def log(self, data: dict[str, Any], step: int) -> None:
            self.steps.append(step)

    file = tmp_path / "rounded.jsonl"
    for step in (1, 2):
        tracker = mend.counting(Tracker, file)()
        tracker.log(data={"cpt_rft/rounded_groups": step, "actor/lr": 1.0}, step=step)
        assert tracker.steps == [step]
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"step": 1, "rounded_groups": 1},
        {"step": 2, "rounded_groups": 2},
    ]


# --- workers ----------------------------------------------------------------------------------------------------------


def test_the_reference_is_another_model_than_the_actor() -> None:
    @dataclass
    class Model:
        model_path: str

    class Worker:
        pass

    class Sharded(Worker):
        def _build_model_optimizer(self, model_config: Model, role: str) -> None:
            self.__dict__.setdefault("made", {})[role] = model_config.model_path

        def init_model(self) -> None:
            for role in ("actor", "ref"):
                self._build_model_optimizer(model_config=Model("start"), role=role)

    anchored: Any = mend.anchored(Sharded, "base")
    assert anchored.__base__.__bases__ == (Worker,)  # what the framework makes its outer class of
    assert issubclass(anchored, Sharded)
    worker = anchored()
    worker.init_model()
    assert worker.made == {"actor": "start", "ref": "base"}


def test_what_needs_vllm_is_only_named_on_device_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("verl.workers.rollout.vllm_rollout_spmd", "verl.workers.sharding_manager.fsdp_vllm")
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)  # so that both are taken out again
        monkeypatch.delitem(sys.modules, name)
    stand_in()
    rollout = sys.modules[names[0]]
    with pytest.raises(RuntimeError, match="vLLMRollout needs vLLM and a GPU"):
        rollout.vLLMRollout("path", config=None)
    stand_in()
    assert sys.modules[names[0]] is rollout


def worker_section(**changes: Any) -> SimpleNamespace:
    """What device cpu looks at in the framework's ``worker`` section."""
    keys = {"lora": 0, "ulysses_size": 1, "strategy": "adamw", "tensor": 1, "top_k": -1, "ignore_eos": False} | changes
    model = SimpleNamespace(lora=SimpleNamespace(rank=keys["lora"]))
    optim = SimpleNamespace(strategy=keys["strategy"])
    return SimpleNamespace(
        actor=SimpleNamespace(model=model, ulysses_size=keys["ulysses_size"], optim=optim),
        rollout=SimpleNamespace(
            tensor_parallel_size=keys["tensor"], top_k=keys["top_k"], ignore_eos=keys["ignore_eos"]
        ),
    )


@pytest.mark.parametrize(
    ("changes", "role", "workers", "says"),
    [
        ({"lora": 8}, "actor_rollout_ref", 1, "worker.actor.model.lora.rank is 8, on device cpu it must be 0"),
        ({"ulysses_size": 2}, "actor_rollout_ref", 1, "worker.actor.ulysses_size is 2"),
        ({"strategy": "adamw_bf16"}, "actor_rollout_ref", 1, "set it to adamw, or use a GPU"),
        ({"tensor": 2}, "actor_rollout_ref", 1, "worker.rollout.tensor_parallel_size is 2"),
        ({"top_k": 50}, "actor_rollout_ref", 1, "worker.rollout.top_k is 50"),
        ({"ignore_eos": True}, "actor_rollout_ref", 1, "worker.rollout.ignore_eos is True"),
        ({}, "critic", 1, "the role of a worker is critic"),
        ({}, "actor_rollout_ref", 2, "trainer.nnodes times trainer.n_gpus_per_node is 2"),
    ],
)
def test_device_cpu_refuses_what_only_a_gpu_has(changes: dict[str, Any], role: str, workers: int, says: str) -> None:
    refuse_what_needs_a_gpu(worker_section(), "actor_rollout_ref", 1)
    with pytest.raises(ConfigError) as refusal:
        refuse_what_needs_a_gpu(worker_section(**changes), role, workers)
    assert says in str(refusal.value)


def test_rows_of_one_prompt_share_their_context_where_they_can() -> None:
    assert side_by_side(["b", "a", "b", "a"]) == ([0, 2, 1, 3], 2)
    assert side_by_side(["b", "a", "b", "a", "a"]) == ([0, 1, 2, 3, 4], 1)
