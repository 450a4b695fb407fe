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
from cpt_rft.miniature.model import train_tokenizer
from cpt_rft.miniature.tasks import GENERAL, TASKS
from cpt_rft.miniature.world import DRAWN, draw_rows, make_rows, split_of
from cpt_rft.prompts import STYLES, user_text
from cpt_rft.seeds import python_random

# Made once by rows_hash(make_rows(task, "test", 20, 0)): another value means that every earlier result is void.
GOLDEN = {
    "mini_caption": "bedb3dd525af445f95f81ec04010db1ee08be9d4f78d3b1820cf75b82862be83",
    "mini_geometry3k": "6092ed7cd32915d5ab2ac81c04c87da4bcc37a66c12679a799ddc606682b5865",
    "mini_gqa": "7948fdb26bbb0c4e5c93cd573ef8ce65e1bdf89af02decbbf1a87dc4b2fa2048",
    "mini_mmlu_pro": "c0f473a6fd18f429250015726439512202c8c6739c1749ca64901db0c5d8e04a",
    "mini_mmmu": "03a826520efc8cb41b27a8cb399339785522403ca3672e06d8aba494e6a07c50",
    "mini_pathvqa": "a407dde76b6ee7f4637bfcc8dd776a81a1ed36c8fcb3bb7ed0ffe5bce1ed6eb0",
    "mini_pope": "9cf6104f9afd383d3d19c637a100706252c93de155b293801eb3c0b462481ebd",
    "mini_scienceqa": "b198d35f8feb22a6a81031141eb5e1f27445867877125c68fbf165212f6ae8ff",
    "mini_superclevr": "dab0f092c9cefa2702573b432afb57974007d65ff1f356210319cbb3154ab7aa",
    "mini_textvqa": "7337eb509b4debba2f3889efde0730f109c5295578378b7e639cbe39e97813b4",
    "mini_vizwiz": "6c3bf1cce17dcd516c857192c3858f4a8035412648d5068d389c333b3d6672d0",
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
    rows = make_rows("mini_mmlu_pro", "test", 200, 0)
    assert len({row.problem for row in rows}) == 200


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


def test_prompts_fit_in_48_tokens_and_answers_in_16() -> None:
    tokenizer = train_tokenizer(tokenizer_corpus(300), 704)
    template = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    picture = "<|vision_start|>" + 9 * "<|image_pad|>" + "<|vision_end|>"
    for task in (*TASKS, *GENERAL):
        for row in make_rows(task, "train", 150, 0):
            for style in STYLES:
                text = user_text(row, style, "miniature").replace("<image>", picture)
                prompt = template.format(text) + "<|im_start|>assistant\n"
                assert len(tokenizer.encode(prompt).ids) <= 48, row.problem
        for _ in range(100):
            reading = draw_reading(task, 0.0, python_random("length", task, _))
            assert len(tokenizer.encode(reading.target + "<|im_end|>").ids) <= 16, reading.target


def test_every_answer_form_appears_in_pretraining() -> None:
    seen = {draw_reading("mini_superclevr", 1.0, python_random("forms", index)).target for index in range(200)}
    assert {"1", "one", "yes", "true"} <= seen


@pytest.mark.parametrize("shape", draw.SHAPES)
@pytest.mark.parametrize("other", draw.SHAPES)
def test_shapes_differ(shape: str, other: str) -> None:
    same = np.array_equal(draw.shape_mask(shape, 10), draw.shape_mask(other, 10))
    assert same == (shape == other)


def test_glyphs_differ() -> None:
    masks = {draw.glyph_mask(glyph, 1).tobytes() for glyph in draw.GLYPHS}
    assert len(masks) == len(draw.GLYPHS)


def test_geometry_answers_follow_from_their_rationale() -> None:
    for row in make_rows("mini_geometry3k", "train", 100, 0):
        first, word, second = re.fullmatch(r"(\d+) (plus|minus) (\d+)", row.rationale or "").groups()  # type: ignore[union-attr]
        value = int(first) + int(second) if word == "plus" else int(first) - int(second)
        assert row.answer == str(value)


def test_choice_letters_point_at_the_option_text() -> None:
    for task in ("mini_scienceqa", "mini_mmmu", "mini_mmlu_pro"):
        letters = set()
        for row in make_rows(task, "train", 60, 0):
            options = dict(re.findall(r"\b([ABC]) (\w+)", row.problem.split("? ")[1]))
            assert options[row.answer] == row.references[1]
            letters.add(row.answer)
        assert letters == {"A", "B", "C"}


def test_vizwiz_is_often_unanswerable_and_blurred() -> None:
    rows = make_rows("mini_vizwiz", "train", 200, 0)
    share = sum(row.answer == "unanswerable" for row in rows) / len(rows)
    assert 0.3 < share < 0.5


def test_noise_and_blur_are_integer_and_bounded() -> None:
    flat = np.full((draw.SIDE, draw.SIDE, 3), 250, dtype=np.uint8)
    assert np.array_equal(draw.blur(flat), flat)
    noisy = draw.add_noise(flat, 10, random.Random(0))
    assert noisy.min() >= 240
    assert noisy.dtype == np.uint8
    assert hashlib.sha256(noisy.tobytes()).hexdigest() != hashlib.sha256(flat.tobytes()).hexdigest()
