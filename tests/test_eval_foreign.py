"""Anybody's checkpoint in one command: tasks by name, what is missing in words, nothing asked twice."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cpt_rft.data.pipeline import prepare_task
from cpt_rft.errors import CheckpointError
from eval.__main__ import main
from eval.foreign import lacking, refuse_unfit
from eval.records import read_contracts, read_records, record_path
from tests.helpers.listed_task import ListedTask, row
from tests.test_pipeline import LOOSE

BASE = Path(__file__).resolve().parents[1] / "cpt_rft/miniature/base"


def options(checkpoint: Path, out: Path, *tasks: str) -> list[str]:
    return [
        str(checkpoint),
        "--tasks",
        *tasks,
        "--out",
        str(out),
        "--rows",
        "3",
        "--styles",
        "direct",
        "--max-new-tokens",
        "4",
    ]


def test_a_plain_directory_is_evaluated_on_tasks_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in (*kept, "preprocessor_config.json", "chat_template.jinja"):
        shutil.copy(BASE / name, plain / name)
    assert lacking(plain) == []
    out = tmp_path / "out"
    assert main(options(plain, out, "mini_gqa")) == 0
    path = record_path(out, "mini_gqa", "direct")
    assert len(read_records(path)) == 3
    made = path.stat().st_mtime_ns
    # Another task later: only that is asked, and ability and task need no other command.
    assert main(options(plain, out, "mini_gqa", "mini_pope")) == 0
    assert path.stat().st_mtime_ns == made
    assert len(read_records(record_path(out, "mini_pope", "direct"))) == 3
    assert "mini_pope" in capsys.readouterr().out


def test_prepared_tasks_by_name_all_their_rows_and_abilities_too(tmp_path: Path) -> None:
    """Rows as 'cpt-rft data prepare' leaves them: twelve of each split, of an ability those of test alone."""
    directory = tmp_path / "there"
    for first, name in ((0, "geometry3k"), (100, "pope")):
        general = name == "pope"
        rows = {
            split: [replace(row(first + 20 * part + n, split), task=name) for n in range(12)]
            for part, split in enumerate(("test",) if general else ("train", "dev", "test"))
        }
        prepare_task(ListedTask(rows, name=name, general=general), tmp_path, directory, LOOSE)
    command = [str(BASE), "--tasks", "geometry3k", "pope", "--data-directory", str(directory), "--styles", "direct"]
    command += ["--max-new-tokens", "3"]
    out = tmp_path / "all"
    assert main([*command, "--out", str(out)]) == 0
    assert {task: len(read_records(record_path(out, task, "direct"))) for task in ("geometry3k", "pope")} == {
        "geometry3k": 12,
        "pope": 12,
    }
    [terms] = read_contracts(out).values()
    assert terms["prompts"]["preset"] == "task"
    assert main([*command, "--rows", "5", "--out", str(tmp_path / "five")]) == 0
    assert len(read_records(record_path(tmp_path / "five", "pope", "direct"))) == 5
    assert main([*command, "--rows", "13", "--out", str(tmp_path / "more")]) == 2
    dev = [*command[:2], "geometry3k", *command[4:], "--split", "dev", "--preset", "miniature"]
    assert main([*dev, "--out", str(tmp_path / "dev")]) == 0
    records = read_records(record_path(tmp_path / "dev", "geometry3k", "direct"))
    assert len(records) == 12 and not {one.id for one in records} & {
        one.id for one in read_records(record_path(out, "geometry3k", "direct"))
    }


def test_all_that_is_missing_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "pytorch_model.bin").touch()
    found = lacking(bare)
    assert [text.split(" ", 1)[0] for text in found] == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
        "model.safetensors",
    ]
    assert "pytorch_model.bin is an older format" in found[-1]
    assert lacking(bare, weights=False) == found[:-1]
    assert main(options(bare, tmp_path / "out", "mini_gqa")) == 2
    assert "the tokens that end an answer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        refuse_unfit(tmp_path / "nowhere")


def test_a_missing_part_of_the_weights_and_a_broken_index(tmp_path: Path) -> None:
    whole = Path(shutil.copytree(BASE, tmp_path / "whole"))
    (whole / "model.safetensors").unlink()
    index = whole / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    (whole / "one.safetensors").touch()
    assert lacking(whole) == ["two.safetensors (a part of the weights)"]
    index.write_text("{")
    assert lacking(whole) == ["model.safetensors.index.json, whole (which file holds which weight)"]
    (whole / "chat_template.jinja").unlink(missing_ok=True)
    (whole / "tokenizer_config.json").write_text("{")
    assert "chat_template" not in " ".join(lacking(whole))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "There is nothing to ask"),
        (("a.parquet", "--tasks", "mini_gqa"), "both given"),
        (("--tasks", "gqa"), "no task gqa of the source 'miniature'"),
    ],
)
def test_wrong_tasks(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(BASE), *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
