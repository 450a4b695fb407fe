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
from torch.utils.checkpoint import checkpoint

from cpt_rft.checkpoint import EncodedPrompt
from cpt_rft.engines.local.layers import attend, rms_norm, rotate, swiglu, turns
from cpt_rft.engines.local.packing import Blocks, Contexts, pack_contexts
from cpt_rft.engines.local.vision import VisionTower
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
    """Spread (N, ...) over (size, ...) at slots that only ascend, zeros elsewhere."""
    if len(slots) == size:
        return x
    out: Tensor = _Pad.apply(x, slots, size)
    return out


def unpad(x: Tensor, slots: Tensor) -> Tensor:
    """Pick (N, ...) out of (size, ...) at slots that only ascend."""
    if len(slots) == len(x):
        return x
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
    """Keys and values of one layer: (R, K, P, D) of contexts, (R, K, G, room, D) of completions (see `_Plan`)."""

    keys: Tensor
    values: Tensor

    def select_contexts(self, rows: Tensor) -> "Cache":
        """A copy that holds the contexts of these prompts, in this order."""
        return Cache(self.keys.index_select(0, rows), self.values.index_select(0, rows))

    def select_completions(self, places: Tensor) -> "Cache":
        """A copy that holds these completions, (R', G') of them, each by its place among R * G."""

        def picked(x: Tensor) -> Tensor:
            chosen = x.transpose(1, 2).flatten(0, 1).index_select(0, places.flatten())
            return chosen.unflatten(0, places.shape).transpose(1, 2).contiguous()

        return Cache(picked(self.keys), picked(self.values))


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
        x = torch.cat([self._embed_contexts(contexts), self.decoder.embed_tokens(blocks.ids)])
        cos, sin = self._angles(torch.cat([contexts.positions, blocks.positions], dim=1))
        plan = _Plan(contexts, blocks)

        def through(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            q, k, v = self._qkv(layer, x, cos, sin)
            return self._residual(layer, x, plan.attend_all(q, k, v))

        step = partial(recomputed, through) if self.decoder.gradient_checkpointing else through
        for layer in self.layers[:-1]:
            x = step(layer, x, cos, sin)
        layer = self.layers[-1]
        k, v = self._kv(layer, h := rms_norm(x, layer.input_layernorm), cos, sin)
        (k, own_k), (v, own_v) = k.split(plan.parts), v.split(plan.parts)
        x, h, cos, sin = (each.split(plan.parts)[1] for each in (x, h, cos, sin))
        mixed = plan.attend_blocks(self._q(layer, h, cos, sin), plan.context(k, v), own_k, own_v)
        x = self._residual(layer, x, mixed)
        logits: Tensor = self.model.lm_head(rms_norm(x, self.decoder.norm))
        return logits

    def prefill(self, contexts: Contexts) -> list[Cache]:
        """Keys and values of contexts, one cache a layer, right-aligned."""
        x = self._embed_contexts(contexts)
        cos, sin = self._angles(contexts.positions)
        plan = _Plan(contexts, None)
        caches = []
        for index, layer in enumerate(self.layers):
            h = rms_norm(x, layer.input_layernorm)
            caches.append(plan.context(*self._kv(layer, h, cos, sin)))
            if index < len(self.layers) - 1:
                x = self._residual(layer, x, plan.attend_contexts(self._q(layer, h, cos, sin), caches[-1]))
        return caches

    def empty(self, rows: int, group: int, room: int) -> list[Cache]:
        """Room for the keys and values of completions, one cache a layer."""
        shape = (rows, self.kv_heads, group, room, self.head_width)
        weight = self.model.lm_head.weight
        return [Cache(weight.new_empty(shape), weight.new_empty(shape)) for _ in self.layers]

    def decode(
        self, ids: Tensor, positions: Tensor, contexts: list[Cache], own: list[Cache], column: int, bias: Tensor
    ) -> Tensor:
        """Logits (R * G, V) after one more token of each completion.

        Args:
            ids: (R * G,) the tokens.
            positions: (R * G,) their rotary positions.
            contexts: One cache a layer, read for all completions of a prompt at once.
            own: One cache a layer; this token's keys and values are written into it.
            column: Where in it this token goes.
            bias: (R, 1, 1, 1, 1, P + column + 1) zero on real columns, -inf on padding.
        """
        x = self.decoder.embed_tokens(ids)
        cos, sin = self._angles(positions.expand(3, -1))
        rows, _, group = own[0].keys.shape[:3]
        for layer, context, cache in zip(self.layers, contexts, own, strict=True):
            q, k, v = self._qkv(layer, x, cos, sin)
            cache.keys[:, :, :, column] = k.unflatten(0, (rows, group)).transpose(1, 2)
            cache.values[:, :, :, column] = v.unflatten(0, (rows, group)).transpose(1, 2)
            written = Cache(cache.keys[:, :, :, : column + 1], cache.values[:, :, :, : column + 1])
            q = q.view(rows, group, self.kv_heads, -1, 1, self.head_width).transpose(1, 2)
            mixed = _attend_shared(q, context, written, bias)
            x = self._residual(layer, x, mixed.transpose(1, 2).reshape(rows * group, self.heads, -1))
        logits: Tensor = self.model.lm_head(rms_norm(x, self.decoder.norm))
        return logits

    def _embed_contexts(self, contexts: Contexts) -> Tensor:
        x: Tensor = self.decoder.embed_tokens(contexts.ids)
        if contexts.images is None:
            return x
        features = pad(self.vision(contexts.images), contexts.image_slots, len(x))
        return torch.where((contexts.ids == self.image_token)[:, None], features, x)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (N, 1, head width) for `rotate`, each rotation pair on its axis."""
        angles = positions.float()[self.axis.to(positions.device)].T * self.frequencies.to(positions.device)
        return turns(angles[:, None])

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
        self.causal_bias = _bias(visible)[:, None]
        if blocks is not None:
            self.parts = [len(contexts.ids), len(blocks.ids)]
            width = blocks.mask.shape[-1]
            own = torch.ones(width, width, dtype=torch.bool, device=columns.device).tril()
            both = [real[:, None].expand(-1, width, -1), own.expand(len(real), -1, -1)]
            self.block_bias = _bias(torch.cat(both, dim=-1))[:, None, None, None]

    def attend_all(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of all tokens, contexts first: (N, Q * K, D)."""
        (q, own_q), (k, own_k), (v, own_v) = (each.split(self.parts) for each in (q, k, v))
        context = self.context(k, v)
        return torch.cat([self.attend_contexts(q, context), self.attend_blocks(own_q, context, own_k, own_v)])

    def context(self, k: Tensor, v: Tensor) -> Cache:
        """Keys and values of contexts, from (N, K, D)."""
        return Cache(self._context_heads(k).contiguous(), self._context_heads(v).contiguous())

    def _context_heads(self, x: Tensor) -> Tensor:
        """(N, heads, D) to (R, heads, P, D)."""
        rows, width = self.contexts.rows, self.contexts.width
        return pad(x, self.contexts.slots, rows * width).view(rows, width, *x.shape[1:]).transpose(1, 2)

    def attend_contexts(self, q: Tensor, context: Cache) -> Tensor:
        """Causal attention within each context: (N, Q * K, D)."""
        shared = q.shape[1] // context.keys.shape[1]
        k, v = (each.repeat_interleave(shared, dim=1) for each in (context.keys, context.values))
        mixed = attend(self._context_heads(q), k, v, self.causal_bias)
        return unpad(mixed.transpose(1, 2).flatten(0, 1), self.contexts.slots)

    def attend_blocks(self, q: Tensor, context: Cache, k: Tensor, v: Tensor) -> Tensor:
        """Attention of block tokens to their context and, causally, to their own block: (N, Q * K, D)."""
        assert self.blocks is not None
        rows, group, width = self.blocks.mask.shape
        kv_heads, slots = k.shape[1], self.blocks.slots

        def block_heads(x: Tensor) -> Tensor:  # (N, heads, D) to (R, heads, G, C, D)
            return pad(x, slots, rows * group * width).view(rows, group, width, *x.shape[1:]).permute(0, 3, 1, 2, 4)

        q = block_heads(q).unflatten(1, (kv_heads, -1)).transpose(2, 3)  # (R, K, G, Q, C, D)
        mixed = _attend_shared(q, context, Cache(block_heads(k), block_heads(v)), self.block_bias)
        return unpad(mixed.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(0, 2), slots)


def _attend_shared(q: Tensor, context: Cache, own: Cache, bias: Tensor) -> Tensor:
    """Attention of completions to their prompt's context, whose keys are read once a prompt, and to themselves.

    Args:
        q: (R, K, G, Q, C, D) queries.
        context: (R, K, P, D).
        own: (R, K, G, N, D) keys and values of the completions.
        bias: Added to the scores; broadcasts to (R, K, G, Q, C, P + N).
    """
    by_prompt = q.flatten(2, 4).flatten(0, 1)
    by_completion = by_prompt.view(-1, q.shape[3] * q.shape[4], q.shape[5])
    to_context = torch.bmm(by_prompt, context.keys.flatten(0, 1).transpose(1, 2)).view(*q.shape[:5], -1)
    to_own = torch.bmm(by_completion, own.keys.flatten(0, 2).transpose(1, 2)).view(*q.shape[:5], -1)
    shares = _shares(torch.cat([to_context, to_own], dim=-1), bias, q.shape[-1])
    share_context, share_own = shares.split([to_context.shape[-1], to_own.shape[-1]], dim=-1)
    mixed = torch.bmm(share_context.flatten(2, 4).flatten(0, 1), context.values.flatten(0, 1))
    mixed = mixed.view_as(by_completion)
    return torch.baddbmm(mixed, share_own.flatten(3, 4).flatten(0, 2), own.values.flatten(0, 2)).view(q.shape)


def _shares(scores: Tensor, bias: Tensor, width: int) -> Tensor:
    """Attention shares from products of queries and keys of a head width, computed in float32."""
    return torch.add(bias, scores, alpha=width**-0.5).softmax(-1).to(scores.dtype)


def _bias(visible: Tensor) -> Tensor:
    """0 where visible, -inf elsewhere, float32."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, float("-inf"))
