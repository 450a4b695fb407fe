"""Do two back ends give the same greedy text? Every difference is traced to the logits of the local model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cpt_rft.checkpoint import Policy, encode_prompts, load_policy
from cpt_rft.data.example import Example
from cpt_rft.engines.local.generate import suppression
from cpt_rft.prompts import Style, user_text
from eval.records import Record


@dataclass(frozen=True)
class Difference:
    """Two answers to one row.

    Attributes:
        id: The row.
        texts: Both answers.
        gap: How far the local model's two likeliest tokens lie apart in log-probability where the answers part.
    """

    id: str
    texts: tuple[str, str]
    gap: float


def differing(
    checkpoint: Path, rows: Sequence[Example], style: Style, local: Sequence[Record], other: Sequence[Record]
) -> list[Difference]:
    """The rows whose texts differ, each with the gap of the logits at the token where they part."""
    policy = load_policy(checkpoint)
    found = []
    for row, one, two in zip(rows, local, other, strict=True):
        assert row.id == one.id == two.id
        if one.response != two.response:
            ids = [policy.tokenizer.encode(record.response, add_special_tokens=False) for record in (one, two)]
            shared = next((n for n, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
            found.append(Difference(row.id, (one.response, two.response), gap(policy, row, style, ids[0][:shared])))
    return found


@torch.no_grad()
def gap(policy: Policy, row: Example, style: Style, before: list[int]) -> float:
    """Log-probability of the likeliest token after the prompt and some tokens, minus that of the second."""
    [prompt] = encode_prompts(policy, [(row.images, user_text(row, style, "miniature"))])
    ids = torch.cat([prompt.ids, torch.tensor(before, dtype=torch.long)])[None]
    logits = policy.model(
        input_ids=ids,
        mm_token_type_ids=(ids == policy.model.config.image_token_id).int(),
        pixel_values=prompt.pixel_values,
        image_grid_thw=prompt.image_grid_thw,
    ).logits[0, -1]
    best = (logits + suppression(policy, logits.device)).log_softmax(-1).topk(2).values
    return float(best[0] - best[1])
