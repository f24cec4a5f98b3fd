"""Ragged batches, once: tokens of every row moved to its front, so that only padding behind them is left."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Masks of a batch whose rows are filled from the front.

    length (B,) tokens of each row, None for all; write, reset (B, T) bool in that order, None for all and none;
    order (B, T) int64 where the tokens were before, None if nothing moved.
    """

    length: Tensor | None = None
    write: Tensor | None = None
    reset: Tensor | None = None
    order: Tensor | None = None

    def valid(self, T: int) -> Tensor | None:
        """The tokens that exist, (B, T) bool, or None for all."""
        if self.length is None:
            return None
        return torch.arange(T, device=self.length.device) < self.length[:, None]

    def gather(self, x: Tensor) -> Tensor:
        """x (B, T, ...) with every row's tokens at its front, and 0 behind them, whatever padding held."""
        valid = self.valid(x.shape[1])
        if valid is None:
            return x
        wide = (..., *[None] * (x.dim() - 2))
        if self.order is not None:
            x = x.gather(1, self.order[wide].expand(x.shape))
        return x.masked_fill(~valid[wide], 0)

    def scatter(self, y: Tensor) -> Tensor:
        """The inverse of `gather`, with 0 at padding tokens."""
        valid = self.valid(y.shape[1])
        if valid is None:
            return y
        wide = (..., *[None] * (y.dim() - 2))
        y = torch.where(valid[wide], y, torch.zeros_like(y))
        if self.order is None:
            return y
        return torch.zeros_like(y).scatter(1, self.order[wide].expand(y.shape), y)


def pack(
    shape: tuple[int, int],
    valid: Tensor | None = None,
    write: Tensor | None = None,
    reset: Tensor | None = None,
) -> Rows:
    """The masks (B, T) of a batch, packed. Raises ValueError when one is not a bool mask of that shape."""
    for name, mask in (("valid", valid), ("write", write), ("reset", reset)):
        if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != shape):
            raise ValueError(
                f"{name} must be a bool mask (B, T) = {shape}, got {mask.dtype} {tuple(mask.shape)}"
            )
    if reset is not None and not bool(reset.any()):
        reset = None
    if valid is None or bool(valid.all()):
        return Rows(write=write, reset=reset)
    length, order = valid.sum(1), None
    if bool((valid[:, 1:] & ~valid[:, :-1]).any()):
        order = (~valid).long().argsort(dim=1, stable=True)
        write = None if write is None else write.gather(1, order)
    if reset is not None:
        reset = reset & valid
        reset = reset if order is None else reset.gather(1, order)
    return Rows(length, write, reset, order)
