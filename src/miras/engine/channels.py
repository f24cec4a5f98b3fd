"""Gates by channel, and maps from accumulator to weights: gradients chunk by chunk, then all reads
at once.

Without momentum A_t = keep_t A_{t-1} + s_t x_t d_t^T, s = -lr, and a factor per row or column of a
weight can be moved into x or d. So over a chunk a memory changes by a weighted sum of its n
gradients,

    A_n = (keep_1 ... keep_n) A_0 + sum_i (keep_{i+1} ... keep_n) s_i x_i d_i^T

and no A_t inside a chunk is needed for the next chunk. The reads of all chunks are computed
afterwards in parallel: as masked attention over each chunk with a decay by channel if A is the
weights, else by forming A_t in tiles (`miras.engine.tiles`). Products of keep are never divided, so
they are exact where a gate is 0 or 1.

Shapes, with R = B * H: N chunks of n tokens; x (R, N, n, d_in), d (R, N, n, d_out).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.core.memory import Weights
from miras.core.rule import Rule, State, close_chunk, gate_of
from miras.core.state import Tree
from miras.engine import tiles
from miras.engine.chunks import Chunks, begun, contiguous
from miras.engine.exact import met_by_key_channel
from miras.engine.factors import factors, has_factors
from miras.engine.gradient import gates_of_bias, gradient_factors, leave_open
from miras.engine.kernels import recorded, through
from miras.engine.recompute import recomputed
from miras.engine.tables import products, step_sizes


class Sides(NamedTuple):
    """A factor of every token's gradient: at x, (R, N, n, d_in), or at d, (R, N, n, d_out or 1)."""

    x: Tensor | None
    d: Tensor | None

    @staticmethod
    def of(gate: Tensor) -> "Sides":
        """(..., d_in, 1), (..., 1, d_out) or (..., 1, 1)."""
        return Sides(gate[..., 0], None) if gate.shape[-2] > 1 else Sides(None, gate[..., 0, :])

    def times(self, other: "Sides") -> "Sides":
        """The product of both."""
        return Sides(_times(self.x, other.x), _times(self.d, other.d))

    def chunk(self, j: int) -> "Sides":
        """The factors of one chunk."""
        return Sides(*(None if side is None else side[:, j] for side in self))


class Gated(NamedTuple):
    """One weight's gates: step s, keep, its products through each token; by chunk, the kept and
    added factors."""

    step: Sides
    keep: Tensor
    before: Tensor
    share: tuple[Tensor, ...]
    late: list[Sides]


def run(
    rule: Rule, state: State, fresh: State | None, chunks: Chunks, trace: list[Tree] | None
) -> tuple[Tensor, State]:
    """Chunks one after the other, then all reads."""
    assert trace is None, "what an observation shows is formed elsewhere"
    state = begun(state, fresh, chunks, 0)
    B, H, N = chunks.q.shape[:3]
    gated = {n: _gated(rule, state, chunks, n) for n in state.A}
    k, v = (x.flatten(0, 1).unbind(1) for x in (chunks.k, chunks.v))
    of_bias = {n: g.flatten(0, 1).unbind(1) for n, g in gates_of_bias(rule, chunks).items()}
    fixed = chunks.fixed.by_head(B)
    starts: dict[str, list[Tensor]] = {n: [] for n in state.A}
    xs: dict[str, list[Tensor]] = {n: [] for n in state.A}
    ds: dict[str, list[Tensor]] = {n: [] for n in state.A}
    for j in range(N):
        state = state if j == 0 else begun(state, fresh, chunks, j)
        end = chunks.ends[j]
        kept = {n: g.before[:, j] for n, g in gated.items()}
        gates = {n: g[j] for n, g in of_bias.items()}
        if has_factors(rule):
            x, d = factors(rule, state, k[j], v[j], fixed)
        else:
            decayed = kept if rule.retention.decayed else None
            x, d, _ = gradient_factors(rule, state, k[j], v[j], gates, fixed, decayed)
        A: Tree = {}
        for n, g in gated.items():
            a = state.A[n].flatten(0, 1)
            late = g.late[j]
            grown = torch.baddbmm(g.share[j] * a, _scaled(x[n], late.x).mT, _scaled(d[n], late.d))
            A[n] = grown.view(state.A[n].shape)
            starts[n].append(a)
            xs[n].append(x[n])
            ds[n].append(d[n])
        state = replace(state, A=A)
        if end is not None:
            retained = {n: r * kept[n][:, -1].unflatten(0, (B, H)) for n, r in state.retained.items()}
            state = leave_open(rule, replace(state, retained=retained), chunks, j, end)
        else:
            state = close_chunk(rule, state)

    def read(name: str, x: Tensor) -> Tensor:
        g = gated[name]
        keys = _scaled(torch.stack(xs[name], 1), g.step.x)
        written = _scaled(torch.stack(ds[name], 1), g.step.d)
        A = torch.stack(starts[name], 1)
        if not rule.retention.direct:
            return tiles.read(rule.retention, x, keys, written, g.keep, A, fixed.base.get(name))
        before = Sides.of(g.before)
        y = _scaled(_scaled(x, before.x) @ A, before.d) + _met(x, keys, written, Sides.of(g.keep))
        return y + x @ fixed.base[name][:, None] if fixed.base else y

    def scale(name: str, x: Tensor) -> Tensor:
        raise AssertionError(f"weight {name!r} scales: such memories have another form")

    outer = {n: p[:, None, None] for n, p in fixed.outer.items()}
    y = rule.memory.apply(chunks.q.flatten(0, 1), Weights(read, scale, outer))
    return y.flatten(1, 2).unflatten(0, (B, H)), contiguous(state)


def _gated(rule: Rule, state: State, chunks: Chunks, name: str) -> Gated:
    """One weight's gates, all chunks at once; tokens that do not write leave it unchanged."""
    lr = step_sizes(rule, state, chunks, name, gate_of(chunks.gates, "lr", name))
    keep = torch.ones_like(lr[..., :1, :1] if lr.dim() == 6 else lr)
    if "forget" in rule.retention.gates:
        keep = 1 - gate_of(chunks.gates, "forget", name)
        if chunks.write is not None:
            write = chunks.write[:, None]
            keep = torch.where(write if keep.dim() == 4 else write[..., None, None], keep, 1)
    lr, keep = ((g[..., None, None] if g.dim() == 4 else g).flatten(0, 1) for g in (lr, keep))
    before, after = through(keep)
    step = Sides.of(-lr)
    late = step.times(Sides.of(after))
    return Gated(step, keep, before, before[:, :, -1].unbind(1), [late.chunk(j) for j in range(lr.shape[1])])


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _met(x: Tensor, keys: Tensor, d: Tensor, keep: Sides) -> Tensor:
    """The reads of a chunk from its own steps: sum_{i <= t} of x_t keys_i^T d_i, decayed from i to
    t."""
    if keep.x is not None:
        met = lambda *parts: (met_by_key_channel(*(part[""] for part in parts))[0],)  # noqa: E731
        return recomputed(met, {"": x}, {"": keys}, {"": d}, {"": keep.x})[0]
    assert keep.d is not None
    scores = x @ keys.mT
    if keep.d.shape[-1] == 1:
        return (scores * products(keep.d[..., 0])[1]) @ d
    return _Mixed.apply(scores, d, keep.d)


def _mixed(scores: Tensor, d: Tensor, keep: Tensor) -> Tensor:
    """y_t = sum_{i <= t} scores_ti (keep_{i+1} * ... * keep_t) * d_i: scores (..., n, n), d and
    keep (..., n, D).

    By halves: reads of the second half of a range from the first half cross the boundary between
    them, so their decay is a product before it, applied to d_i, times one after it, applied to y_t.
    """
    n = d.shape[-2]
    scores, d, keep = _padded(scores, d, keep)
    y = scores.diagonal(0, -2, -1)[..., None] * d
    before, after = keep, torch.ones_like(keep)
    half = 1
    while half < d.shape[-2]:
        (d1, _), (y1, y2), (b1, b2), (a1, a2) = (_pair(x, half) for x in (d, y, before, after))
        y2 = y2 + b2 * (_below(scores, half) @ (d1 * a1))
        y, before, after = (
            torch.stack(both, -3).flatten(-4, -2)
            for both in ((y1, y2), (b1, b2 * b1[..., -1:, :]), (a1 * b2[..., -1:, :], a2))
        )
        half *= 2
    return y[..., :n, :]


def _padded(scores: Tensor, d: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, padded to the next power of two with tokens that add nothing."""
    more = (1 << (d.shape[-2] - 1).bit_length()) - d.shape[-2]
    if not more:
        return scores, d, keep
    return (
        F.pad(scores, (0, more, 0, more)),
        F.pad(d, (0, 0, 0, more)),
        F.pad(keep, (0, 0, 0, more), value=1.0),
    )


def _pair(x: Tensor, half: int) -> tuple[Tensor, ...]:
    """The first and the second halves of all ranges, views (..., ranges, half, D) of (..., n,
    D)."""
    return x.unflatten(-2, (-1, 2, half)).unbind(-3)


def _below(scores: Tensor, half: int) -> Tensor:
    """The reads of second halves from first ones, a view (..., ranges, half, half) of (..., n,
    n)."""
    size = 2 * half
    blocks = scores.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).diagonal(0, -4, -2)
    return blocks[..., half:, :half, :].movedim(-1, -3)


def _levels(keep: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Level by level, half and, for all ranges: the second halves' products up to each token, the
    first halves' products after each token, and the first halves' whole products. Views, valid
    until the next level."""
    before, after = keep.clone(), torch.ones_like(keep)
    half = 1
    while half < keep.shape[-2]:
        (b1, b2), (a1, _) = _pair(before, half), _pair(after, half)
        whole = b1[..., -1:, :]
        yield half, b2, a1, whole
        a1.mul_(b2[..., -1:, :])
        b2.mul_(whole)
        half *= 2


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        n = inputs[1].shape[-2]
        scores, d, keep = _padded(*inputs)
        y = scores.diagonal(0, -2, -1)[..., None] * d
        for half, b, a, _ in _levels(keep):
            _pair(y, half)[1].addcmul_(b, _below(scores, half) @ (_pair(d, half)[0] * a))
        return y[..., :n, :]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            return recorded(ctx.needs_input_grad, _mixed, grads, inputs)
        n = inputs[1].shape[-2]
        scores, d, keep = _padded(*inputs)
        g = F.pad(grads[0], (0, 0, 0, d.shape[-2] - n))
        by_scores = torch.zeros_like(scores)
        by_scores.diagonal(0, -2, -1).copy_((g * d).sum(-1))
        by_d = scores.diagonal(0, -2, -1)[..., None] * g
        by_before, by_after = torch.zeros_like(keep), torch.zeros_like(keep)
        levels = [(half, b.clone(), a.clone(), whole.clone()) for half, b, a, whole in _levels(keep)]
        for half, b, a, whole in reversed(levels):
            (by_b1, by_b2), (by_a1, _) = _pair(by_before, half), _pair(by_after, half)
            # Backward through the products of the next level, b2 * whole and a1 * (the last of b2).
            by_whole, by_last = ((x * y).sum(-2, keepdim=True) for x, y in ((by_b2, b), (by_a1, a)))
            by_b2.mul_(whole)
            by_a1.mul_(b[..., -1:, :])
            by_b1[..., -1:, :].add_(by_whole)
            by_b2[..., -1:, :].add_(by_last)
            # And through the reads of this level.
            (d1, _), (_, g2) = _pair(d, half), _pair(g, half)
            block, late = _below(scores, half), d1 * a
            by_b2.addcmul_(g2, block @ late)
            through = g2 * b
            _below(by_scores, half).copy_(through @ late.mT)
            back = block.mT @ through
            _pair(by_d, half)[0].addcmul_(back, a)
            by_a1.addcmul_(back, d1)
        return by_scores[..., :n, :n], by_d[..., :n, :], by_before[..., :n, :]
