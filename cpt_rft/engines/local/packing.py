"""Prompts and completions as one flat row of tokens: no padding, and every prompt once however many completions.

A prompt's *context* is all of it but its last token. Each of its completions is a *block*: the prompt's last token
followed by the completion without its last token. So block token t predicts completion token t, the context is
shared, and nothing is predicted from it. Blocks of one prompt do not see each other, and each starts at the position
after the context. The mathematics is that of one row a completion; tests hold it to the stock model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cpt_rft.checkpoint import EncodedPrompt


@dataclass(frozen=True)
class Images:
    """Pictures of a batch, in the order of their tokens.

    Attributes:
        patches: (N, 1176) patches of all pictures.
        grids: One (time, height, width) in patches a picture.
    """

    patches: Tensor
    grids: list[tuple[int, int, int]]


@dataclass(frozen=True)
class Contexts:
    """The contexts of R prompts, flat.

    Attributes:
        ids: (N,) token ids, one context after the other.
        positions: (3, N) rotary positions in time, height and width.
        slots: (N,) where each token stands in the padded (R * width) layout, contexts at its right.
        width: Longest context.
        lengths: (R,) tokens of each context.
        image_slots: (M,) flat places of the picture tokens.
        images: The pictures, or none.
        last_ids: (R,) last token of each prompt.
        last_positions: (R,) its rotary position, equal on the three axes.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    width: int
    lengths: Tensor
    image_slots: Tensor
    images: Images | None
    last_ids: Tensor
    last_positions: Tensor

    @property
    def rows(self) -> int:
        """How many contexts."""
        return self.lengths.numel()


@dataclass(frozen=True)
class Blocks:
    """The completions of R prompts, G each, flat.

    Attributes:
        ids: (N,) input ids of all blocks.
        targets: (N,) the completion tokens they predict.
        positions: (3, N) rotary positions.
        slots: (N,) where each token stands in the padded (R * G * width) layout, blocks at its left.
        mask: (R, G, width) 1.0 on real tokens.
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor
    slots: Tensor
    mask: Tensor


def pack_contexts(prompts: Sequence[EncodedPrompt], image_token: int, merge: int, device: str = "cpu") -> Contexts:
    """Lay out the contexts of a batch of prompts."""
    ids = torch.cat([prompt.ids[:-1] for prompt in prompts])
    positions = [rope_positions(prompt, image_token, merge) for prompt in prompts]
    lengths = torch.tensor([len(prompt.ids) - 1 for prompt in prompts])
    width = int(lengths.max())
    ends = (torch.arange(len(prompts)) + 1) * width
    slots = torch.cat([torch.arange(end - n, end) for end, n in zip(ends.tolist(), lengths.tolist(), strict=True)])
    pictured = [
        (prompt.pixel_values, prompt.image_grid_thw)
        for prompt in prompts
        if prompt.pixel_values is not None and prompt.image_grid_thw is not None
    ]
    images = None
    if pictured:
        patches = torch.cat([patches for patches, _ in pictured]).to(device)
        images = Images(patches, [tuple(grid) for _, grids in pictured for grid in grids.tolist()])
    return Contexts(
        ids=ids.to(device),
        positions=torch.cat([row[:, :-1] for row in positions], dim=1).to(device),
        slots=slots.to(device),
        width=width,
        lengths=lengths.to(device),
        image_slots=(ids == image_token).nonzero().squeeze(1).to(device),
        images=images,
        last_ids=torch.stack([prompt.ids[-1] for prompt in prompts]).to(device),
        last_positions=torch.stack([row[0, -1] for row in positions]).to(device),
    )


def pack_blocks(contexts: Contexts, completions: Sequence[Sequence[Sequence[int]]]) -> Blocks:
    """Lay out G completions (token ids, at least one each) for each of the R prompts."""
    device = contexts.ids.device
    rows = [torch.tensor(tokens) for group in completions for tokens in group]
    lengths = torch.tensor([len(row) for row in rows])
    group = len(completions[0])
    width = int(lengths.max())
    starts = torch.arange(len(rows)) * width
    within = torch.cat([torch.arange(n) for n in lengths.tolist()])
    slots = starts.repeat_interleave(lengths) + within
    first_positions = contexts.last_positions.cpu().repeat_interleave(group).repeat_interleave(lengths)
    last_ids = contexts.last_ids.cpu().repeat_interleave(group)
    ids = torch.cat([torch.cat([last[None], row[:-1]]) for last, row in zip(last_ids, rows, strict=True)])
    mask = (torch.arange(width) < lengths[:, None]).float().view(len(completions), group, width)
    return Blocks(
        ids=ids.to(device),
        targets=torch.cat(rows).to(device),
        positions=(first_positions + within).expand(3, -1).to(device),
        slots=slots.to(device),
        mask=mask.to(device),
    )


def rope_positions(prompt: EncodedPrompt, image_token: int, merge: int) -> Tensor:
    """Rotary positions (3, S) of a prompt.

    Source: transformers Qwen2_5_VLModel.get_rope_index. Text counts up on all three axes; a picture's tokens share
    one time and spread over rows and columns; the text after it goes on at the largest position so far plus one.
    """
    ids = prompt.ids
    if prompt.image_grid_thw is None:
        return torch.arange(len(ids)).expand(3, -1)
    parts, next_position, done = [], 0, 0
    starts = (ids == image_token).nonzero().squeeze(1).tolist()
    for time, height, width in prompt.image_grid_thw.tolist():
        if time != 1:
            raise ValueError(f"a picture has one frame, not {time}")
        start, rows, columns = starts[0], height // merge, width // merge
        text = start - done
        parts.append((torch.arange(text) + next_position).expand(3, -1))
        next_position += text
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        parts.append(torch.stack([torch.zeros_like(row), row, column]).flatten(1) + next_position)
        next_position += max(rows, columns)
        done = start + rows * columns
        starts = starts[rows * columns :]
    parts.append((torch.arange(len(ids) - done) + next_position).expand(3, -1))
    return torch.cat(parts, dim=1)
