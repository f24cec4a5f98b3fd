"""Nonlinearities of memories, made to be differentiated twice."""

import math
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

gelu_backward = torch.ops.aten.gelu_backward.default
layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


def gelu(x: Tensor) -> Tensor:
    """Exact GELU, x Phi(x), whose second derivative is one expression instead of a graph of a
    dozen."""
    return F.gelu(x) if _plain() else made(gelu, _Gelu.apply(x), x)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = None
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (g,) = grads
        (x,) = ctx.saved_tensors
        slope = gelu_backward(torch.ones_like(x), x.detach()) if ctx.slope is None else ctx.slope
        if torch.is_grad_enabled():  # an inner gradient: the outer gradient comes here again
            ctx.slope = slope
            return made(_GeluBackward.apply, _GeluBackward.apply(g, x, slope), g, x, slope)
        ctx.slope = None  # the graph may outlive this tensor
        return g * slope


class _GeluBackward(torch.autograd.Function):
    """g gelu'(x), with gelu'(x) = Phi(x) + x phi(x), given as slope, and gelu''(x) = (2 - x^2)
    phi(x)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(g, x, slope)
        return g * slope

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        (h,) = grads
        g, x, slope = ctx.saved_tensors
        bend = gelu_bend(x)
        by_g = _GeluBackward.apply(h, x, slope) if torch.is_grad_enabled() else h * slope
        return by_g, bend.mul_(g).mul_(h), None


def gelu_bend(x: Tensor) -> Tensor:
    """gelu'' = (2 - x^2) phi(x), phi the density of the normal distribution."""
    bell = torch.addcmul(x.new_full((), -0.5 * math.log(2 * math.pi)), x, x, value=-0.5).exp_()
    return torch.addcmul(x.new_full((), 2.0), x, x, value=-1).mul_(bell)


def made(by: Callable[..., Tensor], y: Tensor, *parts: Tensor) -> Tensor:
    """y, marked as by(*parts): cheap to recompute from tensors that are saved anyway (see
    `save_lean`)."""
    setattr(y, _MADE, (by, parts))
    return y


_MADE = "_miras_made"


def save_lean(ctx: Any, lean: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """`ctx.save_for_backward` of all, but of those in `lean` that were `made` only the parts."""
    notes = [getattr(x, _MADE, (None, (x,))) for x in lean]
    ctx.notes = [(by, len(parts)) for by, parts in notes]
    ctx.save_for_backward(*chain(*(parts for _, parts in notes)), *others)


def saved_lean(ctx: Any) -> list[Tensor]:
    """The tensors given to `save_lean`: `lean`, then `others`."""
    kept = iter(ctx.saved_tensors)
    lean = [(by, list(islice(kept, n))) for by, n in ctx.notes]
    return [parts[0] if by is None else by(*parts) for by, parts in lean] + list(kept)


EPS = 1e-5
"""The epsilon of layer norms."""


def layer_norm(x: Tensor, eps: float = EPS) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last axis, without affine part."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) if _plain() else _LayerNorm.apply(x, eps)


def _plain() -> bool:
    """Whether torch's own operation suffices: no backward pass is recorded, or a compiler makes
    it."""
    return not torch.is_grad_enabled() or torch.compiler.is_compiling()


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        y, mean, scale = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(x, mean, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (g,) = grads
        x, mean, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _LayerNormBackward.apply(g, x, mean, scale, ctx.eps), None
        return layer_norm_slope(g, x, mean, scale), None


class _LayerNormBackward(torch.autograd.Function):
    """s (g - m(g) - y m(g y)): s = 1 / deviation, y the normalised x, m the mean over the last
    axis."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, mean: Tensor, scale: Tensor, eps: float) -> Tensor:
        slope = layer_norm_slope(g, x, mean, scale)
        ctx.save_for_backward(g, x, mean, scale, slope)
        ctx.eps = eps
        return slope

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None, None]:
        (h,) = grads
        g, x, mu, scale, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # differentiated once more: everything as a function of x
            scale = (x.var(-1, correction=0, keepdim=True) + ctx.eps).rsqrt()
            y = (x - x.mean(-1, keepdim=True)) * scale
            by_g, slope = (scale * (u - u.mean(-1, keepdim=True) - _mean(u, y) * y) for u in (h, g))
        else:
            y = (x - mu) * scale
            by_g = layer_norm_slope(h, x, mu, scale)
        return by_g, layer_norm_bend(h, g, by_g, slope, y, scale), None, None, None


def layer_norm_bend(h: Tensor, g: Tensor, by_g: Tensor, slope: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The gradient by x of h . slope(g, x), with by_g = slope(h, x) and y the normalised x."""
    return -scale * (_mean(g, y) * by_g + _mean(h, y) * slope + _mean(h, slope) * y)


def _mean(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).mean(-1, keepdim=True)


def layer_norm_slope(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """The gradient of a layer norm's input x from that of its output g, given x's mean and
    1 / deviation."""
    return layer_norm_backward(g, x, x.shape[-1:], mean, scale, None, None, [True, False, False])[0]
