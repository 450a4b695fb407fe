"""The whole way, offline: a hub with every dataset, prepare, exports, and back through other libraries' loaders."""

import hashlib
import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("datasets")

import datasets

from cpt_rft.cli import main
from cpt_rft.data.example import IMAGE_TAG
from cpt_rft.data.export import ground_truth
from cpt_rft.data.index import read_index
from cpt_rft.data.ledger import read_ledger
from cpt_rft.data.parquet import read_split
from cpt_rft.data.picture import decode_picture
from cpt_rft.data.tokens import PICTURE, PromptCounter
from cpt_rft.files import hash_tree
from cpt_rft.prompts import user_text
from cpt_rft.vision import VisionSpec
from tests.helpers import easyr1
from tests.helpers.hub.client import environment
from tests.helpers.hub.study import Study, running_study
from tests.helpers.tree import ROOT

pytestmark = pytest.mark.full
SEVEN = ("scienceqa", "textvqa", "vizwiz", "gqa", "geometry3k", "pathvqa", "superclevr")
EVERY = (*SEVEN, "jigsaw", "mmmu", "mmlu_pro", "pope")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    with running_study(tmp_path_factory.mktemp("whole")) as running:
        yield running


@pytest.fixture(scope="module")
def out(study: Study) -> Path:
    """Everything prepared and exported by the command line."""
    place = study.place
    checks = place / "checks.yaml"
    checks.write_text("max_dropped: 0.6\n")  # the fixture sets hold one row of every quirk
    tasks = [str(place / "tasks" / f"{name}.yaml") for name in EVERY]
    options = ["--out", str(place / "out"), "--cache", str(place / "cache"), "--checks", str(checks)]
    assert main(["data", "prepare", *tasks, *options, "--processes", "2"]) == 0
    before = hash_tree(place / "out") | {".lock": None}
    assert main(["data", "prepare", *tasks, *options, "--processes", "1", "--offline"]) == 0
    assert hash_tree(place / "out") | {".lock": None} == before
    assert main(["data", "check", "all", "--out", str(place / "out")]) == 0
    for engine in ("easyr1", "llamafactory"):
        assert main(["data", "export", "all", "--out", str(place / "out"), "--engine", engine]) == 0
    return place / "out"


@pytest.mark.parametrize("name", EVERY)
def test_every_row_is_used_or_counted_and_every_engine_gets_the_same(out: Path, name: str, tmp_path: Path) -> None:
    ledger = read_ledger(out / name)
    index = read_index(out / name)
    assert ledger["task"]["general"] == (name in ("mmmu", "mmlu_pro", "pope"))
    assert ledger["task"]["general"] != ("train" in ledger["splits"])
    drops = [json.loads(line) for line in (out / name / "drops.jsonl").read_text().splitlines()]
    for split, entry in ledger["splits"].items():
        counted = Counter(drop["reason"] for drop in drops if drop["split"] == split)
        assert entry["drops"] == dict(sorted(counted.items()))
        assert entry["rows_in"] == entry["rows_used"] + counted.total()
        ids = [row["id"] for row in index if row["split"] == split]
        assert [row.id for row in read_split(out / name / split)] == ids
        assert len(ids) == entry["rows_used"]
        assert ids or split == "dev"  # a small share of few pictures may be none
        if not ids:
            continue
        assert _easyr1_ids(out, name, split, tmp_path) == ids
        assert _sharegpt_ids(out, name, split, tmp_path) == ids


def _easyr1_ids(out: Path, name: str, split: str, cache: Path) -> list[str]:
    """As EasyR1 reads a directory: file type from a name in it, split from the names."""
    theirs = {"dev": "validation"}.get(split, split)
    rows = datasets.load_dataset(
        "parquet", data_dir=str(out / "exports" / "easyr1" / name), split=theirs, cache_dir=str(cache)
    )
    for row in rows:
        assert row["problem"].count("<image>") == len(row["images"])
        assert all(image["bytes"] for image in row["images"])
    return [json.loads(row["answer"])["id"] for row in rows]


def _sharegpt_ids(out: Path, name: str, split: str, cache: Path) -> list[str]:
    folder = out / "exports" / "llamafactory"
    info = json.loads((folder / "dataset_info.json").read_text())[f"{name}_{split}"]
    rows = datasets.load_dataset(
        "json", data_files=str(folder / info["file_name"]), split="train", cache_dir=str(cache)
    )
    for row in rows:
        assert row["messages"][0]["content"].count("<image>") == len(row["images"])
        assert all((folder / image).is_file() for image in row["images"])
    return [row["id"] for row in rows]


def _environment_of(name: str) -> Path:
    """The Python of an engine environment, as scripts/check_base.sh makes them."""
    folder = Path(os.environ.get("CPT_RFT_ENVS", ROOT / ".envs"))
    found = [path / "bin" / "python" for path in sorted(folder.glob(f"{name}-*")) if (path / "ready").exists()]
    if not found:
        pytest.skip(f"no environment {name}-* in {folder} (set CPT_RFT_ENVS to where it is)")
    return found[-1]


LLAMAFACTORY = """
import json, sys
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.data.parser import get_dataset_list
from llamafactory.data.loader import _load_single_dataset
from llamafactory.hparams import DataArguments, ModelArguments
from transformers import Seq2SeqTrainingArguments

folder, names, work = sys.argv[1], sys.argv[2].split(","), sys.argv[3]
data = DataArguments(dataset=",".join(names), dataset_dir=folder, template="qwen2_vl", media_dir=folder)
training = Seq2SeqTrainingArguments(output_dir=work)
found = {}
for name, attributes in zip(names, get_dataset_list(names, folder)):
    rows = _load_single_dataset(attributes, ModelArguments(model_name_or_path=work), data, training)
    found[name] = [[row["_prompt"][0]["content"], row["_response"][0]["content"], row["_images"] or []] for row in rows]
json.dump(found, open(work + "/found.json", "w"))
"""


def test_llamafactory_reads_its_export(out: Path, tmp_path: Path) -> None:
    python = _environment_of("llamafactory")
    folder = out / "exports" / "llamafactory"
    names = [f"{name}_train" for name in SEVEN]
    script = tmp_path / "read.py"
    script.write_text(LLAMAFACTORY)
    command = [str(python), "-I", str(script), str(folder), ",".join(names), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | {"HF_HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for name in names:
        rows = json.loads((folder / f"{name}.json").read_text())
        turns = [[turn["content"] for turn in row["messages"]] for row in rows]
        images = [[str(folder / image) for image in row["images"]] for row in rows]
        expected = [[*texts, paths] for texts, paths in zip(turns, images, strict=True)]
        assert found[name] == expected


EASYR1 = """
import hashlib, json, sys
from transformers import AutoProcessor
from verl.utils.dataset import RLHFDataset, process_image

folder, names, base, template, found = sys.argv[1:]
processor = AutoProcessor.from_pretrained(base)
keys = {"prompt_key": "problem", "answer_key": "answer", "image_key": "images"}
told = {}
for name in names.split(","):
    path, split = name.split("/")
    rows = RLHFDataset(
        f"{folder}/{path}@{split}", processor.tokenizer, processor, format_prompt=template, max_prompt_length=8192,
        filter_overlong_prompts=False, **keys,
    )
    told[name] = []
    for number in range(len(rows)):
        row = rows[number]
        images = row["multi_modal_data"]["images"]
        assert all(process_image(image, None, None).mode == "RGB" for image in images)
        hashes = [hashlib.sha256(image["bytes"]).hexdigest() for image in images]
        prompt = processor.tokenizer.decode(row["raw_prompt_ids"])
        told[name].append([row["ground_truth"], prompt, hashes, int(row["attention_mask"].sum())])
json.dump(told, open(found, "w"))
"""


def test_easyr1_reads_its_export(out: Path, tmp_path: Path) -> None:
    """Rows, prompts, pictures and, after the processor expanded the pictures, the number of tokens that we count."""
    base = ROOT / "cpt_rft" / "miniature" / "base"
    folder = out / "exports" / "easyr1"
    names = [f"{name}/train" for name in SEVEN] + [f"{name}/test" for name in EVERY]
    script = tmp_path / "read.py"
    script.write_text(EASYR1)
    template, found = folder / "task_direct.jinja", tmp_path / "found.json"
    command = [str(easyr1.environment() / "bin" / "python"), str(script), str(folder), ",".join(names)]
    done = subprocess.run(
        [*command, str(base), str(template), str(found)],
        capture_output=True,
        text=True,
        timeout=600,
        env=easyr1.variables(tmp_path),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told, counter, vision = json.loads(found.read_text()), PromptCounter(base), VisionSpec.read(base)
    for name in names:
        rows = read_split(out / name)
        assert len(told[name]) == len(rows) > 0
        for row, (truth, prompt, hashes, tokens) in zip(rows, told[name], strict=True):
            text = user_text(row, "direct", "task")
            assert truth == ground_truth(row)
            assert prompt == counter.before + text.replace(IMAGE_TAG, PICTURE) + counter.after
            assert hashes == [hashlib.sha256(data).hexdigest() for data in row.images]
            sizes = [decode_picture(data, row.id).size for data in row.images]
            assert tokens == counter(text, [vision.image_tokens(height, width) for width, height in sizes])


def test_the_notebook_runs_from_top_to_bottom(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    book = nbformat.read(ROOT / "dataproc.ipynb", as_version=4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in book.cells)
    checks = tmp_path / "configs" / "data.yaml"
    checks.parent.mkdir()
    checks.write_text("max_dropped: 0.6\n")
    for cell in book.cells:
        cell.source = cell.source.replace("load_checks()", f"load_checks(Path({str(checks)!r}))")
    variables = environment(study.hub, study.place / "home") | {
        "CPT_RFT_DATA": str(tmp_path / "data"),
        "CPT_RFT_TASKS": str(study.place / "tasks"),
        "PYTHONPATH": str(ROOT),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    nbclient.NotebookClient(
        book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) == 2 * len(EVERY)
    lock = json.loads((tmp_path / "data" / "data.lock.json").read_text())
    assert sorted(lock["tasks"]) == sorted(EVERY)
