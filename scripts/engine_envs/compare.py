"""Compares what the consumers of a checkpoint recorded; one line a consumer, exit 1 if any differs.

Usage: python compare.py WORK NAME...; the transformers consumers are compared with the first one of them.
"""

import json
import sys
from pathlib import Path

import numpy as np

TOLERANCE = 1e-4


def main(work: Path, names: list[str]) -> int:
    """Print one line a consumer."""
    reference = next((name for name in names if (work / f"{name}.npz").is_file()), None)
    failed = 0
    for name in names:
        report = work / f"{name}.json"
        if not report.is_file():
            continue  # its probe has already printed why
        content = json.loads(report.read_text(encoding="utf-8"))
        versions = " ".join(f"{package} {version}" for package, version in content["versions"].items())
        problem, text = judge(work, name, content, reference)
        failed += problem
        print(f"{'FAIL' if problem else 'ok  '} {name} ({versions}): {text}")
    return failed


def judge(work: Path, name: str, content: dict, reference: str | None) -> tuple[bool, str]:
    """Whether the consumer differs from the reference, and the line that says so."""
    if "losses" in content:
        return False, "trained, losses " + ", ".join(f"{loss:.2f}" for loss in content["losses"])
    if reference is None:
        return True, "no transformers consumer ran, so there is nothing to compare with"
    expected = json.loads((work / f"{reference}.json").read_text(encoding="utf-8"))
    if content["greedy"] != expected["greedy"]:
        return True, f"greedy text {content['texts']} differs from {reference}'s {expected['texts']}"
    if not (work / f"{name}.npz").is_file():
        return False, f"greedy tokens equal {reference}'s"
    arrays, base = np.load(work / f"{name}.npz"), np.load(work / f"{reference}.npz")
    if any(not np.array_equal(arrays[key], base[key]) for key in base.files if key.startswith("ids")):
        return True, f"token ids differ from {reference}'s"
    gaps = {
        kind: max(float(np.abs(arrays[key] - base[key]).max()) for key in base.files if key.startswith(kind))
        for kind in ("pixels", "logits")
    }
    largest = max(float(np.abs(base[key]).max()) for key in base.files if key.startswith("logits"))
    text = f"logits within {gaps['logits']:.1e} of {reference}'s (largest {largest:.1f}), pixels {gaps['pixels']:.1e}"
    # Written so that a NaN fails.
    return not (gaps["logits"] <= TOLERANCE and gaps["pixels"] <= TOLERANCE), text


if __name__ == "__main__":
    sys.exit(1 if main(Path(sys.argv[1]), sys.argv[2:]) else 0)
