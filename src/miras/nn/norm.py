"""Norms that keep the dtype of their input, as autocast needs, and save little for the backward
pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last axis, in x's type."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if weight is not None:  # pyright: ignore[reportUnnecessaryComparison]
            weight = weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def unit(x: Tensor, eps: float = 1e-12) -> Tensor:
    """x / max(|x|, eps) over the last axis."""
    plain = not torch.is_grad_enabled() or torch.compiler.is_compiling()
    return x / _size(x, eps) if plain else _Unit.apply(x, eps)[0]


def _size(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps)


class _Unit(torch.autograd.Function):
    """x / size and size: as outputs, so that the backward pass can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        size = _size(x, eps)
        y = x / size
        ctx.save_for_backward(y, size)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        return y, size

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None]:
        g, by_size = grads
        y, size = ctx.saved_tensors
        free = size > ctx.eps
        found = None
        if g is not None:
            found = torch.addcmul(g, y, (g * y).sum(-1, keepdim=True) * free, value=-1) / size
        if by_size is not None:
            found = torch.addcmul(torch.zeros_like(y) if found is None else found, y, by_size * free)
        return found, None
