"""Loads a checkpoint with stock transformers alone and records what it computes.

Usage: python -I probe_transformers.py MODEL WORK NAME. Reads WORK/prompts.json and WORK/picture.png; writes
WORK/NAME.json (versions, greedy token ids) and WORK/NAME.npz (ids, pixels and logits of every prompt).
"""

import importlib.util
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

NEW_TOKENS = 12


def by_parts(model_dir: str, tokenizer: Any, text: str, picture: Image.Image) -> dict[str, torch.Tensor]:
    """Inputs from the tokenizer and the PIL image processor: the way without torchvision."""
    name = "Qwen2VLImageProcessorPil" if hasattr(transformers, "Qwen2VLImageProcessorPil") else "Qwen2VLImageProcessor"
    pixels = getattr(transformers, name).from_pretrained(model_dir)(images=[picture], return_tensors="pt")
    pads = int(pixels["image_grid_thw"].prod()) // 4
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * pads), return_tensors="pt").input_ids
    return {"input_ids": ids, **pixels}


def check_auto_processor(model_dir: str, text: str, picture: Image.Image, expected: dict[str, torch.Tensor]) -> None:
    """Where torchvision is there, AutoProcessor must give the same inputs."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model_dir)
    if processor.chat_template != (Path(model_dir) / "chat_template.jinja").read_text(encoding="utf-8"):
        sys.exit("AutoProcessor has another chat template")
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    if not torch.equal(inputs["input_ids"], expected["input_ids"]):
        sys.exit("AutoProcessor gives other token ids than tokenizer and image processor")
    gap = float((inputs["pixel_values"] - expected["pixel_values"]).abs().max())
    if gap > 1e-5:  # the torchvision processor fuses rescaling and normalising, so not bit for bit
        sys.exit(f"AutoProcessor gives other pixel values (by {gap:.2g})")


def main(model_dir: str, work: Path, name: str) -> None:
    """Logits of every position and greedy tokens of every prompt."""
    model, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        model_dir, dtype=torch.float32, output_loading_info=True
    )
    if loading["missing_keys"] or loading["unexpected_keys"]:
        sys.exit(f"missing {loading['missing_keys']}, unexpected {loading['unexpected_keys']}")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    picture = Image.open(work / "picture.png")
    has_torchvision = importlib.util.find_spec("torchvision") is not None
    arrays: dict[str, np.ndarray] = {}
    greedy, texts = [], []
    for number, question in enumerate(json.loads((work / "prompts.json").read_text(encoding="utf-8"))):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = by_parts(model_dir, tokenizer, text, picture)
        if has_torchvision:
            check_auto_processor(model_dir, text, picture, inputs)
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
        with torch.no_grad():
            logits = model(**inputs).logits
            tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        arrays |= {f"ids{number}": inputs["input_ids"].numpy(), f"pixels{number}": inputs["pixel_values"].numpy()}
        arrays[f"logits{number}"] = logits[0].numpy()
        greedy.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
        texts.append(tokenizer.decode(greedy[-1]))
    np.savez(work / f"{name}.npz", **arrays)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "torchvision": has_torchvision}
    report = {"versions": versions, "greedy": greedy, "texts": texts}
    (work / f"{name}.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
