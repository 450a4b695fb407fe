"""Contracts and record files: what identifies them, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from cpt_rft.config.contracts import Decoding
from cpt_rft.config.schema import EvaluationConfig
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
from tests.helpers.tree import ROOT

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
    references=("star", "a star"),
    options=(),
    kind="short_text",
    contract="c" * 64,
)


def contract_of(checkpoint: Path, *, prompts: str = "miniature", decoding: Decoding | None = None, **changes) -> dict:
    config = EvaluationConfig.model_validate({"max_new_tokens": 32, **changes})
    return evaluation_contract(checkpoint, config, prompts, decoding)


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
        (lambda text: text[: len(text) // 2] + "\n", r"a\.jsonl, line 2 is no record of version 3 .* Fix: delete"),
        (lambda text: text.replace('"strict"', '"strickt"'), "line 1 is no record .*no strict"),
        (lambda text: text.replace('"sample"', '"note": 1, "sample"'), "line 1 is no record .*unknown key note"),
        (
            lambda text: text.replace('"version": 3, ', ""),
            "line 1 is of record version 1; this program reads version 3",
        ),
        (
            lambda text: text.replace('"version": 3', '"version": 2', 1),
            "line 1 is of record version 2; .* Fix: evaluate",
        ),
        (lambda text: text.replace('"answered"', '"pending"'), "line 1 is no record .*status is 'pending'"),
        (lambda text: text.replace('"tokens": 9', '"tokens": "9"'), "line 1 is no record .*tokens is '9'"),
        (lambda text: text.replace('"strict": 1.0', '"strict": 100.0'), "a score is not within 0 and 1"),
        (lambda text: text.replace('"strict": 1.0', '"strict": NaN'), "a score is not within 0 and 1"),
        (lambda text: text.replace('["star", "a star"]', '"star"'), "references is 'star'"),
        (lambda text: text.replace('"options": []', '"options": "AB"'), "options is 'AB'"),
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
            dataclasses.replace(RECORD, strict=0.0, lenient=0.0, status="undecodable"),
        ]
    )
    assert found == {"rows": 4, "strict": 25.0, "lenient": 50.0, "truncated": 1, "no_answer": 1, "undecodable": 1}


def test_a_response_that_is_no_text_is_kept_as_it_is(tmp_path: Path) -> None:
    record = dataclasses.replace(RECORD, response="a\udcffb\ufffd\x00", status="undecodable")
    write_records(tmp_path / "a.jsonl", [record])
    assert read_records(tmp_path / "a.jsonl") == [record]


def test_separators_of_lines_within_a_response_part_no_records(tmp_path: Path) -> None:
    """Python's ``splitlines`` cuts at more than newlines."""
    record = dataclasses.replace(RECORD, response="a\u2028b\x85c\x0bd\x1ce\u2029f\rg\nh")
    write_records(tmp_path / "a.jsonl", [record])
    assert read_records(tmp_path / "a.jsonl") == [record]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"prompts": "paper_rft"}, "prompts.preset: miniature against paper_rft"),
        ({"max_new_tokens": 33}, "limits.max_new_tokens: 32 against 33"),
        ({"max_prompt_tokens": 99}, "limits.max_prompt_tokens: absent against 99"),
        ({"min_pixels": 784}, "vision.min_pixels: 3136 against 784"),
        ({"max_pixels": 9408}, "vision.max_pixels: 12544 against 9408"),
        ({"dtype": "bfloat16"}, "dtype: float32 against bfloat16"),
        ({"scorer": "paper_single_label"}, "scorer.preset: official against paper_single_label"),
        ({"decoding": Decoding(temperature=1.0)}, "decoding.temperature: 0.0 against 1.0"),
        ({"decoding": Decoding(samples=8)}, "decoding.samples: 1 against 8"),
        ({"decoding": Decoding(top_p=0.9)}, "decoding.top_p: 1.0 against 0.9"),
        ({"decoding": Decoding(forced=True)}, "decoding.teacher_forced: absent against True"),
    ],
)
def test_every_setting_is_in_the_fingerprint(tmp_path: Path, change: dict, difference: str) -> None:
    checkpoint = write_checkpoint_files(tmp_path / "a")
    one, other = contract_of(checkpoint), contract_of(checkpoint, **change)
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(contract_of(checkpoint))
    assert difference in differences(one, other)


def test_the_paper_contract_is_that_of_the_released_script(tmp_path: Path) -> None:
    """RFTvsSFT@7d4f50e EasyR1/examples/test.yaml; what is stated in the experiment goes before what it fills in."""
    checkpoint = write_checkpoint_files(tmp_path / "a")
    config = EvaluationConfig.model_validate({"contract": "paper"})
    found = evaluation_contract(checkpoint, config, "paper_rft")
    assert found["limits"] == {"max_new_tokens": 1024, "max_prompt_tokens": 6144}
    assert (found["vision"]["min_pixels"], found["vision"]["max_pixels"]) == (262144, 4194304)
    sampling = {"temperature": 0.5, "top_p": 0.99, "samples": 1}
    assert found["decoding"] == {**sampling, "vision_tokens": "suppressed"}
    stated = EvaluationConfig.model_validate(
        {"contract": "paper", "max_new_tokens": 24, "min_pixels": None, "max_pixels": None, "max_prompt_tokens": None}
    )
    found = evaluation_contract(checkpoint, stated, "miniature")
    assert found["limits"] == {"max_new_tokens": 24}
    assert (found["vision"]["min_pixels"], found["vision"]["max_pixels"]) == (3136, 12544)


def test_the_default_contract_means_what_it_meant() -> None:
    """Runs of before can stand beside runs of today: not a key more, not a key less."""
    contract = evaluation_contract(ROOT / "cpt_rft/miniature/base", EvaluationConfig(max_new_tokens=24), "miniature")
    contract["chat_template"] = contract["scorer"] = None
    assert contract == {
        "vision": {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "max_pixels": 12845056,
            "merge_size": 2,
            "min_pixels": 3136,
            "patch_size": 14,
            "processor": "Qwen2VLImageProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "temporal_patch_size": 2,
        },
        "chat_template": None,
        "prompts": {"preset": "miniature", "cot": " Think, then box.", "direct": " Answer now."},
        "decoding": {"temperature": 0.0, "samples": 1, "top_p": 1.0, "vision_tokens": "suppressed"},
        "limits": {"max_new_tokens": 24},
        "dtype": "float32",
        "extraction": {"cot": "last balanced box", "direct": "whole stripped response"},
        "scorer": None,
    }


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
    names = {write_contract(tmp_path, contract_of(checkpoint, decoding=Decoding(samples=n))) for n in (1, 8, 8)}
    assert set(read_contracts(tmp_path)) == names
    path = tmp_path / "contracts.json"
    path.write_text(path.read_text().replace('"max_new_tokens": 32', '"max_new_tokens": 64'))
    with pytest.raises(RecordError, match="edited by hand"):
        read_contracts(tmp_path)
    path.write_text("{")
    with pytest.raises(RecordError, match="is broken"):
        read_contracts(tmp_path)
