"""What stands between the linear maps of a memory, made to be differentiated twice."""

import math
from typing import Any

import torch
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """Exact GELU, x Phi(x); its second derivative is one expression and not a graph of a dozen."""
    return _Gelu.apply(x)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.nn.functional.gelu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (g,) = grads
        return _GeluBackward.apply(g, *ctx.saved_tensors)


class _GeluBackward(torch.autograd.Function):
    """g gelu'(x), with gelu'(x) = Phi(x) + x phi(x) and gelu''(x) = (2 - x^2) phi(x)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        return torch.ops.aten.gelu_backward(g, x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        (h,) = grads
        g, x = ctx.saved_tensors
        bell = torch.addcmul(x.new_tensor(-0.5 * math.log(2 * math.pi)), x, x, value=-0.5).exp()
        bend = torch.addcmul(x.new_tensor(2.0), x, x, value=-1) * bell
        return _GeluBackward.apply(h, x), bend * g * h


def layer_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last axis, without affine part."""
    return _LayerNorm.apply(x, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        y, mean, scale = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(x, y, mean, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (g,) = grads
        x, y, mean, scale = ctx.saved_tensors
        return _LayerNormBackward.apply(g, x, y, mean, scale, ctx.eps), None


class _LayerNormBackward(torch.autograd.Function):
    """s (g - m(g) - y m(g y)): s = 1 / deviation, y the normalised x, m the mean over the last axis."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, y: Tensor, mean: Tensor, scale: Tensor, eps: float) -> Tensor:
        slope = _slope(g, x, y, mean, scale)
        ctx.save_for_backward(g, x, y, mean, scale, slope)
        ctx.eps = eps
        return slope

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None, None, None]:
        (h,) = grads
        g, x, y, mu, scale, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone differentiates once more: everything as a function of x
            y = layer_norm(x, ctx.eps)
            scale = (x.var(-1, correction=0, keepdim=True) + ctx.eps).rsqrt()
            slope = _LayerNormBackward.apply(g, x, y, mu, scale, ctx.eps)
        mean = lambda a, b: (a * b).mean(-1, keepdim=True)  # noqa: E731
        by_g = _slope(h, x, y, mu, scale)
        gy, hy = mean(g, y), mean(h, y)
        c = mean(h, g) - h.mean(-1, keepdim=True) * g.mean(-1, keepdim=True) - hy * gy
        by_x = -scale * (gy * by_g + hy * slope + scale * c * y)
        return by_g, by_x, None, None, None, None


def _slope(g: Tensor, x: Tensor, y: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return scale * (g - g.mean(-1, keepdim=True) - y * (g * y).mean(-1, keepdim=True))
    shape = x.shape[-1:]
    return torch.ops.aten.native_layer_norm_backward(
        g, x, shape, mean, scale, None, None, [True, False, False]
    )[0]
