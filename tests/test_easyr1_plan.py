"""Before EasyR1 starts: the Ray cluster, what a stage will take, the plan and the doctor."""

import json
from pathlib import Path

import pytest

from cpt_rft.config.load import load_experiment
from cpt_rft.engines.easyr1.cluster import Demand, Node, check_cluster, free_nodes, shortage
from cpt_rft.engines.easyr1.estimate import checkpoint_bytes, memory, seconds, work_bytes
from cpt_rft.engines.llamafactory.estimate import Shape
from cpt_rft.errors import ConfigError, StageError
from cpt_rft.sequence.doctor import examine
from cpt_rft.sequence.doctor_easyr1 import gpu_memory
from cpt_rft.sequence.finding import Finding
from cpt_rft.sequence.plan import Selection
from cpt_rft.sequence.status import plan, plan_table
from tests.helpers.easyr1_settings import SPEC, engine, grpo
from tests.helpers.tree import ROOT

SMOKE = ROOT / "configs/experiments/smoke.yaml"
PAPER = ROOT / "configs/experiments/paper_qwen2_5_vl_7b.yaml"
ON_CPU = ["rft_engine={name: easyr1, device: cpu, dtype: float32}", "methods.grpo.max_prompt_tokens=200"]
# Qwen2.5-VL-7B-Instruct: sizes of its config.json.
SEVEN_B = Shape(8_292_166_656, 544_997_376, 28, 3584, 18944, 512, 152064, 32, 1280, 3420, 4)


# --- the cluster ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "demand", "words"),
    [
        ([(8, 64)], (1, 8), None),
        ([(8, 11)], (1, 8), None),
        ([(8, 10)], (1, 8), "asks for 11 CPUs on each of 1 machines with 8 GPUs"),
        ([(7, 64)], (1, 8), "asks for 1 machines with 8 GPUs each, and 0 have them"),
        ([(8, 64), (4, 64), (4, 64)], (2, 8), "asks for 2 machines with 8 GPUs each, and 1 have them"),  # STRICT_PACK
        ([(0, 64), (8, 11), (8, 11)], (2, 8), None),
        ([(0, 64), (8, 11), (8, 9)], (2, 8), "and 1 have them"),
    ],
)
def test_a_cluster_is_measured_against_what_will_be_asked_for(nodes, demand, words):
    found = shortage([Node(f"n{i}", gpus, cpus) for i, (gpus, cpus) in enumerate(nodes)], Demand(*demand, 3))
    assert (found is None) == (words is None) and (words or "") in (found or "")


def test_what_the_framework_asks_for():
    demand = Demand.of(engine(nodes=2, ray_address="auto"))
    assert (demand.nodes, demand.workers, demand.others, demand.cpus) == (2, 8, 3, 19)


def fake_environment(directory: Path, script: str) -> Path:
    """An environment whose Python answers as Ray would."""
    python = directory / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return directory


def test_a_cluster_that_is_not_there_silent_or_broken_is_named(tmp_path_factory, monkeypatch):
    def environment(script: str) -> Path:
        return fake_environment(tmp_path_factory.mktemp("env"), script)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert free_nodes(environment("exit 3"), None) is None
    with pytest.raises(StageError, match=r"No Ray cluster runs at 10.0.0.1:6379.*ray start --head"):
        free_nodes(environment("exit 3"), "10.0.0.1:6379")
    with pytest.raises(StageError, match=r"The Ray cluster at auto did not answer in 0.2 s"):
        free_nodes(environment("exec sleep 5"), "auto", timeout_s=0.2)
    with pytest.raises(StageError, match=r"failed: No module named ray\."):
        free_nodes(environment("echo No module named ray >&2; exit 1"), None)
    with pytest.raises(StageError, match=r"at auto wants a token.*export RAY_AUTH_MODE=token"):
        free_nodes(environment("echo Unauthenticated: InvalidAuthToken >&2; exit 3"), None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    with pytest.raises(StageError, match=r"No Ray cluster runs at 10.0.0.2:6379"):
        free_nodes(environment("exit 3"), None)
    answer = environment("""echo noise; echo; echo '[["a", 8, 64.0], ["b", 8, 9]]'""")
    assert check_cluster(engine(), answer) == "a: 8 GPUs and 64 CPUs free; b: 8 GPUs and 9 CPUs free"
    with pytest.raises(StageError, match=r"11 CPUs on each of 2 machines.* there are a: 8 GPUs and 64 .*--num-cpus=N"):
        check_cluster(engine(nodes=2, ray_address="auto"), answer)


# --- estimates --------------------------------------------------------------------------------------------------------


def test_a_7b_checkpoint_is_33_gigabytes_of_weights_and_66_of_optimizer():
    weights, optimizer = checkpoint_bytes(engine(), SEVEN_B)
    assert (round(weights / 1e9), round(optimizer / 1e9)) == (33, 66)
    assert work_bytes(engine(), SEVEN_B) == 3 * (weights + optimizer) + 4 * SEVEN_B.params
    half = engine(param_dtype="bfloat16", optimizer="adamw_bf16")
    assert checkpoint_bytes(half, SEVEN_B) == (2 * SEVEN_B.params, 6 * SEVEN_B.params)


@pytest.mark.parametrize(
    ("card", "changes", "peak"),
    [
        # Source: hiyouga/EasyR1@b44b311 assets/baselines.md, Peak VRAM in GB of Qwen2.5-VL-7B on 8 GPUs, vLLM TP 2.
        (80, {}, 68),
        (80, {"param_dtype": "bfloat16", "optimizer": "adamw_bf16"}, 58),
        (48, {}, 42),
    ],
)
def test_the_memory_while_writing_is_within_a_tenth_of_what_was_published(card, changes, peak):
    config = engine(tensor_parallel=2, **changes)
    need = memory(config, grpo(max_prompt_tokens=2048, max_new_tokens=2048), SEVEN_B, SPEC)
    assert abs(need.waiting / 1e9 + config.gpu_memory_utilization * card - peak) < peak / 10
    assert need.writing == SEVEN_B.params  # two bytes a weight, on two GPUs
    offloaded = memory(engine(offload=True, **changes), grpo(), SEVEN_B, SPEC)
    assert offloaded.waiting == 0 and offloaded.machine > need.machine


def test_time_is_that_of_the_published_rate():
    # 725 tokens a completion, 512 x 5 of them: 145 seconds on 8 H100 (the same table).
    assert seconds(engine(), grpo(group=5, max_new_tokens=400), SEVEN_B, 512, 512 * 325) == 145


# --- plan and doctor --------------------------------------------------------------------------------------------------


def test_the_plan_shows_every_native_command_and_what_it_takes(tmp_path):
    experiment = load_experiment(SMOKE, [*ON_CPU, f"output={tmp_path / 'run'}"])
    result = plan(experiment, Selection(methods=("grpo",)))
    native_part = result["native"]["easyr1"]
    assert set(native_part["commands"]) == {"grpo seed0 1_mini_gqa", "grpo seed0 2_mini_superclevr"}
    assert (native_part["gpus"], native_part["cpus"]) == (0, 4)
    text = plan_table(result)[1]
    assert f"cd {tmp_path}/run/grpo/order0/seed0/1_mini_gqa.partial/easyr1 && " in text
    assert "EasyR1: no GPU, 4 CPUs of Ray" in text and "of optimizer each until they are merged" in text
    assert result["disk_peak_bytes"] > native_part["work_bytes"] and not (tmp_path / "run").exists()
    assert plan(experiment, Selection(methods=("sft",))).get("native") is None


def test_both_arms_of_the_paper_can_be_planned_without_gpus_and_model():
    words = ["engine.processes=8", "rft_engine.processes=8"]
    result = plan(load_experiment(PAPER, words), Selection(methods=("sft", "grpo", "remax")))
    assert result["native"]["llamafactory"]["processes"] == result["native"]["easyr1"]["gpus"] == 8
    assert len(result["native"]["easyr1"]["commands"]) == 14
    with pytest.raises(ConfigError, match=r"global_batch_size \* n % GPUs == 0|generation call % GPUs == 0"):
        plan(load_experiment(PAPER, ["rft_engine.processes=6"]), Selection(methods=("grpo",)))


def test_the_plan_of_a_7b_model_says_memory_disk_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(Shape, "read", classmethod(lambda cls, checkpoint: SEVEN_B))
    words = [*ON_CPU, "rft_engine={name: easyr1, device: cuda, dtype: bfloat16, processes: 2}"]
    result = plan(load_experiment(SMOKE, [*words, f"output={tmp_path}"]), Selection(methods=("grpo",)))
    text = plan_table(result)[1]
    assert "beside vLLM's share of 60%, which must hold 15.4 GiB of weights and its cache" in text
    assert "30.9 GiB of weights and 61.8 GiB of optimizer each until they are merged" in text
    assert "1,600 tokens a second and GPU that EasyR1 publishes for H100" in text


def looked(tmp_path: Path, *overrides: str) -> dict[str, Finding]:
    experiment = load_experiment(SMOKE, [*ON_CPU, f"output={tmp_path / 'run'}", *overrides])
    return {finding.what: finding for finding in examine(experiment, Selection(("grpo",)))}


def test_the_doctor_looks_at_easyr1(tmp_path, monkeypatch):
    monkeypatch.setenv("CPT_RFT_ENVS", str(tmp_path))
    found = looked(tmp_path)
    assert found["EasyR1's rules"].word == found["memory"].word == "ok"
    assert found["EasyR1's GPUs"].word == "warning"
    for what in ("EasyR1's environment", "Ray"):
        assert found[what].word == "problem" and "setup_easyr1.sh" in found[what].fix
    broken = looked(tmp_path, "rft_engine.top_p=0.9", "methods.grpo.advantage_epsilon=1e-3")
    assert broken["EasyR1's rules"].word == "problem" and "advantage_epsilon" in broken["EasyR1's rules"].text


def test_the_doctor_refuses_what_may_not_be_in_the_environment(tmp_path):
    versions = {"verl": "0.3.3.dev0", "omegaconf": "2.4.0", "transformers": "4.56.2"}
    place = tmp_path / "env"
    place.mkdir()
    fake_environment(place, f"cat <<'X'\n{json.dumps(versions)}\nX")
    found = looked(tmp_path, f"rft_engine.environment={place}")
    assert found["EasyR1's environment"].word == "problem" and "omegaconf==2.3.0" in found["EasyR1's environment"].fix
    assert found["Ray"].word == "ok" and "a Ray of its own" in found["Ray"].text


def test_the_doctor_says_whether_the_worst_moments_fit_a_gpu(tmp_path):
    experiment = load_experiment(SMOKE, [*ON_CPU, f"output={tmp_path / 'run'}"])
    chains = Selection(("grpo",)).chains(experiment, tmp_path / "run")
    base = ROOT / "cpt_rft" / "miniature" / "base"
    roomy = gpu_memory(engine(processes=2), chains, base, 80 * 2**30)
    assert roomy.word == "ok" and "80.0 GiB a GPU" in roomy.text
    tight = gpu_memory(engine(processes=2), chains, base, 2**20)
    assert tight.word == "problem" and "gpu_memory_utilization" in tight.fix
