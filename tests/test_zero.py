"""ZeRO-2 under the local engine: what is refused, how processes hand gradients over, and the update of one process."""

import json
import os
import pickle
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cpt_rft.checkpoint import load_policy
from cpt_rft.config.engine import LocalConfig, parse_engine
from cpt_rft.config.load import load_experiment
from cpt_rft.engines.base import get_engine
from cpt_rft.engines.local.resume import stage_fingerprint
from cpt_rft.engines.local.team import Processes
from cpt_rft.engines.local.zero import Sharing, _Handover, deepspeed_settings
from cpt_rft.errors import ConfigError
from cpt_rft.miniature.world import make_rows
from cpt_rft.sequence.native import native_plan
from cpt_rft.sequence.plan import Selection
from tests.helpers.engine import TASK, grpo, make_base, make_stage, run, sft
from tests.helpers.llamafactory import environment
from tests.helpers.tiny_run import unmeasured
from tests.helpers.tree import ROOT
from tests.test_parallel import relative_difference

ZERO2: dict[str, Any] = {"processes": 2, "deepspeed": "zero2"}


def zero2(**changes: Any) -> LocalConfig:
    engine = parse_engine({"name": "local", "dtype": "float32", "device": "cpu", **ZERO2, **changes})
    assert isinstance(engine, LocalConfig)
    return engine


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"deepspeed": "zero3"}, "zero3 would save nothing.*use zero2"),
        ({"deepspeed": "zero3_offload"}, "zero3_offload would save nothing"),
        ({"deepspeed": "zero1"}, "'none' or 'zero2'"),
        ({"processes": 1}, "2 or more"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        zero2(**changes)


def test_stages_without_it_keep_their_identity() -> None:
    plain = parse_engine({"name": "local", "processes": 2}).identity()
    assert "deepspeed" not in plain
    assert zero2(dtype="auto", device="auto").identity() == plain | {"deepspeed": "zero2"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("zero") / "base", scale=2.0)


@pytest.mark.parametrize(
    ("key", "value"), [("ewc", {"strength": 1.0, "rows": 2, "max_new_tokens": 3}), ("l2", {"strength": 1.0})]
)
def test_a_method_that_needs_all_float32_weights_is_refused(base: Path, tmp_path: Path, key: str, value: Any) -> None:
    stage = make_stage(tmp_path / "stage", base, sft(**{key: value}), make_rows(TASK, "train", 4, 1), **ZERO2)
    with pytest.raises(ConfigError, match=rf"sft holds the float32 weights back by {key}.*engine\.deepspeed=none"):
        get_engine(stage.engine).train(stage, print)


def test_the_plan_says_so_too(tmp_path: Path) -> None:
    words = ["methods=[sft_ewc, sft]", "engine.processes=2", "engine.deepspeed=zero2", f"output={tmp_path / 'run'}"]
    study = load_experiment(ROOT / "configs/experiments/smoke.yaml", words)
    assert native_plan(study, Selection(("sft",)).chains(study, tmp_path), ROOT) == {}
    with pytest.raises(ConfigError, match="sft_ewc holds the float32 weights back by ewc"):
        native_plan(study, Selection(("sft_ewc",)).chains(study, tmp_path), ROOT)


def test_another_sharing_has_resume_points_of_its_own(base: Path, tmp_path: Path) -> None:
    stage = make_stage(tmp_path / "stage", base, sft(), make_rows(TASK, "train", 4, 1), **ZERO2)
    plain = replace(stage, engine=stage.engine.model_copy(update={"deepspeed": "none"}))
    assert stage_fingerprint(stage, torch.float32) != stage_fingerprint(plain, torch.float32)


def test_deepspeed_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"needs the packages accelerate and deepspeed\..*\[zero\]"):
        Sharing(zero2(), sft())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_left_to_a_trainer(dtype: str) -> None:
    settings = deepspeed_settings(zero2(dtype=dtype), sft(max_grad_norm=0.7))
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["gradient_clipping"] == 0.7
    assert settings["bf16"] == {"enabled": dtype == "bfloat16"}
    assert "auto" not in json.dumps(settings)


def test_gradients_computed_before_are_handed_over() -> None:
    weights = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(()))]
    gradients = [torch.arange(6.0).view(2, 3), None, torch.tensor(5.0)]
    given = list(gradients)
    _Handover(weights)(given).backward()
    assert not given, "they would stay in memory until the next ones"
    for weight, gradient in zip(weights, gradients, strict=True):
        assert weight.grad is not None
        assert torch.equal(weight.grad, torch.zeros_like(weight) if gradient is None else gradient)


class Exchange:
    """What the processes of a team say to each other, by threads; one that says nothing for long breaks it."""

    def __init__(self, size: int) -> None:
        self.said: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def all(self, rank: int, value: Any) -> list[Any]:
        self.said[rank] = value
        self.barrier.wait()
        heard = list(self.said)
        self.barrier.wait()
        return heard


def test_all_hand_over_together_whatever_each_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes with two, none and one micro-batch; in the second step with none, none and three."""
    exchange, joined, sums = Exchange(3), [0, 0, 0], []
    monkeypatch.setattr(Processes, "_everyone", lambda team, value: exchange.all(team.rank, value))

    def process(rank: int) -> None:
        team = Sharing.__new__(Sharing)
        team.rank, team.size = rank, 3

        def hand() -> None:
            assert exchange.all(rank, "hands over") == ["hands over"] * 3

        def join() -> None:
            joined[rank] += 1
            hand()

        team.join = join
        for mine in ((2, 0, 1)[rank], (0, 0, 3)[rank]):
            for _ in range(mine):
                team.meet()
                hand()
            sums.append(team.total(mine))

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == [3] * 6
    assert joined == [0 + 3, 2 + 3, 1 + 0]


def by_deepspeed(program: str, *arguments: object) -> str:
    """What a program of ``tests/engine_envs`` prints in the environment of LLaMA-Factory, which has deepspeed."""
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [str(environment() / "bin/python"), str(ROOT / "tests/engine_envs" / program), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.full
def test_the_shared_optimiser_makes_the_steps_of_one() -> None:
    """Micro-batches that differ in number and in what they use, steps that are not finite, a resume; 17 seconds."""
    said = by_deepspeed("zero_optimiser.py")
    gaps = dict(re.findall(r"(\w+): relative difference of the update (\S+)", said))
    assert float(gaps["float32"]) <= 1e-5
    assert float(gaps["bfloat16"]) <= 5e-3


@pytest.mark.full
def test_two_processes_under_zero2_make_the_update_of_one_and_resume(base: Path, tmp_path: Path) -> None:
    """GRPO with LwF on eleven rows in steps of four, one row at a time: the last step has three. 40 seconds."""
    rows = make_rows(TASK, "train", 11, 1)
    first = make_stage(tmp_path / "first", base, sft(epochs=8, lr=6e-3), rows)
    run(first)  # taught, so that rewards differ
    start = first.directory / "checkpoint"
    method = grpo(group=6, temperature=1.2, kl_coef=0.1, micro_batch=1, lwf={"strength": 0.1, "max_new_tokens": 3})
    engines: dict[str, dict[str, Any]] = {"alone": {}, "whole": ZERO2, "killed": {**ZERO2, "save_every": 1}}
    stages = {
        name: make_stage(tmp_path / name, base, method, rows, parent=start, **engine)
        for name, engine in engines.items()
    }
    for name, stage in stages.items():
        (tmp_path / name).with_suffix(".pickle").write_bytes(pickle.dumps(stage))
    arguments = [tmp_path / name for name in ("alone.pickle", "whole.pickle", "killed.pickle@2", "killed.pickle")]
    alone, whole, resumed = (json.loads(line) for line in by_deepspeed("train_stage.py", *arguments).splitlines())
    assert relative_difference(stages["alone"], stages["whole"], start) <= 1e-3
    for one, two in zip(alone, whole, strict=True):
        for key, value in unmeasured(one).items():
            assert two[key] == (value if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)), key
    assert resumed[0]["step"] in (2, 3)
    written = [stages[name].directory / "checkpoint" / "model.safetensors" for name in ("whole", "killed")]
    assert written[0].read_bytes() == written[1].read_bytes()
    load_policy(written[0].parent)
