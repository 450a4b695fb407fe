"""The command line: its help, its lines, and what it does not load."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpt_rft import __version__, cli
from cpt_rft.progress import BarDisplay, LineDisplay, make_display
from tests.helpers.tiny_run import Tiny, content, one_line_error, prepared, reference

VERBS = (
    "plan",
    "run",
    "status",
    "report",
    "prepare",
    "train",
    "evaluate",
    "schema",
    "audit",
    "rescore",
    "pretrain",
    "audit-base",
)


@pytest.fixture
def tiny(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Tiny:
    return prepared(tmp_path_factory.getbasetemp()).copy(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return reference(tmp_path_factory.getbasetemp())


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    text = shown(capsys, verb, "--help")
    assert f"usage: cpt-rft {verb}" in text and "--debug" in text
    if verb in ("plan", "run", "status", "report", "prepare", "train", "evaluate"):
        assert "KEY=VALUE" in text and "method.lr=1e-4" in text


def test_the_command_lists_its_verbs_and_version(capsys):
    text = shown(capsys, "--help")
    assert all(verb in text for verb in VERBS)
    assert shown(capsys, "--version").strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "VERB"),
        (["rn", "miniature"], "invalid choice: 'rn'"),
        (["run"], "the following arguments are required: experiment"),
        (["run", "miniature", "--sed", "1", "--stuff"], "'--sed 1 --stuff' is not understood"),
        (["run", "miniature", "sft"], "'sft' is not KEY=VALUE"),
        (["run", "miniature", "--seed", "one"], "invalid int value: 'one'"),
        (["run", "miniatur"], "There is no experiment file miniatur"),
        (["schema", "a=b"], "'a=b' is not understood"),
        (["evaluate", "miniature", "sft"], "a stage is a method and a task"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, words, capsys):
    status = cli.main(arguments)
    line = one_line_error((status, "", capsys.readouterr().err))
    assert words in line


def test_debug_shows_where_an_error_comes_from(tiny):
    with pytest.raises(Exception, match="unknown key"):
        tiny.command("run", "nonsense=1", "--debug")


def test_overrides_may_stand_anywhere(tiny):
    status, out, _ = tiny.command("plan", "workers=1", "--method", "sft", "seeds=[0,1]", "--json", "data.train=8")
    assert status == 0
    plan = json.loads(out)
    assert plan["workers"] == 1
    rows = [(row["chain"], row["stage"], row["parent"], row["rows"], row["steps"]) for row in plan["stages"][1:]]
    assert rows == [
        ("sft seed0", "1_mini_gqa", "base", 8, 2),
        ("sft seed0", "2_mini_superclevr", "1_mini_gqa", 8, 2),
        ("sft seed1", "1_mini_gqa", "base", 8, 2),
        ("sft seed1", "2_mini_superclevr", "1_mini_gqa", 8, 2),
    ]
    assert plan["disk_peak_bytes"] > 4 * sum(path.stat().st_size for path in tiny.base.iterdir())


def test_plan_for_people_and_for_scripts(tiny):
    _, out, _ = tiny.command("plan")
    assert "2_mini_superclevr" in out and "disk at the peak about" in out and "joint seed0" in out
    assert tiny.command("plan", "--method", "sft", "--stages")[1].split() == ["mini_gqa", "mini_superclevr"]
    assert tiny.command("plan", "--method", "joint", "--stages")[1].split() == ["multitask"]
    shutil.rmtree(tiny.base)
    assert "(missing)" in tiny.command("plan")[1]


def test_status(done, tiny):
    status, out, _ = done.command("status", "--verify")
    assert status == 0 and "complete" in out and "broken" not in out
    status, out, _ = tiny.command("status", "--json")
    assert status == 0
    found = json.loads(out)
    assert not found["complete"] and {row["state"] for row in found["stages"]} == {"missing"}
    found = json.loads(done.command("status", "--json", "--method", "grpo")[1])
    assert found["complete"] and [row["chain"] for row in found["stages"]] == ["base", "grpo seed0", "grpo seed0"]
    assert found["report"] == str(done.directory / "report.html")
    shutil.rmtree(tiny.directory)
    assert "holds no run yet" in one_line_error(tiny.command("status"))


def test_status_finds_what_is_wrong_with_base_and_data(tiny):
    (tiny.base / "config.json").unlink()
    shutil.copy(tiny.directory / "data/mini_gqa/dev.parquet", tiny.directory / "data/mini_gqa/train.parquet")
    status, out, _ = tiny.command("status", "--verify")
    assert status == 2
    assert "config.json is missing" in out and "holds other rows than" in out


def test_prepare_writes_rows_and_needs_no_base(tiny):
    shutil.rmtree(tiny.base)
    shutil.rmtree(tiny.directory)
    status, out, _ = tiny.command("prepare")
    assert status == 0
    assert "mini_gqa/train: 12 rows" in out and "mini_pope/test: 4 rows" in out
    assert sorted(path.name for path in tiny.directory.iterdir()) == [".lock", "data"]


def test_report_without_a_complete_sequence_is_refused(tiny):
    assert "is incomplete" in one_line_error(tiny.command("report"))


def test_results_are_the_same_for_the_same_records(done):
    before = content(done.directory)
    status, out, _ = done.command("report")
    assert status == 0 and "AvgAcc" in out
    assert content(done.directory) == before
    assert (done.directory / "report.html").stat().st_size > 1000


def test_a_second_start_loads_no_model_library_and_takes_no_time(done):
    code = (
        "import sys; from cpt_rft.cli import main; status = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(status)"
    )
    before = time.process_time(), content(done.directory), os.times().children_user
    again = subprocess.run([sys.executable, "-c", code, "run", str(done.file)], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "everything is done already" in again.stderr and "report.html" in again.stderr
    assert content(done.directory) == before[1]
    assert os.times().children_user - before[2] < 5.0


def test_scoring_the_base_is_not_done_twice(done):
    for arguments in ([], ["workers=1"], ["workers=1", "seeds=[0]"]):
        status, _, err = done.command("evaluate", *arguments)
        assert status == 0 and err == f"scored: {done.directory / 'base/eval'}\n"


def test_one_stage_after_another_by_hand(tiny, done):
    """Train and evaluate as the scripts do, with real workers."""
    assert "parent stage" in tiny.command("train", "sft", "mini_superclevr")[2]
    assert "is not trained" in one_line_error(tiny.command("evaluate", "sft", "mini_gqa"))
    status, _, err = tiny.command("train", "sft", "mini_gqa", "workers=1")
    assert status == 0 and "trained: " in err
    status, _, err = tiny.command("evaluate", "sft", "mini_gqa")
    assert status == 0 and "scored: " in err
    expected, found = content(done.directory), content(tiny.directory)
    made = [name for name in found if name.startswith("sft/")]
    assert len(made) > 20 and {name: found[name] for name in made} == {name: expected[name] for name in made}
    for verb in ("train", "evaluate"):  # nothing is left to do
        assert tiny.command(verb, "sft", "mini_gqa")[0] == 0


def test_a_schema_goes_where_it_is_told(tmp_path, capsys):
    assert cli.main(["schema", "--out", str(tmp_path / "schemas")]) == 0
    assert len(capsys.readouterr().out.split()) == len(list((tmp_path / "schemas").iterdir())) == 3


# --- progress ---


class Terminal:
    """A stream that says that it is a terminal."""

    def __init__(self, answer: bool) -> None:
        self.answer = answer
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return self.answer


def test_lines_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr("cpt_rft.progress.PLAIN_EVERY_S", 1000.0)
    stream = Terminal(False)
    with make_display({"a": 3.0, "b": 1.0}, stream) as display:
        assert isinstance(display, LineDisplay)
        display.update("a", 0.25, "too soon to say")
        display.update("a", 0.5, "half", part=True)
        display.update("b", 1.0, "scored", part=True)
        display.note("error: something")
    lines = stream.text.splitlines()
    assert [line.partition("] ")[2].partition(" left)")[0][:26] for line in lines] == [
        "a: half (38% of all, 0 s", "b: scored (62% of all, 0 s", "error: something",
    ]  # fmt: skip
    monkeypatch.setattr("cpt_rft.progress.PLAIN_EVERY_S", 0.0)
    display.update("a", 0.5, "now")
    assert "a: now" in stream.text


def test_bars_on_a_terminal():
    stream = Terminal(True)
    with make_display({"sft seed0": 3.0, "grpo seed0": 1.0}, stream) as display:
        assert isinstance(display, BarDisplay)
        display.update("sft seed0", 0.5, "1/2 mini_gqa step 3/6")
        display.update("grpo seed0", 1.0, "scored")
        display.note("a [note]")
    assert "sft seed0" in stream.text and "all" in stream.text and "62 %" in stream.text and "a [note]" in stream.text
