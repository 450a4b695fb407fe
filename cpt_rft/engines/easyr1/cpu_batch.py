"""Batches of EasyR1 in the form of our local engine, and back.

Names of the framework's tensors: prompts are padded left to P columns, responses right to T; a batch has S rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import pad
from verl.protocol import DataProto
from verl.utils.dataset import process_image
from verl.utils.torch_functional import get_response_mask, pad_2d_list_to_length

from cpt_rft.algos.aggregate import pad_rows
from cpt_rft.algos.logprobs import token_logprobs
from cpt_rft.checkpoint import EncodedPrompt, Policy
from cpt_rft.engines.easyr1.groups import side_by_side
from cpt_rft.engines.local.generate import suppression
from cpt_rft.engines.local.network import Network
from cpt_rft.engines.local.packing import pack_blocks


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: the configuration's way, or what a batch asks for instead."""

    n: int
    temperature: float
    top_p: float
    seed: int

    @classmethod
    def read(cls, rollout: Any, asked: Mapping[str, Any]) -> "Sampling":
        """The configuration's ``rollout`` section, but for what the batch's own settings name."""
        names = ("n", "temperature", "top_p", "seed")
        return cls(**{name: asked.get(name, getattr(rollout, name)) for name in names})


def encoded_prompts(data: DataProto, processor: Any) -> list[EncodedPrompt]:
    """The prompt of every row, with what the framework's worker makes of its pictures."""
    columns = data.batch["input_ids"].shape[1]
    if "prompts" in data.batch.keys():  # noqa: SIM118 - of a TensorDict
        columns = data.batch["prompts"].shape[1]
    ids, mask = data.batch["input_ids"][:, :columns], data.batch["attention_mask"][:, :columns].bool()
    pictures = data.non_tensor_batch.get("multi_modal_data", [{}] * len(ids))
    limits = data.meta_info.get("min_pixels"), data.meta_info.get("max_pixels")
    prompts = []
    for row_ids, row_mask, row_pictures in zip(ids, mask, pictures, strict=True):
        images = [process_image(image, *limits) for image in row_pictures.get("images", [])]
        cut = processor.image_processor(images=images, return_tensors="pt") if images else {}
        prompts.append(EncodedPrompt(row_ids[row_mask], cut.get("pixel_values"), cut.get("image_grid_thw")))
    return prompts


def responses(prompts: DataProto, tokens: Sequence[Sequence[int]], n: int, length: int) -> DataProto:
    """The framework's batch of responses.

    Args:
        prompts: What was asked; its rows are repeated ``n`` times each.
        tokens: Token ids of the responses, those of a prompt next to each other.
        n: Responses a prompt.
        length: Columns of a response, whatever the longest one is.
    """
    asked = {key: prompts.batch[key].repeat_interleave(n, 0) for key in ("input_ids", "attention_mask", "position_ids")}
    written_ST = pad_2d_list_to_length([list(row) for row in tokens], prompts.meta_info["pad_token_id"], length)
    mask_ST = get_response_mask(written_ST, prompts.meta_info["eos_token_id"], dtype=asked["attention_mask"].dtype)
    # Text after the prompt goes on by one on every axis of the rotary positions.
    following = asked["position_ids"][..., -1:] + torch.arange(1, written_ST.shape[1] + 1)
    batch = TensorDict(
        {
            "prompts": asked["input_ids"],
            "responses": written_ST,
            "input_ids": torch.cat([asked["input_ids"], written_ST], dim=-1),
            "attention_mask": torch.cat([asked["attention_mask"], mask_ST], dim=-1),
            "response_mask": mask_ST,
            "position_ids": torch.cat([asked["position_ids"], following], dim=-1),
        },
        batch_size=len(written_ST),
    )
    pictures = prompts.non_tensor_batch.get("multi_modal_data")
    others = {} if pictures is None else {"multi_modal_data": np.repeat(pictures, n, axis=0)}
    return DataProto(batch=batch, non_tensor_batch=others, meta_info=prompts.meta_info)


def response_logprobs(
    policy: Policy, rows: DataProto, prompts: Sequence[EncodedPrompt], uids: Sequence[str], temperature: float
) -> Tensor:
    """Log-probabilities (S, T) of the responses, zero on padding; differentiable where the policy is.

    Rows of one prompt are computed with one context where every prompt of the batch has equally many.
    """
    order, group = side_by_side(uids)
    mask_ST = rows.batch["response_mask"].bool()
    tokens = [rows.batch["responses"][row][mask_ST[row]].tolist() for row in order]
    network = Network(policy.model)
    contexts = network.contexts([prompts[row] for row in order[::group]])
    blocks = pack_blocks(contexts, [tokens[start : start + group] for start in range(0, len(tokens), group)])
    logits_NV = network.logits(contexts, blocks).float() + suppression(policy, network.device)
    logprobs_N = token_logprobs(logits_NV, blocks.targets, temperature=temperature)
    found_ST, _ = pad_rows(logprobs_N, [len(row) for row in tokens])
    return pad(found_ST, (0, mask_ST.shape[1] - found_ST.shape[1]))[torch.tensor(order).argsort()]
