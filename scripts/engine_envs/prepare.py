"""Draws the fixed picture, writes the fixed questions and, without a model of the user, trains a throw-away one.

Usage: python prepare.py WORK [--model-given]; the model goes to WORK/model. Needs cpt_rft on PYTHONPATH.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer

from cpt_rft.checkpoint import encode_prompt, load_policy, save_checkpoint
from cpt_rft.miniature.model import build_model, train_tokenizer, write_base

QUESTIONS = ("What colour is the circle? Answer now.", "What shape is it? Think, then box.", "Is it red?")
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (240, 210, 40)}
STEPS = 50


def draw(work: Path, colour: str) -> bytes:
    """A circle of this colour on a grey ramp, so that every patch differs."""
    picture = Image.linear_gradient("L").resize((84, 84)).convert("RGB")
    ImageDraw.Draw(picture).ellipse((10, 16, 58, 64), fill=COLOURS[colour])
    picture.save(work / "picture.png")
    return (work / "picture.png").read_bytes()


def corpus_tokenizer() -> Tokenizer:
    """Trained on the questions, the template's words, and enough numbers to fill the vocabulary."""
    frame = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|im_start|>assistant\n"
    answers = [f"<think>the circle is {colour}</think>\\boxed{{{colour}}}" for colour in COLOURS]
    filler = [
        f"{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{chr(97 + i * 7 % 26)}{chr(97 + i * 11 % 26)}" for i in range(999)
    ]
    return train_tokenizer([frame, *QUESTIONS, *answers] * 20 + filler)


def throw_away(work: Path) -> None:
    """Fifty steps of naming the colour: enough that logits are not noise; no result is read from it."""
    tokenizer = corpus_tokenizer()
    write_base(work / "start", build_model(tokenizer.get_vocab_size(), seed=0), tokenizer)
    policy = load_policy(work / "start")
    model = policy.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    colours = list(COLOURS)
    pictures = {colour: draw(work, colour) for colour in colours}
    for step in range(STEPS):
        colour, question = colours[step % len(colours)], QUESTIONS[step % 2]
        prompt = encode_prompt(policy, [pictures[colour]], "<image>" + question)
        answer = colour if step % 2 == 0 else f"<think>the circle is {colour}</think>\\boxed{{{colour}}}"
        target = torch.tensor(policy.tokenizer.encode(answer + "<|im_end|>"))
        ids = torch.cat([prompt.ids, target])[None]
        kinds = (ids == model.config.image_token_id).int()
        logits = model(
            input_ids=ids,
            mm_token_type_ids=kinds,
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
        ).logits
        loss = torch.nn.functional.cross_entropy(logits[0, len(prompt.ids) - 1 : -1], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_checkpoint(policy, work / "model", source=work / "start")
    print(f"Throw-away model: {STEPS} steps, last loss {loss.item():.2f}")


def main(work: Path, arguments: list[str]) -> None:
    """Everything the probes read."""
    if "--model-given" not in arguments:
        throw_away(work)
    draw(work, "red")
    (work / "prompts.json").write_text(json.dumps(QUESTIONS), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
