"""Two processes on one stage: the update of one, the same files, the same resume, and no survivor."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cpt_rft.config.restraints import Ewc
from cpt_rft.data.example import Example
from cpt_rft.engines.base import ARTEFACTS_NAME, EarlierStage, Stage
from cpt_rft.engines.local.team import ALONE, Team
from cpt_rft.errors import CheckpointError, TrainingError
from cpt_rft.miniature.world import make_rows
from tests.helpers.engine import TASK, grpo, make_base, make_stage, run, sft, weights
from tests.helpers.killed import train_and_die
from tests.helpers.tiny_run import unmeasured

EWC: dict[str, Any] = {"strength": 10.0, "rows": 2, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return make_rows(TASK, "train", 10, 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("parallel") / "base", scale=2.0)


@pytest.fixture(scope="module")
def first(base: Path, rows: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """An earlier stage, taught so that rewards differ."""
    directory = tmp_path_factory.mktemp("parallel_first") / "stage"
    stage = make_stage(directory, base, sft(ewc=Ewc(**EWC), epochs=8, lr=6e-3), rows)
    run(stage)
    return stage


def following(first: Stage, directory: Path, method: Any, rows: list[Example], **engine: Any) -> Stage:
    stage = make_stage(directory, first.base, method, rows, parent=first.directory / "checkpoint", **engine)
    return replace(stage, history=(EarlierStage((TASK,), first.data, first.directory / ARTEFACTS_NAME),))


def relative_difference(one: Stage, two: Stage, start: Path) -> float:
    """Of the updates, over all weights."""
    left, right, begin = (weights(at) for at in (one.directory / "checkpoint", two.directory / "checkpoint", start))
    gap = sum(float((left[name] - right[name]).detach().double().square().sum()) for name in begin)
    moved = sum(float((left[name] - begin[name]).detach().double().square().sum()) for name in begin)
    assert moved > 0
    return (gap / moved) ** 0.5


def test_one_process_alone_shares_nothing() -> None:
    gradient = torch.ones(3)
    ALONE.add_up(gradient)
    assert gradient.tolist() == [1, 1, 1] and ALONE.leads
    assert ALONE.mine([1, 2, 3]) == [1, 2, 3] == ALONE.shared(list, [1, 2, 3])
    assert (ALONE.total(2.0), ALONE.largest(3.0), ALONE.told("x")) == (2.0, 3.0, "x")


def test_every_item_is_some_processes_own() -> None:
    parts = []
    for rank in range(3):
        team = Team()
        team.rank, team.size = rank, 3
        parts.append(team.mine(list(range(7))))
    assert sorted(item for part in parts for item in part) == list(range(7))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


METHODS = {
    "sft": lambda: sft(style="cot", micro_batch=2),
    "grpo": lambda: grpo(group=6, temperature=1.2, kl_coef=0.1),
    "restrained": lambda: sft(
        ewc=EWC, l2={"strength": 0.5}, lwf={"strength": 1.0, "max_new_tokens": 4}, replay={"rows_per_step": 1}
    ),
    "remax": lambda: grpo(group=2, temperature=1.2, advantage="remax", rollout_steps=2, loss="grpo"),
    "o_lora": lambda: sft(lora={"rank": 2, "alpha": 4.0, "targets": ("q_proj", "up_proj")}, lr=1e-2),
}


@pytest.mark.full
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_make_the_update_of_one(first: Stage, rows: list[Example], tmp_path: Path, name: str) -> None:
    """Ten rows in steps of four: the last step has two. About 8 seconds each."""
    method = METHODS[name]()
    stages = [following(first, tmp_path / str(count), method, rows, processes=count) for count in (1, 2)]
    logs = [run(stage) for stage in stages]
    start = first.directory / "checkpoint"
    assert relative_difference(*stages, start) <= 1e-3
    for one, two in zip(*logs, strict=True):
        for key, value in unmeasured(json.loads(one.line())).items():
            other = json.loads(two.line())[key]
            assert other == (value if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)), key
    written = [[json.loads(line) for line in _log(stage)] for stage in stages]
    assert written[1] == [json.loads(log.line()) for log in logs[1]]
    assert sorted(path.name for path in stages[0].directory.iterdir()) == sorted(
        path.name for path in stages[1].directory.iterdir()
    )


@pytest.mark.full
def test_two_killed_processes_end_with_the_same_bits(first: Stage, rows: list[Example], tmp_path: Path) -> None:
    """About 20 seconds."""
    method, engine = grpo(group=4, epochs=2, lwf={"strength": 0.1, "max_new_tokens": 3}), {"processes": 2}
    whole = following(first, tmp_path / "whole", method, rows, save_every=2, **engine)
    run(whole)
    stage = following(first, tmp_path / "killed", method, rows, save_every=2, **engine)
    train_and_die(stage, at=4)
    assert next(iter(run(stage))).step in (3, 5)
    name = "checkpoint/model.safetensors"
    assert (whole.directory / name).read_bytes() == (stage.directory / name).read_bytes()


@pytest.mark.full
def test_what_goes_wrong_in_a_process_is_the_users_error(base: Path, rows: list[Example], tmp_path: Path) -> None:
    """About 12 seconds."""
    stage = make_stage(tmp_path / "nan", base, sft(lr=1e30, epochs=3), rows, processes=2, max_skipped_steps=0)
    with pytest.raises(TrainingError, match="not finite in 1 steps"):
        run(stage)
    lost = make_stage(tmp_path / "lost", base, sft(), rows, parent=tmp_path / "nowhere", processes=2)
    with pytest.raises(CheckpointError, match="nowhere"):
        run(lost)


def _log(stage: Stage) -> list[str]:
    return (stage.directory / "train" / "log.jsonl").read_text().splitlines()
