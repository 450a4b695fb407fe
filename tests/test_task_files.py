"""Task files, the paper's prompts to the letter, and rows and pictures of no documented form."""

import io
import json
import subprocess
import sys
import zipfile

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("datasets")

from cpt_rft.config.load import REPOSITORY
from cpt_rft.data.drop import Drop
from cpt_rft.data.example import Example
from cpt_rft.errors import ConfigError, DataError
from cpt_rft.prompts import PRESETS, problem_of, user_text
from cpt_rft.tasks.base import Task, load_task, load_task_config, task_names
from cpt_rft.tasks.superclevr_official import items
from tests.helpers.hub import sets
from tests.helpers.hub.study import dropped, running_study, used, write_broken_pictures

STUDY = ["scienceqa", "textvqa", "vizwiz", "gqa", "geometry3k", "pathvqa", "superclevr"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with running_study(tmp_path_factory.mktemp("study")) as running:
        yield running


def test_broken_pictures_and_links_are_counted(study, tmp_path):
    write_broken_pictures(tmp_path / "bad", tmp_path / "outside.png")
    config = yaml.safe_load((REPOSITORY / "configs/tasks/jigsaw.yaml").read_text())
    config["options"]["folder"] = str(tmp_path / "bad")
    (tmp_path / "jigsaw.yaml").write_text(yaml.safe_dump(config))
    task = load_task(tmp_path / "jigsaw.yaml")
    source = task.source(tmp_path)
    found = [row for split in task.splits for row in task.rows(split, source)]
    assert {row.id.rpartition("/")[2]: str(row.reason) for row in found} == {
        "cut.jpg": "picture_truncated",
        "link.png": "unsafe_name",
        "narrow.png": "picture_too_small",
        "nowhere.png": "picture_unreadable",
        "text.png": "picture_unreadable",
    }


def test_the_authors_sets_are_used_as_they_are(study, tmp_path):
    features = sets.Features({"images": sets.List(sets.Image()), "problem": sets.TEXT, "answer": sets.TEXT})
    raw = [
        {"images": [sets.picture(1)], "problem": "<image>\nWhich?\nA. a", "answer": "A"},
        {"images": [sets.picture(2)], "problem": "what is it?", "answer": "no"},
    ]
    study.hub.add(sets.repo("zhhxte/mllm_cl_scienceqa", {"default": (features, {"train": raw})}))
    (tmp_path / "a.yaml").write_text(
        "{name: scienceqa, reader: authors, kind: choice, repos: [zhhxte/mllm_cl_scienceqa],"
        " splits: {train: train}, prompts: {task: '{question}'}}"
    )
    task = load_task(tmp_path / "a.yaml")
    found = list(task.rows("train", task.source(tmp_path)))
    assert [row.problem for row in found] == ["<image>\nWhich?\nA. a", "<image>what is it?"]


def test_a_repository_without_a_column_is_refused(study, tmp_path):
    features = sets.Features({"question": sets.TEXT})
    study.hub.add(sets.repo("a/other", {"default": (features, {"train": [{"question": "q"}]})}))
    (tmp_path / "a.yaml").write_text(
        "{name: pathvqa, reader: pathvqa, kind: short_text, repos: [a/other], splits: {train: train},"
        " prompts: {task: '<image>{question}'}}"
    )
    task = load_task(tmp_path / "a.yaml")
    with pytest.raises(DataError, match=r"a/other at .* has no column image, answer"):
        list(task.rows("train", task.source(tmp_path)))


def test_rows_of_no_documented_form_are_counted(study, tmp_path):
    notes = [{}, [], None, 3, {"image": 4}, {"image": "x.jpg", "answers": [{"answer": 3}], "question": "q"}]
    notes += [
        {"image": "x.jpg", "answers": [{"answer": "yes"}], "question": "half \ud800"},
        {"image": "half \ud800.jpg", "answers": [{"answer": "yes"}], "question": "q"},
        {"image": "x.jpg", "answers": "yes", "question": "q"},
        {"image": "../../x.jpg", "answers": [], "question": None},
    ]
    for name, members in {"Annotations.zip": {"train.json": json.dumps(notes)}, "train.zip": {"x.jpg": b"x"}}.items():
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        study.hub.site[f"/site/bad/{name}"] = buffer.getvalue()
    text = (study.place / "tasks" / "vizwiz.yaml").read_text().replace("/site/", "/site/bad/")
    (tmp_path / "vizwiz.yaml").write_text(text)
    task = load_task(tmp_path / "vizwiz.yaml")
    source = task.source(tmp_path)
    found = [*task.rows("train", source), *task.rows("dev", source)]
    assert len(found) == len(notes)
    assert used(found) == []
    assert all(" ".join(row).encode() for row in found)  # a ledger can write them


CELLS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["bytes", "value", "a"]), inner),
    max_leaves=6,
)
GOOD = {
    **{"image": sets.picture(1), "images": [sets.picture(1)], "question": "q", "problem": "<image>q", "answer": "yes"},
    **{"choices": ["a", "b"], "hint": "h", "solution": "s", "question_id": 1, "answers": ["yes"], "category": "c"},
    **{"options": "['a', 'b']", "answer_index": 0, "question_type": "open", "id": "1", "imageId": "1"},
    **{"conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]},
    **{f"image_{i}": None for i in range(1, 8)},
}


@pytest.mark.parametrize("name", [*STUDY, "mmmu", "mmlu_pro", "pope"])
@settings(max_examples=50)
@given(cells=st.dictionaries(st.sampled_from(sorted(GOOD)), CELLS, max_size=4), gone=st.sampled_from(["", *GOOD]))
def test_any_row_at_all_is_an_example_or_a_drop(name, cells, gone):
    good = GOOD | ({"options": ["a", "b"]} if name == "mmlu_pro" else {})
    task = load_task(name)
    raw = {key: value for key, value in (good | cells).items() if key != gone}
    row = task.converted("test", "000001", lambda: task.read(raw))
    assert isinstance(row, Example | Drop)
    " ".join([row.id, *([row.detail] if isinstance(row, Drop) else [row.problem, *row.references])]).encode()


def test_items_of_a_large_object_come_one_at_a_time():
    text = json.dumps({"info": {"a": [1]}, "questions": [{"n": i, "s": 'a"],[b'} for i in range(500)], "end": 1})

    class Dribble(io.StringIO):
        def read(self, size: int = -1) -> str:
            return super().read(min(size, 3))

    assert list(items(Dribble(text), "questions")) == json.loads(text)["questions"]
    assert list(items(Dribble('{"q": [12345, "x", true]}'), "q")) == [12345, "x", True]
    for broken in ('{"questions": [{"n": 1}, {"n"', '{"other": []}', ""):
        with pytest.raises(DataError):
            list(items(Dribble(broken), "questions"))


SUFFIX = "Answer the question using a single word or phrase."


@pytest.mark.parametrize(
    ("name", "split", "sft", "rft"),
    [
        ("geometry3k", "train", f"<image>Find x.\n{SUFFIX}", "<image>Find x."),
        ("geometry3k", "test", f"<image>Find x.\n{SUFFIX}", "<image>Find x."),
        ("pathvqa", "train", f"<image>what is shown 0?\n{SUFFIX}", "<image>what is shown 0?"),
        ("gqa", "test", f"<image>\nWho wears plain 15?\n{SUFFIX}", f"<image>\nWho wears plain 15?\n{SUFFIX}"),
    ],
)
def test_the_papers_arms_differ_where_they_did(study, name, split, sft, rft):
    row = used(study.rows(name, split))[0]
    assert problem_of(row, "paper_sft") == sft
    assert problem_of(row, "paper_rft") == rft
    assert user_text(row, "direct", "paper_sft") == sft
    assert user_text(row, "direct", "paper_rft") == rft + " You MUST provide the final answer directly."
    assert user_text(row, "cot", "paper_rft").startswith(rft + " You FIRST think about the reasoning process as")
    assert user_text(row, "cot", "task").startswith(row.problem + " You FIRST think")


def test_scienceqas_test_rows_lack_the_word_context_in_the_papers_prompts(study):
    train, test = used(study.rows("scienceqa", "train"))[0], used(study.rows("scienceqa", "test"))[2]
    for preset in ("paper_sft", "paper_rft"):
        assert problem_of(train, preset) == train.problem
        assert problem_of(test, preset) == test.problem.replace("Context: ", "")
    assert "Context: Hint 204." in test.problem
    dev = used(study.rows("scienceqa", "dev"))[1]  # dev stands for the test
    assert problem_of(dev, "paper_sft") == dev.problem.replace("Context: ", "") != dev.problem


def test_every_task_of_the_study_has_one_default_prompt_and_the_papers():
    for name in STUDY:
        assert list(load_task_config(name).prompts) == ["task", "paper_sft", "paper_rft"]
    for name in task_names():
        config = load_task_config(name)
        assert isinstance(config.prompts["task"], str)  # train and test alike
        assert set(config.prompts) <= set(PRESETS)
        assert config.revision is None
        assert isinstance(load_task(name), Task)
    for path in (REPOSITORY / "configs/tasks/authors").glob("*.yaml"):
        assert load_task(path).config.name == path.stem in task_names()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("readr: gqa", "unknown key 'readr', the nearest is 'reader'"),
        ("reader: gqua", "nearest is 'gqa'"),
        ("kind: words", "kind"),
        ("splits: {training: train}", "splits"),
        ("carve: {dev: {from_split: test, share: 0.1}}", "must be cut from a split"),
        ("carve: {train: {from_split: train, share: 0.1}}", "must be cut from a split"),
        ("prompts: {paper_sft: '{question}'}", "the preset 'task' is missing"),
        ("prompts: {task: '', papersft: ''}", "nearest is 'paper_sft'"),
        ("options: {selection: all, folder: x}", "unknown option 'folder'"),
        ("options: {selection: 3}", "the option selection is 3.*like its default, 'balanced'"),
        ("sample: {train: {rows: 0}}", "rows"),
    ],
)
def test_a_wrong_task_file_is_refused_by_name(tmp_path, change, message):
    base = {
        "name": "x",
        "reader": "gqa",
        "kind": "short_text",
        "splits": {"train": "train"},
        "prompts": {"task": "{q}"},
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(base | yaml.safe_load(f"{{{change}}}")))
    with pytest.raises(ConfigError, match=message):
        load_task(tmp_path / "x.yaml")


def test_task_files_load_without_the_extra_and_rows_say_what_they_need(study, monkeypatch):
    code = "import sys, cpt_rft.tasks.table, cpt_rft.tasks.vizwiz; assert not {'datasets', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'need the package datasets.*pip install -e "\.\[data\]"'):
        study.rows("pope", "test")


def test_an_unknown_task_names_its_nearest():
    with pytest.raises(ConfigError, match=r"unknown task 'scienceq', the nearest is 'scienceqa'"):
        load_task("scienceq")


def test_a_prompt_with_a_field_that_there_is_not_is_refused(study):
    with pytest.raises(ConfigError, match=r"task pathvqa: the prompt 'task' cannot be filled in.*fields are question"):
        study.rows("pathvqa", "train", prompts={"task": "<image>{qestion}"})


def test_a_tag_in_the_text_of_a_row_is_no_picture(study, tmp_path):
    features = sets.Features({"image": sets.Image(), "question": sets.TEXT, "answer": sets.TEXT})
    raw = [{"image": sets.picture(1), "question": text, "answer": "no"} for text in ("see <image>", "", "what?")]
    study.hub.add(sets.repo("a/tags", {"default": (features, {"train": raw})}))
    (tmp_path / "a.yaml").write_text(
        "{name: p, reader: pathvqa, kind: short_text, repos: [a/tags], splits: {train: train},"
        " prompts: {task: '<image>{question}'}}"
    )
    task = load_task(tmp_path / "a.yaml")
    assert dropped(list(task.rows("train", task.source(tmp_path)))) == {"image_tags": 1, "row_malformed": 1}
