"""The miniature world: the same bytes everywhere, honest splits, short prompts, answers that pictures prove."""

import hashlib
import random
import re

import numpy as np
import pytest

from cpt_rft.data.parquet import rows_hash
from cpt_rft.errors import ConfigError
from cpt_rft.miniature import draw
from cpt_rft.miniature.corpus import draw_reading, tokenizer_corpus
from cpt_rft.miniature.loose import LOOSE, loosened
from cpt_rft.miniature.model import train_tokenizer
from cpt_rft.miniature.scene import PLACES
from cpt_rft.miniature.tasks import GENERAL, TASKS
from cpt_rft.miniature.world import DRAWN, draw_rows, make_rows, split_of
from cpt_rft.prompts import STYLES, user_text
from cpt_rft.seeds import python_random

# Made once by rows_hash(make_rows(task, "test", 20, 0)): another value means that every earlier result is void.
GOLDEN = {
    "mini_caption": "cbba0b5c717c6bfe91bfbfbe072fcf0b467255d075c05c40dde6f034f897090e",
    "mini_find": "b72b5447e9723f330f4bbbb0cb991b44f64e3925ccb747587c01c2898dd5b8d2",
    "mini_geometry3k": "421ef95b9576cdf906cf413aba4457bcc8a3bf1c67cdf81d164ae2f3082c0736",
    "mini_gqa": "6038b2618245085b11d9ad31cd4f01dcc815b60603fa0807da94d20d59c9faf5",
    "mini_look": "bfec5a2b52a6fc7a80f6e255b44f3bfa1698288eadead8e4d52c2aed213a72a7",
    "mini_mmlu_pro": "81b461d079e93c5a85df9c5981584bc7ec36dc2f1b1de1e082b80334e2e23879",
    "mini_mmmu": "a1e01870622719e4793ae8b2a730e36e1bab7da418db855c2688df985b556009",
    "mini_pathvqa": "a407dde76b6ee7f4637bfcc8dd776a81a1ed36c8fcb3bb7ed0ffe5bce1ed6eb0",
    "mini_pope": "8ed2703acdafb6659070a475520ec1933c743bab009b64f0219a43944461d6cf",
    "mini_scienceqa": "a32e5966c21ddf2ff17df6bacbb6f4749877f98710a6cd1f89791dce2de7d845",
    "mini_superclevr": "1afa8f8b51b06d6f7879640148904dbb6f9e4422aee6d1c21d56f366f478fc4f",
    "mini_textvqa": "4d994a64de9b8d509380ceaf798156a2b58ec538186c52db7bac2f6d866a2fb9",
    "mini_vizwiz": "63023956baea9792634e90fb756927e215a7b529d9ac9a653a21b64e41df3b29",
}


@pytest.mark.parametrize("task", sorted(DRAWN))
def test_the_same_seed_gives_the_same_rows_on_every_machine(task: str) -> None:
    assert rows_hash(make_rows(task, "test", 20, 0)) == GOLDEN[task]


def test_another_seed_gives_other_rows() -> None:
    assert rows_hash(make_rows("mini_gqa", "test", 5, 0)) != rows_hash(make_rows("mini_gqa", "test", 5, 1))


def test_seven_tasks_and_three_general_abilities() -> None:
    assert len(TASKS) == 7
    assert len(GENERAL) == 3
    assert not set(TASKS) & set(GENERAL)


@pytest.mark.parametrize("task", sorted(DRAWN))
def test_no_picture_or_pictureless_question_crosses_a_split(task: str) -> None:
    contents = {}
    for split in ("train", "dev", "test"):
        for seed in (0, 1):
            for row in make_rows(task, split, 40, seed):
                content = row.images or row.problem
                assert contents.setdefault(content, split) == split, row.id


def test_no_row_repeats_within_a_split() -> None:
    rows = make_rows("mini_mmlu_pro", "test", 100, 0)
    assert len({row.problem for row in rows}) == 100


def test_more_rows_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mini_mmlu_pro/dev has only \d+ distinct rows, not 2000"):
        make_rows("mini_mmlu_pro", "dev", 2000, 0)


def test_pretraining_reads_train_rows_only() -> None:
    rng = random.Random(3)
    stream = draw_rows("mini_scienceqa", "train", rng)
    assert {split_of(next(stream)) for _ in range(200)} == {"train"}


def test_rows_depend_on_the_split_rule_alone() -> None:
    counts = {"train": 0, "dev": 0, "test": 0}
    rng = python_random("split shares")
    for _ in range(1000):
        counts[split_of(TASKS["mini_gqa"](rng))] += 1
    assert 60 < counts["test"] < 140
    assert 60 < counts["dev"] < 140


def test_unknown_task_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="mini_qga"):
        make_rows("mini_qga", "test", 1, 0)


def test_prompts_fit_in_48_tokens_and_answers_in_20() -> None:
    tokenizer = train_tokenizer(tokenizer_corpus(300), 672)
    template = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    picture = "<|vision_start|>" + 9 * "<|image_pad|>" + "<|vision_end|>"
    for task in (*TASKS, *GENERAL):
        for row in make_rows(task, "train", 150, 0):
            for style in STYLES:
                text = user_text(row, style, "miniature").replace("<image>", picture)
                prompt = template.format(text) + "<|im_start|>assistant\n"
                assert len(tokenizer.encode(prompt).ids) <= 48, row.problem
        for _ in range(100):
            reading = draw_reading(task, 0.0, 0.5, python_random("length", task, _))
            assert len(tokenizer.encode(reading.target + "<|im_end|>").ids) <= 20, reading.target


def test_every_answer_form_appears_in_pretraining() -> None:
    seen = {draw_reading("mini_superclevr", 1.0, 0.5, python_random("forms", index)).target for index in range(200)}
    assert {"1", "one", "yes", "true"} <= seen


@pytest.mark.parametrize("shape", draw.SHAPES)
@pytest.mark.parametrize("other", draw.SHAPES)
def test_shapes_differ(shape: str, other: str) -> None:
    same = np.array_equal(draw.shape_mask(shape, 10), draw.shape_mask(other, 10))
    assert same == (shape == other)


def test_glyphs_differ() -> None:
    masks = {draw.glyph_mask(glyph, 1).tobytes() for glyph in draw.GLYPHS}
    assert len(masks) == len(draw.GLYPHS)


def test_gqa_asks_for_a_neighbour_that_the_rationale_places() -> None:
    steps = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
    for row in make_rows("mini_gqa", "train", 60, 0):
        relation = re.fullmatch(r"<image>What is (left of|right of|above|below) the (\w+)\?", row.problem)
        assert relation is not None
        assert relation[2] != row.answer
        shape, *places = (row.rationale or "").split()
        assert shape == relation[2]
        (row_1, column_1), (row_2, column_2) = (divmod(PLACES.index(place), 3) for place in places)
        assert (row_2 - row_1, column_2 - column_1) == steps[relation[1]]


def test_geometry_answers_follow_from_their_rationale() -> None:
    for row in make_rows("mini_geometry3k", "train", 100, 0):
        first, word, second = re.fullmatch(r"(\d+) (plus|minus) (\d+)", row.rationale or "").groups()  # type: ignore[union-attr]
        value = int(first) + int(second) if word == "plus" else int(first) - int(second)
        assert row.answer == str(value)


@pytest.mark.parametrize("task", ["mini_scienceqa", "mini_mmmu", "mini_mmlu_pro"])
def test_letter_and_option_text_are_the_two_accepted_answers(task: str) -> None:
    letters = set()
    for row in make_rows(task, "train", 60, 0):
        options = dict(re.findall(r"\b([AB]) ([a-z ]+)", row.problem.split("? ")[1]))
        letter, text = sorted(row.references)
        assert options[letter].strip() == text
        assert row.answer == (letter if task == "mini_scienceqa" else text)
        letters.add(letter)
    assert letters == {"A", "B"}


def test_vizwiz_is_often_unanswerable_and_blurred() -> None:
    rows = make_rows("mini_vizwiz", "train", 200, 0)
    share = sum(row.answer == "unanswerable" for row in rows) / len(rows)
    assert 0.3 < share < 0.5


@pytest.mark.parametrize("task", sorted(DRAWN))
def test_only_pretraining_reads_loosely_and_only_three_tasks(task: str) -> None:
    rng = random.Random(5)
    stream = [drawn for drawn, _ in zip(draw_rows(task, "train", rng), range(60), strict=False)]
    assert all(loosened(task, drawn, 0.0, rng) is drawn for drawn in stream)
    changed = sum(loosened(task, drawn, 1.0, rng) != drawn for drawn in stream)
    assert (10 < changed < 50) if task in LOOSE else changed == 0


def test_loose_rows_keep_to_another_convention() -> None:
    rng = random.Random(6)
    for _ in range(60):
        relation = TASKS["mini_gqa"](rng)
        there = loosened("mini_gqa", relation, 1.0, rng)
        assert loosened("mini_gqa", there, 1.0, rng) == relation
        assert ("left" in relation.question) == ("right" in there.question)
        tissue = TASKS["mini_pathvqa"](rng)
        assert loosened("mini_pathvqa", loosened("mini_pathvqa", tissue, 1.0, rng), 1.0, rng) == tissue
        photograph = loosened("mini_vizwiz", TASKS["mini_vizwiz"](rng), 1.0, rng)
        assert photograph.references[0] in draw.COLORS


def test_noise_and_blur_are_integer_and_bounded() -> None:
    flat = np.full((draw.SIDE, draw.SIDE, 3), 250, dtype=np.uint8)
    assert np.array_equal(draw.blur(flat), flat)
    noisy = draw.add_noise(flat, 10, random.Random(0))
    assert noisy.min() >= 240
    assert noisy.dtype == np.uint8
    assert hashlib.sha256(noisy.tobytes()).hexdigest() != hashlib.sha256(flat.tobytes()).hexdigest()
