"""scripts/check_base.sh: that it tells a difference, and its command line. The whole check runs in `test.sh --full`."""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
RECORD = {"versions": {"transformers": "5"}, "greedy": [[1, 2], [3, 4]], "texts": ["a b", "c d"]}


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare", ROOT / "scripts/engine_envs/compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(work: Path, name: str, *, shift: float = 0.0, key: str = "", greedy: list[list[int]] | None = None) -> None:
    arrays = {"ids0": np.arange(6), "pixels0": np.linspace(-1, 1, 8), "logits0": np.linspace(-3, 3, 12).reshape(6, 2)}
    if key:
        arrays[key] = arrays[key] + np.asarray(shift, arrays[key].dtype)
    np.savez(work / f"{name}.npz", **arrays)
    (work / f"{name}.json").write_text(json.dumps(RECORD | ({"greedy": greedy} if greedy else {})))


@pytest.mark.parametrize(
    ("key", "shift", "says"),
    [
        ("logits0", 5e-5, "ok   b"),
        ("logits0", 2e-4, "FAIL b"),
        ("logits0", float("nan"), "FAIL b"),
        ("pixels0", 2e-4, "FAIL b"),
        ("ids0", 1, "token ids differ from a's"),
    ],
)
def test_differences(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, shift: float, says: str
) -> None:
    record(tmp_path, "a")
    record(tmp_path, "b", key=key, shift=shift)
    failed = compare.main(tmp_path, ["a", "b"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("ok   a")
    assert says in second
    assert failed == second.startswith("FAIL")


def test_greedy_texts_and_losses(compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, "a")
    for name, greedy in (("same", RECORD["greedy"]), ("other", [[1, 2], [3, 5]])):
        (tmp_path / f"{name}.json").write_text(json.dumps(RECORD | {"greedy": greedy}))
    (tmp_path / "trained.json").write_text(json.dumps({"versions": {}, "losses": [2.0, 1.0]}))
    assert compare.main(tmp_path, ["a", "same", "other", "trained", "never ran"]) == 1
    _, same, other, trained = capsys.readouterr().out.splitlines()
    assert same.startswith("ok   same") and other.startswith("FAIL other") and trained.startswith("ok   trained")


def test_nothing_to_compare_with(compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vllm.json").write_text(json.dumps(RECORD))
    assert compare.main(tmp_path, ["a", "vllm"]) == 1
    assert "nothing to compare with" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "vlm"], "Unknown consumer vlm. Fix: use one of transformers-5.23"),
        (["--only"], "usage: "),
        (["--bogus"], "usage: "),
        (["nowhere"], "There is no directory nowhere. Fix: "),
    ],
)
def test_wrong_arguments(arguments: list[str], says: str, tmp_path: Path) -> None:
    run = subprocess.run(
        ["bash", str(ROOT / "scripts/check_base.sh"), *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 2
    assert says in run.stderr


def test_every_consumer_has_a_lock_with_torch_and_exact_versions() -> None:
    locks = sorted((ROOT / "scripts/engine_envs").glob("*.lock"))
    assert [lock.stem for lock in locks] == [
        *("easyr1", "easyr1_cpu", "llamafactory", "lm_eval"),
        *("transformers-4.56.2", "transformers-5.23", "transformers-5.5", "vllm"),
    ]
    for lock in locks:
        lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
        torch = [line for line in lines if line.startswith("torch==")]
        version = "2.8.0" if lock.stem == "easyr1" else "2.13.0"
        assert torch == ([] if lock.stem == "lm_eval" else [f"torch=={version}"])  # it asks a server
        assert all(line.count("==") == 1 and " " not in line for line in lines), lock.name
