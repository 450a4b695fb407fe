"""Cases of official scorers, what ours say to them, and the one table of the differences."""

import ast
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from cpt_rft import scoring
from cpt_rft.scoring import choice, extract, jigsaw, math_equality, mmlu_pro, mmmu, pope, reward, score, vqa

CASES = Path(__file__).parents[1] / "vectors" / "scoring_cases.json"
TABLE = Path(scoring.__file__).with_name("differences.yaml")
DOCS = Path(__file__).parents[2] / "docs" / "scoring.md"
BEGIN, END = "<!-- made by code from here to the next mark -->", "<!-- end -->"
# What a case asks; its other columns are official answers.
INPUTS = {
    "answer", "answer_index", "choices", "grid", "ground_truth", "input", "items", "n_choices", "options", "prediction",
    "reference", "references", "response", "set", "target",
}  # fmt: skip
Case = Mapping[str, Any]


def lenient(kind: str, prediction: str, reference: str) -> float:
    return score(prediction, answer=reference, references=[reference], kind=kind, style="direct").lenient


def choices(case: Case) -> list[str]:
    return list(case["choices"].values())


def paper(case: Case) -> dict[str, float]:
    label = case["ground_truth"]
    result = score(
        case["response"], answer=label, references=[label], kind="latex", style="cot", preset="paper_single_label"
    )
    return {"overall": reward(result, "cot"), "format": result.format, "accuracy": result.strict}


def golds(case: Case) -> list[str]:
    return ast.literal_eval(case["answer"]) if case["answer"].startswith("[") else [case["answer"]]


def rates(case: Case) -> pope.Pope:
    return pope.aggregate((pope.prediction(given), label) for given, label in case["items"])


def grid(case: Case) -> jigsaw.Jigsaw:
    return jigsaw.grade(case["prediction"], case["ground_truth"], *case["grid"])


def mathematics(judge: str) -> Callable[[Case], Any]:
    return lambda case: math_equality.verdict(case["prediction"], case["ground_truth"], judge)


def normal_form(case: Case) -> str:
    return vqa.normalise(case["input"])


def vqa_accuracy(case: Case) -> float:
    return round(vqa.accuracy(case["prediction"], case["references"]), 6)


def exact_match(case: Case) -> float:
    return lenient("short_text", case["prediction"], case["reference"])


def pope_score(case: Case) -> float:
    return float(pope.prediction(case["prediction"]) == case["answer"])


def mmmu_choice(case: Case) -> str | None:
    return mmmu.parse_choice(case["prediction"], case["options"])


def mmmu_open(case: Case) -> bool:
    return mmmu.open_is_right(case["prediction"], golds(case))


#: What ours give, by rule and by column of the official answers; a column with a dot is a key inside a column.
OURS: dict[str, dict[str, Callable[[Case], Any]]] = {
    "vqa_answer_normalisation": dict.fromkeys(("official_vqa", "lmms", "vlmevalkit"), normal_form),
    "vqa_accuracy": dict.fromkeys(("official_vqa", "lmms_textvqa", "lmms_vizwiz", "vlmevalkit"), vqa_accuracy),
    "scienceqa_exact": {"score": lambda case: lenient("choice", case["prediction"], "ABCDE"[case["answer_index"]])},
    "vlmevalkit_mcq_can_infer": {
        "inferred": lambda case: choice.infer(extract.without_wrappers(case["prediction"]), choices(case))
    },
    "math_equivalence": {
        "mathruler_grade_answer": mathematics("mathruler"),
        "math_verify": mathematics("math_verify"),
        "lmms_MathVerifyFn_boxed": lambda case: float(mathematics("math_verify")(case)),
    },
    "boxed_extraction": {"extracted": lambda case: extract.last_box(case["input"])},
    "rl_rewards_geo3k_r1v": {"easyr1_math": paper, "verl_geo3k": lambda case: paper(case)["overall"]},
    "exact_match_gqa": dict.fromkeys(("lmms_exact_match", "vlmevalkit_accuracy"), exact_match),
    "pope_item": {
        "vlmevalkit_extracted": lambda case: (pope.prediction(case["prediction"]) or "").title() or None,
        "vlmevalkit_score": pope_score,
        "lmms_score": pope_score,
    },
    "pope_aggregate": {
        "lmms.accuracy": lambda case: round(rates(case).accuracy, 6),
        "lmms.precision": lambda case: round(rates(case).precision, 6),
        "lmms.recall": lambda case: round(rates(case).recall, 6),
        "lmms.f1_score": lambda case: round(rates(case).f1, 6),
        "lmms.yes_ratio": lambda case: round(rates(case).yes_share, 6),
        "vlmevalkit_percent.acc": lambda case: round(100 * rates(case).accuracy, 6),
        "vlmevalkit_percent.precision": lambda case: round(100 * rates(case).precision, 6),
        "vlmevalkit_percent.recall": lambda case: round(100 * rates(case).recall, 6),
        "vlmevalkit_percent.f1_Overall": lambda case: round(100 * rates(case).f1, 6),
    },
    "mmmu_multi_choice": dict.fromkeys(("official", "lmms"), mmmu_choice),
    "mmmu_open": dict.fromkeys(("official_eval_open", "lmms_eval_open"), mmmu_open),
    "mmlu_pro_extract": {"official": lambda case: mmlu_pro.extract(case["prediction"])},
    "jigsaw_grid": {
        "extracted": lambda case: jigsaw.parse(case["prediction"], len(case["ground_truth"])),
        "exact": lambda case: grid(case).exact,
        "patch_score": lambda case: grid(case).patches,
        "connection_score": lambda case: grid(case).connections,
    },
}


def rules() -> dict[str, Any]:
    return dict(json.loads(CASES.read_text(encoding="utf-8"))["rules"])


def table() -> dict[str, Any]:
    return dict(yaml.safe_load(TABLE.read_text(encoding="utf-8")))


def official(case: Case, column: str) -> Any:
    outer, _, inner = column.partition(".")
    return case[outer][inner] if inner else case[outer]


def found() -> Iterator[tuple[str, str, int, Any, Any]]:
    """Every case where ours differ: rule, column, number of the case, theirs, ours.

    Words by which an official function says that it found nothing count as none.
    """
    nothing = table()["nothing_found"]
    for rule, columns in OURS.items():
        for number, case in enumerate(rules()[rule]["cases"]):
            for column, ours in columns.items():
                theirs = official(case, column)
                is_nothing = any(type(theirs) is type(word) and theirs == word for word in nothing.get(rule, ()))
                given = ours(case)
                if given != (None if is_nothing else theirs):
                    yield rule, column, number, theirs, given


def listed() -> set[tuple[str, str, int]]:
    """What the table says differs: rule, column, number of the case."""
    return {
        (entry["rule"], column, number)
        for entry in table()["differences"]
        for column in entry["columns"]
        for number in entry["cases"]
    }


def columns_of(rule: str) -> set[str]:
    """The official answers of a rule: its columns that are no input."""
    return set(rules()[rule]["cases"][0]) - INPUTS


def page() -> str:
    """The part of docs/scoring.md that is made by code: kinds and the table of differences."""
    stored, words = rules(), table()
    lines = ["| rule | official answers | what ours do instead | cases |", "|---|---|---|---|"]
    for entry in words["differences"]:
        inputs = [stored[entry["rule"]]["cases"][number] for number in entry["cases"]]
        keys = ("prediction", "input", "response", "set")
        quoted = ", ".join(f"`{case[key]}`" for case in inputs for key in keys if key in case)
        lines.append(f"| {entry['rule']} | {', '.join(entry['columns'])} | {entry['reason']} | {quoted} |")
    lines += [f"| {entry['rule']} | | {entry['reason']} | beyond the cases |" for entry in words["beyond_the_cases"]]
    lines += [
        f"| {entry['rule']} | {', '.join(entry.get('columns', ['all']))} | Not claimed. {entry['reason']} | all |"
        for entry in words["not_claimed"]
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the table into the page."""
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n{page()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
