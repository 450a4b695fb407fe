"""The audit of the base model: what it measures and what it demands."""

from pathlib import Path

import pytest

from cpt_rft.checkpoint import load_policy
from cpt_rft.miniature.audit import Cell, failures, gains, measure
from cpt_rft.miniature.corpus import tokenizer_corpus
from cpt_rft.miniature.model import build_model, train_tokenizer, write_base
from cpt_rft.miniature.world import make_rows

FIT = [Cell(f"t{index}", style, 40.0, 60.0, 70.0) for index in range(4) for style in ("cot", "direct")]
GENERAL = [Cell("g", "cot", 80.0, 80.0, 50.0)]
JOINT = [Cell(f"t{index}", "direct", 70.0, 75.0, 30.0) for index in range(4)]


def test_a_fit_base_passes() -> None:
    assert failures(FIT, GENERAL, JOINT) == []
    assert gains(FIT, JOINT) == {"t0": 15.0, "t1": 15.0, "t2": 15.0, "t3": 15.0}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"strict": 19.9}, "strict accuracy 19.9"),
        ({"strict": 65.1}, "strict accuracy 65.1"),
        ({"skill": 39.9}, "any-form skill 39.9"),
        ({"skill": 80.1}, "any-form skill 80.1"),
        ({"mixed": 49.9}, "only 49.9 % of prompts"),
    ],
)
def test_each_bound_is_checked(change: dict[str, float], complaint: str) -> None:
    found = failures([FIT[0]._replace(**change), *FIT[1:]], GENERAL, JOINT)
    assert len(found) == 1
    assert complaint in found[0]
    assert "t0 (cot)" in found[0]


def test_weak_general_abilities_and_nothing_to_learn_are_findings() -> None:
    assert "69.9" in failures(FIT, [GENERAL[0]._replace(skill=69.9)], JOINT)[0]
    flat = [cell._replace(skill=69.0) for cell in JOINT[:2]] + JOINT[2:]
    assert "only 2 tasks gain" in failures(FIT, GENERAL, flat)[0]


def test_measure_counts_samples(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(tokenizer_corpus(20), 400)
    write_base(tmp_path / "base", build_model(400, 0), tokenizer)
    policy = load_policy(tmp_path / "base")
    rows = make_rows("mini_pope", "dev", 3, 0)
    first, again = (measure(policy, rows, "direct", "miniature", 4) for _ in range(2))
    assert first == again
    assert first.strict <= first.skill
    assert 0.0 <= first.mixed <= 100.0
