"""Causal attention over a stream, in a sliding window or over everything: (q, k, v, window) -> (y, window).

Shapes: B rows, H heads, T tokens, D head width, L cached keys, P persistent tokens, m keys of a token.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.core.state import Record


@dataclass(frozen=True)
class Window(Record):
    """The keys and values that later tokens may still see.

    k, v (B, H, L, D), rotated already; position (B, L) int64, -1 where there is none; next (B,) int64 the
    position of the next token; start (B,) int64 where the open document began. L is the window size, times the
    keys of a token, for sliding attention, and grows for full attention.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    next: Tensor
    start: Tensor


def init_window(rows: int, heads: int, width: int, size: int | None, like: Tensor) -> Window:
    """An empty window of `size` keys (None: full attention, which starts with none)."""
    shape = (rows, heads, size or 0, width)
    return Window(
        k=like.new_zeros(shape),
        v=like.new_zeros(shape),
        position=torch.full((rows, size or 0), -1, dtype=torch.long, device=like.device),
        next=torch.zeros(rows, dtype=torch.long, device=like.device),
        start=torch.zeros(rows, dtype=torch.long, device=like.device),
    )


def rotate(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotary embedding of x (B, H, T, D) at int64 positions (B, T); D must be even.

    Angles are formed in fp64: in fp32 they are 0.25 rad wrong at position 10,000,000.
    """
    half = x.shape[-1] // 2
    rate = theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = position[:, None, :, None].double() * rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    *,
    size: int | None,
    theta: float | None,
    persistent: tuple[Tensor, Tensor] | None = None,
    there: Tensor | None = None,
    length: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Window]:
    """Token t attends to the last `size` tokens of its document, itself included (all of them for None).

    q (B, H, T, D), k, v (B, H, m T, D): each token brings m keys in a row, all at its own position; `there`
    (B, m T) bool leaves some of them out. `theta` the base of the rotary embedding, None for none; `persistent`
    keys and values (H, P, D) that every token sees, without position. `length` (B,) counts the tokens of each row,
    the rest is padding behind them; `reset` (B, T) marks tokens that start a document. Returns y (B, H, T, D).
    """
    B, _, T, _ = q.shape
    if T == 0:
        return v, window
    m = k.shape[2] // T
    position = window.next[:, None] + torch.arange(T, device=q.device)
    start = window.start[:, None].expand(B, T)
    if reset is not None:
        start = torch.where(reset, position, start).cummax(1).values
    free = None if persistent is None else (q @ persistent[0].mT, persistent[1])  # before q has a position
    place = position if m == 1 else position.repeat_interleave(m, 1)
    if theta is not None:
        q, k = rotate(q, position, theta), rotate(k, place, theta)
    if length is not None:
        real = torch.arange(T, device=q.device) < length[:, None]
        position = torch.where(real, position, -1)
        real = real if m == 1 else real.repeat_interleave(m, 1)
        there = real if there is None else there & real
    if there is not None:
        place = torch.where(there, place, -1)
        # Weight 0 does not silence a padding value that is not a number.
        k, v = (x.masked_fill(~there[:, None, :, None], 0) for x in (k, v))
    keys, values = torch.cat([window.k, k], 2), torch.cat([window.v, v], 2)
    places = torch.cat([window.position, place], 1)

    # A stream's first call without holes, documents or persistent tokens needs no mask of T x T.
    plain = free is None and there is None and reset is None and keys.shape[2] == T
    if plain and (size is None or T <= size):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        scores = _banded if size is not None and T > size else _dense
        y = scores(q, keys, values, position, start, places, size, free)

    moved = torch.full_like(window.next, T) if length is None else length
    full = m * (size or 0)
    if size is not None and window.k.shape[2] < full:  # a window that was handed over empty
        short = full - window.k.shape[2]
        keys, values = F.pad(keys, (0, 0, short, 0)), F.pad(values, (0, 0, short, 0))
        places = F.pad(places, (short, 0), value=-1)
    if size is None:
        k, v, kept = keys, values, places
    elif length is None:
        # Copies: views would keep the keys and values of the whole call.
        k, v, kept = keys[:, :, -full:].clone(), values[:, :, -full:].clone(), places[:, -full:].clone()
    else:
        index = m * moved[:, None] + torch.arange(full, device=q.device)
        wide = index[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        k, v, kept = keys.gather(2, wide), values.gather(2, wide), places.gather(1, index)
    newest = start.gather(1, (moved - 1).clamp_min(0)[:, None])[:, 0]
    start = torch.where(moved > 0, newest, window.start)
    return y, Window(k, v, kept, window.next + moved, start)


def _visible(position: Tensor, start: Tensor, places: Tensor, size: int | None) -> Tensor:
    """Which places (..., L) a token at `position` (..., T) of a document begun at `start` sees: (..., T, L)."""
    place, here = places[..., None, :], position[..., :, None]
    seen = (place <= here) & (place >= start[..., :, None]) & (place >= 0)
    return seen if size is None else seen & (place > here - size)


def _softmax_read(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, free: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Attention of q (..., H, T, D) over k, v (..., H, L, D) where seen (..., T, L), and over what persists.

    `free` holds the persistent tokens' scores (..., H, T, P), not yet scaled, and values (H, P, D).
    """
    scale = 1 / math.sqrt(q.shape[-1])
    score = ((q @ k.mT) * scale).masked_fill(~seen.unsqueeze(-3), -torch.inf)
    if free is not None:
        weight = torch.cat([free[0] * scale, score], -1).softmax(-1)
        P = free[1].shape[-2]
        return weight[..., :P] @ free[1] + weight[..., P:] @ v
    # A padding token sees nothing: its row of -inf must not become NaN.
    nothing = ~seen.any(-1)[..., None, :, None]
    return score.masked_fill(nothing, 0.0).softmax(-1) @ v


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    start: Tensor,
    places: Tensor,
    size: int | None,
    free: tuple[Tensor, Tensor] | None,
) -> Tensor:
    return _softmax_read(q, k, v, _visible(position, start, places, size), free)


def _banded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    start: Tensor,
    places: Tensor,
    size: int | None,
    free: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Blocks of `size` queries, each against its own and the previous block of keys: linear in T."""
    assert size is not None
    T = q.shape[2]
    blocks = -(-T // size)
    pad = blocks * size - T
    m = k.shape[2] // (size + T)
    q = F.pad(q, (0, 0, 0, pad)).unflatten(2, (blocks, size)).transpose(1, 2)  # (B, blocks, H, size, D)
    position = F.pad(position, (0, pad), value=-1).unflatten(1, (blocks, size))
    start = F.pad(start, (0, pad)).unflatten(1, (blocks, size))
    k, v = (F.pad(x, (0, 0, 0, m * pad)) for x in (k, v))  # (B, H, m (size + blocks * size), D)
    k, v = (x.unfold(2, 2 * m * size, m * size).permute(0, 2, 1, 4, 3) for x in (k, v))
    places = F.pad(places, (0, m * pad), value=-1).unfold(1, 2 * m * size, m * size)
    if free is not None:
        score = F.pad(free[0], (0, 0, 0, pad)).unflatten(2, (blocks, size)).transpose(1, 2)
        free = (score, free[1])
    y = _softmax_read(q, k, v, _visible(position, start, places, size), free)
    return y.transpose(1, 2).flatten(2, 3)[:, :, :T]
