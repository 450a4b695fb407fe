"""The Fisher meter against the engine's own objectives and against the divergence of a real small step."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cpt_rft.algos.fisher import fisher_risk
from cpt_rft.checkpoint import EncodedPrompt
from cpt_rft.config.schema import FisherConfig
from cpt_rft.data.example import Example
from cpt_rft.data.parquet import write_split
from cpt_rft.engines.local.generate import Completion
from cpt_rft.engines.local.grpo import GrpoObjective
from cpt_rft.engines.local.scores import completion_logits, score_functions
from cpt_rft.engines.local.sft import SftObjective
from cpt_rft.miniature.world import make_rows
from eval.asked import Model
from eval.fisher import fisher_scores, measure_fisher, old_rows, risks
from eval.meters import Asking, fisher_path
from tests.helpers.engine import TASK, grpo, make_base, sft

GROUP = 4


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Model:
    base = make_base(tmp_path_factory.mktemp("fisher") / "base")
    return Model(base, "hash of the start", Asking("direct", "miniature", 1))


@pytest.fixture(scope="module")
def rows(start: Model) -> list[Example]:
    """Three rows whose answer is something that the model says, so that some completions are right; one without."""
    rows = make_rows(TASK, "train", 24, 3)
    groups = start.sample(start.prompts(rows), rows, GROUP, "fisher update")
    texts = [[start.policy.tokenizer.decode(each.token_ids).strip() for each in group] for group in groups]
    said = [(row, next(filter(str.isalnum, some), "")) for row, some in zip(rows, texts, strict=True)]
    asked = [replace(row, answer=word, references=(word,)) for row, word in said if word][:3]
    return [*asked, next(row for row in rows if row.id not in {one.id for one in asked})]


@pytest.fixture(scope="module")
def old() -> list[Example]:
    """A few prompts, each many times under another name, so that it is answered anew."""
    rows = make_rows("mini_superclevr", "dev", 3, 0)
    return [replace(row, id=f"{row.id} {number}") for number in range(60) for row in rows]


class Same(GrpoObjective):
    """GRPO on the completions that the meter draws."""

    def __init__(self, start: Model, rows: Sequence[Example]) -> None:
        method = grpo(kl_coef=0.0, group=GROUP, max_new_tokens=1)
        super().__init__(start.policy, None, method, "miniature", ("test",))
        self.start, self.asked = start, rows

    def rollout(self, step: int, prompts: Sequence[EncodedPrompt]) -> list[list[Completion]]:
        return self.start.sample(prompts, self.asked, GROUP, "fisher update")


def gradient(start: Model, objective: SftObjective | GrpoObjective, rows: list[Example]) -> Tensor:
    """What the engine would step along, flat."""
    start.policy.model.zero_grad()
    objective.gradients(1, rows, lambda loss: loss.backward())
    flat = torch.cat([weight.grad.flatten() for weight in start.policy.model.parameters() if weight.grad is not None])
    start.policy.model.zero_grad()
    return flat


def divergence_of_step(start: Model, rows: Sequence[Example], step_W: Tensor) -> float:
    """KL of one-token answers, over the whole vocabulary, that a step of the real weights causes."""
    prompts = start.prompts(rows)
    weights = list(start.policy.model.parameters())

    def logs() -> Tensor:
        with torch.no_grad():
            logits = completion_logits(start.network, prompts, [[[0]] for _ in prompts]) + start.banned
        return logits.double().log_softmax(-1)

    before, kept = logs(), [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, part in zip(weights, step_W.split([weight.numel() for weight in weights]), strict=True):
            weight.add_(part.view_as(weight))
        after = logs()
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)
    return float(torch.where(before.exp() > 0, before.exp() * (before - after), 0.0).sum(-1).mean())


def test_the_risk_is_twice_the_divergence_of_a_small_step(
    start: Model, rows: list[Example], old: list[Example]
) -> None:
    """Of the real model along the gradient of the real objectives, on the prompts of the old task."""
    found = risks(start, rows, old, GROUP)["updates"]
    objectives = {"sft": SftObjective(start.policy, sft(), "miniature"), "grpo": Same(start, rows)}
    for name, objective in objectives.items():
        direction_W = gradient(start, objective, rows)
        assert found[name]["squared_norm"] == pytest.approx(float(direction_W.square().sum()), rel=1e-4)
        step = 0.01 / float(direction_W.norm())
        expected = 2 * divergence_of_step(start, old[:3], -step * direction_W) / step**2
        _, low, high = found[name]["risk"]
        assert low <= expected <= high
        assert high - low < expected
        assert found[name]["diagonal"] > 0


def test_the_parts_are_those_of_the_mathematics(start: Model, rows: list[Example], old: list[Example]) -> None:
    """The risk by the function of the algorithms, the diagonal by squares, and the claim prompt by prompt."""
    few = old[:7]
    found, scores_KW = risks(start, rows, few, GROUP), fisher_scores(start, few)
    direction_W = -gradient(start, SftObjective(start.policy, sft(), "miniature"), rows)
    expected = fisher_risk({"w": direction_W}, [{"w": each} for each in scores_KW])
    assert found["updates"]["sft"]["risk"][0] == pytest.approx(expected, rel=1e-3)
    diagonal = float((scores_KW.double().square().mean(0) * direction_W.double().square()).sum())
    assert found["updates"]["sft"]["diagonal"] == pytest.approx(diagonal, rel=1e-3)
    prompts = start.prompts(rows)
    groups = start.sample(prompts, rows, GROUP, "fisher update")
    for place, (prompt, row, group) in enumerate(zip(prompts, rows, groups, strict=True)):
        texts = [start.policy.tokenizer.decode(each.token_ids, skip_special_tokens=True) for each in group]
        rewards = torch.tensor([float(text.strip() == row.answer.strip()) for text in texts]).double()
        assert found["prompts"]["reward_variance"][place] == pytest.approx(float(rewards.var()))
        each_GW = score_functions(start.network, prompt, [one.token_ids for one in group], start.banned).double()
        squares_G = ((scores_KW.double() @ each_GW.T) * (rewards - rewards.mean())).square().mean(0)
        assert found["prompts"]["rft"][place] == pytest.approx(float(squares_G.sum()) / (GROUP - 1), rel=1e-4, abs=1e-9)
    assert found["prompts"]["reward_variance"][3] == found["prompts"]["rft"][3] == 0.0
    assert max(found["prompts"]["reward_variance"]) > 0


def test_without_rationales_there_is_no_supervised_update(
    start: Model, rows: list[Example], old: list[Example]
) -> None:
    thinking = Model(start.directory, start.sha256, replace(start.asking, style="cot"))
    found = risks(thinking, [replace(row, rationale=None) for row in rows], old[:2], 2)
    assert found["updates"]["sft"] is None and found["prompts"]["sft"] is None
    assert found["updates"]["grpo"]["risk"][0] == 0.0  # nothing is right


def test_old_tasks_count_alike(tmp_path: Path) -> None:
    for task, count in (("mini_gqa", 5), ("mini_superclevr", 2)):
        write_split(tmp_path / task, make_rows(task, "dev", count, 0))
    tasks = [row.task for row in old_rows([tmp_path / "mini_gqa", tmp_path / "mini_superclevr"], 5)]
    assert tasks == ["mini_gqa", "mini_superclevr", "mini_gqa", "mini_superclevr", "mini_gqa"]


def test_a_risk_that_is_there_is_not_measured_again(
    start: Model, rows: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = []
    for task, split, count in ((TASK, "train", 3), ("mini_superclevr", "dev", 3)):
        write_split(tmp_path / f"{task}.parquet", make_rows(task, split, count, 0))
        sides.append({task: (tmp_path / f"{task}.parquet", f"hash of {task}")})
    config = FisherConfig(rows=2, group=2, scores=2)
    measure_fisher(start, sides[0], sides[1], tmp_path / "meters", config)
    before = fisher_path(tmp_path / "meters").read_bytes()
    calls = []
    monkeypatch.setattr("eval.fisher.risks", lambda *a: calls.append(a) or {})
    measure_fisher(start, sides[0], sides[1], tmp_path / "meters", config)
    assert calls == [] and fisher_path(tmp_path / "meters").read_bytes() == before
    measure_fisher(replace(start, sha256="other"), sides[0], sides[1], tmp_path / "meters", config)
    assert len(calls) == 1
