"""A checkpoint answers a few rows by plain transformers: greedy tokens and log-probabilities of the prompts.

Usage: python -I canary.py CHECKPOINT PROMPTS OUT. PROMPTS is a list of {"user", "images"} with picture files beside
it; OUT gets {"greedy", "logprobs"}. Neither cpt_rft nor a processor class is needed, so every environment with torch,
transformers and pillow runs it: the producer's, then a consumer's.
"""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

NEW_TOKENS = 8
TOLERANCE = 2e-3
"""Largest difference of a prompt's mean log-probability a token that two environments may have in float32."""


def answer(checkpoint: Path, prompts: Path) -> dict[str, Any]:
    """Greedy tokens, and the mean log-probability of the prompt's tokens, for every row."""
    import torch
    import transformers
    from PIL import Image
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    model = model.to(device).eval()
    typed = "mm_token_type_ids" in inspect.signature(model.forward).parameters  # since transformers 5
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    pil = getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor
    images = pil.from_pretrained(checkpoint, local_files_only=True)
    greedy, logprobs = [], []
    for row in json.loads(prompts.read_text(encoding="utf-8")):
        pictures = [Image.open(prompts.parent / name).convert("RGB") for name in row["images"]]
        content: list[dict[str, str]] = [{"type": "image"} for _ in pictures]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": row["user"]}]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        inputs: dict[str, Any] = {}
        if pictures:
            inputs = dict(images(images=pictures, return_tensors="pt"))
            head, *tails = text.split("<|image_pad|>")
            counts = (inputs["image_grid_thw"].prod(-1) // images.merge_size**2).tolist()
            text = head + "".join("<|image_pad|>" * n + tail for n, tail in zip(counts, tails, strict=True))
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if typed:
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        inputs = {name: value.to(device) for name, value in inputs.items()}
        with torch.no_grad():
            rows = model(**inputs).logits[0, :-1].float().log_softmax(-1)
            written = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        logprobs.append(float(rows.gather(1, inputs["input_ids"][0, 1:, None]).mean()))
        greedy.append(written[0, ids.shape[1] :].tolist())
    return {"greedy": greedy, "logprobs": logprobs}


def difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """What two environments answer differently, or none."""
    gaps = [abs(a - b) for a, b in zip(one["logprobs"], other["logprobs"], strict=True)]
    if not max(gaps, default=0.0) <= TOLERANCE:  # a NaN differs too
        return f"prompt log-probabilities differ by up to {max(gaps):.1e} a token"
    unequal = sum(a != b for a, b in zip(one["greedy"], other["greedy"], strict=True))
    return f"{unequal} of {len(gaps)} greedy answers differ" if unequal else None


if __name__ == "__main__":
    checkpoint_, prompts_, out_ = map(Path, sys.argv[1:])
    out_.write_text(json.dumps(answer(checkpoint_, prompts_)), encoding="utf-8")
