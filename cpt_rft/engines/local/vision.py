"""The picture tower of Qwen2.5-VL, on the stock model's parameters, with pictures of one size as one batch.

Source: transformers modeling_qwen2_5_vl.py Qwen2_5_VisionTransformerPretrainedModel. Differs from: the patch
embedding is a matrix product (the kernel covers a patch exactly once), and attention runs over all pictures and
windows of one size at once instead of one after the other. Same parameters, same numbers up to rounding.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cpt_rft.engines.local.layers import attend, rms_norm, rotate, swiglu, turns
from cpt_rft.engines.local.packing import Images


@dataclass(frozen=True)
class Layout:
    """How the patches of one picture size are ordered and grouped.

    Attributes:
        order: (merged tokens,) order in which windows of one size stand side by side.
        inverse: (merged tokens,) back to reading order.
        positions: (patches, 2) row and column of each patch, in the new order.
        windows: (how many, patches in each) runs of equal windows.
    """

    order: Tensor
    inverse: Tensor
    positions: Tensor
    windows: tuple[tuple[int, int], ...]


@lru_cache(maxsize=64)
def layout(height: int, width: int, merge: int, window: int) -> Layout:
    """The layout of a picture of ``height`` x ``width`` patches; a window is ``window`` merged tokens a side."""
    rows, columns = height // merge, width // merge
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    window_of = (row // window * -(-columns // window) + column // window).flatten()
    counts = window_of.bincount()
    size = counts[window_of]
    order = torch.argsort(size * (len(counts) + 1) + window_of, stable=True)
    sizes, how_many = torch.unique(counts, return_counts=True)
    inner = torch.arange(merge * merge)
    in_row, in_column = inner // merge, inner % merge
    patch_rows = row.flatten()[order][:, None] * merge + in_row
    patch_columns = column.flatten()[order][:, None] * merge + in_column
    return Layout(
        order=order,
        inverse=torch.argsort(order),
        positions=torch.stack([patch_rows.flatten(), patch_columns.flatten()], dim=-1),
        windows=tuple(zip(how_many.tolist(), (sizes * merge * merge).tolist(), strict=True)),
    )


class VisionTower:
    """Computes picture tokens from patches.

    Args:
        visual: ``model.visual`` of the stock model; its parameters are used in place.
        config: Its vision configuration.
    """

    def __init__(self, visual: Any, config: Any) -> None:
        self.visual = visual
        self.heads = config.num_heads
        self.merge = config.spatial_merge_size
        self.window = config.window_size // config.patch_size // config.spatial_merge_size
        self.full = frozenset(config.fullatt_block_indexes)
        half = config.hidden_size // config.num_heads // 2
        self.frequencies = 1.0 / (10000.0 ** (torch.arange(0, half, 2, dtype=torch.float32) / half))

    def __call__(self, images: Images) -> Tensor:
        """Picture tokens (M, hidden) of all pictures, in their order."""
        grids = sorted(set(images.grids))
        if len(grids) == 1:
            return self._same_size(images.patches.unflatten(0, (len(images.grids), -1)), grids[0]).flatten(0, 1)
        pieces = images.patches.split([height * width for _, height, width in images.grids])
        outputs: list[Tensor | None] = [None] * len(pieces)
        for grid in grids:
            members = [index for index, other in enumerate(images.grids) if other == grid]
            batch = self._same_size(torch.stack([pieces[index] for index in members]), grid)
            for index, tokens in zip(members, batch, strict=True):
                outputs[index] = tokens
        return torch.cat([tokens for tokens in outputs if tokens is not None])

    def _same_size(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, patches, 1176) to (B, merged tokens, hidden)."""
        plan = layout(grid[1], grid[2], self.merge, self.window)
        device, batch = patches.device, len(patches)
        weight = self.visual.patch_embed.proj.weight
        x = F.linear(patches.to(weight.dtype), weight.flatten(1))
        unit = self.merge**2
        if len(plan.windows) > 1 or plan.windows[0][0] > 1:
            x = x.view(batch, -1, unit, x.shape[-1])[:, plan.order.to(device)].flatten(1, 2)
        cos, sin = turns((plan.positions[:, :, None].float() * self.frequencies).flatten(1).to(device))
        for index, block in enumerate(self.visual.blocks):
            windows = ((1, x.shape[1]),) if index in self.full else plan.windows
            x = x + self._attention(block.attn, rms_norm(x, block.norm1), cos, sin, windows)
            x = x + swiglu(block.mlp, rms_norm(x, block.norm2))
        merger = self.visual.merger
        x = merger.mlp(rms_norm(x, merger.ln_q).reshape(batch, -1, unit * x.shape[-1]))
        return x if len(plan.windows) == 1 and plan.windows[0][0] == 1 else x[:, plan.inverse.to(device)]

    def _attention(
        self, attention: Any, x: Tensor, cos: Tensor, sin: Tensor, windows: tuple[tuple[int, int], ...]
    ) -> Tensor:
        batch, length, width = x.shape
        qkv = attention.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        outputs, start = [], 0
        for count, size in windows:
            stop = start + count * size
            parts = [each[:, :, start:stop].unflatten(2, (count, size)) for each in (q, k, v)]
            outputs.append(attend(*parts).flatten(2, 3))
            start = stop
        mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return attention.proj(mixed.transpose(1, 2).reshape(batch, length, width))
