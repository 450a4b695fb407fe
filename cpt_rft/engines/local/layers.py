"""The parts of a layer that the decoder and the picture tower share, with gradients in few passes over memory.

Autograd alone assembles the gradients of a norm and of a rotation from a dozen small operations, each of which writes
a tensor as large as the activations; on a CPU that takes as long as the matrix products beside them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _RmsNorm(torch.autograd.Function):
    """y = w n with n = x r and r = 1 / sqrt(mean(x^2) + eps). For g = dL/dy: dL/dx = r (w g - n mean(w g n))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        width, wide_x, wide_grad = x.shape[-1], x.float(), grad.float()
        rate = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True).square_().div_(width).add_(ctx.eps).rsqrt_()
        normed = wide_x * rate
        products = wide_grad * normed
        mean = (products @ weight.float()).div_(width)[..., None]
        to_x = (wide_grad * weight).addcmul_(normed, mean, value=-1.0).mul_(rate).to(x.dtype)
        if not ctx.needs_input_grad[1]:
            return to_x, None, None
        return to_x, products.flatten(0, -2).sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    """Root-mean-square norm of (..., width) with the parameters of a stock norm."""
    if x.is_cuda or not torch.is_grad_enabled():  # a GPU has both passes as one kernel each
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    out: Tensor = _RmsNorm.apply(x, norm.weight, norm.variance_epsilon)
    return out


class _Rotate(torch.autograd.Function):
    """Rotation of pairs; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    wide = x.float()
    return (wide * cos).addcmul_(wide.roll(x.shape[-1] // 2, -1), sin, value=sign).to(x.dtype)


def turns(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., width) for `rotate` from the angles (..., width / 2) of the pairs."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (..., width), in float32: element i and element i + width / 2 are a pair. See `turns`."""
    out: Tensor = _Rotate.apply(x, cos, sin)
    return out


def swiglu(mlp: Any, x: Tensor) -> Tensor:
    """The gated feed-forward block."""
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention (..., heads, length, width) over the last two axes; the softmax is computed in float32.

    On a CPU, torch's fused attention holds no matrix of scores in float32, but its backward pass in bfloat16 takes some
    fourteen times as long as the plain products.
    """
    if q.dtype == torch.float32 or q.is_cuda:
        mask = None if bias is None else bias.to(q.dtype)
        flat_q, flat_k, flat_v = (each.flatten(0, -4) for each in (q, k, v))
        return F.scaled_dot_product_attention(flat_q, flat_k, flat_v, attn_mask=mask).reshape(q.shape)
    scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).float()
    shares = (scores if bias is None else scores + bias).softmax(-1)
    return shares.to(q.dtype) @ v
