"""LLaMA-Factory itself, on CPU: chains, agreement with the local engine, adapters. About five minutes in all."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch

from cpt_rft.checkpoint import load_policy
from cpt_rft.config.engine import LlamaFactoryConfig, parse_engine
from cpt_rft.engines.base import Stage, StepLog, get_engine
from cpt_rft.engines.llamafactory.estimate import Shape, state_bytes
from cpt_rft.engines.llamafactory.rows import ENDING
from cpt_rft.engines.local import train as local_train
from cpt_rft.engines.local.sft import SftObjective
from cpt_rft.vision import VisionSpec
from tests.helpers.llamafactory import BASE, environment, make_stage, own_venv, sft
from tests.helpers.tree import ROOT

pytestmark = pytest.mark.full
EXPERIMENT = """
name: lf
base_model: cpt_rft/miniature/base
output: {output}
tasks: [mini_gqa, mini_superclevr, mini_textvqa]
methods:
  sft: {{prompts_per_step: 4, micro_batch: 2}}
  multitask: {{prompts_per_step: 4, micro_batch: 2, epochs: 1}}
engine: {{name: llamafactory, dtype: float32, device: cpu, processes: {processes}}}
data: {{train: 16, dev: 4, test: 4, general: 4}}
evaluation: {{max_new_tokens: 6, general: [mini_pope], base_samples: 0}}
"""


@pytest.fixture(scope="module", autouse=True)
def made() -> Path:
    return environment()


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in load_policy(checkpoint).model.state_dict().items()}


def run(stage: Stage) -> list[StepLog]:
    logs: list[StepLog] = []
    get_engine(stage.engine).train(stage, logs.append)
    return logs


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """|one - other| / |one - start| over all weights."""
    gap = math.sqrt(sum(float((one[name] - other[name]).double().square().sum()) for name in one))
    return gap / math.sqrt(sum(float((one[name] - start[name]).double().square().sum()) for name in one))


def sequence(tmp_path: Path, processes: int, method: str) -> Path:
    file = tmp_path / "lf.yaml"
    file.write_text(EXPERIMENT.format(output=tmp_path / "run", processes=processes))
    script = ["bash", str(ROOT / "scripts/run_sequence.sh"), str(file), method]
    done = subprocess.run(script, env=own_venv(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("processes", "method", "names"),
    [(1, "sft", ["1_mini_gqa", "2_mini_superclevr", "3_mini_textvqa"]), (2, "multitask", ["1_multitask"])],
)
def test_a_sequence_by_llamafactory_itself_is_evaluated_by_the_shared_harness(
    tmp_path: Path, processes: int, method: str, names: list[str]
) -> None:
    """About 2 minutes for the chain and 1 for the joint stage by two processes."""
    run_dir = sequence(tmp_path, processes, method)
    chain = run_dir / method / "order0" / "seed0"
    assert sorted(path.name for path in chain.iterdir()) == names
    before = weights(BASE)
    for name in names:
        stage = chain / name
        rows = 48 if method == "multitask" else 16
        assert len((stage / "train" / "log.jsonl").read_text().splitlines()) == rows // 4
        now = weights(stage / "checkpoint")
        assert all(not torch.equal(now[key], before[key]) for key in now)  # neither tower nor projector is frozen
        before = now
        for file in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja", "config.json"):
            assert (stage / "checkpoint" / file).read_bytes() == (BASE / file).read_bytes()
        assert (stage / "eval" / "evaluation.json").is_file()
        assert len(list((stage / "eval").rglob("*.jsonl"))) == 8  # three tasks and one ability in two styles
        assert {path.name for path in stage.iterdir()} == {
            "checkpoint",
            "eval",
            "llamafactory",
            "manifest.json",
            "train",
        }
    log = (chain / names[0] / "llamafactory" / "framework.log").read_text()
    assert ("distributed training: True" in log) == (processes == 2)


class CountsTheNewline(SftObjective):
    """The local objective with the newline that LLaMA-Factory's template puts after the end token in the loss too."""

    def target(self, row):
        return [*super().target(row), *self.policy.tokenizer.encode(ENDING)[1:]]


def test_the_local_engine_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same start, rows, order, rate, float32: 20 steps. About 30 seconds."""
    method = sft(prompts_per_step=4, micro_batch=4, schedule="cosine")
    framework = make_stage(tmp_path / "framework", method, rows=80)
    theirs = run(framework)
    monkeypatch.setattr(local_train, "SftObjective", CountsTheNewline)
    ours = run(make_stage(tmp_path / "ours", method, rows=80, name="local"))
    assert len(ours) == len(theirs) == 20
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.step, mine.tokens, mine.lr) == (other.step, other.tokens, pytest.approx(other.lr))
        assert mine.loss == pytest.approx(other.loss, abs=1e-4)
    start, one = weights(BASE), weights(tmp_path / "framework" / "checkpoint")
    gap = apart(weights(tmp_path / "ours" / "checkpoint"), one, start)
    losses = max(abs(mine.loss - other.loss) for mine, other in zip(ours, theirs, strict=True))
    print(f"largest gap of a loss {losses:.1e}, of the weights {gap:.1e}")
    assert gap <= 1e-3

    logged = [json.loads(line) for line in (tmp_path / "framework/train/log.jsonl").read_text().splitlines()]
    assert all(line["grad_norm"] > 0 for line in logged)


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    """The same micro-batches, one after the other or side by side. About 50 seconds."""
    alone = run(make_stage(tmp_path / "alone", sft(micro_batch=2)))
    pair = run(make_stage(tmp_path / "pair", sft(micro_batch=2), processes=2))
    assert [line.loss for line in pair] == pytest.approx([line.loss for line in alone], abs=1e-4)
    one, other = (weights(tmp_path / name / "checkpoint") for name in ("alone", "pair"))
    gap = apart(one, other, weights(BASE))
    print(f"two processes: {gap:.1e}")
    assert gap <= 1e-3


def test_adapters_are_merged_and_another_pixel_budget_reaches_the_checkpoint(tmp_path: Path) -> None:
    """About 45 seconds."""
    stage = make_stage(
        tmp_path / "lora", sft(lr=1e-3), max_pixels=50176, lora={"rank": 4, "alpha": 8}, freeze_vision_tower=True
    )
    run(stage)
    checkpoint = stage.directory / "checkpoint"
    assert VisionSpec.read(checkpoint) == VisionSpec.read(BASE).with_limits(None, 50176)
    before, now = weights(BASE), weights(checkpoint)
    moved = {name for name in now if not torch.equal(now[name], before[name])}
    assert moved and not any("visual.blocks" in name or "norm" in name for name in moved)


def test_the_estimate_of_states_is_deepspeeds_own() -> None:
    """About 10 seconds."""
    program = (
        "from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as three;"
        "from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as two;"
        "import json; print(json.dumps([*two(8_000_000_000, 8, 2, cpu_offload=False),"
        " *three(8_000_000_000, 545_000_000, 8, 2, cpu_offload=False, cpu_offload_params=False)[:2],"
        " *three(8_000_000_000, 545_000_000, 8, 2)[:2]]))"
    )
    done = subprocess.run(
        [str(environment() / "bin/python"), "-c", program], capture_output=True, text=True, check=True
    )
    theirs = json.loads(done.stdout.splitlines()[-1])
    shape = Shape(8_000_000_000, 545_000_000, 28, 3584, 18944, 512, 152064, 32, 1280, 3420, 4)
    settings = {"name": "llamafactory", "device": "cpu", "processes": 8, "nodes": 2, "launcher": ["srun"]}
    ours = []
    for name in ("zero2", "zero3", "zero3_offload"):
        engine = parse_engine({**settings, "deepspeed": name})
        assert isinstance(engine, LlamaFactoryConfig)
        ours += reversed(state_bytes(engine, shape))
    assert ours == theirs
