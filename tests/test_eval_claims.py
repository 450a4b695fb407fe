"""The paper's claims beside ours; tables and figures as files; two runs side by side; trackers."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from cpt_rft.cli import main
from cpt_rft.errors import UserError
from eval.claims import claims, judge, paper_claims, wider
from eval.compare import compare
from eval.records import RecordError
from eval.report import EXPORT_NAME, write_report
from eval.results import build_results
from eval.runs import Run
from eval.sheets import further_sheets
from eval.table import Sheet
from eval.track import points, track
from tests.helpers.synthetic_run import write_run
from tests.helpers.wandb_file import messages

TASKS = ("mini_textvqa", "mini_gqa", "mini_scienceqa")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("claims") / "run", tasks=TASKS, seeds=(0, 1), rows=24)


@pytest.fixture(scope="module")
def results(run: Path) -> dict[str, Any]:
    return build_results(run)


def test_the_papers_numbers_are_data_with_a_source() -> None:
    found = {(c["metric"], c["first"], c["second"]): c["value"] for c in paper_claims()}
    # Source: arXiv 2507.05386, FM -10.4 and -2.3, AvgAcc 54.0 and 60.0, MMMU 52.1 to 40.1.
    assert found["fm", "grpo", "sft"] == pytest.approx(-2.3 + 10.4)
    assert found["avg_acc", "grpo", "sft"] == 60.0 - 54.0
    assert found["mini_mmmu", "sft", None] == pytest.approx(40.1 - 52.1)
    assert all("arXiv 2507.05386" in claim["source"] for claim in paper_claims())


def test_a_verdict_takes_the_whole_interval() -> None:
    assert judge(-10.4, -10.0, (-12.0, -9.0)) == "reproduced"
    assert judge(-10.4, -4.0, (-9.0, -1.0)) == "direction only"
    assert judge(-10.4, -6.0, (-12.0, 0.5)) == judge(-10.4, 10.0, (9.0, 12.0)) == "not"
    assert judge(0.6, 0.0, (-2.9, 2.9), nothing=True) == "reproduced"
    assert judge(0.6, -0.5, (-4.0, 2.9), nothing=True) == "direction only"
    assert judge(0.6, -3.2, (-6.5, 0.1), nothing=True) == "not"
    assert wider({"examples": [-2.0, 1.0], "seeds": [-1.0, 3.0]}) == [-2.0, 3.0]
    assert wider({"examples": [-2.0, 1.0], "seeds": None}) == [-2.0, 1.0]


def test_claims_are_judged_by_the_results(results: dict[str, Any]) -> None:
    found = {claim["claim"]: claim for claim in claims(results)}
    part = results["comparisons"][0]["views"]["native"]["strict"]["fm"]
    assert found["RFT forgets less than SFT"]["ours"] == part["value"]
    assert found["RFT forgets less than SFT"]["interval"] == wider(part)
    assert found["Thinking is not the cause"]["verdict"] == "not run"
    general = results["methods"]["sft"]["summary"]["native"]["strict"]["general"]["mini_mmmu"]["change"]
    assert found["SFT loses general ability (MMMU)"]["ours"] == general["value"]
    turned = {**results, "comparisons": [{**results["comparisons"][0], "first": "sft", "second": "grpo"}]}
    other = {claim["claim"]: claim for claim in claims(turned)}["RFT forgets less than SFT"]
    assert other["ours"] == -part["value"]
    assert other["interval"] == [-bound for bound in reversed(wider(part))]


def test_a_sheet_in_three_languages() -> None:
    sheet = Sheet("A_title", ("na|me", "50 % & more"), (("a_b", "\N{MINUS SIGN}1.0\n[0.1, 0.2]"),), 1, "Note.")
    assert list(csv.reader(sheet.csv().splitlines())) == [["na|me", "50 % & more"], ["a_b", "-1.0 [0.1, 0.2]"]]
    assert sheet.latex() == (
        "% A_title. Note.\n\\begin{tabular}{lr}\n\\hline\nna|me & 50 \\% \\& more \\\\\n\\hline\n"
        "a\\_b & $-$1.0 [0.1, 0.2] \\\\\n\\hline\n\\end{tabular}\n"
    )


def test_a_run_directory_is_reported_from_its_records_alone_and_twice_the_same(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(copy / "base" / "checkpoint")
    assert main(["report", str(copy)]) == 0
    assert "Claims of the paper" in (copy / "report.html").read_text()
    first = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    (copy / EXPORT_NAME / "tables" / "left over.csv").write_text("stale")
    assert main(["report", str(copy)]) == 0
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == first
    assert main(["report", str(copy), "seeds=[1]"]) == 2
    assert "would change nothing" in capsys.readouterr().err


def test_every_table_and_figure_is_a_file(run: Path, results: dict[str, Any], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    page = write_report(copy, results).read_text()
    figures = sorted((copy / EXPORT_NAME / "figures").glob("*.svg"))
    assert len(figures) == page.count('role="img"')
    for path in figures:
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "--paper" in root[0].text
    names = {path.stem for path in (copy / EXPORT_NAME / "tables").glob("*.csv")}
    assert {
        "methods",
        "claims-of-the-paper",
        "costs",
        "ability-and-form",
        "grpo-sft",
        "figure-forest-backward-transfer",
    } <= names
    for name in names:
        assert all((copy / EXPORT_NAME / "tables" / f"{name}.{suffix}").stat().st_size for suffix in ("tex", "md"))
    sheet = next(sheet for sheet in further_sheets(results) if sheet.title == "Costs")
    assert (copy / EXPORT_NAME / "tables" / "costs.csv").read_text() == sheet.csv()


def test_a_run_against_itself_differs_in_nothing(run: Path) -> None:
    settings, found = compare(run, run)
    assert (settings.rows, settings.note) == ((), "Nothing.")
    assert {row[0] for row in found.rows} == {"sft", "grpo"}
    assert all(row[5] == "0.0\n[0.0, 0.0]" for row in found.rows)


def test_two_runs_are_paired_over_rows_and_seeds(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["methods"]["sft"]["lr"] = 1e-5
    config["seeds"] = [1]
    (other / "config.json").write_text(json.dumps(config))
    for path in other.glob(f"sft/order0/seed1/3_{TASKS[2]}/eval/{TASKS[0]}.direct.jsonl"):
        lines = [{**json.loads(line), "strict": 0.0, "lenient": 0.0} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings, found = compare(run, other)
    assert ("methods.sft.lr", "0.0002", "1e-05") in settings.rows
    before = build_results(run)["methods"]["sft"]["seeds"]["1"]
    bwt = next(row for row in found.rows if row[:3] == ("sft", "strict", "BWT"))
    assert float(bwt[5].split("\n")[0].replace("\N{MINUS SIGN}", "-")) == pytest.approx(
        -before["matrix"][-1][0] / 2, abs=0.06
    )
    assert main(["compare", str(run), str(other)]) == 0
    assert "methods.sft.lr" in capsys.readouterr().out


def test_runs_that_cannot_be_compared(run: Path, tmp_path: Path) -> None:
    fewer = write_run(tmp_path / "fewer", tasks=TASKS, seeds=(0,), rows=8)
    with pytest.raises(RecordError, match="other rows"):
        compare(run, fewer)
    seeds = write_run(tmp_path / "seeds", tasks=TASKS, seeds=(7,), rows=24)
    with pytest.raises(RecordError, match="no complete sequence"):
        compare(run, seeds)
    tasks = write_run(tmp_path / "tasks", tasks=TASKS[:2], seeds=(0,), rows=24)
    with pytest.raises(RecordError, match="was not asked about mini_scienceqa"):
        compare(run, tasks)


def test_tensorboard_gets_every_number(run: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["track", str(run), "--to", "tensorboard", "--out", str(tmp_path)]) == 0
    opened = Run.open(run)
    chain = next(chain for chain in opened.chains if chain.method == "grpo")
    events = EventAccumulator(str(tmp_path / "grpo/order0/seed0"))
    events.Reload()
    wanted = [(step, value) for key, value, step in points(opened, chain) if key == "train/reward"]
    assert len(wanted) == 60
    assert [step for step, _ in wanted] == list(range(1, 61))
    found = [(event.step, event.value) for event in events.Scalars("train/reward")]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_wandb_gets_every_number_offline(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in W&B's own files is read back; nothing is sent anywhere."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main(["track", str(run), "--to", "wandb", "--out", str(tmp_path)]) == 0
    opened = Run.open(run)
    found: dict[str, list[tuple[str, int, float]]] = {}
    for path in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        name, numbers = "", []
        for message in messages(path):
            record = Record.FromString(message)
            name = record.run.display_name or name
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            numbers += [(key, items["step"], value) for key, value in items.items() if key.startswith("train/")]
        found[name] = numbers
    for chain in opened.chains:
        wanted = [(key, step, value) for key, value, step in points(opened, chain)]
        assert len(wanted) >= 60
        assert found.pop(f"{chain.method}/order{chain.order_index}/seed{chain.seed}") == wanted
    assert found == {}


def test_a_tracker_that_is_not_installed_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb is not installed.*\.\[wandb\]"):
        track(run, "wandb", tmp_path / "out")


def test_no_tracker_is_loaded_unasked() -> None:
    code = "import sys, eval.report, eval.track, cpt_rft.cli; print({'wandb', 'tensorboard'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
