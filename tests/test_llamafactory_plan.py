"""Before a run of the engine llamafactory: the plan, its estimates, and the doctor."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from cpt_rft.checkpoint import load_policy
from cpt_rft.config.engine import LlamaFactoryConfig, parse_engine
from cpt_rft.config.load import load_experiment
from cpt_rft.engines.environment import locked_versions
from cpt_rft.engines.llamafactory.estimate import Shape, activation_bytes, state_bytes, work_bytes
from cpt_rft.errors import ConfigError
from cpt_rft.sequence.doctor import examine
from cpt_rft.sequence.finding import Finding
from cpt_rft.sequence.plan import Selection
from cpt_rft.sequence.status import plan, plan_table
from tests.helpers.llamafactory import BASE
from tests.helpers.tree import ROOT

SMALL = ["engine={name: llamafactory, device: cpu, dtype: float32, processes: 2}", "methods.sft.micro_batch=2"]


def config(**changes: Any) -> LlamaFactoryConfig:
    engine = parse_engine({"name": "llamafactory", "dtype": "float32", "device": "cpu", "processes": 1, **changes})
    assert isinstance(engine, LlamaFactoryConfig)
    return engine


# --- estimates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "nodes", "deepspeed", "gpu", "machine"),
    [
        # Reference: deepspeed 0.18.4's own functions for 8e9 weights with a largest layer of 545e6.
        (8, 1, "zero2", 34_000_000_000, 384_000_000_000),
        (8, 2, "zero2", 25_000_000_000, 384_000_000_000),
        (8, 1, "zero3", 20_180_000_000, 26_160_000_000),
        (4, 2, "zero3", 20_180_000_000, 13_080_000_000),
        (8, 1, "zero3_offload", 2_180_000_000, 216_000_000_000),
        (8, 2, "zero3_offload", 2_180_000_000, 108_000_000_000),
        (8, 1, "none", 128_000_000_000, 256_000_000_000),
    ],
)
def test_states_are_those_of_deepspeeds_own_estimate(processes, nodes, deepspeed, gpu, machine):
    shape = Shape(8_000_000_000, 545_000_000, 28, 3584, 18944, 512, 152064, 32, 1280, 3420, 4)
    engine = config(processes=processes, nodes=nodes, launcher=["srun"], deepspeed=deepspeed)
    assert state_bytes(engine, shape) == (gpu, machine)


def test_the_shape_of_a_checkpoint_is_read_from_its_headers():
    shape = Shape.read(BASE)
    model = load_policy(BASE).model
    assert shape.params == sum(weight.numel() for weight in model.parameters())
    own = [sum(w.numel() for w in module.parameters(recurse=False)) for module in model.modules()]
    assert shape.largest_layer == max(own)
    assert (shape.layers, shape.hidden, shape.tower_layers) == (4, 128, 2)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("tokens", "pictures"), [(300, 0), (600, 504)])
def test_activations_are_within_a_sixth_of_what_pytorch_measures(checkpointing, tokens, pictures):
    model = load_policy(BASE).model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(5, 600, (1, tokens), generator=torch.Generator().manual_seed(0))
    inputs: dict[str, torch.Tensor] = {}
    if pictures:
        grid = torch.tensor([[1, 24, pictures * 4 // 24]])
        inputs = {"pixel_values": torch.zeros(int(grid.prod()), 1176), "image_grid_thw": grid}
        ids[0, 5 : 5 + pictures] = model.config.image_token_id
    inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **inputs)
        output.loss.backward()
    peak = {str(kind): size for kind, size in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items()}
    measured = sum(size for kind, size in peak.items() if kind.endswith(("ACT", "TEMP")))
    estimate = activation_bytes(config(gradient_checkpointing=checkpointing), Shape.read(BASE), tokens, pictures)
    assert 5 / 6 <= estimate / measured <= 7 / 6


def test_a_stage_in_work_holds_two_resume_points_and_the_final_weights():
    shape = Shape.read(BASE)
    assert work_bytes(config(), shape) == (2 * (4 + 8) + 4) * shape.params
    zero = config(deepspeed="zero3", dtype="bfloat16", processes=2)
    assert work_bytes(zero, shape) == (2 * (2 + 12) + 2) * shape.params


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_shows_every_native_command_before_anything_starts(tmp_path):
    experiment = load_experiment(ROOT / "configs/experiments/smoke.yaml", [*SMALL, f"output={tmp_path / 'run'}"])
    result = plan(experiment, Selection(methods=("sft",)))
    assert set(result["native"]["llamafactory"]["commands"]) == {"sft seed0 1_mini_gqa", "sft seed0 2_mini_superclevr"}
    text = plan_table(result)[1]
    assert f"cd {tmp_path}/run/sft/order0/seed0/1_mini_gqa.partial/llamafactory && " in text
    assert "FORCE_TORCHRUN=1 NPROC_PER_NODE=2 NNODES=1 llamafactory-cli train train.yaml" in text
    assert "memory a GPU: about" in text and "gradient accumulation sft 1" in text
    assert not (tmp_path / "run").exists()
    assert result["disk_peak_bytes"] > result["native"]["llamafactory"]["work_bytes"]


def test_the_papers_arm_can_be_planned_without_gpus_and_model():
    paper = ROOT / "configs/experiments/paper_qwen2_5_vl_7b.yaml"
    result = plan(load_experiment(paper, ["engine.processes=8"]), Selection(methods=("sft",)))
    assert result["native"]["llamafactory"]["gradient_accumulation"] == {"sft": 3}
    assert [row["stage"] for row in result["stages"]][5:] == ["5_geometry3k", "6_pathvqa", "7_superclevr"]
    assert "guesses until the data is prepared" in plan_table(result)[1]
    with pytest.raises(ConfigError, match="16 processes of 1 rows do not divide the 24 rows"):
        plan(load_experiment(paper, ["engine.processes=16"]), Selection(methods=("sft",)))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"say engine\.processes=N"):
            plan(load_experiment(paper), Selection(methods=("sft",)))


def test_methods_that_are_not_supervised_are_refused_before_anything_starts():
    experiment = load_experiment(ROOT / "configs/experiments/smoke.yaml", SMALL)
    with pytest.raises(ConfigError, match="grpo is of the kind grpo"):
        plan(experiment, Selection(methods=("grpo",)))


def test_the_epochs_of_the_paper():
    method = load_experiment(ROOT / "configs/experiments/paper_qwen2_5_vl_7b.yaml").methods["sft"]
    tasks = ("scienceqa", "textvqa", "vizwiz", "gqa", "geometry3k", "pathvqa", "superclevr")
    assert [method.epochs_of([task]) for task in tasks] == [1, 1, 1, 1, 10, 1, 3]
    assert method.epochs_of(tasks) == 1
    assert (method.lr, method.schedule, method.warmup_ratio, method.prompts_per_step) == (1e-5, "cosine", 0.1, 24)


# --- the doctor -------------------------------------------------------------------------------------------------------


def looked(tmp_path: Path, *overrides: str) -> dict[str, Finding]:
    words = [*SMALL, f"output={tmp_path / 'run'}", *overrides]
    return {
        f.what: f for f in examine(load_experiment(ROOT / "configs/experiments/smoke.yaml", words), Selection(("sft",)))
    }


def test_the_doctor_finds_nothing_wrong_where_nothing_is(tmp_path, monkeypatch):
    monkeypatch.setenv("CPT_RFT_ENVS", str(tmp_path))
    monkeypatch.delenv("MASTER_PORT", raising=False)
    found = looked(tmp_path)
    for what in ("model", "a row", "data", "disk"):
        assert found[what].word == "ok" and found[what].fix == "", found[what]
    assert "39 tokens, 9 of them for pictures" in found["a row"].text
    assert found["environment"].word == "problem" and "setup_llamafactory.sh" in found["environment"].fix


def environment_with(folder: Path, **versions: str) -> Path:
    """An environment that holds what the lock names, and these instead or besides."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\ncat <<'X'\n{json.dumps({**locked_versions('llamafactory'), **versions})}\nX\n")
    python.chmod(0o755)
    return folder


def test_the_doctor_compares_versions_with_the_lock(tmp_path):
    place = environment_with(tmp_path, torch="2.13.0+cu130", transformers="5.6.0")
    finding = looked(tmp_path, f"engine.environment={place}")["environment"]
    assert finding.word == "warning" and "transformers 5.6.0 instead of 5.5.4." in finding.text
    assert "torch" not in finding.text


@pytest.mark.parametrize(
    ("versions", "missing"),
    [({}, True), ({"ray": "2.60.0"}, True), ({"ray": "2.60.0", "aiohttp-cors": "0.8.1"}, False)],
)
def test_the_doctor_asks_for_ray_with_what_the_framework_needs_of_it(tmp_path, versions, missing):
    place = environment_with(tmp_path / "env", **versions)
    finding = looked(tmp_path, f"engine.environment={place}", "engine.ray=true")["environment"]
    assert (finding.text == "ray[default] is not installed.") == missing


def test_the_doctor_finds_a_cut_model_a_taken_port_and_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("CPT_RFT_ENVS", str(tmp_path))
    shutil.copytree(BASE, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with socket.socket() as taken:
        taken.bind(("", 0))
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        found = looked(tmp_path, f"base_model={tmp_path / 'base'}")
    assert "is truncated" in found["model"].text
    assert found["port"].word == "problem" and "is taken" in found["port"].text
    assert "--shm-size" in found["shared memory"].fix
    assert found["disk"].word == "problem"


def test_the_doctor_says_what_is_not_prepared():
    paper = load_experiment(
        ROOT / "configs/experiments/paper_qwen2_5_vl_7b.yaml", ["engine.processes=8", "data.directory=no"]
    )
    found = {f.what: f for f in examine(paper, Selection(("sft",)))}
    assert "scripts/prepare_data.sh scienceqa textvqa" in found["data"].fix
    assert found["model"].word == "problem" and "download it there" in found["model"].fix
