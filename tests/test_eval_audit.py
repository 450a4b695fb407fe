"""The audit of contracts and the rescoring of records: equal to evaluating directly, resumable, never overwriting."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any, get_args

import pytest

from cpt_rft import cli
from cpt_rft.config.contracts import Scorer
from cpt_rft.config.load import load_experiment
from cpt_rft.config.schema import EvaluationConfig
from cpt_rft.data.parquet import write_split
from cpt_rft.files import hash_tree
from cpt_rft.miniature.world import make_rows
from eval.audit import DECODINGS, Audit, sheet
from eval.harness import evaluate_checkpoint
from eval.records import RecordError, accuracy, read_contracts, read_records, record_path, write_records
from eval.rescore import rescore
from tests.helpers.tiny_run import in_child, kill_at_write, make_tiny_base

TASKS, GENERAL = ("mini_gqa", "mini_superclevr"), "mini_pope"
TEXT = """\
name: tiny
base_model: base
output: runs/tiny
tasks: [mini_gqa, mini_superclevr]
methods: {sft: {}}
engine: {name: local, dtype: float32, device: cpu}
data: {train: 12, dev: 5, test: 4, general: 3}
evaluation: {batch_size: 3, max_new_tokens: 6, general: [mini_pope]}
"""
ROWS = 2 * 5 + 3


def config(**changes: object) -> EvaluationConfig:
    return EvaluationConfig.model_validate({"max_new_tokens": 8, "batch_size": 3, **changes})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and an experiment."""
    folder = tmp_path_factory.mktemp("audit")
    make_tiny_base(folder / "base")
    (folder / "tiny.yaml").write_text(TEXT)
    return folder


def audit(place: Path, out: Path, *options: str) -> int:
    experiment = ["--experiment", str(place / "tiny.yaml")]
    return cli.main(["audit", str(place / "base"), *experiment, "--out", str(out), *options])


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert audit(place, out) == 0
    return out


def content(out: Path) -> dict[str, Any]:
    """Every file of an audit, times left out."""
    files: dict[str, Any] = {name: print_[1] for name, print_ in hash_tree(out).items() if name != ".lock"}
    files.pop("seconds.json", None)
    result = json.loads((out / "audit.json").read_text())
    files["audit.json"] = [
        {key: value for key, value in line.items() if "seconds" not in key} for line in result.pop("lines")
    ] + [result]
    return files


def test_every_choice_has_its_line(whole: Path) -> None:
    result = json.loads((whole / "audit.json").read_text())
    lines = result["lines"]
    choices = [(line["decoding"], line["style"], line["scorer"], line["score"]) for line in lines]
    written = [
        (decoding, style, scorer, score)
        for decoding in ("greedy", "paper")
        for style in ("cot", "direct")
        for scorer in get_args(Scorer)
        for score in ("strict", "lenient")
    ]
    forced = [
        ("teacher_forced", s, "compute_accuracy_vqa", k) for s in ("cot", "direct") for k in ("strict", "lenient")
    ]
    assert choices == written + forced
    for line in lines:
        assert line["rows"] == ROWS and line["seconds"] > 0
        assert line["mean"] == pytest.approx(sum(line["tasks"].values()) / 2)
        reference = next(each for each in lines if each["style"] == line["style"])
        assert line["cost"] == pytest.approx(line["mean"] - reference["mean"])
        terms = result["contracts"][line["contract"]]
        assert terms["decoding"].get("temperature") == {"greedy": 0.0, "paper": 0.5}.get(line["decoding"])
        assert terms["scorer"]["preset"] == line["scorer"]
    assert len({line["contract"] for line in lines}) == 5


@pytest.mark.parametrize("scorer", get_args(Scorer))
def test_a_line_is_what_evaluating_under_it_gives(place: Path, whole: Path, tmp_path: Path, scorer: Scorer) -> None:
    data = {name: whole / "data" / name / "dev.parquet" for name in (*TASKS, GENERAL)}
    settings = config(split="dev", max_new_tokens=6, scorer=scorer)
    evaluate_checkpoint(place / "base", data, tmp_path, settings, "miniature")
    lines = json.loads((whole / "audit.json").read_text())["lines"]
    for line in lines:
        if (line["decoding"], line["scorer"]) == ("greedy", scorer):
            cells = {name: read_records(record_path(tmp_path, name, line["style"])) for name in data}
            assert line["tasks"] == {task: accuracy(cells[task])[line["score"]] for task in TASKS}
            assert line["general"] == {GENERAL: accuracy(cells[GENERAL])[line["score"]]}
            assert {line["contract"]} == set(read_contracts(tmp_path))
            assert line["truncated"] == sum(accuracy(records)["truncated"] for records in cells.values()) > 0


def test_answers_are_generated_once_and_a_second_audit_generates_nothing(place: Path, whole: Path, capsys) -> None:
    files = sorted(path.relative_to(whole).as_posix() for path in whole.rglob("*.jsonl"))
    every = [f"{d}/{n}.{s}.jsonl" for d in DECODINGS for n in (*TASKS, GENERAL) for s in ("cot", "direct")]
    assert files == sorted(every)
    before, weights = content(whole), place / "base" / "model.safetensors"
    stamps = {path: path.stat().st_mtime_ns for path in whole.rglob("*.jsonl")}
    assert audit(place, whole) == 0
    shown = capsys.readouterr().out
    assert "teacher forced" in shown and "T=0.5" in shown and "superclevr" in shown
    assert content(whole) == before and weights.is_file()
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.jsonl")} == stamps


def test_dev_is_read_unless_test_is_asked_for_and_that_leaves_a_trace(place: Path, whole: Path, tmp_path: Path) -> None:
    assert {path.name for path in whole.rglob("*.parquet")} == {"dev.parquet"}
    assert audit(place, tmp_path / "out", "--split", "test") == 0
    for out, split, count in ((whole, "dev", 5), (tmp_path / "out", "test", 4)):
        reads = [json.loads(path.read_text()) for path in sorted(out.rglob("reads.json"))]
        assert len(reads) == 3
        assert {(each[task]["split"], each[task]["rows"]) for each in reads for task in TASKS} == {(split, count)}
        assert json.loads((out / "audit.json").read_text())["reads"]["greedy"] == reads[0]
    assert {path.name for path in (tmp_path / "out").rglob("*.parquet")} == {"test.parquet"}


@pytest.mark.parametrize("number", [3, 14, 27, 60])
def test_a_killed_audit_goes_on_and_ends_the_same(place: Path, whole: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"

    def work() -> None:
        kill_at_write(number, out)
        audit(place, out)

    assert in_child(work) == -signal.SIGKILL
    assert not (out / "audit.json").exists()
    assert audit(place, out) == 0
    assert content(out) == content(whole)


def test_an_audit_of_something_else_is_refused(place: Path, whole: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(whole, tmp_path / "out")
    assert audit(place, tmp_path / "out", "--split", "test") == 2
    assert 'holds another audit: evaluation.split is "dev" there, "test" is asked for' in capsys.readouterr().err
    shutil.copytree(place, tmp_path / "place")
    make_tiny_base(tmp_path / "place" / "other")
    generation = tmp_path / "place" / "base" / "generation_config.json"
    generation.write_text(generation.read_text() + "\n")
    assert audit(tmp_path / "place", tmp_path / "out") == 2
    assert "holds another audit: checkpoint is" in capsys.readouterr().err
    assert cli.main(["audit", str(tmp_path / "nowhere")]) == 2
    assert "no such checkpoint" in capsys.readouterr().err
    assert content(tmp_path / "out") == content(whole)


def test_seconds_that_were_lost_are_a_dash(place: Path, whole: Path, tmp_path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    seconds = json.loads((out / "seconds.json").read_text())
    del seconds["greedy/mini_gqa.cot.jsonl"]
    (out / "seconds.json").write_text(json.dumps(seconds))
    assert audit(place, out) == 0
    lines = json.loads((out / "audit.json").read_text())["lines"]
    lost = {line["style"] for line in lines if line["decoding"] == "greedy" and line["seconds"] is None}
    assert lost == {"cot"}
    rows = sheet(json.loads((out / "audit.json").read_text())).rows
    assert [row[-1] == "\N{EN DASH}" for row in rows[:8]] == [True] * 4 + [False] * 4


def test_the_cost_of_a_choice_is_against_greedy_official_and_strict(place: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for path in (out / "teacher_forced").glob("*.jsonl"):
        write_records(path, [dataclasses.replace(record, strict=0.0, lenient=1.0) for record in read_records(path)])
    assert audit(place, out) == 0
    lines = json.loads((out / "audit.json").read_text())["lines"]
    for style in ("cot", "direct"):
        greedy, *_, as_released, no_newline = (line for line in lines if line["style"] == style)
        assert greedy["cost"] == 0.0
        assert as_released["cost"] == -greedy["mean"] and no_newline["cost"] == 100.0 - greedy["mean"]


def test_a_label_without_its_rationale_is_not_forced_in_cot(place: Path, tmp_path: Path) -> None:
    rows = [dataclasses.replace(row, rationale=None) for row in make_rows("mini_gqa", "dev", 3, seed=0)]
    write_split(tmp_path / "bare.parquet", rows)
    write_split(tmp_path / "rest.parquet", make_rows("mini_pope", "dev", 3, seed=0))
    one = Audit(place / "base", load_experiment(place / "tiny.yaml"), tmp_path)
    data = {name: tmp_path / "bare.parquet" if name == "mini_gqa" else tmp_path / "rest.parquet" for name in one.names}
    forced = {(job.task, job.style) for job in one.jobs(data) if job.decoding.forced}
    assert forced == {(name, style) for name in one.names for style in ("cot", "direct")} - {("mini_gqa", "cot")}
    assert len(one.jobs(data)) == 3 * 2 * 3 - 1


# --- rescore ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same evaluation, with samples, directly under each scorer."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_split(folder / "rows.parquet", make_rows("mini_gqa", "test", 12, seed=0))
    for scorer in get_args(Scorer):
        settings = config(scorer=scorer)
        data = {"mini_gqa": folder / "rows.parquet"}
        evaluate_checkpoint(place / "base", data, folder / scorer, settings, "miniature", samples=2)
    return {scorer: folder / scorer for scorer in get_args(Scorer)}


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(("one", "other"), [get_args(Scorer), get_args(Scorer)[::-1]])
def test_rescoring_equals_evaluating_under_the_other_scorer(evaluated, tmp_path: Path, one: str, other: str) -> None:
    before = files(evaluated[one])
    out = tmp_path / "new" / "out"
    assert cli.main(["rescore", str(evaluated[one]), "--scorer", other, "--out", str(out)]) == 0
    assert files(out) == files(evaluated[other])
    assert files(evaluated[one]) == before
    assert not set(read_contracts(out)) & set(read_contracts(evaluated[one]))
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_rescoring_takes_nothing_from_the_scores_that_stand_there(evaluated, tmp_path: Path) -> None:
    shutil.copytree(evaluated["official"], tmp_path / "records")
    verdict = {"extracted": "?", "strict": 0.5, "lenient": 0.5, "format": 0.5, "status": "undecodable"}
    for path in (tmp_path / "records").glob("*.jsonl"):
        write_records(path, [dataclasses.replace(record, **verdict) for record in read_records(path)])
    rescore(tmp_path / "records", "paper_single_label", tmp_path / "out")
    assert files(tmp_path / "out") == files(evaluated["paper_single_label"])


def spoil_version(path: Path) -> None:
    path.write_text(path.read_text().replace('"version": 3, ', ""))


def spoil_references(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "references"}) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_version, "line 1 is of record version 1; this program reads version 3"),
        (spoil_references, r"line 1 is no record .*no references"),
        (lambda path: (path.parent / "contracts.json").unlink(), "no contracts.json explains its contract"),
        (lambda path: [each.unlink() for each in path.parent.glob("*.jsonl")], "holds no records"),
    ],
)
def test_records_without_what_is_needed_are_refused(evaluated, tmp_path: Path, spoil, message: str) -> None:
    shutil.copytree(evaluated["official"], tmp_path / "records")
    spoil(tmp_path / "records" / "mini_gqa.cot.jsonl")
    with pytest.raises(RecordError, match=message):
        rescore(tmp_path / "records", "paper_single_label", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["records"]


def test_nothing_is_overwritten_and_nothing_is_rescored_in_vain(evaluated, whole: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RecordError, match="exists already, and nothing is overwritten"):
        rescore(evaluated["official"], "paper_single_label", tmp_path / "out")
    with pytest.raises(RecordError, match="was scored by official already"):
        rescore(evaluated["official"], "official", tmp_path / "new")
    with pytest.raises(RecordError, match="teacher forcing"):
        rescore(whole / "teacher_forced", "paper_single_label", tmp_path / "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert cli.main(["rescore", str(tmp_path), "--scorer", "best", "--out", str(tmp_path / "new")]) == 2
    assert "invalid choice: 'best'" in capsys.readouterr().err


@pytest.mark.parametrize("number", [1, 4, 8, 12])
def test_a_killed_rescoring_leaves_nothing_under_its_name(evaluated, tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"

    def work() -> None:
        kill_at_write(number, tmp_path)
        rescore(evaluated["official"], "paper_single_label", out)

    assert in_child(work) == -signal.SIGKILL
    assert not out.exists()
    rescore(evaluated["official"], "paper_single_label", out)
    assert files(out) == files(evaluated["paper_single_label"])
    assert list(tmp_path.iterdir()) == [out]
