"""Contracts and record files: what identifies them, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from cpt_rft.errors import CheckpointError
from eval.contract import differences, evaluation_contract, fingerprint
from eval.records import (
    Record,
    RecordError,
    accuracy,
    read_contracts,
    read_records,
    record_path,
    refuse_mixed,
    write_contract,
    write_records,
)
from tests.helpers.synthetic_run import write_checkpoint_files

RECORD = Record(
    id="mini_gqa/test/00000",
    task="mini_gqa",
    style="cot",
    sample=0,
    response='<think>a "star"\n</think>\\boxed{star}',
    tokens=9,
    finish="stop",
    extracted="star",
    strict=1.0,
    lenient=1.0,
    format=1.0,
    status="answered",
    answer="star",
    contract="c" * 64,
)
SETTINGS = {"prompt_preset": "miniature", "max_new_tokens": 32, "dtype": "float32"}


def contract_of(checkpoint: Path, **changes: object) -> dict:
    return evaluation_contract(checkpoint, **{**SETTINGS, **changes})  # type: ignore[arg-type]


def test_round_trip_and_one_line_a_record(tmp_path: Path) -> None:
    records = [dataclasses.replace(RECORD, id=str(number), extracted=None) for number in range(5)]
    path = record_path(tmp_path / "new", "mini_gqa", "cot")
    write_records(path, records)
    assert path.name == "mini_gqa.cot.jsonl"
    assert read_records(path) == records
    assert len(path.read_text().splitlines()) == 5
    assert list(path.parent.iterdir()) == [path]


def test_a_writer_that_dies_leaves_no_file(tmp_path: Path) -> None:
    def dying():
        yield RECORD
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(tmp_path / "a.jsonl", dying())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: "", "empty or cut short"),
        (lambda text: text[:-1], "empty or cut short"),
        (lambda text: text[: len(text) // 2] + "\n", "line 2 is no record"),
        (lambda text: text.replace('"strict"', '"strickt"'), "line 1 is no record .*no strict"),
        (lambda text: text.replace("/1", "/0"), "holds a row twice"),
        (lambda text: "[]\n", "line 1 is no record"),
        (lambda text: text.replace("c" * 64, "d" * 64, 1), "Two evaluation contracts"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, spoil, message: str) -> None:
    path = tmp_path / "a.jsonl"
    write_records(path, [dataclasses.replace(RECORD, id=f"x/{number}") for number in range(3)])
    path.write_text(spoil(path.read_text()))
    with pytest.raises(RecordError, match=message):
        read_records(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"nowhere\.jsonl cannot be read"):
        read_records(tmp_path / "nowhere.jsonl")


def test_accuracy_counts_what_is_no_answer() -> None:
    found = accuracy(
        [
            RECORD,
            dataclasses.replace(RECORD, strict=0.0, status="truncated"),
            dataclasses.replace(RECORD, strict=0.0, lenient=0.0, status="no_answer"),
            dataclasses.replace(RECORD, strict=0.0, lenient=0.0),
        ]
    )
    assert found == {"rows": 4, "strict": 25.0, "lenient": 50.0, "truncated": 1, "no_answer": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_preset": "paper_rft"},
        {"max_new_tokens": 33},
        {"dtype": "bfloat16"},
        {"temperature": 1.0},
        {"samples": 8},
    ],
)
def test_every_setting_is_in_the_fingerprint(tmp_path: Path, change: dict) -> None:
    checkpoint = write_checkpoint_files(tmp_path / "a")
    one, other = contract_of(checkpoint), contract_of(checkpoint, **change)
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(contract_of(checkpoint))
    assert any(str(next(iter(change.values()))) in line for line in differences(one, other))


def test_pixels_and_template_are_in_the_fingerprint(tmp_path: Path) -> None:
    one = contract_of(write_checkpoint_files(tmp_path / "a"))
    other = contract_of(write_checkpoint_files(tmp_path / "b", max_pixels=50176))
    assert differences(one, other) == ["vision.max_pixels: 12544 against 50176"]
    (tmp_path / "a" / "chat_template.jinja").write_text("another")
    assert [line.split(":")[0] for line in differences(one, contract_of(tmp_path / "a"))] == ["chat_template"]


def test_old_and_new_forms_of_the_image_processor_agree(tmp_path: Path) -> None:
    old = contract_of(write_checkpoint_files(tmp_path / "a"))
    newer = write_checkpoint_files(tmp_path / "b")
    raw = json.loads((newer / "preprocessor_config.json").read_text())
    raw["size"] = {"shortest_edge": raw.pop("min_pixels"), "longest_edge": raw.pop("max_pixels")}
    (newer / "preprocessor_config.json").unlink()
    (newer / "processor_config.json").write_text(json.dumps({"image_processor": raw}))
    assert contract_of(newer) == old


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda at: (at / "preprocessor_config.json").unlink(), "preprocessor_config.json is missing or broken"),
        (lambda at: (at / "preprocessor_config.json").write_text("{"), "missing or broken"),
        (lambda at: (at / "preprocessor_config.json").write_text("{}"), "states no pixel limits"),
        (lambda at: (at / "tokenizer_config.json").write_text("{}"), "no chat template"),
    ],
)
def test_a_checkpoint_without_its_files_is_refused(tmp_path: Path, spoil, message: str) -> None:
    checkpoint = write_checkpoint_files(tmp_path / "a")
    spoil(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        contract_of(checkpoint)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        contract_of(tmp_path / "b")


def test_mixed_fingerprints_name_both_and_the_difference(tmp_path: Path) -> None:
    checkpoint = write_checkpoint_files(tmp_path / "a")
    prints = [
        write_contract(tmp_path / name, contract_of(checkpoint, max_new_tokens=n)) for name, n in (("x", 8), ("y", 9))
    ]
    with pytest.raises(RecordError) as caught:
        refuse_mixed({"first": (prints[0], tmp_path / "x"), "second": (prints[1], tmp_path / "y")})
    for expected in (prints[0][:12], prints[1][:12], "first", "second", "limits.max_new_tokens: 8 against 9"):
        assert expected in str(caught.value)
    refuse_mixed({"first": (prints[0], tmp_path / "x"), "second": (prints[0], tmp_path / "y")})


def test_contracts_are_kept_and_checked(tmp_path: Path) -> None:
    checkpoint = write_checkpoint_files(tmp_path / "a")
    names = {write_contract(tmp_path, contract_of(checkpoint, samples=n)) for n in (1, 8, 8)}
    assert set(read_contracts(tmp_path)) == names
    path = tmp_path / "contracts.json"
    path.write_text(path.read_text().replace('"max_new_tokens": 32', '"max_new_tokens": 64'))
    with pytest.raises(RecordError, match="edited by hand"):
        read_contracts(tmp_path)
    path.write_text("{")
    with pytest.raises(RecordError, match="is broken"):
        read_contracts(tmp_path)
