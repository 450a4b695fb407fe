"""Qwen2.5-VL on the parameters of a stock model, over flat tokens with shared contexts (see `packing`).

Source: transformers modeling_qwen2_5_vl.py (Qwen2_5_VLModel and below). Differs from: a context is computed once for
all of its completions; linear layers see real tokens only; the last layer computes keys and values, but nothing else,
of contexts; picture tokens come from `vision`. Logits and gradients equal those of the stock model up to rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cpt_rft.checkpoint import EncodedPrompt
from cpt_rft.engines.local.packing import Blocks, Contexts, pack_contexts
from cpt_rft.engines.local.vision import VisionTower, rms_norm, rotate, swiglu
from cpt_rft.errors import CheckpointError


class _Pad(torch.autograd.Function):
    """Spread (N, ...) over (size, ...), zeros elsewhere; the adjoint of `_Unpad`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(slots)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, slots, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """Pick (N, ...) out of (size, ...) at distinct slots; the adjoint of `_Pad`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.size = x.shape[0]
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        slots = ctx.saved_tensors[0]
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, slots, grad), None


def pad(x: Tensor, slots: Tensor, size: int) -> Tensor:
    """Spread (N, ...) over (size, ...) at distinct slots, zeros elsewhere."""
    out: Tensor = _Pad.apply(x, slots, size)
    return out


def unpad(x: Tensor, slots: Tensor) -> Tensor:
    """Pick (N, ...) out of (size, ...) at distinct slots."""
    out: Tensor = _Unpad.apply(x, slots)
    return out


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """The function's value; what it computes on the way is not kept but computed again in the backward pass.

    Source: Chen et al., arXiv 1604.06174, by torch's own checkpointing.
    """
    out: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return out


@dataclass
class Cache:
    """Keys and values of one layer, each (A, kv heads, width, head width)."""

    keys: Tensor
    values: Tensor

    def select(self, rows: Tensor) -> "Cache":
        """A copy that holds these rows, in this order."""
        return Cache(self.keys.index_select(0, rows), self.values.index_select(0, rows))


class Network:
    """A view of a stock model; it owns no parameter.

    Raises:
        CheckpointError: The model's configuration asks for something that is not computed here.
    """

    def __init__(self, model: Any) -> None:
        text = model.config.text_config
        decoder = model.model.language_model
        self.model = model
        self.decoder = decoder
        self.layers = list(decoder.layers)
        self.vision = VisionTower(model.model.visual, model.config.vision_config)
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.head_width = text.hidden_size // self.heads
        self.image_token = model.config.image_token_id
        rope = getattr(text, "rope_parameters", None) or {**text.rope_scaling, "rope_theta": text.rope_theta}
        _refuse("use_sliding_window", text.use_sliding_window, (False,))
        _refuse("hidden_act", text.hidden_act, ("silu",))
        _refuse("rope type", rope.get("rope_type", rope.get("type")), ("default", "mrope"))
        half = torch.arange(0, self.head_width, 2, dtype=torch.float32)
        self.frequencies = 1.0 / (rope["rope_theta"] ** (half / self.head_width))
        sections = torch.tensor(rope["mrope_section"])
        self.axis = torch.arange(len(sections)).repeat_interleave(sections)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        weight: Tensor = self.model.lm_head.weight
        return weight.device

    def contexts(self, prompts: Sequence[EncodedPrompt]) -> Contexts:
        """Lay out the contexts of prompts for this model, on its device."""
        return pack_contexts(prompts, self.image_token, self.vision.merge, str(self.device))

    def logits(self, contexts: Contexts, blocks: Blocks) -> Tensor:
        """Logits (N, V) that predict the targets of all blocks."""
        split = len(contexts.ids)
        x = torch.cat([self._embed_contexts(contexts), self.decoder.embed_tokens(blocks.ids)])
        cos, sin = self._angles(torch.cat([contexts.positions, blocks.positions], dim=1))
        plan = _Plan(contexts, blocks)

        def through(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            q, k, v = self._qkv(layer, x, cos, sin)
            return self._residual(layer, x, plan.attend_all(q, k, v, split))

        step = partial(recomputed, through) if self.decoder.gradient_checkpointing else through
        for layer in self.layers[:-1]:
            x = step(layer, x, cos, sin)
        layer = self.layers[-1]
        k, v = self._kv(layer, h := rms_norm(x, layer.input_layernorm), cos, sin)
        x, h, cos, sin = x[split:], h[split:], cos[split:], sin[split:]
        x = self._residual(layer, x, plan.attend_blocks(self._q(layer, h, cos, sin), k, v, split))
        logits: Tensor = self.model.lm_head(rms_norm(x, self.decoder.norm))
        return logits

    def prefill(self, contexts: Contexts, room: int) -> list[Cache]:
        """Keys and values of contexts, one cache a layer, right-aligned, with ``room`` empty columns after them."""
        x = self._embed_contexts(contexts)
        cos, sin = self._angles(contexts.positions)
        plan = _Plan(contexts, None)
        caches = []
        for index, layer in enumerate(self.layers):
            if index < len(self.layers) - 1:
                q, k, v = self._qkv(layer, x, cos, sin)
                x = self._residual(layer, x, plan.attend_contexts(q, k, v))
            else:
                k, v = self._kv(layer, rms_norm(x, layer.input_layernorm), cos, sin)
            caches.append(Cache(*(F.pad(plan.context_heads(each), (0, 0, 0, room)) for each in (k, v))))
        return caches

    def decode(self, ids: Tensor, positions: Tensor, caches: list[Cache], column: int, bias: Tensor) -> Tensor:
        """Logits (A, V) after one more token a row; its keys and values are written at ``column``.

        Args:
            ids: (A,) the tokens.
            positions: (A,) their rotary positions.
            caches: One a layer, changed in place.
            column: Where this token goes.
            bias: (A, 1, column + 1) zero on real columns, -inf on padding.
        """
        x = self.decoder.embed_tokens(ids)
        cos, sin = self._angles(positions.expand(3, -1))
        rows = len(ids)
        for layer, cache in zip(self.layers, caches, strict=True):
            q, k, v = self._qkv(layer, x, cos, sin)
            cache.keys[:, :, column] = k
            cache.values[:, :, column] = v
            q = q.view(rows, self.kv_heads, -1, self.head_width)
            scores = q @ cache.keys[:, :, : column + 1].transpose(-1, -2)
            shares = _shares(scores, bias[:, None], self.head_width)
            x = self._residual(layer, x, (shares @ cache.values[:, :, : column + 1]).view(rows, self.heads, -1))
        logits: Tensor = self.model.lm_head(rms_norm(x, self.decoder.norm))
        return logits

    def _embed_contexts(self, contexts: Contexts) -> Tensor:
        x: Tensor = self.decoder.embed_tokens(contexts.ids)
        if contexts.images is None:
            return x
        features = pad(self.vision(contexts.images), contexts.image_slots, len(x))
        return torch.where((contexts.ids == self.image_token)[:, None], features, x)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (N, 1, head width), each rotation pair on its axis."""
        angles = positions.float()[self.axis.to(positions.device)].T * self.frequencies.to(positions.device)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return angles.cos(), angles.sin()

    def _qkv(self, layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = rms_norm(x, layer.input_layernorm)
        return self._q(layer, h, cos, sin), *self._kv(layer, h, cos, sin)

    def _q(self, layer: Any, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(layer.self_attn.q_proj(h).view(len(h), self.heads, -1), cos, sin)

    def _kv(self, layer: Any, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        k = layer.self_attn.k_proj(h).view(len(h), self.kv_heads, -1)
        v = layer.self_attn.v_proj(h).view(len(h), self.kv_heads, -1)
        return rotate(k, cos, sin), v

    def _residual(self, layer: Any, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of a layer after attention ``mixed`` (N, heads, head width)."""
        x = x + layer.self_attn.o_proj(mixed.flatten(1))
        return x + swiglu(layer.mlp, rms_norm(x, layer.post_attention_layernorm))


def _refuse(name: str, value: Any, known: tuple[Any, ...]) -> None:
    """Rather stop than compute something else than the stock model would."""
    if value not in known:
        raise CheckpointError(f"The local engine does not compute {name} = {value!r}.", "use a plain Qwen2.5-VL model")


class _Plan:
    """Attention over contexts and blocks in padded form.

    Letters of shapes: R prompts, G completions, C block width, P context width, K kv heads, Q query heads a kv head,
    D head width.
    """

    def __init__(self, contexts: Contexts, blocks: Blocks | None) -> None:
        self.contexts, self.blocks = contexts, blocks
        columns = torch.arange(contexts.width, device=contexts.ids.device)
        real = columns >= contexts.width - contexts.lengths[:, None]
        visible = real[:, None] & (columns <= columns[:, None])
        # A padded query row sees itself, so that its softmax is finite; nothing reads it.
        visible |= torch.eye(contexts.width, dtype=torch.bool, device=columns.device)
        self.causal_bias = _bias(visible)[:, None, None]
        if blocks is not None:
            width = blocks.mask.shape[-1]
            own = torch.ones(width, width, dtype=torch.bool, device=columns.device).tril()
            both = [real[:, None].expand(-1, width, -1), own.expand(len(real), -1, -1)]
            self.block_bias = _bias(torch.cat(both, dim=-1))[:, None, None, None]

    def attend_all(self, q: Tensor, k: Tensor, v: Tensor, split: int) -> Tensor:
        contexts = self.attend_contexts(q[:split], k[:split], v[:split])
        return torch.cat([contexts, self.attend_blocks(q[split:], k, v, split)])

    def context_heads(self, x: Tensor) -> Tensor:
        """(N, heads, D) to (R, heads, P, D)."""
        rows, width = self.contexts.rows, self.contexts.width
        return pad(x, self.contexts.slots, rows * width).view(rows, width, *x.shape[1:]).transpose(1, 2)

    def attend_contexts(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention within each context: (N, Q * K, D)."""
        k, v = self.context_heads(k), self.context_heads(v)
        q = self.context_heads(q).unflatten(1, (k.shape[1], -1))
        shares = _shares(q @ k.unsqueeze(2).transpose(-1, -2), self.causal_bias, q.shape[-1])
        mixed = (shares @ v.unsqueeze(2)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        return unpad(mixed.flatten(0, 1), self.contexts.slots)

    def attend_blocks(self, q: Tensor, k: Tensor, v: Tensor, split: int) -> Tensor:
        """Attention of block tokens to their context and, causally, to their own block: (N, Q * K, D)."""
        assert self.blocks is not None
        rows, group, width = self.blocks.mask.shape
        kv_heads, slots = k.shape[1], self.blocks.slots

        def block_heads(x: Tensor) -> Tensor:  # (N, heads, D) to (R, heads, G, C, D)
            return pad(x, slots, rows * group * width).view(rows, group, width, *x.shape[1:]).permute(0, 3, 1, 2, 4)

        k_context, v_context = self.context_heads(k[:split]), self.context_heads(v[:split])
        k_own, v_own = block_heads(k[split:]).unsqueeze(2), block_heads(v[split:]).unsqueeze(2)
        q = block_heads(q).unflatten(1, (kv_heads, -1))  # (R, K, Q, G, C, D)
        to_context = (q.flatten(2, 4) @ k_context.transpose(-1, -2)).view(*q.shape[:-1], -1)
        to_own = q @ k_own.transpose(-1, -2)
        shares = _shares(torch.cat([to_context, to_own], dim=-1), self.block_bias, q.shape[-1])
        share_context, share_own = shares.split([k_context.shape[2], width], dim=-1)
        mixed = (share_context.flatten(2, 4) @ v_context).view(q.shape) + share_own @ v_own
        return unpad(mixed.permute(0, 3, 4, 1, 2, 5).flatten(3, 4).flatten(0, 2), slots)


def _shares(scores: Tensor, bias: Tensor, width: int) -> Tensor:
    """Attention shares from products of queries and keys of a head width, computed in float32."""
    return torch.add(bias, scores, alpha=width**-0.5).softmax(-1).to(scores.dtype)


def _bias(visible: Tensor) -> Tensor:
    """0 where visible, -inf elsewhere, float32."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, float("-inf"))
