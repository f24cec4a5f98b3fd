"""The loss window: each token's gradient is that of the last pairs of key and value, including its
own.

All losses are taken at the anchor of the token's chunk, so the pairs before a chunk are evaluated
again in it. The coefficient matrix of the dual form is then multiplied by a band.

Shapes: B rows, H heads, R = B * H, n tokens of a chunk, m = window - 1 pairs before it; D a width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from miras.core.rule import Rule, State
from miras.core.state import Tree
from miras.engine.chunks import Chunks, written
from miras.engine.gradient import gates_of_bias


class Window(NamedTuple):
    """A chunk's pairs with those before it.

    k, v (R, m + n, D), gates of the bias (R, m + n) or (R, m + n, Dv), share (R, m + n, 1) their
    weights; band (R or 1, n, m + n) the pairs in each token's window; past: the pairs before the
    next chunk.
    """

    k: Tensor
    v: Tensor
    gates: Tree
    share: Tensor
    band: Tensor
    past: Tree


def windowed(rule: Rule, state: State, chunks: Chunks, j: int) -> Window:
    """The pairs of chunk j, for a state that holds the previous ones."""
    size, n = rule.algorithm.window, chunks.q.shape[3]
    m, H = size - 1, chunks.q.shape[1]
    share, writes = chunks.gates["share", ""][:, :, j], written(chunks, j)
    new = {"key": chunks.k[:, :, j], "value": chunks.v[:, :, j], "share": share}
    if writes is not None:
        new["share"] = torch.where(writes[:, None], share, 0)
    new |= {f"bias_{name}": g[:, :, j] for name, g in gates_of_bias(rule, chunks).items()}
    both = {name: torch.cat([old, _like(new[name], old)], 2) for name, old in state.past.items()}
    there = None if chunks.there is None else chunks.there[:, j]
    if there is None:
        rank = torch.arange(n, device=share.device)[None]
        past = {name: x[:, :, n:] for name, x in both.items()}
    else:
        rank = there.cumsum(1) - 1
        count, first = there.sum(1, keepdim=True), there.long().argmax(1, keepdim=True)
        last = count + torch.arange(m, device=share.device)  # among existing pairs, past ones first
        at = torch.where(last < m, last, last + first)
        past = {name: _picked(x, at) for name, x in both.items()}
    before = torch.arange(-m, 0, device=share.device).expand(len(rank), m)
    back = rank[:, :, None] - torch.cat([before, rank], 1)[:, None]
    band = (back >= 0) & (back < size)
    if there is not None:
        band = band & torch.cat([torch.ones_like(before, dtype=torch.bool), there], 1)[:, None]
        band = band.repeat_interleave(H, 0)
    flat = {name: x.flatten(0, 1) for name, x in both.items()}
    gates = {name: flat[f"bias_{name}"] for name in rule.bias.gates}
    return Window(flat["key"], flat["value"], gates, flat["share"][..., None], band.to(share.dtype), past)


def _like(x: Tensor, old: Tensor) -> Tensor:
    """x with the axes of `old`: a gate of the bias may be per token where channels are stored."""
    return x if x.dim() == old.dim() else x[..., None].expand(*x.shape, old.shape[-1])


def _picked(x: Tensor, at: Tensor) -> Tensor:
    """x (B, H, m + n, ...) at places (B, m)."""
    index = at[:, None].view(len(at), 1, -1, *[1] * (x.dim() - 3)).expand(*x.shape[:2], -1, *x.shape[3:])
    return x.gather(2, index)
