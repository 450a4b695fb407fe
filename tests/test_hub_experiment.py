"""An experiment on prepared rows: which rows it takes, and that it notices when they change."""

import json
import shutil
from pathlib import Path

import pytest

from cpt_rft.config.load import load_experiment
from cpt_rft.config.schema import DataConfig, Experiment
from cpt_rft.data.parquet import read_split
from cpt_rft.data.pipeline import prepare_task
from cpt_rft.data.prepare import LOCK_NAME, PreparedData, check_prepared, prepare
from cpt_rft.errors import ConfigError, DataError
from cpt_rft.sequence.rundir import locked_data
from tests.helpers.listed_task import ListedTask, row
from tests.test_pipeline import LOOSE

EXPERIMENT = """
name: small
base_model: base
tasks: [geometry3k]
methods: [sft]
engine: local
data: {source: hub, directory: there, train: 8, dev: 2, test: 3, prompt_preset: task}
evaluation: {max_new_tokens: 8}
output: out
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two tasks, and one that is never trained on."""
    for number, name in enumerate(("geometry3k", "gqa")):
        first = 100 * number
        rows = {
            split: [row(first + 20 * part + n, split) for n in range(12)]
            for part, split in enumerate(("train", "dev", "test"))
        }
        prepare_task(ListedTask(rows, name=name), tmp_path, tmp_path / "there", LOOSE)
    task = ListedTask({"test": [row(900 + n, "test") for n in range(12)]}, name="pope", general=True)
    prepare_task(task, tmp_path, tmp_path / "there", LOOSE)
    return tmp_path / "there"


def settings(directory: Path, **changes: object) -> DataConfig:
    sizes = {"train": 8, "dev": 2, "test": 3, "general": 4}
    values = {"source": "hub", "directory": str(directory), "prompt_preset": "task"} | sizes
    return DataConfig.model_validate(values | changes)


def made(directory: Path, out: Path, **changes: object) -> PreparedData:
    return prepare(settings(directory, **changes), ["geometry3k", "gqa"], ["pope"], out)


def test_the_choice_is_seeded_and_keeps_the_order(directory: Path, tmp_path: Path) -> None:
    data = made(directory, tmp_path / "a")
    assert data.rows == {
        **{
            f"{task}/{split}": n
            for task in ("geometry3k", "gqa")
            for split, n in (("train", 8), ("dev", 2), ("test", 3))
        },
        "pope/test": 4,
    }
    check_prepared(data)
    chosen = read_split(data.path("geometry3k", "train"))
    there = read_split(directory / "geometry3k" / "train")
    assert chosen == [example for example in there if example in chosen]
    assert made(directory, tmp_path / "b").hashes == data.hashes
    other = made(directory, tmp_path / "c", seed=1)
    assert other.hashes["geometry3k/train"] != data.hashes["geometry3k/train"]
    more = made(directory, tmp_path / "d", train=10)
    assert {r.id for r in chosen} < {r.id for r in read_split(more.path("geometry3k", "train"))}


def test_more_rows_than_there_are_is_an_error(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="geometry3k/train has only 12 rows, not 13"):
        made(directory, tmp_path / "a", train=13)


def test_unprepared_and_general_tasks_are_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prepared task 'pathvqa'") as caught:
        prepare(settings(directory), ["pathvqa"], [], tmp_path / "a")
    assert "cpt-rft data prepare pathvqa" in caught.value.fix
    with pytest.raises(DataError, match="pope is a general ability"):
        prepare(settings(directory), ["pope"], [], tmp_path / "a")


def test_another_lock_is_refused(directory: Path, tmp_path: Path) -> None:
    made(directory, tmp_path / "out" / "data")
    text = EXPERIMENT.replace("there", str(directory)).replace("[geometry3k]", "[geometry3k, gqa]")
    (tmp_path / "small.yaml").write_text(text)
    overrides = ["data.general=4", "evaluation.general=[pope]"]
    experiment = load_experiment(tmp_path / "small.yaml", overrides)
    assert locked_data(experiment, tmp_path / "out" / "data") is not None
    lock = json.loads((directory / LOCK_NAME).read_text())
    lock["tasks"]["gqa"]["splits"]["dev"]["sha256"] = "0" * 64
    (directory / LOCK_NAME).write_text(json.dumps(lock))
    for again in (
        lambda: locked_data(experiment, tmp_path / "out" / "data"),
        lambda: made(directory, tmp_path / "out" / "data"),
    ):
        with pytest.raises(DataError, match=r"other rows than this run was made from: gqa\.dev\.sha256"):
            again()
    shutil.rmtree(directory)  # the run has rows of its own
    assert locked_data(experiment, tmp_path / "out" / "data") is not None


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("data.directory=null", "the source 'hub' needs the directory"),
        ("data.source=miniature", "only the source 'hub' has one"),
        ("tasks=[geometry3]", "the nearest is 'geometry3k'"),
        ("evaluation={max_new_tokens: 8, split: dev, general: [pope]}", "have no dev rows"),
    ],
)
def test_mistakes_in_the_experiment_are_named(tmp_path: Path, override: str, complaint: str) -> None:
    (tmp_path / "small.yaml").write_text(EXPERIMENT)
    with pytest.raises(ConfigError, match=complaint):
        load_experiment(tmp_path / "small.yaml", [override])


def test_drawn_rows_have_no_directory_in_their_configuration(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(EXPERIMENT)
    stored: Experiment = load_experiment(tmp_path / "small.yaml")
    assert Experiment.model_validate_json(stored.model_dump_json()) == stored
    assert "directory" not in DataConfig(train=1, dev=1, test=1).model_dump(mode="json")
