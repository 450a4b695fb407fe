"""A Qwen2.5-VL small enough to train in a test: the real class, the real files, some 130 thousand weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpt_rft.checkpoint import EncodedPrompt, Policy, load_policy
from cpt_rft.config.engine import parse_engine
from cpt_rft.config.methods import GrpoMethod, SftMethod
from cpt_rft.data.example import Example
from cpt_rft.data.parquet import write_split
from cpt_rft.engines.base import Stage, StepLog, get_engine
from cpt_rft.miniature.model import Sizes, build_model, train_tokenizer, write_base
from cpt_rft.miniature.world import make_rows
from cpt_rft.prompts import STYLES, target_text, user_text

SIZES = Sizes(
    hidden=64, layers=2, heads=2, kv_heads=1, mlp=96, vision_hidden=32, vision_depth=2, vision_heads=2, vision_mlp=48
)
TASK = "mini_gqa"
VOCABULARY = 384


def make_base(directory: Path, *, scale: float = 1.0, seed: int = 0) -> Path:
    """Write an untrained base checkpoint; ``scale`` above 1 gives it opinions (logits far apart)."""
    rows = make_rows(TASK, "train", 64, 0)
    corpus = [user_text(row, style, "miniature") + target_text(row, style) for row in rows for style in STYLES]
    tokenizer = train_tokenizer([*corpus, *_words()], VOCABULARY)
    model = build_model(VOCABULARY, seed, SIZES)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.dim() > 1:
                weight.mul_(scale)
            elif scale != 1.0:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    write_base(directory, model, tokenizer)
    return directory


def make_stage(
    directory: Path,
    base: Path,
    method: SftMethod | GrpoMethod,
    rows: list[Example],
    *,
    parent: Path | None = None,
    **engine: Any,
) -> Stage:
    """A stage on one task whose data file lies beside its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    data = directory.parent / f"{directory.name}.parquet"
    write_split(data, rows)
    settings = {"name": "local", "dtype": "float32", "device": "cpu", **engine}
    return Stage(
        directory=directory,
        parent=parent or base,
        base=base,
        tasks=(TASK,),
        data=(data,),
        method=method,
        engine=parse_engine(settings),
        prompt_preset="miniature",
        seed=0,
        seed_path=("test", method.name, 0, TASK),
    )


def run(stage: Stage) -> list[StepLog]:
    """Train and return what was reported."""
    logs: list[StepLog] = []
    get_engine(stage.engine).train(stage, logs.append)
    return logs


def sft(**changes: Any) -> SftMethod:
    """SFT settings for a test."""
    settings = {"name": "sft", "kind": "sft", "style": "direct", "lr": 3e-3, "prompts_per_step": 4, "micro_batch": 4}
    return SftMethod(**(settings | changes))


def grpo(**changes: Any) -> GrpoMethod:
    """GRPO settings for a test."""
    settings = {
        "name": "grpo",
        "kind": "grpo",
        "style": "direct",
        "lr": 1e-3,
        "prompts_per_step": 4,
        "micro_batch": 4,
        "group": 4,
        "max_new_tokens": 6,
    }
    return GrpoMethod(**(settings | changes))


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint by name."""
    return dict(load_policy(checkpoint).model.named_parameters())


def random_prompt(policy: Policy, before: int, after: int, *grids: tuple[int, int], seed: int = 0) -> EncodedPrompt:
    """A prompt of random tokens and random pictures of the given sizes in patches."""
    generator = torch.Generator().manual_seed(seed)
    image = policy.model.config.image_token_id
    parts = [torch.randint(0, 256, (before,), generator=generator)]
    for rows, columns in grids:
        parts += [torch.full((rows * columns // 4,), image), torch.randint(0, 256, (2,), generator=generator)]
    ids = torch.cat([*parts, torch.randint(0, 256, (after,), generator=generator)])
    if not grids:
        return EncodedPrompt(ids)
    patches = torch.randn(sum(rows * columns for rows, columns in grids), 1176, generator=generator)
    return EncodedPrompt(ids, patches, torch.tensor([[1, rows, columns] for rows, columns in grids]))


def stock_inputs(policy: Policy, prompt: EncodedPrompt, completion: list[int]) -> dict[str, Tensor]:
    """A prompt and a completion as keyword arguments of the stock model's forward."""
    ids = torch.cat([prompt.ids, torch.tensor(completion, dtype=torch.long)])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["mm_token_type_ids"] = (ids == policy.model.config.image_token_id).int()
    if prompt.pixel_values is not None and prompt.image_grid_thw is not None:
        inputs |= {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    policy.model.model.rope_deltas = None
    return inputs


def _words() -> list[str]:
    letters = "abcdefgh"
    return [f" {a}{b}{c}{a}" for a in letters for b in letters for c in letters] * 2
