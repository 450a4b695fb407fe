"""Runs a few SFT steps of LLaMA-Factory on drawn rows from a checkpoint, with nothing of ours imported.

Usage: python -I probe_llamafactory.py MODEL WORK NAME. Writes its data, its configuration and its output below
WORK/NAME and the measured loss to WORK/NAME.json.
"""

import json
import math
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (240, 210, 40)}
STEPS = 4


def write_data(folder: Path) -> None:
    """Sixteen plain pictures with a question each, in LLaMA-Factory's sharegpt form."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(16):
        colour = list(COLOURS)[number % len(COLOURS)]
        Image.new("RGB", (84, 84), COLOURS[colour]).save(folder / "images" / f"{number}.png")
        question = {"role": "user", "content": "<image>What colour is it? Answer now."}
        answer = {"role": "assistant", "content": colour}
        rows.append({"messages": [question, answer], "images": [f"images/{number}.png"]})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"file_name": "rows.json", "formatting": "sharegpt", "tags": tags | {"system_tag": "system"}}
    entry["columns"] = {"messages": "messages", "images": "images"}
    (folder / "dataset_info.json").write_text(json.dumps({"drawn": entry}), encoding="utf-8")


def main(model_dir: str, work: Path, name: str) -> None:
    """Train, then check that the steps were taken and the weights moved."""
    folder = work / name
    write_data(folder / "data")
    settings = {
        **{"model_name_or_path": model_dir, "stage": "sft", "do_train": True, "finetuning_type": "full"},
        **{"freeze_vision_tower": True, "freeze_multi_modal_projector": False, "template": "qwen2_vl"},
        **{"dataset": "drawn", "dataset_dir": str(folder / "data"), "cutoff_len": 256, "seed": 0},
        **{"output_dir": str(folder / "out"), "max_steps": STEPS, "per_device_train_batch_size": 4},
        **{"learning_rate": 3e-4, "logging_steps": 1, "save_strategy": "no", "report_to": "none"},
    }
    config = folder / "train.yaml"
    config.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in settings.items()), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-I", "-m", "llamafactory.cli", "train", str(config)], capture_output=True, text=True
    )
    (folder / "log.txt").write_text(run.stdout + run.stderr, encoding="utf-8")
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        sys.exit(f"LLaMA-Factory exited with {run.returncode}: {lines[-1] if lines else 'no message'}")
    losses = [
        entry["loss"]
        for line in (folder / "out" / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
        if "loss" in (entry := json.loads(line))
    ]
    if len(losses) != STEPS or not all(math.isfinite(loss) for loss in losses):
        sys.exit(f"LLaMA-Factory logged the losses {losses} in {STEPS} steps")
    if (folder / "out" / "model.safetensors").read_bytes() == (Path(model_dir) / "model.safetensors").read_bytes():
        sys.exit("LLaMA-Factory did not change the weights")
    report = {"versions": {p: version(p) for p in ("llamafactory", "transformers")}, "losses": losses}
    (work / f"{name}.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
