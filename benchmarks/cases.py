"""The work that both sides of a benchmark get: a random Qwen2.5-VL of the stock class, pictures, prompts, answers."""

import json
import shutil
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cpt_rft.checkpoint import VISION_TOKENS, encode_prompt, load_policy
from cpt_rft.miniature.model import Sizes, build_model, train_tokenizer, write_base

SIZES = {
    "smoke": Sizes(64, 2, 2, 1, 96, 32, 2, 2, 48),
    "192x4": Sizes(192, 4, 4, 2, 576, 128, 2, 4, 384),
    "512x8": Sizes(512, 8, 8, 2, 1536, 256, 4, 4, 768),
    "2048x36": Sizes(2048, 36, 16, 2, 11008, 1280, 32, 16, 3420),
    "3584x28": Sizes(3584, 28, 28, 4, 18944, 1280, 32, 16, 3420),
}
FILLERS = [f"{a}{b}{c}" for a in "bdgk" for b in "aei" for c in "lmn"]
TURNS = "system\nYou are a helpful assistant.\nuser\nassistant\n Answer now. "


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        work: ``grpo``, ``rollout``, ``sft`` or ``evaluate``.
        prompts: Prompts in a unit of work.
        group: Completions a prompt.
        picture: Width and height of each picture in merged tokens (28 pixels).
        prompt_tokens: Tokens of a prompt, its picture among them; of the shortest where they differ.
        spread: The longest prompt is this many tokens longer.
        new_tokens: Tokens of each completion or answer.
    """

    work: str
    prompts: int
    group: int
    picture: tuple[int, int]
    prompt_tokens: int
    spread: int
    new_tokens: int


CASES = {
    "grpo_short": Case("grpo", 4, 8, (3, 3), 46, 0, 16),
    "grpo_long": Case("grpo", 2, 8, (28, 20), 600, 0, 64),
    "rollout": Case("rollout", 32, 8, (3, 3), 46, 0, 16),
    "sft": Case("sft", 32, 1, (3, 3), 46, 12, 16),
    "evaluate": Case("evaluate", 512, 1, (3, 3), 46, 24, 16),
}


def write_case(folder: Path, name: str, size: str, seed: int = 0, **changes: Any) -> Case:
    """Write model, pictures and ``case.json``; end tokens and picture tokens are never written by any side."""
    case = Case(**asdict(CASES[name]) | changes)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "pictures").mkdir(parents=True)
    tokenizer = train_tokenizer([TURNS + " ".join(FILLERS)] * 20 + _noise(), 704)
    write_base(folder / "model", build_model(704, seed, SIZES[size]), tokenizer)
    policy = load_policy(folder / "model")
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(case.prompts):
        picture = _draw(rng, case.picture)
        (folder / "pictures" / f"{number}.png").write_bytes(picture)
        wanted = case.prompt_tokens + (number * 7919) % (case.spread + 1)
        problem, tokens = "<image>", 0
        while tokens < wanted:
            problem += " " + str(rng.choice(FILLERS))
            tokens = len(encode_prompt(policy, [picture], problem + " Answer now.").ids)
        answer = " ".join(rng.choice(FILLERS, case.new_tokens))
        while len(policy.tokenizer.encode(answer)) > case.new_tokens - 1:
            answer = answer.rpartition(" ")[0] or answer[:-1]
        rows.append({"picture": f"pictures/{number}.png", "problem": problem, "answer": answer, "tokens": tokens})
    ends = policy.model.generation_config.eos_token_id
    never = sorted({*policy.tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)), *ends})
    told = {"name": name, "size": size, **asdict(case), "rows": rows, "never": never, "suffix": " Answer now."}
    (folder / "case.json").write_text(json.dumps(told), encoding="utf-8")
    return case


def _draw(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    pixels = rng.integers(0, 256, (size[1] * 28, size[0] * 28, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _noise() -> list[str]:
    """Enough other words to fill the vocabulary."""
    letters = "hjqrstvwxyz"
    return [f" {a}{b}{c}{a}" for a in letters for b in letters for c in letters] * 2
