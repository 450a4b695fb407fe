"""Preparing a set: every row is used or counted, in the same bytes however often it is begun."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cpt_rft.data.config import Checks
from cpt_rft.data.drop import Drop
from cpt_rft.data.example import Example
from cpt_rft.data.index import read_index
from cpt_rft.data.ledger import ledger_notes, read_ledger
from cpt_rft.data.lock import LOCK_NAME
from cpt_rft.data.parquet import read_split
from cpt_rft.data.picture import decode_picture
from cpt_rft.data.pipeline import Settings, prepare_task
from cpt_rft.data.reasons import Reason
from cpt_rft.errors import DataError
from cpt_rft.files import hash_tree, read_json
from tests.helpers.engine import make_base
from tests.helpers.listed_task import ListedTask, encoded, photo, row

LOOSE = Settings(Checks(max_dropped=1.0))


def drops_of(directory: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (directory / "drops.jsonl").read_text().splitlines()]


def prepare(task: ListedTask, out: Path, settings: Settings = LOOSE) -> Path:
    prepare_task(task, out / "cache", out, settings)
    return out / task.config.name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("pipeline") / "base")


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return [row(number) for number in range(40)]


def test_what_is_fine_stays_byte_for_byte_and_in_order(tmp_path: Path, rows: list[Example]) -> None:
    tests = [row(number, "test") for number in range(100, 110)]
    directory = prepare(
        ListedTask({"train": rows, "test": tests}, {"train": 40, "test": 10}), tmp_path, Settings(Checks())
    )
    assert read_split(directory / "train") == rows
    assert read_split(directory / "test") == tests
    ledger = read_ledger(directory)
    assert {
        split: (entry["rows_in"], entry["rows_used"], entry["drops"]) for split, entry in ledger["splits"].items()
    } == {
        "train": (40, 40, {}),
        "test": (10, 10, {}),
    }
    assert drops_of(directory) == []
    assert [entry["id"] for entry in read_index(directory)] == [example.id for example in rows + tests]
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK_NAME, "listed"]


def faulty_rows() -> list[tuple[Example | Drop, str]]:
    """One row a reason."""
    good = row(0)
    picture = photo(1)

    def bad(number: int, **changes: object) -> Example:
        return replace(row(number), **changes)

    return [
        (Drop("listed/train/x", "train", "not_sampled", "left out"), "not_sampled"),
        (bad(1, images=(b"not a picture",)), Reason.PICTURE_UNREADABLE),
        (bad(2, images=(encoded(picture, "JPEG")[:-99],)), Reason.PICTURE_TRUNCATED),
        (bad(3, images=(encoded(photo(1, 20, 20)),)), Reason.PICTURE_TOO_SMALL),
        (bad(4, images=(encoded(photo(1, 28, 5700), "JPEG"),)), Reason.PICTURE_TOO_THIN),
        (bad(5, images=(b"",)), Reason.PICTURE_MISSING),
        (bad(6, images=(None,)), Reason.PICTURE_MISSING),
        (bad(7, image_paths=("../../x.jpg",)), Reason.UNSAFE_NAME),
        (bad(8, image_paths=(None,)), Reason.UNSAFE_NAME),
        (bad(9, problem="<image>What is <|image_pad|>?"), Reason.RESERVED_TOKEN),
        (bad(10, answer="<image>", references=("<image>",)), Reason.RESERVED_TOKEN),
        (bad(11, rationale="first <|im_end|>"), Reason.RESERVED_TOKEN),
        (bad(12, meta={"problems": {"paper_sft": "no tag"}}), Reason.IMAGE_TAGS),
        (bad(13, meta={"problems": {"nobody": "<image>"}}), Reason.ROW_MALFORMED),
        (bad(14, references=(good.answer, "thing 0", 7), answer=good.answer), Reason.ROW_MALFORMED),
        (bad(15, rationale="\ud800"), Reason.ROW_MALFORMED),
        (bad(16, problem="<image>" * 2, images=row(16).images * 2, image_paths=("a", "b")), ""),
        (replace(row(17), id=good.id), Reason.ID_REPEATED),
        (replace(good, id="again"), Reason.DUPLICATE),
        (replace(good, id="other", answer="a thing"), Reason.CONTRADICTION),
    ]


def test_every_fault_is_counted_under_its_reason(tmp_path: Path) -> None:
    cases = faulty_rows()
    given = [row(0), *(case for case, _ in cases)]
    directory = prepare(ListedTask({"train": given}, {"train": len(given)}), tmp_path)
    entry = read_ledger(directory)["splits"]["train"]
    assert entry["drops"] == dict(Counter(reason for _, reason in cases if reason))
    assert entry["rows_in"] == len(given) == entry["rows_used"] + sum(entry["drops"].values())
    assert [example.id for example in read_split(directory / "train")] == [
        "listed/train/00000",
        "listed/train/00016",
    ]
    assert Counter(drop["reason"] for drop in drops_of(directory)) == Counter(entry["drops"])
    assert {drop["split"] for drop in drops_of(directory)} == {"train"}


def test_a_picture_that_engines_would_read_differently_is_stored_anew(tmp_path: Path) -> None:
    clear = photo(1).convert("RGBA")
    clear.putalpha(Image.fromarray(np.zeros((48, 64), np.uint8)))
    changed = row(1, image=encoded(clear))
    grey = row(2, image=encoded(photo(2).convert("L")))
    directory = prepare(ListedTask({"train": [changed, grey]}), tmp_path)
    first, second = read_split(directory / "train")
    assert second == grey
    assert (np.asarray(decode_picture(first.images[0], "x")) == 255).all()
    assert first.image_paths == ("listed/train/00001.png",)
    assert read_ledger(directory)["splits"]["train"]["pictures_stored_anew"] == 1


def test_unseen_rows_leave_training_not_testing(tmp_path: Path) -> None:
    test = [row(0, "test"), row(1, "test"), replace(row(0, "test"), id="listed/test/again")]
    same_file = replace(row(0), id="same file")
    recoded = replace(row(1), id="same pixels", images=(encoded(_decoded(row(1)), "PNG"),))
    other_question = replace(row(1), id="other question", problem="<image>And this?")
    directory = prepare(ListedTask({"train": [same_file, recoded, other_question, row(2)], "test": test}), tmp_path)
    ledger = read_ledger(directory)
    assert [example.id for example in read_split(directory / "train")] == ["other question", row(2).id]
    assert ledger["splits"]["train"]["drops"] == {Reason.OVERLAP: 2}
    assert ledger["splits"]["test"]["drops"] == {}
    assert ledger["splits"]["test"]["kept_anyway"] == {Reason.DUPLICATE: 1}
    assert ledger["shared_pictures"] == {"train/test": 3}
    assert any("3 rows of train" in note for note in ledger_notes(ledger))


def _decoded(example: Example) -> Image.Image:
    return decode_picture(example.images[0], "x")


def test_a_shared_picture_can_be_a_reason_too(tmp_path: Path) -> None:
    other_question = replace(row(1), id="other question", problem="<image>And this?")
    task = ListedTask({"train": [other_question, row(2)], "dev": [row(3, "dev")], "test": [row(1, "test")]})
    directory = prepare(task, tmp_path, Settings(Checks(max_dropped=1.0, picture_overlap="drop")))
    assert read_ledger(directory)["splits"]["train"]["drops"] == {Reason.OVERLAP: 1}


def test_equal_samples_are_not_equal_pictures(tmp_path: Path) -> None:
    """Two drawings that differ in one pixel that the fingerprint does not look at."""
    one, two = Image.new("RGB", (640, 480), "white"), Image.new("RGB", (640, 480), "white")
    two.putpixel((3, 3), (0, 0, 0))
    problem = {"problem": "<image>How many dots?"}
    train = [row(1, image=encoded(one), **problem), row(2, image=encoded(two), **problem)]
    directory = prepare(ListedTask({"train": train}), tmp_path)
    assert read_ledger(directory)["splits"]["train"]["rows_used"] == 2


def test_too_many_faults_are_an_error_that_shows_them(tmp_path: Path, rows: list[Example]) -> None:
    given = [*rows, replace(row(50), images=(b"",)), Drop("z", "train", "no_picture", "")]
    task = ListedTask({"train": given}, expected_drops=("no_picture",))
    with pytest.raises(DataError, match=r"1 of 42 rows .*\n +1 picture_missing: the picture is missing"):
        prepare(task, tmp_path, Settings(Checks()))
    assert not (tmp_path / "listed").exists()
    assert not (tmp_path / LOCK_NAME).exists()
    prepare(task, tmp_path, Settings(Checks(max_dropped=0.03)))


def test_rows_that_the_files_hold_and_nobody_saw_are_an_error(tmp_path: Path, rows: list[Example]) -> None:
    with pytest.raises(DataError, match="hold 41 rows, but 40 came in"):
        prepare(ListedTask({"train": rows}, {"train": 41}), tmp_path)


def test_published_counts_are_compared_and_shown(tmp_path: Path, rows: list[Example]) -> None:
    given = [*rows, Drop("z", "train", "no_picture", "")]
    options = {"expected_drops": ("no_picture",), "official": {"train": 40, "test": 3}}
    directory = prepare(ListedTask({"train": given, "test": [row(90, "test")]}, **options), tmp_path)
    ledger = read_ledger(directory)
    assert [ledger["splits"][split]["official_found"] for split in ("train", "test")] == [40, 1]
    assert [note for note in ledger_notes(ledger) if "MISMATCH" in note] == [
        "MISMATCH: listed/test has 1 rows, 3 are published for this set."
    ]


def test_a_card_that_states_another_number_is_told(tmp_path: Path, rows: list[Example]) -> None:
    rows = rows[:3]
    task = ListedTask({"train": rows, "test": [row(90, "test")]}, {"train": 3, "test": 1}, card={"train": 5, "test": 1})
    assert list(ledger_notes(read_ledger(prepare(task, tmp_path)))) == [
        "MISMATCH: listed: the files of 'train' hold 3 rows, its card says 5."
    ]


def test_a_split_without_rows_is_told(tmp_path: Path) -> None:
    ledger = read_ledger(prepare(ListedTask({"train": [], "test": [row(1, "test")]}), tmp_path))
    assert list(ledger_notes(ledger)) == ["EMPTY: listed/train has no rows."]


def test_prompts_longer_than_the_limit_are_dropped(tmp_path: Path, base: Path) -> None:
    large = row(1, image=encoded(photo(1, 280, 280), "JPEG"))
    wordy = replace(row(2), problem="<image>" + "why " * 60)
    task = ListedTask({"train": [large, wordy, row(3)]})
    bytes_only = Settings(Checks(max_dropped=1.0, max_prompt_tokens=99))
    assert [example.id for example in read_split(prepare(task, tmp_path / "a", bytes_only) / "train")] == [
        "listed/train/00002",
        "listed/train/00003",
    ]
    assert read_ledger(tmp_path / "a" / "listed")["splits"]["train"]["unproved"] == 2
    counted = Settings(Checks(max_dropped=1.0, max_prompt_tokens=330), model=base)
    ledger = read_ledger(prepare(task, tmp_path / "b", counted))
    assert ledger["processor_sample"] == {"asked": 1, "equal": 1}
    assert ledger["splits"]["train"]["unproved"] == 0


def test_the_closed_form_is_the_processor(tmp_path: Path, base: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = [(int(w), int(h)) for w, h in rng.integers(28, 700, (12, 2))] + [(28, 28), (28, 1400), (1600, 1300)]
    rows = [row(n, image=encoded(photo(n, *size), "JPEG")) for n, size in enumerate(sizes)]
    checks = Checks(max_prompt_tokens=100_000, processor_sample=1.0)
    ledger = read_ledger(prepare(ListedTask({"train": rows}), tmp_path, Settings(checks, model=base)))
    assert ledger["processor_sample"] == {"asked": 15, "equal": 15}


def test_a_second_run_changes_nothing_and_another_source_is_refused(tmp_path: Path, rows: list[Example]) -> None:
    prepare(ListedTask({"train": rows}), tmp_path)
    before = hash_tree(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "listed").rglob("*")}
    prepare(ListedTask({"train": rows}), tmp_path)
    assert hash_tree(tmp_path) == before
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "listed").rglob("*")}
    with pytest.raises(DataError, match=r"source\.revision is .*aaa.* there, .*bbb.* is asked for"):
        prepare(ListedTask({"train": rows}, revision="b" * 40), tmp_path)
    assert hash_tree(tmp_path) == before


def test_a_lock_from_elsewhere_names_other_rows(tmp_path: Path, rows: list[Example]) -> None:
    prepare(ListedTask({"train": rows}), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / LOCK_NAME).write_bytes((tmp_path / "a" / LOCK_NAME).read_bytes())
    with pytest.raises(DataError, match=r"train\.rows is 40 there, 39 is asked for"):
        prepare(ListedTask({"train": rows[1:]}), tmp_path / "b")
    prepare(ListedTask({"train": rows}), tmp_path / "b")
    assert hash_tree(tmp_path / "a" / "listed") == hash_tree(tmp_path / "b" / "listed")


def test_the_content_hash_does_not_depend_on_parts(
    tmp_path: Path, rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = ListedTask({"train": [*rows, replace(rows[3], id="again")]})
    prepare(task, tmp_path / "a")
    monkeypatch.setattr("cpt_rft.data.parts.PART_ROWS", 7)
    prepare(task, tmp_path / "b")
    assert read_json(tmp_path / "a" / LOCK_NAME) == read_json(tmp_path / "b" / LOCK_NAME)
    assert len(list((tmp_path / "b" / "listed" / "train").iterdir())) == 6


def test_processes_make_the_same_bytes(tmp_path: Path, rows: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first part, made before there are processes, remembers a broken picture and one that is stored anew."""
    monkeypatch.setattr("cpt_rft.data.parts.PART_ROWS", 9)
    odd = [row(50, image=b"broken"), row(51, image=encoded(Image.new("RGBA", (40, 40))))]
    task = ListedTask({"train": [*odd, *rows, row(52, image=b"broken")]})
    prepare(task, tmp_path / "a")
    prepare(task, tmp_path / "b", Settings(Checks(max_dropped=1.0), processes=2))
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")


def test_a_limit_takes_the_first_rows(tmp_path: Path, rows: list[Example]) -> None:
    directory = prepare(ListedTask({"train": rows}, {"train": 40}), tmp_path, Settings(Checks(), limit=5))
    assert read_split(directory / "train") == rows[:5]
    assert read_ledger(directory)["limit"] == 5


def test_progress_reaches_the_end(tmp_path: Path, rows: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpt_rft.data.parts.PART_ROWS", 16)
    told: list[tuple[str, int, int | None]] = []
    task = ListedTask({"train": rows}, {"train": 40})
    prepare_task(task, tmp_path, tmp_path, LOOSE, lambda *values: told.append(values))
    assert told == [("listed/train", count, 40) for count in (16, 32, 40)]
