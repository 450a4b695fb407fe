"""Scoring: what counts as right, in which form, and what no form of a wrong answer can earn."""

import re
import string
import subprocess
import sys
import time
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_rft.data.example import Kind
from cpt_rft.scoring import KINDS as REGISTERED
from cpt_rft.scoring import PRESETS, Score, ScoringError, reward, score
from cpt_rft.scoring.extract import after_thought, balanced_boxes, final_answer, follows_cot_format, tagged, unwrap

OPTIONS = ("cat", "dog", "bird", "fish")
CASES = {  # kind: (answer, references, a wrong answer, all options in one line)
    "choice": ("B", ["B", "dog"], "A", "A B C D"),
    "short_text": ("red", ["red", "crimson"], "blue", "red blue green"),
    "number": ("3", ["3", "three"], "4", "1 2 3 4 5"),
    "yes_no": ("yes", ["yes", "true"], "no", "yes no"),
    "latex": ("2\\sqrt{3}", ["2\\sqrt{3}"], "3", "2\\sqrt{3} 3"),
    "sequence": ("3,1,2", ["3,1,2"], "1,2,3", "1,2,3 3,1,2"),
    "vqa": ("red", ["red"] * 6 + ["crimson"] * 4, "blue", "red blue green"),
    "mmmu_choice": ("B", ["B"], "A", "A B C D"),
    "mmmu_open": ("Paris", ["Paris", "42"], "Rome", "Paris Rome 41 42 43"),
    "mmlu_pro": ("B", ["B"], "A", "A B C D E F G H I J"),
}
KINDS = list(CASES)
LABEL_KINDS = [kind for kind in KINDS if kind not in ("vqa", "mmmu_open")]  # strict is the label itself
READ_FREE_TEXT = {"mmmu_choice", "mmmu_open", "mmlu_pro"}  # officially, some letter of a list of letters is the answer
STYLES = ["cot", "direct"]


def judge(response, kind="short_text", style="cot", **changes):
    answer, references, *_ = CASES[kind]
    row = {"answer": answer, "references": references, "kind": kind, "style": style, "options": OPTIONS}
    return score(response, **row | changes)


def required_form(text, style):
    return f"<think>so</think>\\boxed{{{text}}}" if style == "cot" else text


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_label_in_the_required_form_is_right_and_earns_one(kind, style):
    result = judge(required_form(CASES[kind][0], style), kind, style)
    assert result == Score(1.0, 1.0, 1.0, CASES[kind][0], "answered")
    assert reward(result, style) == 1.0


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_answer_in_the_required_form_earns_the_format_only(kind, style):
    result = judge(required_form(CASES[kind][2], style), kind, style)
    assert (result.strict, result.lenient, result.format) == (0.0, 0.0, 1.0)
    assert reward(result, style) == (0.1 if style == "cot" else 0.0)


@pytest.mark.parametrize("kind", LABEL_KINDS)
def test_another_reference_is_lenient_only(kind):
    reference = CASES[kind][1][-1]
    result = judge(required_form(reference, "cot"), kind)
    assert result.lenient == 1.0
    assert result.strict == float(reference == CASES[kind][0])


@pytest.mark.parametrize(
    ("response", "style", "strict", "lenient", "format_kept"),
    [
        ("red", "cot", 0, 1, 0),
        ("\\boxed{red}", "cot", 1, 1, 0),
        ("<think>x \\boxed{red}", "cot", 1, 1, 0),
        ("pre <think>x</think>\\boxed{red}", "cot", 1, 1, 0),
        ("< think > x < / think > \\boxed{ red } ", "cot", 1, 1, 1),
        ("<think>\\boxed{blue}</think>\\boxed{red}", "cot", 1, 1, 1),
        ("<think>x</think>\\boxed{Red}", "cot", 0, 1, 1),
        ("<think>x</think>\\boxed{red.}", "cot", 0, 1, 1),
        ("<think>x</think>\\boxed{red", "cot", 0, 0, 0),
        ("<think>x</think> <answer>red</answer>", "cot", 0, 1, 0),
        ("<think>x</think>The answer is **red**.", "cot", 0, 1, 0),
        ("<think>red", "cot", 0, 0, 0),
        ("\\boxed{blue} or \\boxed{red}", "cot", 0, 0, 0),
        (" red\n", "direct", 1, 1, 1),
        ("Red", "direct", 0, 1, 1),
        ("red.", "direct", 0, 1, 1),
        ("Answer: red", "direct", 0, 1, 1),
        ("red\nblue", "direct", 0, 0, 0),
        ("<think>x</think>\\boxed{red}", "direct", 0, 1, 0),
        ("<answer>red</answer>", "direct", 0, 1, 0),
        ("**red**", "direct", 0, 1, 1),
        ("**red** **blue**", "direct", 0, 0, 1),
        ("dark red", "direct", 0, 0, 1),
        ("answer is red\nanswer is blue", "direct", 0, 0, 0),
    ],
)
def test_forms(response, style, strict, lenient, format_kept):
    result = judge(response, style=style)
    assert (result.strict, result.lenient, result.format) == (strict, lenient, format_kept)


@pytest.mark.parametrize(
    ("kind", "candidate", "right"),
    [
        ("choice", "b", True),
        ("choice", "(B).", True),
        ("choice", "B: Dog", True),
        ("choice", "A. dog", False),
        ("choice", "B. cat", False),
        ("choice", "dog cat", False),
        ("choice", "It must be B", True),
        ("choice", "a dog sits there", True),
        ("choice", "A or B", False),
        ("yes_no", "Yes, there is one.", True),
        ("yes_no", "There is no such thing", False),
        ("short_text", "crim-son!", True),
        ("short_text", "?!", False),
        ("vqa", "The RED.", True),
        ("mmmu_choice", "(A) or rather (B)", True),
        ("mmmu_choice", "**B**", True),
        ("mmmu_choice", "dog", False),
        ("mmmu_open", "The answer is 42.0", True),
        ("mmmu_open", "It is Paris, France", True),
        ("mmlu_pro", "The answer is (B). Not C", True),
        ("mmlu_pro", "(b)", False),
        ("mmlu_pro", "Answer: B, since C is wrong", True),
        ("mmmu_open", "so Paris is wrong", False),
        ("latex", "\\sqrt{12}", True),
        ("latex", "3.4641", False),
        ("number", "3.0", True),
        ("number", "+3", True),
        ("number", "three", True),
        ("number", "03", True),
        ("number", "30", False),
        ("number", "3 4", False),
        ("number", "9" * 10_000, False),
        ("yes_no", "Yes!", True),
        ("yes_no", "yes, no", False),
        ("number", "-3", False),
        ("short_text", "CRIMSON", True),
        ("short_text", "re d", False),
        ("latex", "2 \\sqrt { 3 }", True),
        ("latex", "2\\Sqrt{3}", False),
        ("sequence", "[3, 1, 2]", True),
        ("sequence", "3 1 2", True),
        ("sequence", "3,1", False),
        ("sequence", "312", False),
    ],
)
def test_lenient_comparison_by_kind(kind, candidate, right):
    assert judge(candidate, kind, "direct").lenient == float(right)


def test_number_words_are_digits_only_where_listed():
    assert judge("three", "number", "direct", references=["3"]).lenient == 0.0


@pytest.mark.parametrize(
    ("response", "style", "truncated", "status", "extracted"),
    [
        ("", "cot", False, "no_answer", None),
        ("  \n", "direct", False, "no_answer", None),
        ("<think>never ends", "cot", False, "no_answer", None),
        ("<think>never ends", "cot", True, "truncated", None),
        ("<think>x</think>\\boxed{}", "cot", False, "no_answer", None),
        ("<think>x</think>red", "cot", False, "answered", None),
        ("blue", "direct", False, "answered", "blue"),
        ("\\boxed{blue}\\boxed{red}", "cot", False, "answered", "red"),
        ("<think>\ufffd</think>\\boxed{red}", "cot", False, "undecodable", "red"),
        ("red\udc80", "direct", False, "undecodable", "red\udc80"),
        ("red\ufffd", "direct", True, "truncated", "red\ufffd"),
        ("caf\u00e9", "direct", False, "answered", "caf\u00e9"),
    ],
)
def test_status_and_what_strict_looked_at(response, style, truncated, status, extracted):
    result = judge(response, style=style, truncated=truncated)
    assert (result.status, result.extracted) == (status, extracted)


def test_a_truncated_response_counts_what_is_there():
    result = judge("<think>x</think>\\boxed{red} and then", truncated=True)
    assert (result.strict, result.status) == (1.0, "truncated")


# Source: shared scoring cases, rule boxed_extraction (mathruler 0.1.0 extract_boxed_content; "None" is absent here).
@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("The answer is \\boxed{5}", "5"),
        ("\\boxed{\\frac{1}{2}} ok", "\\frac{1}{2}"),
        ("first \\boxed{1} then \\boxed{2}", "2"),
        ("no box", None),
        ("\\boxed{unclosed", None),
        ("\\boxed{ 7 }", " 7 "),
        ("\\boxed{}", ""),
        ("\\boxed{\\boxed{4}}", "4"),
        ("}\\boxed{3}{", "3"),
    ],
)
def test_the_last_balanced_box(text, last):
    assert (balanced_boxes(text) or [None])[-1] == last


# Source: shared scoring cases, rule rl_rewards_geo3k_r1v, column easyr1_math: (overall, format, accuracy).
@pytest.mark.parametrize(
    ("response", "overall"),
    [
        ("<think>x</think> \\boxed{5}", 1.0),
        ("<think>x</think>\\boxed{6}", 0.1),
        ("<think>x</think> 5", 0.0),
        ("<think>a</think> <answer>5</answer>", 0.0),
        ("pre <think>x</think> \\boxed{5}", 0.9),
        (" <think>x</think> \\boxed{5}", 1.0),
        ("<think>x \\boxed{5}", 0.9),
        ("< think > x < / think > \\boxed{5}", 1.0),
        ("<think>x</think><answer> 5 </answer>\n", 0.0),
        ("5", 0.0),
    ],
)
def test_the_reward_is_that_of_the_released_code(response, overall):
    assert reward(judge(response, "number", answer="5", references=["5"]), "cot") == overall


TAGS = ["<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "**", "$", " "]
pieces = st.lists(st.sampled_from([*TAGS, *"{./A3\n\ud800\u202e\x00", "red", "blue", "answer is "]), max_size=30).map(
    "".join
)


@given(pieces)
def test_the_format_is_that_of_the_released_regular_expression(text):
    cleaned = re.sub(r"\s*(<|>|/)\s*", r"\1", text)
    expected = re.fullmatch(r"<think>.*</think>.*\\boxed\{.*\}.*", cleaned, re.DOTALL) is not None
    assert follows_cot_format(text) == expected


@given(pieces, st.sampled_from(KINDS), st.sampled_from(STYLES), st.sampled_from(list(PRESETS)))
def test_scores_lie_between_zero_and_one_and_strict_implies_lenient(text, kind, style, preset):
    result = judge(text, kind, style, preset=preset)
    assert kind == "vqa" or {result.strict, result.lenient, result.format} <= {0.0, 1.0}
    assert 0.0 <= result.strict <= result.lenient <= 1.0
    assert 0.0 <= reward(result, style) <= 1.0
    assert result.extracted is None or result.extracted.strip() == result.extracted != ""


tags_only = st.lists(st.sampled_from([*TAGS, "\\boxed{}"]), max_size=12).map("".join)


@given(tags_only, st.sampled_from(KINDS), st.sampled_from(STYLES), st.sampled_from(list(PRESETS)))
def test_tags_alone_earn_no_more_than_a_wrong_answer(text, kind, style, preset):
    wrong = judge(required_form(CASES[kind][2], style), kind, style, preset=preset)
    result = judge(text, kind, style, preset=preset)
    assert reward(result, style) <= reward(wrong, style)
    assert result.lenient == 0.0


@given(
    st.sampled_from(KINDS),
    st.sampled_from(STYLES),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(["\\boxed{%s}", "<answer>%s</answer>", "**%s**", "%s\n", "%s, "]),
    st.sampled_from(list(PRESETS)),
)
def test_listing_every_option_earns_no_more_than_a_wrong_answer(kind, style, repeats, thought, wrapper, preset):
    right, _, wrong, every_option = CASES[kind]
    listings = [wrapper.replace("%s", wrong) + wrapper.replace("%s", right), wrapper.replace("%s", every_option)]
    floor = reward(judge(required_form(wrong, style), kind, style, preset=preset), style)
    for listing in listings:
        result = judge(("<think></think>" if thought else "") + listing * repeats, kind, style, preset=preset)
        assert reward(result, style) <= floor
        assert result.lenient == 0.0 or (preset == "official" and kind in READ_FREE_TEXT)


@given(st.sampled_from(KINDS), st.sampled_from(STYLES), st.integers(2, 50), st.sampled_from(list(PRESETS)))
def test_repeating_a_box_earns_no_more_than_one_box(kind, style, repeats, preset):
    for text in CASES[kind][0], CASES[kind][2]:
        once = f"<think>so</think>\\boxed{{{text}}}"
        often = once + f"\\boxed{{{text}}}" * repeats
        one, many = (reward(judge(response, kind, style, preset=preset), style) for response in (once, often))
        assert many <= one


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_earns_nothing(kind, style, preset):
    for text in "", " ", "\n\n", "\u200b", "{}", "?", "\\boxed{}", "\\boxed{ }", "the", "None":
        result = judge(text, kind, style, preset=preset, references=["", *CASES[kind][1]])
        assert (result.strict, result.lenient) == (0.0, 0.0), text


@given(st.text(string.ascii_letters + string.digits + " .,()", max_size=20), st.sampled_from(LABEL_KINDS))
def test_a_text_in_the_required_form_is_right_only_if_it_is_the_label(text, kind):
    assert judge(required_form(text, "cot"), kind).strict == float(text.strip() == CASES[kind][0])
    assert judge(text, kind, "direct").strict == float(text.strip() == CASES[kind][0])


@pytest.mark.parametrize("unit", [*TAGS, *"{\na<>/9.(,`'\x00", "\\boxed{1}", "<answer>a</answer>", "**a", "answer is "])
@pytest.mark.parametrize("style", STYLES)
def test_a_hostile_line_of_100_kb_takes_linear_time(unit, style):
    text = unit * (100_000 // len(unit))
    started = time.process_time()
    for kind in KINDS:
        judge(text, kind, style)
    assert time.process_time() - started < 3.0  # quadratic time would be minutes


def test_a_thousand_short_answers_a_tenth_of_a_second():
    started = time.process_time()
    for _ in range(1000):
        judge("<think>a red dog is here</think>\\boxed{blue}")
    assert time.process_time() - started < 0.1


def test_pieces_of_extraction():
    assert after_thought("a</think>b</think> c") == " c"
    assert after_thought("a</think>b<think>c") == ""
    assert tagged("<answer>1<answer>2</answer>", "answer") == ["2"]
    assert final_answer("<answer>a</answer> answer is b") == "a"
    assert unwrap("$" * 40) != ""
    assert unwrap("`**\"'*x*'\"**`.") == "x"


def test_lenient_is_at_least_strict_where_the_label_reads_like_a_phrase():
    references = ["answer: 7"] * 3 + ["7 pm"] * 7
    result = judge("answer: 7", "vqa", "direct", answer="answer: 7", references=references)
    assert result.strict == result.lenient == pytest.approx(0.9)


def test_every_kind_of_a_row_has_rules_and_cases():
    assert set(REGISTERED) == set(CASES) == set(get_args(Kind))


@pytest.mark.parametrize(("changes", "named"), [({"preset": "papper"}, "'papper'"), ({"kind": "vqa2"}, "'vqa2'")])
def test_an_unknown_name_is_refused_with_those_that_exist(changes, named):
    with pytest.raises(ScoringError, match=named) as refusal:
        score("red", **{"answer": "red", "references": ["red"], "kind": "short_text", "style": "cot"} | changes)
    assert "use one of" in refusal.value.fix


def test_scoring_imports_neither_torch_nor_transformers():
    code = "import sys, cpt_rft.scoring; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"torch", "transformers", "numpy", "pyarrow", "PIL", "pydantic", "sympy", "yaml"}
