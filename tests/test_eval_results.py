"""results.json from the records of a run directory: its form, its numbers, what it refuses."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from eval import metrics
from eval.records import RecordError, read_records, record_path, write_contract, write_records
from eval.results import build_results, without_times, write_results
from eval.runs import IncompleteRunError, Run
from eval.table import apart_sheet, markdown, sheets, terminal
from eval.words import verdict
from tests.helpers.synthetic_run import GENERAL, write_run

TASKS = ("mini_textvqa", "mini_gqa", "mini_scienceqa")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("results") / "run", tasks=TASKS, seeds=(0, 1), rows=24)


@pytest.fixture(scope="module")
def results(run: Path) -> dict[str, Any]:
    return build_results(run)


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_form_is_that_of_the_design(results: dict[str, Any]) -> None:
    assert {"experiment", "contract", "tasks", "methods"} <= results.keys()
    assert results["tasks"] == list(TASKS)
    assert results["missing"] == []
    assert list(results["methods"]) == ["sft", "grpo", "multitask"]
    for name, method in results["methods"].items():
        assert list(method["seeds"]) == ["0", "1"]
        for entry in method["seeds"].values():
            wanted = {"order", "train_style", "lr", "matrix", "avg_acc", "fm", "bwt", "learned", "by_style", "general"}
            assert wanted | {"train_seconds"} <= entry.keys()
            stages = 1 if name == "multitask" else len(TASKS)
            assert np.shape(entry["matrix"]) == (stages + 1, len(TASKS))
            assert len(entry["general"]) == stages + 1
            assert set(entry["general"][0]) == set(GENERAL)
            for style in ("cot", "direct"):
                block = entry["by_style"][style]
                assert {"matrix", "avg_acc", "fm", "bwt", "lenient"} <= block.keys()
                assert np.shape(block["lenient"]["matrix"]) == np.shape(block["truncated"]) == (stages + 1, len(TASKS))
            native = entry["by_style"][entry["train_style"]]
            assert [entry[key] for key in ("matrix", "avg_acc", "fm", "bwt")] == [
                native[key] for key in ("matrix", "avg_acc", "fm", "bwt")
            ]
    assert json.loads(json.dumps(results)) == results


def test_every_cell_is_the_mean_of_its_records(run: Path, results: dict[str, Any]) -> None:
    for name, method in results["methods"].items():
        for seed, entry in method["seeds"].items():
            chain = run / name / "order0" / f"seed{seed}"
            stages = ["1_multitask"] if name == "multitask" else [f"{i}_{task}" for i, task in enumerate(TASKS, 1)]
            for style in ("cot", "direct"):
                for i, where in enumerate([run / "base" / "eval", *(chain / stage / "eval" for stage in stages)]):
                    for j, task in enumerate(TASKS):
                        records = read_records(record_path(where, task, style))
                        block = entry["by_style"][style]
                        strict, lenient = (
                            100 * sum(getattr(record, kind) for record in records) / len(records)
                            for kind in ("strict", "lenient")
                        )
                        assert block["matrix"][i][j] == pytest.approx(strict, abs=1e-5)
                        assert block["lenient"]["matrix"][i][j] == pytest.approx(lenient, abs=1e-5)
                        for status in ("truncated", "no_answer", "undecodable"):
                            share = 100 * sum(record.status == status for record in records) / len(records)
                            assert block[status][i][j] == pytest.approx(share, abs=1e-5)


def test_metrics_are_those_of_the_matrix(results: dict[str, Any]) -> None:
    for name in ("sft", "grpo"):
        for entry in results["methods"][name]["seeds"].values():
            for block in (*entry["by_style"].values(), *(part["lenient"] for part in entry["by_style"].values())):
                for key, metric in (metrics.HEADLINE | metrics.FURTHER).items():
                    assert block[key] == pytest.approx(float(metric(block["matrix"])), abs=1e-4), key
                assert block["fm_null"]["mean"] <= 0
                assert block["flips"]["all"]["rows"] == 24 * (len(TASKS) - 1)
                balance = sum(part["gained"] - part["lost"] for part in block["flips"]["tasks"].values())
                assert block["bwt"] == pytest.approx(100 * balance / (24 * (len(TASKS) - 1)), abs=1e-4)


def test_a_joint_method_has_an_average_and_no_forgetting(results: dict[str, Any]) -> None:
    entry = results["methods"]["multitask"]["seeds"]["0"]
    assert entry["fm"] is None
    assert entry["bwt"] is None
    assert entry["avg_acc"] == entry["learned"] == pytest.approx(np.mean(entry["matrix"][-1]))
    best = np.mean(
        [seed["by_style"]["direct"]["matrix"][-1] for seed in results["methods"]["multitask"]["seeds"].values()], axis=0
    )
    learner = results["methods"]["sft"]["seeds"]["1"]["by_style"]["direct"]
    assert learner["intransigence"] == pytest.approx(float(metrics.intransigence(learner["matrix"], best)), abs=1e-4)


def test_summary_and_comparison(results: dict[str, Any]) -> None:
    [entry] = results["comparisons"]
    assert (entry["first"], entry["second"], entry["seeds"]) == ("grpo", "sft", 2)
    for view in ("native", "cot", "direct"):
        for score in ("strict", "lenient"):
            first, second = (results["methods"][name]["summary"][view][score] for name in ("grpo", "sft"))
            for key in ("avg_acc", "learned", "bwt", "fm"):
                part = entry["views"][view][score][key]
                assert part["value"] == pytest.approx(first[key]["value"] - second[key]["value"], abs=1e-4)
                assert part["examples"][0] <= part["examples"][1]
                assert part["seeds"][0] <= part["value"] <= part["seeds"][1]
                assert np.mean(part["values"]) == pytest.approx(part["value"], abs=1e-4)
    native = results["methods"]["sft"]["summary"]
    assert native["native"] == native["direct"]
    assert native["native"]["strict"]["fm"]["examples"][1] <= 0


def test_general_abilities_before_and_after(results: dict[str, Any]) -> None:
    for method in results["methods"].values():
        style = method["train_style"]
        table = method["summary"]["native"]["lenient"]["general"]
        rows = [entry["by_style"][style]["general"]["lenient"] for entry in method["seeds"].values()]
        for name in GENERAL:
            assert table[name]["before"] == pytest.approx(rows[0][0][name], abs=1e-4)
            assert table[name]["after"] == pytest.approx(np.mean([row[-1][name] for row in rows]), abs=1e-4)
        change = np.mean([table[name]["after"] - table[name]["before"] for name in GENERAL])
        assert table["mean"]["change"]["value"] == pytest.approx(change, abs=1e-4)


def test_the_base_row_has_sampled_accuracy(run: Path, results: dict[str, Any]) -> None:
    records = read_records(record_path(run / "base" / "eval", "mini_gqa", "cot", sampled=True))
    sampled = results["base"]["cot"]["mini_gqa"]["sampled"]
    assert sampled["samples"] == 4
    assert sampled["strict"] == pytest.approx(100 * np.mean([record.strict for record in records]), abs=1e-4)
    assert "sampled" not in results["base"]["cot"]["mini_mmmu"]


def test_two_builds_differ_only_in_times(run: Path, copied: Path, results: dict[str, Any]) -> None:
    log = copied / "sft" / "order0" / "seed0" / "1_mini_textvqa" / "train" / "log.jsonl"
    log.write_text(log.read_text().replace('"seconds": 0.5', '"seconds": 9.5'))
    again = write_results(copied)
    assert again != results
    assert without_times(again) == without_times(results)
    assert json.loads((copied / "results.json").read_text()) == again
    seconds = results["methods"]["sft"]["seeds"]["0"]["train_seconds"]
    assert seconds == results["times"]["train_seconds"]["sft"]["0"] == pytest.approx(60 * 0.505, abs=0.5)


def test_an_incomplete_run_names_its_missing_cells(copied: Path) -> None:
    stage = copied / "grpo" / "order0" / "seed1" / "3_mini_scienceqa"
    (stage / "manifest.json").unlink()
    record_path(copied / "sft" / "order0" / "seed0" / "2_mini_gqa" / "eval", "mini_mmmu", "cot").unlink()
    with pytest.raises(IncompleteRunError) as caught:
        build_results(copied)
    assert "grpo/order0/seed1/3_mini_scienceqa: not trained" in str(caught.value)
    assert "sft/order0/seed0/2_mini_gqa: mini_mmmu (cot)" in str(caught.value)
    found = build_results(copied, partial=True)
    assert len(found["missing"]) == 2
    assert {name: list(method["seeds"]) for name, method in found["methods"].items()} == {
        "sft": ["1"],
        "grpo": ["0"],
        "multitask": ["0", "1"],
    }
    assert found["comparisons"] == []  # no seed that both have
    assert "3_mini_scienceqa: not trained" in verdict(found).details[-1]
    assert "Methods" in markdown(found)


def test_nothing_complete_is_an_error_even_in_part(copied: Path, tmp_path: Path) -> None:
    record_path(copied / "base" / "eval", "mini_gqa", "cot").unlink()
    with pytest.raises(IncompleteRunError, match=r"base: mini_gqa \(cot\)"):
        build_results(copied, partial=True)
    with pytest.raises(IncompleteRunError, match="no config"):
        build_results(tmp_path)
    (copied / "config.json").write_text("{}")
    with pytest.raises(RecordError, match="not the configuration of a run"):
        build_results(copied)


def test_records_of_another_contract_are_refused(copied: Path) -> None:
    where = copied / "sft" / "order0" / "seed0" / "2_mini_gqa" / "eval"
    contract = next(iter(json.loads((where / "contracts.json").read_text()).values()))
    name = write_contract(where, {**contract, "limits": {"max_new_tokens": 99}})
    rewrite(record_path(where, "mini_gqa", "direct"), lambda raw: {**raw, "contract": name})
    with pytest.raises(RecordError, match=r"Two evaluation contracts.*limits\.max_new_tokens: 16 against 99"):
        build_results(copied)


def test_responses_that_are_no_text_are_counted_apart(copied: Path) -> None:
    """Six of 24 rows of one task of three, in one of two seeds."""
    path = record_path(copied / "sft" / "order0" / "seed1" / f"3_{TASKS[2]}" / "eval", "mini_gqa", "cot")
    rewrite(path, lambda raw: {**raw, "status": "undecodable"} if int(raw["id"][-5:]) < 6 else raw)
    results = build_results(copied)
    block = results["methods"]["sft"]["seeds"]["1"]["by_style"]["cot"]
    assert block["undecodable"] == [[0, 0, 0]] * 3 + [[0, 25, 0]]
    table = apart_sheet(results)
    assert table.heads == ("method", "prompt style", "truncated", "no answer", "undecodable")
    shares = {row[:2]: row[-1] for row in table.rows}
    assert shares["sft", "cot"] == "4.2" and shares["sft", "direct"] == shares["grpo", "cot"] == "0.0"
    assert table.title in markdown(results)


def test_records_of_other_rows_are_refused(copied: Path) -> None:
    path = record_path(copied / "grpo" / "order0" / "seed0" / "1_mini_textvqa" / "eval", "mini_gqa", "cot")
    write_records(path, read_records(path)[1:])
    with pytest.raises(RecordError, match="holds other rows"):
        build_results(copied)


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    lines = [json.dumps(change(json.loads(line))) for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")


def test_a_second_order_has_its_own_columns(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["orders"] = [["mini_gqa", "mini_scienceqa", "mini_textvqa"]]
    (copied / "config.json").write_text(json.dumps(config))
    for name in ("sft", "grpo"):
        for seed in (0, 1):
            for place, task in enumerate(config["orders"][0], start=1):
                source = copied / name / "order0" / f"seed{seed}" / f"{place}_{TASKS[place - 1]}"
                shutil.copytree(source, copied / name / "order1" / f"seed{seed}" / f"{place}_{task}")
    found = build_results(copied)
    for name in ("sft", "grpo"):
        seeds = found["methods"][name]["seeds"]
        assert list(seeds) == ["0", "1", "order1/0", "order1/1"]
        assert seeds["order1/0"]["order"] == config["orders"][0]
        columns = [TASKS.index(task) for task in config["orders"][0]]
        np.testing.assert_allclose(seeds["order1/0"]["matrix"], np.array(seeds["0"]["matrix"])[:, columns])
    assert list(found["methods"]["multitask"]["seeds"]) == ["0", "1"]
    assert found["comparisons"][0]["seeds"] == 4


def test_sequences_come_first_and_one_seed_is_called_one(tmp_path: Path) -> None:
    arms = ("multitask", "sft", "grpo")
    run = write_run(tmp_path / "run", tasks=TASKS[:2], seeds=(3,), rows=16, arms=arms)
    found = build_results(run)
    assert list(found["methods"]) == ["sft", "grpo", "multitask"]
    assert found["comparisons"][0]["views"]["native"]["strict"]["bwt"]["seeds"] is None
    assert "one seed only" in verdict(found).details[0]


def test_one_task_is_a_sequence_without_forgetting(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tasks=("mini_gqa",), seeds=(0,), rows=8, arms=("sft",))
    found = build_results(run)
    assert found["methods"]["sft"]["seeds"]["0"]["bwt"] is None
    assert verdict(found).answer == "There are no two sequential methods to compare."


def test_cells_are_read_once(run: Path) -> None:
    opened = Run.open(run)
    first = opened.cell(opened.base_eval, "mini_gqa", "cot")
    assert opened.cell(opened.base_eval, "mini_gqa", "cot") is first


def test_tables_show_the_numbers(results: dict[str, Any]) -> None:
    text = markdown(results)
    bwt = results["methods"]["sft"]["summary"]["native"]["strict"]["bwt"]
    assert f"−{abs(bwt['value']):.1f} [−{abs(bwt['examples'][0]):.1f}, " in text  # noqa: RUF001 - a true minus
    assert "| sft | direct, native | strict |" in text
    assert "### grpo − sft" in text  # noqa: RUF001 - a true minus
    for sheet in sheets(results):
        assert all(len(row) == len(sheet.heads) for row in sheet.rows)
    console = Console(width=110, record=True)
    console.print(terminal(results))
    shown = console.export_text()
    assert "FM null" in shown
    assert verdict(results).answer in shown
    assert "mmlu_pro" in shown


def with_difference(results: dict[str, Any], **changes: object) -> dict[str, Any]:
    """Results whose headline difference of BWT, strict and native, is another."""
    found: dict[str, Any] = json.loads(json.dumps(results))
    entry = found["comparisons"][0]
    strict = {key: value for key, value in changes.items() if key != "comparable"}
    entry["views"]["native"]["strict"]["bwt"] |= strict
    entry["views"]["native"]["lenient"]["bwt"] |= {"value": -0.5, "examples": [-2.0, 1.0]}
    entry["comparable"] = changes.get("comparable", True)
    return found


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"value": 8.0, "examples": [6.0, 10.0], "seeds": [2.0, 14.0]}, "grpo forgets less than sft, by 8.0 points"),
        (
            {"value": -8.0, "examples": [-10.0, -6.0], "seeds": [-14.0, -2.0]},
            "sft forgets less than grpo, by 8.0 points",
        ),
        ({"value": -8.0, "examples": [-10.0, -6.0], "seeds": [-20.0, 4.0]}, "sft forgot less than grpo.*do not settle"),
        ({"value": 8.0, "examples": [6.0, 10.0], "seeds": None}, "grpo forgot less than sft.*in one seed"),
        ({"value": 1.0, "examples": [-1.0, 3.0], "seeds": [0.5, 1.5]}, "do not differ clearly"),
    ],
)
def test_verdicts(results: dict[str, Any], changes: dict[str, Any], answer: str) -> None:
    found = verdict(with_difference(results, **changes))
    assert re.search(answer, found.answer), found.answer
    clear = "do not differ" not in found.answer
    assert ("the form more than the answer" in found.details[1]) == clear


def test_a_verdict_on_unequal_learning_says_so(results: dict[str, Any]) -> None:
    found = verdict(with_difference(results, value=8.0, examples=[6.0, 10.0], seeds=[2.0, 14.0], comparable=False))
    assert "no fair comparison" in found.details[2]
