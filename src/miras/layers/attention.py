"""Causal attention over a stream, in a sliding window or over everything: (q, k, v, window) -> (y,
window).

Shapes: B rows, H heads, T tokens, D head width, L cached keys, P persistent tokens, m keys of a
token.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.core.state import Record


@dataclass(frozen=True)
class Window(Record):
    """The keys and values that later tokens may still see.

    k, v (B, H, L, D), already rotated; position (B, L) int64, -1 for empty places; next (B,) int64,
    the position of the next token; start (B,) int64, where the open document began. L is the window
    size, times the keys of a token, for sliding attention, and grows for full attention.
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
    """Rotary embedding of x (B, H, T, D) at int64 positions (B, T), or (B, 1) for all; D must be
    even.

    Angles are formed in fp64: in fp32 they are 0.25 rad wrong at position 10,000,000.
    """
    # a graph remembers nothing
    rates = _rates.__wrapped__ if torch.compiler.is_compiling() else _rates
    rate = rates(x.shape[-1] // 2, theta, x.device)
    angle = position[:, None, :, None] * rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


@lru_cache(maxsize=64)
def _rates(half: int, theta: float, device: torch.device) -> Tensor:
    """Turns per position of each pair of channels, theta^(-i / half), (half,) in fp64."""
    with torch.inference_mode(False):  # because training could not use them later
        return torch.pow(theta, -torch.arange(half, dtype=torch.float64, device=device) / half)


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
    """Token t attends to the last `size` tokens of its document, itself included (all of them for
    None).

    q (B, H, T, D), k, v (B, H, m T, D): each token has m consecutive keys, all at its own position;
    `there` (B, m T) bool masks out some of them. `theta`: the base of the rotary embedding, None
    for none; `persistent`: keys and values (H, P, D) that every token sees, without position.
    `length` (B,): the number of tokens of each row, followed by padding; `reset` (B, T) marks
    tokens that start a document. Returns y (B, H, T, D).
    """
    B, _, T, _ = q.shape
    if T == 0:
        return v, window
    m = k.shape[2] // T
    q = q * q.shape[-1] ** -0.5
    if T == 1 and there is None and length is None and reset is None and _is_full(window, size, m):
        return _next(q, k, v, window, size, theta, persistent)
    position = window.next[:, None] + torch.arange(T, device=q.device)
    start = window.start[:, None].expand(B, T)
    if reset is not None:
        start = torch.where(reset, position, start).cummax(1).values
    # before q has a position
    free = None if persistent is None else (q @ persistent[0].mT, persistent[1])
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
        # A weight of 0 does not remove a padding value that is NaN or infinite.
        k, v = (x.masked_fill(~there[:, None, :, None], 0) for x in (k, v))
    keys, values = torch.cat([window.k, k], 2), torch.cat([window.v, v], 2)
    places = torch.cat([window.position, place], 1)

    # A stream's first call without holes, documents or persistent tokens needs no mask of T x T.
    plain = free is None and there is None and reset is None and keys.shape[2] == T
    if plain and (size is None or T <= size):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    else:
        scores = _banded if size is not None and T > size else _dense
        y = scores(q, keys, values, position, start, places, size, free, documents=reset is not None)

    moved = torch.full_like(window.next, T) if length is None else length
    full = m * (size or 0)
    if size is not None and window.k.shape[2] < full:  # a window that was emptied
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
    if reset is not None:  # what an earlier document left is never visible again
        gone = (kept < start[:, None])[:, None, :, None]
        k, v = k.masked_fill(gone, 0), v.masked_fill(gone, 0)
    return y, Window(k, v, kept, window.next + moved, start)


def _is_full(window: Window, size: int | None, m: int) -> bool:
    """Whether the window has a place for every key, and was not emptied."""
    return size is None or window.k.shape[2] == m * size


def _next(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    size: int | None,
    theta: float | None,
    persistent: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Window]:
    """`attention` for the next token of every row, q scaled: the window moves by one token."""
    m = k.shape[2]
    free = None if persistent is None else (q @ persistent[0].mT, persistent[1])
    here = window.next[:, None]
    if theta is not None:
        both = rotate(torch.cat([q, k], 2), here, theta)
        q, k = both[:, :, :1], both[:, :, 1:]
    gone = 0 if size is None else m
    keys = torch.cat([window.k[:, :, gone:], k], 2)
    values = torch.cat([window.v[:, :, gone:], v], 2)
    places = torch.cat([window.position[:, gone:], *[here] * m], 1)
    y = _softmax_read(q, keys, values, (places < window.start[:, None])[:, None], free)
    return y, Window(keys, values, places, window.next + 1, window.start)


def _hidden(position: Tensor, start: Tensor, places: Tensor, size: int | None) -> Tensor:
    """Which keys (..., L) are hidden from a token at `position` (..., T) whose document began at
    `start`."""
    place, here = places[..., None, :], position[..., :, None]
    hidden = (place > here) | (place < start[..., :, None]) | (place < 0)
    return hidden if size is None else hidden | (place <= here - size)


def _apart(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, free: tuple[Tensor, Tensor] | None) -> Tensor:
    """`_softmax_read` with several documents: NaN and infinity stay in their own, which a weight of
    0 would not ensure."""
    broken = ~(k.isfinite() & v.isfinite()).all(-1)  # (..., H, L)
    k, v = (x.masked_fill(broken[..., None], 0) for x in (k, v))
    meets = (~hidden & broken.any(-2)[..., None, :]).any(-1)[..., None, :, None]
    return _softmax_read(q, k, v, hidden, free).masked_fill(meets, torch.nan)


def _softmax_read(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, free: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Attention of scaled q (..., H, T, D) over visible k, v (..., H, L, D) and persistent tokens.

    `free` holds the persistent tokens' scores (..., H, T, P) and values (H, P, D).
    """
    score = (q @ k.mT).masked_fill(hidden.unsqueeze(-3), -torch.inf)
    if free is not None:
        weight = torch.cat([free[0], score], -1).softmax(-1)
        known, met = weight.split([free[0].shape[-1], score.shape[-1]], -1)
        return known @ free[1] + met @ v
    # A padding token sees nothing; its row of -inf must not become NaN.
    nothing = hidden.all(-1)[..., None, :, None]
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
    documents: bool,
) -> Tensor:
    read = _apart if documents else _softmax_read
    return read(q, k, v, _hidden(position, start, places, size), free)


def _banded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    start: Tensor,
    places: Tensor,
    size: int | None,
    free: tuple[Tensor, Tensor] | None,
    documents: bool,
) -> Tensor:
    """Blocks of `size` queries, each against its own and the previous keys: linear in T."""
    assert size is not None
    T = q.shape[2]
    blocks = -(-T // size)
    pad = blocks * size - T
    m = k.shape[2] // (size + T)
    # (B, blocks, H, size, D)
    q = F.pad(q, (0, 0, 0, pad)).unflatten(2, (blocks, size)).transpose(1, 2)
    position = F.pad(position, (0, pad), value=-1).unflatten(1, (blocks, size))
    start = F.pad(start, (0, pad)).unflatten(1, (blocks, size))
    k, v = (F.pad(x, (0, 0, 0, m * pad)) for x in (k, v))  # (B, H, m (size + blocks * size), D)
    k, v = (x.unfold(2, 2 * m * size, m * size).permute(0, 2, 1, 4, 3) for x in (k, v))
    places = F.pad(places, (0, m * pad), value=-1).unfold(1, 2 * m * size, m * size)
    if free is not None:
        score = F.pad(free[0], (0, 0, 0, pad)).unflatten(2, (blocks, size)).transpose(1, 2)
        free = (score, free[1])
    read = _apart if documents else _softmax_read
    y = read(q, k, v, _hidden(position, start, places, size), free)
    return y.transpose(1, 2).flatten(2, 3)[:, :, :T]
