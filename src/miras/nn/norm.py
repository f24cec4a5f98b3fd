"""Norms that take the type of their input, as autocast needs, and keep little for the backward pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last axis, in x's type."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)  # pyright: ignore[reportUnnecessaryComparison]
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def unit(x: Tensor, eps: float = 1e-12) -> Tensor:
    """x / max(|x|, eps) over the last axis."""
    return _Unit.apply(x, eps)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(eps)
        y = x / size
        ctx.save_for_backward(x, y, size)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (g,) = grads
        x, y, size = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone differentiates once more
            with torch.enable_grad():
                x = x.view_as(x)
                (by_x,) = torch.autograd.grad(F.normalize(x, dim=-1, eps=ctx.eps), x, g, create_graph=True)
            return by_x, None
        along = (g * y).sum(-1, keepdim=True) * (size > ctx.eps)
        return torch.addcmul(g, y, along, value=-1).div_(size), None
