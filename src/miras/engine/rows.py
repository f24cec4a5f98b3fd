"""Ragged batches, once: tokens of every row moved to its front, and rows put on a grid of their own.

Shapes: B rows, T tokens, n tokens of a part.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.core.state import known


@dataclass(frozen=True)
class Rows:
    """Masks of a batch whose rows are filled from the front.

    length (B,) tokens of each row, None for all; write, reset (B, T) bool in that order, None for all and none;
    order (B, T) int64 where the tokens were before, None if nothing moved. inside: the call is one token of every
    row, without masks, that begins no segment and ends no chunk, so that nobody need ask where the rows stand.
    """

    length: Tensor | None = None
    write: Tensor | None = None
    reset: Tensor | None = None
    order: Tensor | None = None
    inside: bool = False

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
        if mask is None:
            continue
        if not isinstance(mask, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"{name} must be a bool mask (B, T) = {shape}, a tensor, got a {type(mask).__name__}"
            )
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
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


def grid(phase: Tensor, valid: Tensor, reset: Tensor, size: int) -> Tensor:
    """Each token's place on its row's own grid of `size` tokens, (B, T) int64: documents start on its lines.

    Padding tokens get the place -1. phase (B,) is how much of the open cell is already read.
    """
    B, T = valid.shape
    document = (reset & valid).cumsum(1)
    count = torch.zeros(B, T + 1, dtype=torch.long, device=valid.device)
    count = count.scatter_add(1, document, valid.long())
    before = count.cumsum(1) - count  # valid tokens of the call before each document
    lead = F.pad(phase[:, None], (0, T))  # what the open cell holds already
    room = -(-(count + lead) // size) * size
    base = room.cumsum(1) - room + lead
    place = base.gather(1, document) + valid.cumsum(1) - 1 - before.gather(1, document)
    return torch.where(valid, place, -1)


@dataclass(frozen=True)
class Part:
    """Some tokens of a call that lie in one segment of every row, filled from the front again.

    rows: their masks. starts (B,) bool: rows whose segment begins with this part, None for no row; everyone: all do.
    place: where they were, a slice, or (B, n) int64 with T for none.
    """

    rows: Rows
    starts: Tensor | None
    everyone: bool
    place: slice | Tensor

    def take(self, x: Tensor) -> Tensor:
        """x (B, T, D) of these tokens, (B, n, D), 0 where there is none."""
        if isinstance(self.place, slice):
            return x[:, self.place]
        index = self.place[..., None].expand(-1, -1, x.shape[-1])
        return F.pad(x, (0, 0, 0, 1)).gather(1, index)


def segments(rows: Rows, phase: Tensor, T: int, size: int) -> list[Part]:
    """A call of T tokens cut where segments of `size` tokens end; documents begin new ones.

    phase (B,) int64 is how much of each row's open segment is already read.
    """
    phases = known(phase)
    if not phases:
        return []
    first = phases[0]
    if T == 1 and rows.length is None and rows.reset is None:
        starts = phase == 0 if 0 in phases else None
        return [Part(Rows(write=rows.write), starts, not any(phases), slice(0, 1))]
    if rows.length is None and rows.reset is None and all(x == first for x in phases):
        parts: list[Part] = []
        at = 0
        while at < T:
            cut = slice(at, min(at + size - first, T))
            write = None if rows.write is None else rows.write[:, cut]
            starts = None if first else torch.ones_like(phase, dtype=torch.bool)
            parts.append(Part(Rows(write=write), starts, not first, cut))
            at, first = cut.stop, 0
        return parts
    everywhere = torch.ones(len(phase), T, dtype=torch.bool, device=phase.device)
    valid = rows.valid(T)
    valid = everywhere if valid is None else valid
    place = grid(phase, valid, ~everywhere if rows.reset is None else rows.reset, size)
    here = torch.arange(T, device=phase.device).expand_as(place)
    return [_part(rows, place, here, number, size) for number in range(int(place.max()) // size + 1)]


def _part(rows: Rows, place: Tensor, here: Tensor, number: int, size: int) -> Part:
    """The part of segment `number` of each row's grid: one run of the row's tokens."""
    T = place.shape[1]
    inside = (place >= 0) & (place // size == number)
    length = inside.sum(1)
    begin = torch.where(inside, here, T).amin(1)
    step = torch.arange(int(length.max()), device=place.device)
    index = torch.where(step < length[:, None], begin[:, None] + step, T)

    def of(mask: Tensor | None) -> Tensor | None:
        return None if mask is None else F.pad(mask, (0, 1)).gather(1, index)

    starts = (length > 0) & (F.pad(place, (0, 1)).gather(1, begin[:, None])[:, 0] % size == 0)
    part = Rows(length, of(rows.write), of(rows.reset))
    return Part(part, starts if bool(starts.any()) else None, bool(starts.all()), index)


def joined(parts: list[Part], values: list[Tensor], T: int) -> Tensor:
    """The inverse of `Part.take`: values (B, n, D) of each part back in their places, (B, T, D), 0 elsewhere."""
    if all(isinstance(part.place, slice) for part in parts):
        return values[0] if len(values) == 1 else torch.cat(values, 1)
    y = torch.cat(values, 1)
    index = torch.cat([part.place for part in parts if isinstance(part.place, Tensor)], 1)
    whole = y.new_zeros(y.shape[0], T + 1, y.shape[2])
    return whole.scatter(1, index[..., None].expand_as(y), y)[:, :T]
