"""Methods at equal learning and at equal cost; ability and form apart; rows that share pictures; the ledger."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpt_rft import cli
from cpt_rft.miniature.world import make_rows
from eval.costs import costs
from eval.equal import families
from eval.harness import READS_NAME, _shared_pictures
from eval.matched import Point, combined, match, mixture, rising
from eval.matching import match_on_dev
from eval.records import RecordError, read_records, record_path
from eval.results import build_results
from eval.runs import MATCHING_NAME, Run
from eval.sheets import matched_sheet
from tests.helpers.synthetic_run import write_run
from tests.helpers.tiny_run import edited

TASKS = ("mini_textvqa", "mini_gqa", "mini_scienceqa")
LOW, MIDDLE, HIGH = (Point(name, place, order) for name, place, order in (("l", 60, 1), ("m", 70, 2), ("h", 65, 3)))


def test_too_high_a_rate_is_no_part_of_the_curve() -> None:
    assert rising([HIGH, LOW, MIDDLE]) == [LOW, MIDDLE]


def test_a_level_between_two_settings_is_a_mixture() -> None:
    assert mixture([LOW, MIDDLE], 67.5) == {"l": 0.25, "m": 0.75}
    assert mixture([LOW, MIDDLE], 70.0) == {"m": 1.0}
    assert mixture([LOW], 60.0) == {"l": 1.0}
    assert mixture([LOW, MIDDLE], 59.9) is mixture([LOW], 61.0) is None


def test_families_meet_in_the_middle_of_what_both_reach() -> None:
    other = [Point("a", 64, 1), Point("b", 74, 2)]
    found = match([LOW, MIDDLE, HIGH], other)
    assert found is not None
    assert found.level == 67.0
    assert found.first == pytest.approx({"l": 0.3, "m": 0.7})
    assert found.second == pytest.approx({"a": 0.7, "b": 0.3})
    values = {
        "l": np.array([1.0, 0.0]),
        "m": np.array([2.0, 0.0]),
        "a": np.array([3.0, 1.0]),
        "b": np.array([4.0, 1.0]),
    }
    np.testing.assert_allclose(combined(found.weights, values), [1.7 - 3.3, -1.0])
    assert match([LOW, MIDDLE], [Point("a", 71, 1), Point("b", 80, 2)]) is None


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on dev whose arms come at two learning rates each; the second rate of each is a copy that learned less."""
    run = write_run(tmp_path_factory.mktemp("equal") / "run", tasks=TASKS, seeds=(0, 1), rows=24, arms=("sft", "grpo"))
    config = json.loads((run / "config.json").read_text())
    for name in ("sft", "grpo"):
        config["methods"][f"{name}_slow"] = {**config["methods"][name], "name": f"{name}_slow", "lr": 1e-4}
        shutil.copytree(run / name, run / f"{name}_slow")
    config["evaluation"]["split"] = "dev"
    (run / "config.json").write_text(json.dumps(config))
    for path in run.glob("*_slow/order0/seed*/*/eval/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines[:: 3 if "sft" in str(path.relative_to(run)) else 5]:
            line |= {"strict": 0.0, "lenient": 0.0}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for log in run.glob("*/order0/seed*/*/train/log.jsonl"):
        lines = [{**json.loads(line), "tokens": 100, "memory_bytes": 5e8} for line in log.read_text().splitlines()]
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture(scope="module")
def results(searched: Path) -> dict[str, Any]:
    return build_results(searched)


def test_families_differ_in_their_settings_only(searched: Path) -> None:
    run = Run.open(searched)
    assert families(run, list(run.experiment.methods)) == {"sft": ["sft", "sft_slow"], "grpo": ["grpo", "grpo_slow"]}


def test_arms_are_compared_where_they_learned_equally(results: dict[str, Any]) -> None:
    learned, tokens = results["matched"]
    assert (learned["first"], learned["second"], learned["on"]) == ("grpo", "sft", "learned")
    summary = {name: method["summary"]["native"]["strict"] for name, method in results["methods"].items()}
    for weights in learned["weights"]:
        assert sum(weights.values()) == pytest.approx(1)
        mixed = sum(weight * summary[name]["learned"]["value"] for name, weight in weights.items())
        assert mixed == pytest.approx(learned["level"], abs=1e-4)
    assert learned["difference"]["learned"]["value"] == pytest.approx(0, abs=1e-4)
    first, second = (
        sum(weight * summary[name]["bwt"]["value"] for name, weight in weights.items())
        for weights in learned["weights"]
    )
    bwt = learned["difference"]["bwt"]
    assert bwt["value"] == pytest.approx(first - second, abs=1e-4)
    assert bwt["examples"][0] < bwt["value"] < bwt["examples"][1]
    # Equal logs, equal cost: each family stands at one place, and that is where they are compared.
    assert (tokens["on"], tokens["level"]) == ("tokens", 60 * 100.0)


@pytest.fixture
def on_test(searched: Path, tmp_path: Path) -> Path:
    """The same methods on test, one seed alone, where the slow arms learned still less."""
    run = Path(shutil.copytree(searched, tmp_path / "test"))
    with edited(run / "config.json") as config:
        config["evaluation"] |= {"split": "test", "rows": 24}
        config["seeds"] = [1]
    for path in run.glob("*_slow/order0/seed1/*/eval/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines[1::4]:
            line |= {"strict": 0.0, "lenient": 0.0}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_what_dev_chose_is_held_fixed_on_test(results: dict[str, Any], searched: Path, on_test: Path) -> None:
    before = build_results(on_test)["matched"]
    assert [entry["chosen_on"] for entry in before] == [None, None]
    assert (before[0]["level"], before[0]["weights"], before[0]["difference"]) == (None, None, None)
    assert before[1]["difference"] is not None  # equal cost reads no row
    assert "not chosen on dev" in matched_sheet({"matched": before, "split": "test"}).rows[0][2]
    assert cli.main(["match", str(searched), str(on_test)]) == 0
    found = build_results(on_test)
    learned, dev = found["matched"][0], results["matched"][0]
    assert (dev["chosen_on"], learned["chosen_on"]) == ("dev", "dev")
    assert (learned["level"], learned["weights"]) == (dev["level"], dev["weights"])
    assert learned["reach"] != dev["reach"]
    for metric in ("bwt", "learned"):
        first, second = (
            sum(w * found["methods"][name]["summary"]["native"]["strict"][metric]["value"] for name, w in part.items())
            for part in dev["weights"]
        )
        assert learned["difference"][metric]["value"] == pytest.approx(first - second, abs=1e-4)
    assert abs(learned["difference"]["learned"]["value"]) > 0.01  # on test it is not equal, and the report says so


def test_only_dev_chooses_and_only_for_the_same_methods(
    searched: Path, on_test: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(first: Path, second: Path) -> str:
        assert cli.main(["match", str(first), str(second)]) == 2
        return capsys.readouterr().err

    assert "is scored on test, not on dev. Fix: name the run on dev first" in refused(on_test, on_test)
    assert "is scored on dev, not on test" in refused(searched, searched)
    with edited(on_test / "config.json") as config:
        config["methods"]["grpo_slow"]["lr"] = 3e-4
    assert "learned differently: methods.grpo_slow.lr: 0.0001 against 0.0003" in refused(searched, on_test)
    with edited(on_test / "config.json") as config:
        config["methods"]["grpo_slow"]["lr"] = 1e-4
        config["rft_engine"] = {**config["engine"], "dtype": "bfloat16"}
    assert "learned differently: rft_engine" in refused(searched, on_test)
    with edited(on_test / "config.json") as config:
        del config["rft_engine"]
    assert not (on_test / MATCHING_NAME).exists()
    (on_test / MATCHING_NAME).write_text('{"pairs": [{"first": "grpo"}]}')
    with pytest.raises(RecordError, match="is broken"):
        build_results(on_test)
    pair = {"first": "grpo", "second": "sft", "level": 1.0, "weights": [{"grpo": 1.0}, {"other": 1.0}]}
    (on_test / MATCHING_NAME).write_text(json.dumps({"pairs": [pair]}))
    with pytest.raises(RecordError, match="this run has no method other"):
        build_results(on_test)


def test_dev_must_find_what_to_carry(searched: Path, on_test: Path, tmp_path: Path) -> None:
    single = Path(shutil.copytree(searched, tmp_path / "single"))
    with edited(single / "config.json") as config:
        del config["methods"]["grpo_slow"]
    with pytest.raises(RecordError, match="no two families of learning rates that reach one accuracy"):
        match_on_dev(single, on_test)


def test_families_that_meet_nowhere_say_what_they_reach(searched: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(searched, tmp_path / "run"))
    for log in run.glob("sft*/order0/seed*/*/train/log.jsonl"):
        log.write_text(log.read_text().replace('"tokens": 100', '"tokens": 7'))
    entry = build_results(run)["matched"][1]
    assert (entry["level"], entry["weights"], entry["difference"]) == (None, None, None)
    assert entry["reach"] == [[6000.0, 6000.0], [420.0, 420.0]]


def test_what_is_lost_is_ability_and_form(results: dict[str, Any]) -> None:
    for method in results["methods"].values():
        for style, parts in method["losses"].items():
            summary = method["summary"][style]
            assert parts["capability"]["value"] == pytest.approx(summary["lenient"]["bwt"]["value"], abs=1e-4)
            whole = parts["capability"]["value"] + parts["form"]["value"]
            assert whole == pytest.approx(summary["strict"]["bwt"]["value"], abs=1e-4)
            low, high = parts["form"]["examples"]
            assert low <= parts["form"]["value"] <= high


def test_the_ledger_adds_up(searched: Path, results: dict[str, Any]) -> None:
    ledger = results["costs"]["grpo"]
    run = Run.open(searched)
    stages = [stage for chain in run.chains if chain.method == "grpo" for stage in chain.stages]
    seconds = sum(line["seconds"] for stage in stages for line in run.train_log(stage))
    assert ledger["seconds"] == pytest.approx(seconds, abs=1e-4)
    assert (ledger["chains"], ledger["steps"], ledger["tokens"]) == (2, 120, 12_000)
    assert (ledger["memory_bytes"], ledger["energy_joules"]) == (5e8, None)
    assert ledger["examples"] == 120 * 16
    every = [r for stage in stages for t, s in run.wanted() for r in read_records(record_path(stage / "eval", t, s))]
    assert (ledger["answers"], ledger["answer_tokens"]) == (len(every), sum(record.tokens for record in every))
    assert costs(run, [])["steps"] is costs(run, [])["tokens"] is None


def test_shared_pictures_are_noted_by_row_and_only_where_there_are_any() -> None:
    rows = make_rows("mini_gqa", "test", 5, seed=0)
    assert _shared_pictures(rows) == {}
    shared = [
        *rows[:3],
        replace(rows[3], images=rows[1].images),
        replace(rows[4], images=(), image_paths=(), problem="Which?"),
    ]
    assert _shared_pictures(shared) == {"pictures": [0, 1, 2, 1, -5]}


def test_rows_that_share_a_picture_widen_the_interval(searched: Path, results: dict[str, Any], tmp_path: Path) -> None:
    run = Path(shutil.copytree(searched, tmp_path / "run"))
    reads = {
        task: {"split": "test", "rows": 24, "sha256": "", "pictures": [n // 12 for n in range(24)]} for task in TASKS
    }
    path = run / "base" / "eval" / READS_NAME
    path.write_text(json.dumps(reads))
    found = build_results(run)
    one, other = (r["methods"]["sft"]["summary"]["native"]["strict"]["avg_acc"] for r in (results, found))
    assert one["value"] == other["value"]
    assert one["examples"] != other["examples"]
    reads[TASKS[0]]["pictures"].pop()
    path.write_text(json.dumps(reads))
    with pytest.raises(RecordError, match=f"{TASKS[0]} has not one picture number a row"):
        build_results(run)
    path.write_text('{"mini_gqa": {"pictures": 3}}')
    with pytest.raises(RecordError, match="is broken"):
        build_results(run)
