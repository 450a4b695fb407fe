"""The preset ``paper_single_label``: the released reward, and where it may not be followed."""

import pytest

from cpt_rft.errors import install_extra
from cpt_rft.scoring import ScoringError, math_equality, reward, score


def judge(response, answer, style="cot", **changes):
    row = {"answer": answer, "references": [answer], "kind": "short_text", "preset": "paper_single_label"}
    return score(response, style=style, **row | changes)


@pytest.mark.parametrize(
    ("response", "label", "style", "earned"),
    [
        ("<think>x</think>\\boxed{Red}", "red", "cot", 1.0),  # mathruler ignores letter case
        ("<think>x</think>\\boxed{12 cm}", "12", "cot", 1.0),
        ("<think>x</think>\\boxed{0.5}", "\\frac{1}{2}", "cot", 1.0),
        ("<think>x</think>\\boxed{\\frac{2}{4}}", "\\frac{1}{2}", "cot", 0.1),  # unreduced is wrong to mathruler
        ("<think>x</think>\\boxed{5} \\boxed{", "5", "cot", 0.1),  # the last box is open, so there is none
        ("red", "red", "cot", 0.0),
        ("12 cm", "12", "direct", 1.0),
        ("\\boxed{red}", "red", "direct", 1.0),  # mathruler drops the commands of LaTeX
        ("the answer is red", "red", "direct", 0.0),
        ("1 / 2", "1/2", "direct", 1.0),
    ],
)
def test_the_reward_is_that_of_the_released_code(response, label, style, earned):
    assert reward(judge(response, label, style), style) == earned


def test_only_the_label_counts():
    assert judge("\\boxed{dog}", "B", references=["B", "dog"], kind="choice").lenient == 0.0


def test_best_effort_is_graded_in_the_same_way():
    result = judge("The answer is **Red**.", "red")
    assert (result.strict, result.lenient) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("<think>x</think>\\boxed{4}\\boxed{5}", "5"),  # boxes that contradict each other
        ("<think>x</think>no box", "None"),  # the released code grades the text "None"
        ("<think>x</think>\\boxed{}", "day"),  # both are empty once mathruler has removed units
    ],
)
def test_what_the_released_code_would_call_right(response, label):
    assert judge(response, label).strict == 0.0


def test_boxes_inside_the_thought_are_free():
    assert judge("<think>\\boxed{4}</think>\\boxed{5}", "5").strict == 1.0


def test_without_the_libraries_exact_answers_are_scored_and_others_say_what_to_install(monkeypatch):
    monkeypatch.setattr(math_equality, "NEEDED", ("no_such_library",))
    assert judge("\\boxed{red}", "red").strict == 1.0
    assert judge("\\boxed{green}", "red").strict == 0.0
    row = {"answer": "\\sqrt{3}", "references": ["\\sqrt{3}"], "kind": "latex"}
    assert score("\\sqrt {3}", **row, style="direct").lenient == 1.0
    with pytest.raises(ScoringError, match="no_such_library") as refusal:
        score("3^{1/2}", **row, style="direct")
    assert refusal.value.fix == install_extra("math")
