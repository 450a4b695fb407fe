"""lm-evaluation-harness on the same rows: what it is given, what it must leave, and why it finds what we do not."""

import base64
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from cpt_rft.config.schema import EvaluationConfig
from cpt_rft.data.parquet import write_split
from cpt_rft.errors import UserError
from cpt_rft.miniature.tasks import TASKS
from cpt_rft.miniature.world import make_rows
from eval.backends import BackendError
from eval.backends.openai import OpenAi
from eval.delegate import Sample, Server, _samples, compare, main, run, why, write_task
from eval.harness import evaluate_checkpoint
from eval.records import Record
from tests.helpers.chat_server import served

BASE = Path(__file__).resolve().parents[1] / "cpt_rft/miniature/base"
ABILITIES = ("mini_mmmu", "mini_mmlu_pro", "mini_pope")
SERVER = Server("http://127.0.0.1:9/v1", "base", 4)


def test_a_task_is_its_rows_pictures_first(tmp_path: Path) -> None:
    for task, sees in (("mini_pope", True), ("mini_mmlu_pro", False)):
        rows = make_rows(task, "test", 2, seed=0)
        write_task(tmp_path, rows, "direct", "miniature", 7)
        lines = [json.loads(line) for line in (tmp_path / f"{task}.jsonl").read_text().splitlines()]
        assert [(line["id"], line["answer"], len(line["pictures"])) for line in lines] == [
            (row.id, row.answer, int(sees)) for row in rows
        ]
        assert all(line["text"].endswith("Answer now.") and "<image>" not in line["text"] for line in lines)
        text = (tmp_path / f"{task}.yaml").read_text()
        assert ("doc_to_image: !function pictures.pictures" in text) == sees
        terms = yaml.safe_load(text.replace("!function ", ""))
        assert (terms["task"], terms["generation_kwargs"]["max_gen_toks"]) == (task, 7)
    row = make_rows("mini_pope", "test", 1, seed=0)[0]
    with pytest.raises(UserError, match="has a picture inside its text"):
        write_task(tmp_path, [replace(row, problem="Is there <image> a cross?")], "direct", "miniature", 7)


def test_leaving_without_results_is_a_failure_whatever_the_exit_status(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"left no results \(exit status 0\): it said nothing"):
        run("true", {"mini_pope": 1}, tmp_path, tmp_path / "one", SERVER)
    with pytest.raises(BackendError, match=r"left no results \(exit status 1\).*No module named lm_eval"):
        run(sys.executable, {"mini_pope": 1}, tmp_path, tmp_path / "two", SERVER)
    with pytest.raises(BackendError, match="does not start"):
        run(str(tmp_path / "nowhere"), {"mini_pope": 1}, tmp_path, tmp_path / "three", SERVER)
    with pytest.raises(BackendError, match="older results would be taken for new ones"):
        run("true", {"mini_pope": 1}, tmp_path, tmp_path, SERVER)


def results_of(folder: Path, mean: float, scores: list[float]) -> Path:
    """Results in the form of lm-evaluation-harness."""
    folder.mkdir()
    (folder / "results_now.json").write_text(json.dumps({"results": {"mini_pope": {"exact_match,none": mean}}}))
    lines = [
        {"doc": {"id": str(number)}, "filtered_resps": ["yes"], "exact_match": score}
        for number, score in enumerate(scores)
    ]
    (folder / "samples_mini_pope_now.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "results_now.json"


def test_results_must_be_whole(tmp_path: Path) -> None:
    whole = results_of(tmp_path / "whole", 0.5, [1.0, 0.0])
    assert _samples(whole, "mini_pope", 2) == {"0": Sample("yes", 1.0), "1": Sample("yes", 0.0)}
    with pytest.raises(BackendError, match="has 2 of 3 rows"):
        _samples(results_of(tmp_path / "zero", 0.0, [0.0, 0.0]), "mini_pope", 3)
    with pytest.raises(BackendError, match="a mean not theirs"):
        _samples(results_of(tmp_path / "mean", 0.6, [1.0, 0.0]), "mini_pope", 2)
    with pytest.raises(BackendError, match="a mean not theirs"):
        _samples(results_of(tmp_path / "nan", float("nan"), [1.0, 0.0]), "mini_pope", 2)
    with pytest.raises(BackendError, match="no whole results of mini_gqa"):
        _samples(whole, "mini_gqa", 2)


def record(response: str, strict: float, **changes: Any) -> Record:
    fields = {"id": "a", "task": "t", "style": "direct", "sample": 0, "response": response, "tokens": 2}
    fields |= {"finish": "stop", "extracted": response, "strict": strict, "lenient": strict, "format": 1.0}
    fields |= {"status": "answered", "answer": "cat", "references": ("cat",), "options": (), "kind": "short_text"}
    return Record(**fields | {"contract": "c"} | changes)


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        (record("cat", 1.0), Sample("cat", 1.0), None),
        (record("cat", 1.0), Sample("dog", 0.0), "another text"),
        (record("cat", 1.0), Sample("cats", 1.0), "another text"),
        (record("Cat.", 0.0), Sample("Cat.", 1.0), "it forgives case and punctuation"),
        (record(" cat", 1.0), Sample(" cat", 0.0), "it keeps white space around the answer"),
        (record("pet", 1.0, references=("cat", "pet")), Sample("pet", 0.0), "it knows one label only"),
        (record("B", 1.0, options=("dog", "cat")), Sample("B", 0.0), "it takes no letter for an option's text"),
    ],
)
def test_every_difference_has_a_reason(ours: Record, theirs: Sample, reason: str | None) -> None:
    assert why(ours, theirs) == reason
    found = compare([ours], {"a": theirs})
    assert found["differences"] == ({} if reason is None else {reason: ["a"]})
    assert (found["ours"], found["theirs"]) == (100 * ours.strict, 100 * theirs.score)


@pytest.mark.parametrize("scores", [(0.0, 1.0), (1.0, 0.0)])
def test_a_difference_without_a_reason_is_an_error(scores: tuple[float, float]) -> None:
    with pytest.raises(BackendError, match="'dog' against 'cat' scores"):
        why(record("dog", scores[0]), Sample("dog", scores[1]))


def lm_eval_python() -> str:
    root = Path(os.environ.get("CPT_RFT_ENVS", Path(__file__).resolve().parents[1] / ".envs"))
    found = sorted(path.parent for path in root.glob("lm_eval-*/ready"))
    if not found:
        pytest.fail(f"No lm-evaluation-harness below {root}. Fix: bash scripts/setup_lm_eval.sh, or set CPT_RFT_ENVS")
    return str(found[-1] / "bin" / "python")


def seen(body: dict[str, Any]) -> tuple[str, list[Any]]:
    """Text and pixels of a request, wherever its text says that the pictures are."""
    [message] = body["messages"]
    parts = message["content"]
    parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
    kinds = [part["type"] for part in parts]
    assert kinds == sorted(kinds)  # image_url before text
    pictures = [base64.b64decode(p["image_url"]["url"].split(",")[1]) for p in parts if p["type"] == "image_url"]
    pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).tolist() for data in pictures]
    return parts[-1]["text"], pixels


@pytest.mark.campaign(name="lm_eval")
def test_both_harnesses_find_the_same(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Ten tasks, by the shipped base; then the same answers in capitals or with a space, which must be explained."""
    data = {task: tmp_path / f"{task}.parquet" for task in (*TASKS, *ABILITIES)}
    for task, path in data.items():
        write_split(path, make_rows(task, "test", 50, seed=0))

    def spoilt(count: int, reply: dict[str, Any]) -> tuple[int, Any]:
        choice = reply["choices"][0]
        said = choice["message"]["content"]
        choice["message"]["content"] = said.upper() if len(said) % 2 else f" {said}"
        choice["token_ids"] = None
        return 200, reply

    for name in ("as it is", "spoilt"):
        out = tmp_path / name
        with served(BASE) as server:
            if name == "spoilt":
                server.fault = spoilt
            config = EvaluationConfig(styles=("direct",), max_new_tokens=24)
            backend = OpenAi(server.url, "base", concurrency=4)
            evaluate_checkpoint(BASE, data, out / "ours", config, "miniature", backend=backend)
            ours, server.bodies = sorted(map(seen, server.bodies), key=repr), []
            command = [*map(str, data.values()), "--records", str(out / "ours"), "--out", str(out / "theirs")]
            command += ["--url", server.url, "--model", "base", "--python", lm_eval_python(), "--max-new-tokens", "24"]
            assert main(command) == 0
            assert sorted(map(seen, server.bodies), key=repr) == ours
        found = json.loads((out / "theirs/comparison.json").read_text())
        assert {task: entry["rows"] for task, entry in found.items()} == dict.fromkeys(data, 50)
        reasons: dict[str, int] = {}
        for entry in found.values():
            for reason, ids in entry["differences"].items():
                reasons[reason] = reasons.get(reason, 0) + len(ids)
        for side in ("ours", "theirs"):
            record_property(f"{name}, {side}, mean of ten tasks", round(sum(e[side] for e in found.values()) / 10, 2))
        record_property(f"{name}, rows that differ", reasons)
        assert "another text" not in reasons
        assert bool(reasons) == (name == "spoilt")
