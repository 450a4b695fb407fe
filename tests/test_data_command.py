"""``cpt-rft data``: prepare, check, show and export a task of local pictures; the forms that other engines read."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cpt_rft.cli import main
from cpt_rft.data.export import export_task, exported_ids
from cpt_rft.data.ledger import read_ledger
from cpt_rft.data.parquet import read_split
from cpt_rft.data.pipeline import prepare_task
from cpt_rft.errors import DataError
from cpt_rft.files import hash_tree, read_json
from cpt_rft.prompts import user_text
from tests.helpers.listed_task import ListedTask, encoded, photo, row
from tests.test_pipeline import LOOSE

Run = Callable[..., str]
SETTINGS = """
name: puzzles
reader: jigsaw
kind: sequence
splits: {{train: pictures}}
carve: {{test: {{from_split: train, share: 0.3, seed: 0}}}}
options: {{folder: {folder}, rows: 2, columns: 2, seed: 0}}
prompts: {{task: "<image>\\n{{question}}"}}
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.jpg").write_bytes(encoded(photo(number, 90, 80), "JPEG"))
    (tmp_path / "secret.jpg").write_bytes(encoded(photo(99, 90, 80), "JPEG"))
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "puzzles.yaml").write_text(SETTINGS.format(folder=folder))
    (tmp_path / "checks.yaml").write_text("max_dropped: 0.5\n")
    return tmp_path / "puzzles.yaml"


@pytest.fixture
def data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an action; the exit status must be the given one. Returns what was printed."""

    def run(action: str, *words: object, status: int = 0) -> str:
        arguments = ["data", action, *map(str, words), "--out", str(tmp_path / "out")]
        assert main(arguments) == status, capsys.readouterr().err
        captured = capsys.readouterr()
        return captured.out if status == 0 else captured.err

    return run


def prepare(data: Run, task: Path, *words: object, status: int = 0) -> str:
    options = ["--cache", task.parent / "cache", "--checks", task.parent / "checks.yaml", "--processes", "1"]
    return data("prepare", task, *options, *words, status=status)


def test_prepare_check_show(data: Run, task: Path, tmp_path: Path) -> None:
    printed = prepare(data, task)
    assert "1 unsafe_name: a file name leads out of its folder" in printed
    ledger = read_ledger(tmp_path / "out" / "puzzles")
    rows = {split: entry["rows_used"] for split, entry in ledger["splits"].items()}
    assert sum(rows.values()) == 12
    checked = data("check", "puzzles")
    assert f"{rows['train']} rows of train" in checked
    assert "all as recorded" in checked
    shown = data("show", "puzzles", "--rows", 1)
    assert "unsafe_name" in shown
    assert shown.count("-> ") == 2
    prepare(data, task)


def test_check_notices_changes(data: Run, task: Path, tmp_path: Path) -> None:
    prepare(data, task)
    path = tmp_path / "out" / "puzzles" / "train" / "00000.parquet"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + b"x")
    assert "was changed" in data("check", "puzzles", status=2)
    path.write_bytes(sound)
    data("check", "all")
    drops = tmp_path / "out" / "puzzles" / "drops.jsonl"
    drops.write_text("")
    assert "does not list the drops" in data("check", "puzzles", status=2)
    path.unlink()
    assert "is missing" in data("check", "puzzles", status=2)


def test_mistakes_are_explained(data: Run, task: Path, tmp_path: Path) -> None:
    assert "holds no prepared task" in data("show", "all", status=2)
    prepare(data, task)
    assert "the nearest is 'puzzles'" in data("show", "puzles", status=2)
    assert "unknown task 'scienceqs', the nearest is 'scienceqa'" in data("prepare", "scienceqs", status=2)
    assert "Unknown preset" in data("export", "puzzles", "--engine", "easyr1", "--preset", "no", status=2)
    (tmp_path / "checks.yaml").write_text("max_droped: 0.5\n")
    assert "the nearest is 'max_dropped'" in prepare(data, task, status=2)
    (tmp_path / "checks.yaml").write_text("max_dropped: 0.0\n")
    assert "was locked otherwise" in prepare(data, task, "--limit", 3, status=2)


def test_what_cannot_be_prepared_does_not_keep_the_rest_waiting(data: Run, task: Path, tmp_path: Path) -> None:
    lost = []
    for name in ("first", "second"):
        lost.append(tmp_path / f"{name}.yaml")
        lost[-1].write_text(SETTINGS.format(folder=tmp_path / name).replace("puzzles", name))
    assert f"error: {tmp_path / 'first'} does not exist. Fix: set options.folder" in prepare(data, lost[0], status=2)
    loose = ["--cache", tmp_path / "cache", "--checks", tmp_path / "checks.yaml"]
    told = data("prepare", lost[0], task, lost[1], *loose, status=2)
    assert "error: 2 of 3 tasks are not prepared." in told
    assert all(f"{tmp_path / name} does not exist. Fix:" in told for name in ("first", "second"))
    assert "rows of train, " in data("check", "all")


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A task with a train and a test split, two rows of which share a picture, and one without any."""
    shared = row(0).images[0]
    rows = [
        row(0),
        row(1, image=shared),
        row(2, rationale="It looks\nlike it.", meta={"options": ["a thing", "thing 2"]}),
        row(3, images=(), image_paths=(), problem="Why?"),
    ]
    rows = [*rows, row(4, meta={"problems": {"paper_sft": "<image>Now what?"}})]
    prepare_task(ListedTask({"train": rows, "test": [row(9, "test")]}), tmp_path, tmp_path / "out", LOOSE)
    return tmp_path / "out"


def test_easyr1_gets_directories_of_parquet(prepared: Path, tmp_path: Path) -> None:
    place = export_task(prepared, "listed", "easyr1", tmp_path / "easy", "paper_sft", "cot")
    assert sorted(path.name for path in place.iterdir()) == [
        "test-00000-of-00001.parquet",
        "train-00000-of-00001.parquet",
    ]
    rows = read_split(prepared / "listed" / "train")
    found = pq.read_table(place / "train-00000-of-00001.parquet").to_pylist()
    assert [set(record) for record in found] == [{"images", "problem", "answer"}] * len(rows)
    for record, example in zip(found, rows, strict=True):
        assert tuple(image["bytes"] for image in record["images"]) == example.images
        truth = json.loads(record["answer"])
        assert set(truth) == {"id", "task", "kind", "answer", "references", *example.meta.keys() & {"options"}}
        assert tuple(truth.get("options", ())) == example.options
        assert (truth["id"], truth["references"]) == (example.id, list(example.references))
    assert found[4]["problem"] == "<image>Now what?"
    template = (tmp_path / "easy" / "paper_sft_cot.jinja").read_text()
    assert template.replace("{{ content }}", found[4]["problem"]) == user_text(rows[4], "cot", "paper_sft")


def test_llamafactory_gets_sharegpt_and_each_picture_once(prepared: Path, tmp_path: Path) -> None:
    target = tmp_path / "factory"
    assert export_task(prepared, "listed", "llamafactory", target, "task", "direct") == target
    rows = read_split(prepared / "listed" / "train")
    found = json.loads((target / "listed_train.json").read_text())
    assert [record["messages"][0]["content"] for record in found] == [
        user_text(example, "direct", "task") for example in rows
    ]
    assert [record["messages"][1]["content"] for record in found] == [example.answer for example in rows]
    assert [[(target / name).read_bytes() for name in record["images"]] for record in found] == [
        list(example.images) for example in rows
    ]
    assert found[0]["images"] == found[1]["images"]
    assert len([path for path in (target / "media").rglob("*") if path.is_file()]) == 4  # three of train, one of test
    info = read_json(target / "dataset_info.json")
    assert sorted(info) == ["listed_test", "listed_train"]
    assert info["listed_train"]["columns"] == {"messages": "messages", "images": "images"}
    before = hash_tree(target)
    export_task(prepared, "listed", "llamafactory", target, "task", "direct")
    assert hash_tree(target) == before


def test_a_split_without_rows_is_exported_too(tmp_path: Path) -> None:
    broken = row(1, image=b"broken")
    prepare_task(ListedTask({"train": [broken], "test": [row(9, "test")]}), tmp_path, tmp_path / "out", LOOSE)
    for engine in ("easyr1", "llamafactory"):
        export_task(tmp_path / "out", "listed", engine, tmp_path / engine, "task", "direct")
        assert exported_ids(engine, tmp_path / engine, "listed", "train") == []
    assert json.loads((tmp_path / "llamafactory" / "listed_train.json").read_text()) == []


def test_every_engine_gets_the_same_rows(prepared: Path, tmp_path: Path) -> None:
    export_task(prepared, "listed", "easyr1", tmp_path / "easy", "task", "direct")
    export_task(prepared, "listed", "llamafactory", tmp_path / "factory", "task", "direct")
    for split in ("train", "test"):
        ours = [example.id for example in read_split(prepared / "listed" / split)]
        assert exported_ids("easyr1", tmp_path / "easy", "listed", split) == ours
        assert exported_ids("llamafactory", tmp_path / "factory", "listed", split) == ours


def test_cot_targets_need_rationales(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rationale"):
        export_task(prepared, "listed", "llamafactory", tmp_path / "factory", "task", "cot")
    assert not (tmp_path / "factory" / "dataset_info.json").exists()


def test_nothing_is_written_through_links(prepared: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    target = tmp_path / "factory"
    target.mkdir()
    (target / "media").symlink_to(elsewhere)
    with pytest.raises(DataError, match="is a link"):
        export_task(prepared, "listed", "llamafactory", target, "task", "direct")
    (target / "media").unlink()
    (target / "listed").symlink_to(elsewhere)
    with pytest.raises(DataError, match="is a link"):
        export_task(prepared, "listed", "easyr1", target, "task", "direct")
    (target / "listed").unlink()
    export_task(prepared, "listed", "llamafactory", target, "task", "direct")
    picture = next(path for path in (target / "media").rglob("*.jpg"))
    content = picture.read_bytes()
    picture.unlink()
    mine = bytes(len(content))
    (elsewhere / "x.jpg").write_bytes(mine)
    picture.symlink_to(elsewhere / "x.jpg")
    export_task(prepared, "listed", "llamafactory", target, "task", "direct")
    assert (elsewhere / "x.jpg").read_bytes() == mine
    assert not picture.is_symlink()
    assert picture.read_bytes() == content
