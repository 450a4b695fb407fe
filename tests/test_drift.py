"""The drift meter: exact where it must be, within its interval elsewhere, and never made twice."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cpt_rft.config.schema import DriftConfig
from cpt_rft.data.parquet import write_split
from cpt_rft.engines.local.generate import end_token_ids
from cpt_rft.engines.local.scores import completion_logits
from cpt_rft.errors import CheckpointError
from cpt_rft.miniature.world import make_rows
from eval.asked import Model
from eval.drift import divergences, estimates, measure_drift, sums
from eval.meters import PAIRS, Asking, drift_path
from tests.helpers.engine import TASK, make_base

ASKING = Asking("direct", "miniature", 2, batch=3)
CONFIG = DriftConfig(rows=4, samples=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Three models of one tokenizer, unlike each other."""
    folder = tmp_path_factory.mktemp("drift")
    names = ("base", "start", "model")
    return {n: Model(make_base(folder / n, scale=1.5, seed=i), f"hash of {n}", ASKING) for i, n in enumerate(names)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("rows")
    found = {}
    for task in (TASK, "mini_superclevr"):
        write_split(folder / f"{task}.parquet", make_rows(task, "dev", 6, 0))
        found[task] = (folder / f"{task}.parquet", f"hash of {task}")
    return found


def test_a_model_has_not_drifted_from_itself(models: dict[str, Model]) -> None:
    twin = replace(models["base"], sha256="the same weights by another name")
    cells = divergences({"base": models["base"], "start": twin, "model": twin}, make_rows(TASK, "dev", 4, 0), 2)
    assert all(len(cells[pair]["kl"]) == 8 and set(cells[pair]["kl"]) == {0.0} for pair in PAIRS)


def test_a_model_of_two_tokens() -> None:
    """At the first position 0.5, 0.5 against 0.8, 0.2; at the others the other way; a third token is banned."""
    even, skew = torch.tensor([0.5, 0.5, 0.9]).log(), torch.tensor([0.8, 0.2, 0.1]).log()
    banned = torch.tensor([0.0, 0.0, -torch.inf])
    forth = 0.5 * torch.tensor(0.5 / 0.8).log() + 0.5 * torch.tensor(0.5 / 0.2).log()
    back = 0.8 * torch.tensor(0.8 / 0.5).log() + 0.2 * torch.tensor(0.2 / 0.5).log()
    found = sums(torch.stack([even, skew, skew]), torch.stack([skew, even, even]), banned, [1, 2])
    assert found == pytest.approx([float(forth), 2 * float(back)], rel=1e-5)


def enumerated(first: Model, second: Model, row: Any) -> float:
    """KL of answers of at most two tokens, over every answer there is."""
    (prompt,) = first.prompts([row])
    vocabulary = len(first.banned)
    answers = [[[token, 0] for token in range(vocabulary)]]
    with torch.no_grad():
        logs = [
            (completion_logits(model.network, [prompt], answers) + first.banned).double().log_softmax(-1)
            for model in (first, second)
        ]
    chances = logs[0].exp()
    each = torch.where(chances > 0, chances * (logs[0] - logs[1]), 0.0).sum(-1).view(vocabulary, 2)
    goes_on = chances[0].clone()
    goes_on[end_token_ids(first.policy)] = 0.0
    return float(each[0, 0] + (goes_on * each[:, 1]).sum())


def test_samples_agree_with_every_answer_there_is(models: dict[str, Model]) -> None:
    rows = make_rows(TASK, "dev", 6, 0)
    cells = divergences(models, rows, 64)
    for pair in ("base_to_model", "model_to_start"):
        first, second = (models[name] for name in pair.split("_to_"))
        exact = sum(enumerated(first, second, row) for row in rows) / len(rows)
        cell = cells[pair]
        # Of the sampling alone, each prompt being there: as if every sequence were a prompt of its own.
        _, sequence = estimates([{**cell, "prompts": list(range(len(cell["kl"])))}])
        assert sequence.low <= exact <= sequence.high
        assert sequence.high - sequence.low < 0.2 * exact


def test_a_stage_that_starts_at_the_base_is_measured_once(models: dict[str, Model], tmp_path: Path) -> None:
    first = {**models, "start": models["base"]}
    cells = divergences(first, make_rows(TASK, "dev", 3, 0), 1)
    assert cells["start_to_model"] is cells["base_to_model"] and cells["base_to_model"]["kl"][0] > 0
    both = divergences(models, make_rows(TASK, "dev", 3, 0), 1)
    assert both["start_to_model"]["kl"] != both["base_to_model"]["kl"]
    assert both["base_to_model"] == cells["base_to_model"] and both["model_to_base"] == cells["model_to_base"]


def test_prompts_of_two_tasks_are_not_one() -> None:
    cell = {"kl": [1.0, 3.0], "tokens": [1, 1], "prompts": [0, 1]}
    token, sequence = estimates([cell, {**cell, "kl": [5.0, 7.0]}])
    alone, _ = estimates([{"kl": [1.0, 3.0, 5.0, 7.0], "tokens": [1] * 4, "prompts": [0, 1, 2, 3]}])
    assert token == alone == sequence


class Count:
    """Counts how often models write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[Sequence[str]] = []
        sample = Model.sample

        def counted(model: Model, prompts: Any, rows: Any, group: int, purpose: str) -> Any:
            self.rows.append([row.task for row in rows])
            return sample(model, prompts, rows, group, purpose)

        monkeypatch.setattr(Model, "sample", counted)


def test_what_is_there_is_not_measured_again(
    models: dict[str, Model], data: dict[str, tuple[Path, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A further task measures itself alone; other weights, other sizes or a damaged file are measured anew."""
    count = Count(monkeypatch)
    one, other = ({task: data[task]} for task in data)
    measure_drift(models, one, tmp_path, CONFIG)
    before = drift_path(tmp_path, TASK).read_bytes()
    assert len(count.rows) == 6 and set(map(tuple, count.rows)) == {(TASK,) * 3, (TASK,)}
    count.rows.clear()
    measure_drift(models, {**one, **other}, tmp_path, CONFIG)
    assert {task for rows in count.rows for task in rows} == {"mini_superclevr"}
    assert drift_path(tmp_path, TASK).read_bytes() == before
    count.rows.clear()
    measure_drift(models, {**one, **other}, tmp_path, CONFIG)
    assert count.rows == []
    drift_path(tmp_path, TASK).write_bytes(before[:-20])
    measure_drift(models, one, tmp_path, CONFIG)
    assert drift_path(tmp_path, TASK).read_bytes() == before  # the same numbers to the last bit
    for change in ({"model": replace(models["model"], sha256="others")}, {}):
        count.rows.clear()
        measure_drift({**models, **change}, one, tmp_path, CONFIG if change else DriftConfig(rows=4, samples=1))
        assert len(count.rows) == 6


def test_models_of_other_tokens_are_refused(
    models: dict[str, Model], data: dict[str, tuple[Path, str]], tmp_path: Path
) -> None:
    strange = make_base(tmp_path / "strange")
    text = (strange / "tokenizer.json").read_text()
    (strange / "tokenizer.json").write_text(text + "\n")
    with pytest.raises(CheckpointError, match="have different tokenizers"):
        measure_drift({**models, "base": Model(strange, "x", ASKING)}, data, tmp_path / "out", CONFIG)
    with pytest.raises(CheckpointError, match="there is no such checkpoint directory"):
        measure_drift({**models, "base": Model(tmp_path / "nowhere", "x", ASKING)}, data, tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()
