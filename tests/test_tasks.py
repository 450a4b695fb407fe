"""Each dataset's rows, from the real columns and quirks to examples and drops."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from PIL import Image

pytest.importorskip("datasets")

from cpt_rft.data.drop import Drop
from cpt_rft.data.example import Example
from cpt_rft.data.picture import decode_picture
from cpt_rft.errors import ConfigError
from cpt_rft.tasks.base import load_task_config
from cpt_rft.tasks.jigsaw import question, shuffle_patches
from tests.helpers.hub import sets
from tests.helpers.hub.study import dropped, running_study, used

Rows = list[Example | Drop]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with running_study(tmp_path_factory.mktemp("study")) as running:
        yield running


def whole(rows: Rows, task: str) -> None:
    """What holds for the rows of every task."""
    ids = [row.id for row in rows]
    assert len(set(ids)) == len(ids)
    for row in used(rows):
        assert row.task == task
        assert row.answer in row.references
        assert json.loads(json.dumps(row.meta)) == row.meta
        for picture in row.images:
            decode_picture(picture, row.id)


@pytest.mark.parametrize("name", sorted([*sets.ALL, "jigsaw"]))
def test_every_raw_row_is_one_row_of_one_split(study, name):
    task = study.task(name)
    source = task.source(study.place / "cache")
    every = {split: study.rows(name, split) for split in task.splits}
    whole([row for split in every.values() for row in split], name)
    for origin in set(task.config.splits.values()):
        found = sum(len(every[split]) for split in task.splits if task.source_split(split) == origin)
        assert found == (source.rows or {"train": 8, "val": 4, "test": 8})[origin]  # a file of questions has no count
    pictures = {split: {p for row in used(every[split]) for p in row.images} for split in task.splits}
    assert not pictures["test"] & pictures.get("train", set()) or name == "jigsaw"
    assert used(every["test"])


def test_scienceqa_uses_the_rows_with_a_picture(study):
    found = study.rows("scienceqa", "train")
    assert dropped(found) == {"picture_missing": 6}
    first, third = used(found)[0], used(found)[1]
    assert first.id == "scienceqa/train/000000"
    assert first.problem == (
        "<image>\nContext: Hint 0.\nWhich animal 0?\nA. cat\nB. dog\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (first.answer, first.references, first.kind, first.options) == ("A", ("A", "cat"), "choice", ("cat", "dog"))
    assert (first.rationale, first.rationale_source) == ("It barks 0.", "dataset")
    assert third.problem.startswith("<image>\nWhich animal 2?")
    assert (used(found)[2].rationale, used(found)[2].rationale_source) == (None, None)
    assert first.images[0] == sets.picture(0)["bytes"]


def test_textvqa_teaches_the_majority_and_keeps_all_answers(study):
    row = used(study.rows("textvqa", "test"))[0]
    assert row.id == "textvqa/validation/35602"
    assert row.problem == (
        "<image>\nwhat brand is 1000?\nReference OCR token:NOUS,7\nAnswer the question using a single word or phrase."
    )
    assert row.answer == "nous"
    assert (row.kind, len(row.references)) == ("vqa", 10)
    assert set(row.references) == {"nous", "Nous", "knous", "nou s", "unanswerable"}


def test_textvqa_test_split_has_no_answers(study):
    found = study.rows("textvqa", "test", splits={"train": "train", "test": "test"})
    assert dropped(found) == {"answer_empty": 4}


def test_vizwiz_trains_on_the_site_and_tests_on_the_hub(study):
    found = study.rows("vizwiz", "train") + study.rows("vizwiz", "dev")
    assert dropped(found) == {"picture_missing": 1, "answer_empty": 1}
    row = used(found)[0]
    assert (row.id, row.answer) == ("vizwiz/train/VizWiz_train_00000000", "grey")
    assert (row.kind, set(row.references)) == ("vqa", {"grey", "gray", "unsuitable"})
    assert row.references.count("grey") > 1
    assert row.images[0] == sets.picture(5000, form="JPEG")["bytes"]
    test = used(study.rows("vizwiz", "test"))
    assert [row.answer for row in test] == ["unanswerable"] * 6
    assert "respond with 'Unanswerable'.\nAnswer the question" in test[0].problem


def test_gqa_joins_questions_and_pictures(study):
    found = study.rows("gqa", "test")
    assert dropped(found) == {"picture_missing": 2}
    row = next(row for row in used(found) if row.id == "gqa/testdev/00009004")
    assert row.problem == "<image>\nWho wears plain 4?\nAnswer the question using a single word or phrase."
    assert (row.answer, row.meta["image_id"]) == ("yes", "n9001")
    assert row.images[0] == sets.picture(9001, form="JPEG")["bytes"]


def test_a_sample_keeps_the_same_rows_whatever_else_is_there(study):
    config = load_task_config("gqa").sample
    some = study.rows("gqa", "train", sample={"train": config["train"].model_copy(update={"rows": 30})})
    fewer = study.rows("gqa", "train", sample={"train": config["train"].model_copy(update={"rows": 10})})
    other = study.rows("gqa", "train", sample={"train": config["train"].model_copy(update={"rows": 10, "seed": 1})})
    assert len(some) == len(fewer)
    assert dropped(fewer)["not_sampled"] == len(fewer) - 10
    assert {row.id for row in used(fewer)} < {row.id for row in used(some)} | missing(some)
    assert {row.id for row in used(fewer)} != {row.id for row in used(other)}
    table = study.rows("scienceqa", "train", sample={"train": config["train"].model_copy(update={"rows": 5})})
    assert len(table) == 12
    assert dropped(table)["not_sampled"] == 7


def missing(rows: Rows) -> set[str]:
    return {row.id for row in rows if isinstance(row, Drop) and row.reason == "picture_missing"}


@pytest.mark.parametrize("name", ["textvqa", "gqa", "superclevr", "jigsaw"])
def test_a_carved_split_shares_no_picture_and_is_about_its_share(study, name):
    carve = load_task_config(name).carve
    larger = {split: rule.model_copy(update={"share": 0.3}) for split, rule in carve.items()}
    parts = {split: used(study.rows(name, split, carve=larger)) for split in ("train", *larger)}
    key = (lambda row: row.meta["picture"]) if name == "jigsaw" else (lambda row: row.images[0])
    pictures = [{key(row) for row in part} for part in parts.values()]
    assert all(pictures)
    assert len(set.union(*pictures)) == sum(map(len, pictures))
    other = {split: rule.model_copy(update={"seed": 1}) for split, rule in larger.items()}
    assert {row.id for row in used(study.rows(name, "dev", carve=other))} != {row.id for row in parts["dev"]}


def test_geometry3k_reads_both_revisions_and_knows_numbers_from_latex(study):
    found = used(study.rows("geometry3k", "train"))
    assert [row.kind for row in found[:6]] == ["number", "number", "latex", "latex", "number", "latex"]
    assert found[2].answer == r"5 \sqrt { 3 }"
    study.hub.add(sets.geometry3k("a/old", old=True))
    old = used(study.rows("geometry3k", "train", repos=("a/old",)))
    assert [replace(row, meta={}) for row in old] == [replace(row, meta={}) for row in found]


def test_pathvqa_tells_closed_from_open_questions(study):
    found = used(study.rows("pathvqa", "train"))
    assert [row.kind for row in found[:4]] == ["yes_no", "yes_no", "short_text", "short_text"]
    assert decode_picture(found[2].images[0], "").mode == "RGB"
    assert found[2].images[0] == sets.picture(1, form="JPEG", mode="CMYK")["bytes"]  # passed through as it is


def test_superclevr_has_the_papers_wording_and_free_labels(study):
    row = used(study.rows("superclevr", "train"))[0]
    assert row.problem == (
        "<image>\nHint: Please answer the question and provide the final answer at the end.\n"
        f"Question: How many {int(row.meta['source_id'][:-4])}?\nAnswer the question using a single word or phrase."
    )
    labels = {row.answer for split in ("train", "dev", "test") for row in used(study.rows("superclevr", split))}
    assert labels == {"False", "No", "1", "Purple", "The bicycle is blue and brown"}


def test_superclevr_official_is_split_by_index(study):
    found = used(study.rows("superclevr_official", "train"))
    assert [(row.answer, row.kind) for row in found[:4]] == [
        ("yes", "yes_no"),
        ("no", "yes_no"),
        ("3", "number"),
        ("bus", "short_text"),
    ]
    assert found[0].references == ("yes", "true")
    assert [len(used(study.rows("superclevr_official", split))) for split in ("train", "dev", "test")] == [8, 4, 8]


def test_mmmu_puts_every_picture_where_it_is_named(study):
    found = used(study.rows("mmmu", "test"))
    assert found[1].problem.startswith("Which plot fits?\nA. <image>\nB. <image>\nC. none\nAnswer with")
    assert found[1].images == tuple(sets.picture(10 + k)["bytes"] for k in (1, 2))
    assert (found[1].kind, len(found[1].options)) == ("mmmu_choice", 3)
    assert (found[2].answer, found[2].references) == ("sonata", ("sonata", "the sonata"))
    assert (found[2].kind, found[2].options) == ("mmmu_open", ())
    assert found[2].problem.endswith("Answer the question using a single word or phrase.")
    assert found[3].problem.startswith("<image>What is shown?")
    assert found[4].problem.startswith("<image><image> How much?")  # the first is named nowhere
    assert found[4].images == tuple(sets.picture(40 + k)["bytes"] for k in (1, 2))
    held_out = study.rows("mmmu", "test", splits={"test": "test"})
    assert dropped(held_out)["row_malformed"] == 3  # "?" is no letter
    assert load_task_config("mmmu").general


def test_mmlu_pro_leaves_padding_out(study):
    row = used(study.rows("mmlu_pro", "test"))[1]
    assert row.images == ()
    assert row.problem.count("\n") == 8
    assert "N/A" not in row.problem
    assert (row.answer, row.references, row.meta["category"]) == ("B", ("B", "option 1"), "law")
    assert (row.kind, len(row.options), row.options[1]) == ("mmlu_pro", row.problem.count("\n") - 1, "option 1")


def test_pope_is_yes_or_no(study):
    found = used(study.rows("pope", "test"))
    assert Counter(row.meta["category"] for row in found) == {"adversarial": 6, "popular": 6, "random": 6}
    assert {(row.answer, row.kind) for row in found} == {("yes", "yes_no"), ("no", "yes_no")}


def test_a_jigsaw_says_where_each_piece_belongs(study):
    row = used(study.rows("jigsaw", "train"))[0]
    shown = decode_picture(row.images[0], "")
    order = [int(number) - 1 for number in row.answer.split()]
    assert [len(line.split()) for line in row.answer.splitlines()] == [3, 3, 3]
    original = decode_picture((study.place / "pictures" / row.meta["picture"]).read_bytes(), "")
    solved = Image.new("RGB", shown.size)
    width, height = shown.width // 3, shown.height // 3
    for position, belongs in enumerate(order):
        left, top = position % 3 * width, position // 3 * height
        patch = shown.crop((left, top, left + width, top + height))
        solved.paste(patch, (belongs % 3 * width, belongs // 3 * height))
    assert solved.tobytes() == original.crop((0, 0, 96, 93)).tobytes()
    assert row.problem.endswith("The final answer should be the position indexes arranged in a 3x3 grid.")
    assert len({row.answer for row in used(study.rows("jigsaw", "train"))}) > 20


def test_jigsaws_of_any_grid(study):
    options = dict(study.task("jigsaw").config.options) | {"rows": 1, "columns": 2}
    found = used(study.rows("jigsaw", "train", options=options))
    assert {row.answer for row in found} == {"1 2", "2 1"}
    assert found[0].problem.endswith("arranged in a 1x2 grid.")
    assert set(dropped(study.rows("jigsaw", "train", options=options | {"rows": 94}))) == {"picture_too_small"}
    with pytest.raises(ConfigError, match="at least two pieces"):
        study.rows("jigsaw", "train", options=options | {"columns": 1})
    picture = Image.new("RGB", (7, 5), "red")
    assert shuffle_patches(picture, 2, 3, list(range(6))).size == (6, 4)
    assert "ranging from 1 (left) to 2 (right):\n\n```\n1 2\n```" in question(1, 2)
    assert "ranging from 1 (top) to 2 (bottom):\n\n```\n1\n2\n```" in question(2, 1)
    assert "ranging from 1 (top-left) to 6 (bottom-right):\n\n```\n1 2 3\n4 5 6\n```" in question(2, 3)
