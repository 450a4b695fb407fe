"""What explains forgetting: from measurements, logs and matrices to entries, coefficients, tables and panels."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpt_rft.sequence.job import Job, do_job
from cpt_rft.sequence.lineage import survey
from cpt_rft.sequence.plan import Selection
from cpt_rft.sequence.rundir import read_run
from eval.explain import CAUSES, interval, relations, spearman, stages
from eval.explain_table import HOW, claim_sheet, drift_sheet, explain_sheets, markdown, risk_sheet
from eval.meters import METERS, PAIRS
from eval.report import render, write_report
from eval.results import build_results
from eval.runs import Run
from tests.helpers.synthetic_run import with_meters, write_run
from tests.helpers.tiny_run import Tiny, one_line_error, prepared, reference

SWITCHES = ("evaluation.drift={rows: 2, samples: 2}", "evaluation.fisher={rows: 2, group: 2, scores: 2}")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run without any measurement."""
    run = write_run(tmp_path_factory.mktemp("explain") / "run", rows=8, seeds=(0, 1))
    return run, build_results(run)


@pytest.fixture(scope="module")
def measured(plain: tuple[Path, dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """The same with measurements that follow a law."""
    return plain[0], with_meters(plain[1])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A real run whose SFT sequence was measured; its scores are older than the meters."""
    tiny = reference(tmp_path_factory.getbasetemp()).copy(tmp_path_factory.mktemp("measured"))
    config = json.loads((tiny.directory / "config.json").read_text())
    config["evaluation"] |= {"drift": {"rows": 2, "samples": 2}, "fisher": {"rows": 2, "group": 2, "scores": 2}}
    (tiny.directory / "config.json").write_text(json.dumps(config))
    measure(tiny)
    return tiny


def measure(tiny: Tiny) -> list[dict[str, Any]]:
    """Measure the SFT sequence in this process."""
    run = read_run(tiny.directory)
    chain = Selection(methods=("sft",)).chains(run.experiment, tiny.directory)[0]
    events: list[dict[str, Any]] = []
    todo = [state for state in survey(run, chain) if not state.measured]
    do_job(tiny.directory, Job.of(chain, todo, train=False, evaluate=False), events.append)
    return events


def test_a_stage_is_set_against_the_tasks_before_it(plain: tuple[Path, dict[str, Any]]) -> None:
    run = Run.open(plain[0])
    chain = next(chain for chain in run.chains if chain.method == "sft")
    matrix = np.array([[9.0, 9, 9, 9], [50, 9, 9, 9], [40, 60, 9, 9], [44, 51, 70, 9], [20, 41, 60, 80]])
    found = stages(run, chain, {"strict": matrix, "lenient": matrix + 1}, joint=False)
    last = [pytest.approx(sum(lost) / 3, 1e-5) for lost in ((-24, -10, -10), (-30, -19, -10))]
    assert [entry["change"]["strict"] for entry in found] == [None, -10.0, -2.5, last[0]]
    assert [entry["bwt"]["lenient"] for entry in found] == [None, -10.0, -7.5, last[1]]
    assert found[1]["tasks"] == ["mini_textvqa"] and found[1]["drift"] is found[1]["fisher"] is None
    log = [json.loads(line) for line in (chain.stages[0] / "train/log.jsonl").read_text().splitlines()]
    assert found[0]["log"] == {"grad_norm": pytest.approx(np.mean([line["grad_norm"] for line in log]), 1e-5)}


def test_a_coefficient_is_of_ranks() -> None:
    up = [(0.001, -5.0), (0.1, -4.0), (0.2, -3.0), (70.0, 2.0), (1e6, 9.0)]
    assert spearman(up) == 1.0
    assert spearman([(x, -y) for x, y in up]) == -1.0
    assert spearman(up[:4]) is None  # too few
    assert spearman([(1.0, y) for _, y in up]) is None  # all alike
    ties = [(1.0, 2.0), (1.0, 1.0), (2.0, 3.0), (3.0, 3.0), (4.0, 5.0)]
    assert spearman(ties) == pytest.approx(9 / 9.5, rel=1e-6)  # with mean ranks


def test_its_interval_resamples_whole_sequences() -> None:
    alike = [[(float(place), float(place)) for place in range(6)]] * 4
    assert interval(alike, "test") == [1.0, 1.0]
    assert interval(alike[:3], "test") is None
    # Within each sequence there is no relation at all; that between them rests on four sequences, not on 24 stages.
    random = np.random.default_rng(0)
    between = [[(10.0 * k + random.random(), 10.0 * (k % 2) + random.random()) for _ in range(6)] for k in range(4)]
    low, high = interval(between, "test") or (0.0, 0.0)
    assert low < -0.5 and high > 0.7
    assert interval(between, "test") == [low, high]  # the same in every run


def test_relations_leave_the_first_stage_and_joint_training_out(measured: tuple[Path, dict[str, Any]]) -> None:
    found = {entry["cause"]: entry for entry in relations(measured[1]["methods"])}
    assert set(found) == {".".join(cause.key) for cause in CAUSES} - {f"log.{key}" for key in NOT_LOGGED}
    old = found["drift.start_to_model.old.sequence"]
    assert (old["points"], old["sequences"], old["effect"]) == (12, 4, "change")
    assert found["drift.base_to_model.new.token"]["effect"] == "bwt"
    assert old["strict"]["rho"] == -1.0 == old["strict"]["interval"][0]  # as `with_meters` makes it
    assert set(old["strict"]["by_method"]) == {"sft", "grpo"}


NOT_LOGGED = ("reward_variance", "zero_variance", "grad_norm_right", "grad_norm_mixed", "grad_norm_wrong")


def test_tables_say_what_was_measured(measured: tuple[Path, dict[str, Any]]) -> None:
    results = measured[1]
    titles = [sheet.title for sheet in explain_sheets(results)]
    assert titles == [
        *("What goes along with forgetting", "Drift an answer", "Drift a token"),
        *("Fisher risk", "The reward variance and the risk"),
    ]
    sheet = drift_sheet(results, "sequence")
    assert len(sheet.heads) == 4 + 2 * len(PAIRS) and all(len(row) == len(sheet.heads) for row in sheet.rows)
    first, second = sheet.rows[:2]
    assert first[3] == first[5] == "\N{EN DASH}" and second[1] == "2 textvqa" and second[2] == "2"
    entries = [seed["stages"][1] for seed in results["methods"]["sft"]["seeds"].values()]
    means = np.mean([entry["drift"]["base_to_model"]["old"]["sequence"] for entry in entries], axis=0)
    assert second[5] == "{:.3g}\n[{:.3g}, {:.3g}]".format(*means)
    assert all(len(row) == len(risk_sheet(results).heads) for row in risk_sheet(results).rows)
    claim = claim_sheet(results).rows[0]
    assert claim[:3] == ("sft", "6", "0.2") and claim[3].startswith("0.3") and claim[4].startswith("0.2")
    assert claim[5] == "0 of 6"


def test_a_run_without_measurements_says_how_to_get_them(plain: tuple[Path, dict[str, Any]]) -> None:
    run, results = plain
    assert [entry["cause"] for entry in results["explained"]] == ["log.grad_norm"]
    assert HOW.split(": ")[0] in render(run, results)
    assert "Drift an answer" not in markdown(results)
    assert markdown({**results, "explained": []}).strip() == HOW


def test_the_page_draws_a_panel_a_cause(measured: tuple[Path, dict[str, Any]]) -> None:
    page = render(*measured)
    section = page.partition('<section id="explained">')[2].partition("</section>")[0]
    drawn = [cause for cause in CAUSES if cause.key[-1] != "token" and cause.key[-1] not in NOT_LOGGED]
    assert section.count('<svg viewBox="0 0 280') == 2 * len(drawn)  # strict and in any form
    assert section.count('class="scatter sft0"') == section.count('class="scatter grpo0"') == 2 * 6 * len(drawn)
    assert HOW.split(": ")[0] not in section
    labels = re.findall(r'aria-label="(change[^"]*)"', section)
    assert len(labels) == 2 * len(drawn) and all("\N{GREEK SMALL LETTER RHO} " in label for label in labels)
    assert "Correlation only" in section


# --- a real run ---


def test_measurements_stand_beside_the_records(tiny: Tiny) -> None:
    """Drift on the prompts of every task so far; the risk from the second stage on; no score is made again."""
    first, second = (tiny.directory / "sft/order0/seed0" / name for name in ("1_mini_gqa", "2_mini_superclevr"))
    names = {path.name for path in (second / METERS).iterdir()}
    assert names == {"drift.mini_gqa.json", "drift.mini_superclevr.json", "fisher.json"}
    assert {path.name for path in (first / METERS).iterdir()} == {"drift.mini_gqa.json"}
    found = json.loads((second / METERS / "drift.mini_gqa.json").read_text())
    assert found["base_to_model"]["kl"] != found["start_to_model"]["kl"] and len(found["base_to_model"]["kl"]) == 4
    started = json.loads((first / METERS / "drift.mini_gqa.json").read_text())
    assert started["base_to_model"] == started["start_to_model"]
    rows = json.loads(tiny.command("status", "--json", *SWITCHES)[1])["stages"]
    states = {row["chain"]: row["state"] for row in rows}
    assert (states["sft seed0"], states["grpo seed0"]) == ("done", "scored")
    assert json.loads(tiny.command("status", "--json")[1])["complete"]  # with the meters off
    before = {path: path.stat().st_mtime_ns for path in second.rglob("*")}
    assert [event for event in measure(tiny) if event["event"] == "part"] == []
    assert {path: path.stat().st_mtime_ns for path in second.rglob("*")} == before


def test_results_and_page_hold_them(tiny: Tiny) -> None:
    results = build_results(tiny.directory)
    second = results["methods"]["sft"]["seeds"]["0"]["stages"][1]
    value, low, high = second["drift"]["base_to_model"]["old"]["sequence"]
    assert low <= value <= high and value > 0
    assert second["fisher"]["own"] == second["fisher"]["sft"] and second["fisher"]["sft"]["risk"][0] > 0
    assert results["methods"]["grpo"]["seeds"]["0"]["stages"][1]["drift"] is None
    assert "Drift an answer" in write_report(tiny.directory, results).read_text()


def test_a_measurement_of_other_weights_is_not_reported(tiny: Tiny, tmp_path: Path) -> None:
    own = tiny.copy(tmp_path)
    stage = own.directory / "sft/order0/seed0/2_mini_superclevr"
    for name, path in (("drift.mini_gqa.json", ("models", "model")), ("fisher.json", ("start",))):
        found = json.loads((stage / METERS / name).read_text())
        place = found["terms"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = "other weights"
        (stage / METERS / name).write_text(json.dumps(found))
    entry = build_results(own.directory)["methods"]["sft"]["seeds"]["0"]["stages"][1]
    assert entry["drift"] is entry["fisher"] is None


def test_the_verb_measures_what_is_trained(
    tiny: Tiny, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    status, _, err = tiny.command("drift", "--method", "sft", *SWITCHES)
    assert status == 0 and "measured already" in err
    empty = prepared(tmp_path_factory.getbasetemp()).copy(tmp_path)  # switching a meter on is kept in the run
    assert "No selected stage is trained yet" in one_line_error(empty.command("drift", *SWITCHES))
    line = one_line_error(tiny.command("drift", "--method", "sft", "--seed", "0", "--task", "mini_gqb", *SWITCHES))
    assert "unknown task 'mini_gqb'" in line


def test_a_missing_or_changed_base_is_one_clear_line(tiny: Tiny, tmp_path: Path) -> None:
    own = tiny.copy(tmp_path)
    weights = own.base / "model.safetensors"
    body = weights.read_bytes()
    weights.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    for path in own.directory.glob(f"*/*/*/*/{METERS}/*"):
        path.unlink()
    with pytest.raises(Exception, match="restore the base model"):
        measure(own)
    weights.unlink()
    assert "restore the base model" in one_line_error(own.command("drift", *SWITCHES))


def test_without_a_meter_there_is_nothing_to_measure(tmp_path_factory: pytest.TempPathFactory) -> None:
    tiny = reference(tmp_path_factory.getbasetemp())
    line = one_line_error(tiny.command("drift"))
    assert "evaluation.drift and evaluation.fisher are both off" in line and "rows: 16" in line
