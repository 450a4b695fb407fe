"""The benchmark of the local engine: it counts operations rightly, runs, and its page shows its figures; no timing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cpt_rft.checkpoint import Policy, load_policy
from tests.helpers.engine import make_base, random_prompt, stock_inputs

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from operations import Model, operations  # noqa: E402

GROUP, NEW = 3, 5


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load_policy(make_base(tmp_path_factory.mktemp("operations") / "base"))


def counted(policy: Policy, tokens: list[int], before: int) -> int:
    """Operations of the stock model over one row, as torch counts them: attention over all pairs, by plain products."""
    policy.model.set_attn_implementation("eager")
    prompt = random_prompt(policy, before, 4, (6, 6))
    inputs = stock_inputs(policy, prompt, tokens)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy.model(**inputs, logits_to_keep=1)
    return int(counter.get_total_flops())


def test_the_operations_of_a_prompt_are_those_of_the_stock_model(policy: Policy) -> None:
    model = Model.read(json.loads((policy.directory / "config.json").read_text()))
    length = 3 + 9 + 2 + 4
    ours = model.picture(3, 3) + model.tokens(length) + model.pairs(length**2) + model.head(1)
    assert counted(policy, [], 3) == ours


def test_operations_grow_as_the_work_does() -> None:
    model = Model(1, 0, 0, 0, 1, 0, 0, 0, 0, 0)  # nothing but a head: two operations a logit
    case: dict[str, Any] = {"prompts": 2, "group": GROUP, "new_tokens": NEW, "rows": [{"tokens": 9}], "picture": [1, 1]}
    logits = 2 * 2 * GROUP * NEW
    for work, passes in (("rollout", 1), ("sft", 3), ("grpo", 4)):
        naive = operations(model, case | {"work": work}, shared=False)
        assert naive - 2 * GROUP * passes * model.picture(1, 1) == passes * logits


def test_sharing_saves_the_prompts_of_all_but_one(policy: Policy) -> None:
    model = Model.read(json.loads((policy.directory / "config.json").read_text()))
    case: dict[str, Any] = {
        **{"prompts": 1, "group": 4, "new_tokens": 6, "rows": [{"tokens": 30}], "picture": [3, 3], "work": "rollout"}
    }
    naive, shared = (operations(model, case, shared=each) for each in (False, True))
    prompt = model.picture(3, 3) + model.tokens(30) + model.pairs(30 * 31 / 2)
    assert naive - shared == pytest.approx(3 * prompt + model.unread(29))


def test_both_sides_run_in_turn(tmp_path: Path) -> None:
    """Our side against itself at the smallest size: the peers need environments of gigabytes."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks/speed.py"),
        "grpo_zero_groups",
        "--size",
        "smoke",
        "--rounds",
        "2",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--out", str(tmp_path)], env=environment, check=True, capture_output=True)
    told = json.loads((tmp_path / "grpo_zero_groups.smoke.cpu.json").read_text())
    assert len(told["ratios"]) == 2 and min(told["ratios"]) > 0
    assert told["operations_ratio"] > 1 and told["share_of_limit"] > 0
    assert min(*told["peak_mib"], told["matrix_gflops"]) > 0
    assert told["seed"] == 0 and "--size smoke" in told["command"] and told["versions"]["ours"]["torch"]


@pytest.mark.parametrize("work", ["sft", "rollout", "evaluate"])
def test_every_work_of_ours_runs(tmp_path: Path, work: str) -> None:
    from cases import write_case

    write_case(tmp_path / "case", work, "smoke", prompts=3, new_tokens=4)
    told = {"threads": 1, "device": "cpu", "dtype": "float32", "batch": 2, "frozen": True}
    command = [sys.executable, str(ROOT / "benchmarks/sides/ours.py"), str(tmp_path / "case"), json.dumps(told)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, input="go\ngo\n", env=environment, check=True, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get("cpu", 1) > 0 for line in lines] == [True, True, True]


def test_the_page_shows_the_figures_that_were_measured() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/table.py"), "--check"]
    assert subprocess.run(command).returncode == 0, "run python benchmarks/table.py"
