"""The harness on a real, tiny, untrained checkpoint: what it writes, how it resumes, what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cpt_rft.config.schema import EvaluationConfig
from cpt_rft.data.parquet import read_split, write_split
from cpt_rft.errors import DataError
from cpt_rft.miniature.model import build_model, train_tokenizer, write_base
from cpt_rft.miniature.world import make_rows
from cpt_rft.prompts import STYLES, user_text
from cpt_rft.scoring import score
from eval.__main__ import main
from eval.harness import evaluate_checkpoint
from eval.records import RecordError, read_contracts, read_records, record_path
from eval.rescore import rescore

ROWS = 7
TASKS = ("mini_gqa", "mini_mmlu_pro")  # one with pictures, one without


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base checkpoint and two parquet files."""
    folder = tmp_path_factory.mktemp("harness")
    rows = {task: make_rows(task, "test", ROWS, seed=0) for task in TASKS}
    for task, examples in rows.items():
        write_split(folder / f"{task}.parquet", examples)
    corpus = [user_text(row, style, "miniature") for examples in rows.values() for row in examples for style in STYLES]
    tokenizer = train_tokenizer(corpus * 5, vocab_size=330)
    write_base(folder / "base", build_model(tokenizer.get_vocab_size(), seed=0), tokenizer)
    return folder


def config(**changes: object) -> EvaluationConfig:
    return EvaluationConfig.model_validate({"max_new_tokens": 4, "batch_size": 3, "base_samples": 2, **changes})


def evaluate(place: Path, out: Path, *, progress=lambda *_: None, samples: int = 0, **changes: object) -> None:
    data = {task: place / f"{task}.parquet" for task in TASKS}
    evaluate_checkpoint(place / "base", data, out, config(**changes), "miniature", samples=samples, progress=progress)


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing disturbed, with samples."""
    out = tmp_path_factory.mktemp("whole") / "eval"
    evaluate(place, out, samples=2, general=("mini_mmlu_pro",))
    return out


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_one_record_a_row_in_order_scored_as_the_reward_is(place: Path, whole: Path) -> None:
    for task in TASKS:
        examples = read_split(place / f"{task}.parquet")
        for style in STYLES:
            records = read_records(record_path(whole, task, style))
            assert [record.id for record in records] == [row.id for row in examples]
            for row, record in zip(examples, records, strict=True):
                assert (record.task, record.style, record.answer, record.sample) == (task, style, row.answer, 0)
                again = score(
                    record.response,
                    answer=row.answer,
                    references=row.references,
                    kind=row.kind,
                    style=style,
                    truncated=record.finish == "length",
                )
                assert (record.strict, record.lenient, record.format) == again[:3]
                assert (record.extracted, record.status) == again[3:]
                assert record.tokens <= 4
                assert (record.finish == "length") == (record.status == "truncated")


def test_a_rows_options_reach_its_scorer_and_its_record(place: Path, whole: Path, tmp_path: Path) -> None:
    """What the model says is known from the evaluation above: rows are made whose options, or label, are just that."""
    said = {record.id: record.response for record in read_records(record_path(whole, "mini_gqa", "direct"))}
    rows = [row for row in read_split(place / "mini_gqa.parquet") if len(said[row.id].strip()) > 1][:3]
    lettered = {"answer": "B", "references": ("B",), "kind": "choice"}
    texts = [said[row.id].strip() for row in rows]
    asked = [
        replace(rows[0], **lettered, meta={"options": ["\u00a7" * 20, texts[0]]}),
        replace(rows[1], **lettered, meta={"options": [texts[1], "\u00a7" * 20]}),
        replace(rows[2], answer=texts[2], references=(texts[2],), kind="mmlu_pro"),
    ]
    write_split(tmp_path / "rows.parquet", asked)
    data = {"mini_gqa": tmp_path / "rows.parquet"}
    evaluate_checkpoint(place / "base", data, tmp_path / "eval", config(styles=("direct",)), "miniature")
    rescore(tmp_path / "eval", "paper_single_label", tmp_path / "paper")
    rescore(tmp_path / "paper", "official", tmp_path / "again")
    for out, wanted in (("eval", (1.0, 0.0)), ("paper", (0.0, 0.0)), ("again", (1.0, 0.0))):
        right, wrong, label = read_records(record_path(tmp_path / out, "mini_gqa", "direct"))
        assert (right.lenient, wrong.lenient) == wanted
        assert (right.strict, wrong.strict, label.strict) == (0.0, 0.0, 1.0)
        assert right.options == tuple(asked[0].meta["options"])
    assert contents(tmp_path / "again") == contents(tmp_path / "eval")


def test_samples_are_of_tasks_only_and_differ(whole: Path) -> None:
    records = read_records(record_path(whole, "mini_gqa", "cot", sampled=True))
    assert [record.sample for record in records] == [0, 1] * ROWS
    assert any(a.response != b.response for a, b in zip(records[::2], records[1::2], strict=True))
    assert records[0].contract != read_records(record_path(whole, "mini_gqa", "cot"))[0].contract
    assert not record_path(whole, "mini_mmlu_pro", "cot", sampled=True).exists()


def test_reads_are_noted(whole: Path) -> None:
    reads = json.loads((whole / "reads.json").read_text())
    assert {task: (entry["split"], entry["rows"]) for task, entry in reads.items()} == dict.fromkeys(
        TASKS, ("test", ROWS)
    )


def test_an_interrupted_evaluation_ends_byte_for_byte_the_same(place: Path, whole: Path, tmp_path: Path) -> None:
    calls = []

    def interrupt(done: int, total: int, what: str) -> None:
        calls.append(done)
        if len(calls) == 5:  # within the second file
            raise KeyboardInterrupt

    out = tmp_path / "eval"
    with pytest.raises(KeyboardInterrupt):
        evaluate(place, out, progress=interrupt, samples=2, general=("mini_mmlu_pro",))
    assert [path.name for path in out.glob("*.jsonl")] == ["mini_gqa.cot.jsonl"]
    made = record_path(out, "mini_gqa", "cot").stat().st_mtime_ns
    seen: list[tuple[int, int, str]] = []
    evaluate(place, out, progress=lambda *now: seen.append(now), samples=2, general=("mini_mmlu_pro",))
    assert contents(out) == contents(whole)
    assert record_path(out, "mini_gqa", "cot").stat().st_mtime_ns == made
    assert seen[0] == (ROWS, 8 * ROWS, "mini_gqa cot")
    assert seen[-1][0] == seen[-1][1] == 8 * ROWS


def test_a_whole_evaluation_loads_no_weights(place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*arguments: object, **named: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("eval.harness.load_policy", loaded)
    before = contents(whole)
    evaluate(place, whole, samples=2, general=("mini_mmlu_pro",))
    assert contents(whole) == before
    with pytest.raises(AssertionError, match="loaded"):
        evaluate(place, whole, samples=2)  # the samples of one task more


def test_batches_do_not_matter(place: Path, whole: Path, tmp_path: Path) -> None:
    evaluate(place, tmp_path, batch_size=2, styles=("direct",))
    for task in TASKS:
        one, other = (read_records(record_path(where, task, "direct")) for where in (whole, tmp_path))
        assert one == other


def test_other_contracts_and_other_rows_are_refused(place: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    shutil.copytree(whole, out)
    with pytest.raises(RecordError, match=r"limits\.max_new_tokens: 4 against 5"):
        evaluate(place, out, max_new_tokens=5)
    with pytest.raises(RecordError, match="holds other rows"):
        evaluate(place, out, rows=3)
    assert {name: text for name, text in contents(out).items() if name != "reads.json"} == {
        name: text for name, text in contents(whole).items() if name != "reads.json"
    }


def test_only_rows_of_the_task_and_split_asked_for(place: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not mini_gqa/dev"):
        evaluate(place, tmp_path, split="dev")
    data = {"mini_gqa": place / "mini_mmlu_pro.parquet"}
    with pytest.raises(DataError, match="not mini_gqa/test"):
        evaluate_checkpoint(place / "base", data, tmp_path, config(), "miniature")
    assert list(tmp_path.iterdir()) == []


def test_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [str(place / f"{task}.parquet") for task in TASKS]
    options = ["--out", str(tmp_path / "eval"), "--rows", "2", "--max-new-tokens", "2", "--styles", "direct"]
    assert main([str(place / "base"), *data, *options]) == 0
    assert "mini_gqa" in capsys.readouterr().out
    assert len(read_records(record_path(tmp_path / "eval", "mini_gqa", "direct"))) == 2
    paper = ["--contract", "paper", "--min-pixels", "3136", "--scorer", "paper_single_label"]
    assert main([str(place / "base"), data[0], "--out", str(tmp_path / "paper"), *options[2:], *paper]) == 0
    (terms,) = read_contracts(tmp_path / "paper").values()
    assert terms["limits"] == {"max_new_tokens": 2, "max_prompt_tokens": 6144}
    assert (terms["vision"]["min_pixels"], terms["vision"]["max_pixels"]) == (3136, 4194304)
    assert (terms["decoding"]["temperature"], terms["scorer"]["preset"]) == (0.5, "paper_single_label")
    assert main([str(place / "base"), data[0], data[0], *options]) == 2
    assert "Fix: name files of one split" in capsys.readouterr().err
    assert main([str(place / "nowhere"), data[0], "--out", str(tmp_path / "other")]) == 2
    assert "no such checkpoint" in capsys.readouterr().err
    write_split(tmp_path / "empty.parquet", [])
    assert main([str(place / "base"), str(tmp_path / "empty.parquet"), "--out", str(tmp_path / "other")]) == 2
    assert "has no rows" in capsys.readouterr().err
