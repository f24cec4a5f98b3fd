"""One update per chunk: the steps of its tokens are summed, and no weights are formed per token.

Shapes: B rows, H heads, N chunks, n tokens of a chunk; (d_in, d_out) one weight.
"""

from dataclasses import replace

import torch
from torch import Tensor

from miras.core.recurrence import norm, observed, taken
from miras.core.rule import Rule, State, close_chunk, formed, gate_of, weights
from miras.core.state import Tree, choose
from miras.engine.chunks import Chunks, begun, written
from miras.engine.gradient import gates_of_bias, gradient_factors, leave_open
from miras.engine.kernels import through
from miras.engine.tables import step_sizes


def per_chunk(
    rule: Rule, state: State, fresh: State | None, chunks: Chunks, trace: list[Tree] | None
) -> tuple[Tensor, State]:
    """Chunks one after the other: the reads of each, and the sum of its steps."""
    state = begun(state, fresh, chunks, 0)
    base = chunks.fixed.base
    lr = {
        n: _wide(step_sizes(rule, state, chunks, n, gate_of(chunks.gates, "lr", n))).unbind(2)
        for n in state.A
    }
    kept = {n: _kept(rule, chunks, n) for n in state.A}
    gates = {name: g.unbind(2) for name, g in gates_of_bias(rule, chunks).items()}
    q, k, v = (x.unbind(2) for x in chunks[:3])
    reads: list[Tensor] = []
    for j in range(len(q)):
        state = state if j == 0 else begun(state, fresh, chunks, j)
        mine = {n: x[j] for n, x in kept.items()}
        of_bias = {name: g[j] for name, g in gates.items()}
        decayed = mine if rule.retention.decayed else None
        xs, ds, loss = gradient_factors(rule, state, k[j], v[j], of_bias, chunks.fixed, decayed)
        steps = {n: -x[j] for n, x in lr.items()}
        before = replace(
            state,
            S={n: s + _summed(rule, xs[n], ds[n], steps[n]) for n, s in state.S.items()},
            retained={n: r * mine[n][:, :, -1] for n, r in state.retained.items()},
        )
        after, ends = taken(rule, before), _ends(chunks, j)
        W, W_after = (weights(rule, A, base) for A in (state.A, after.A))
        y = rule.memory.apply(q[j], formed(W, chunks.fixed.outer))
        if rule.schedule.read == "after":
            last = rule.memory.apply(q[j][:, :, -1:], formed(W_after, chunks.fixed.outer))
            y = torch.cat([y[:, :, :-1], torch.where(ends.view(-1, 1, 1, 1), last, y[:, :, -1:])], 2)
        reads.append(y)
        if trace is not None:
            here = {name: g[:, :, j] for name, g in chunks.gates.items()}
            sizes = {n: _size(rule, xs[n], ds[n]) for n in xs}
            moved = {n: _size(rule, *_stepped(rule, xs[n], ds[n], steps[n])) for n in xs}
            size = norm(W)[..., None].expand(loss.shape)
            size = torch.cat(
                [size[..., :-1], torch.where(ends[:, None], norm(W_after), norm(W))[..., None]], -1
            )
            seen = observed(here, {n: x[j] for n, x in lr.items()}, written(chunks, j)) | {"loss": loss}
            seen |= {"momentary": _together(sizes), "accumulated": _together(moved), "weight": size}
            trace.append({n: x.detach() for n, x in seen.items()})
        end = chunks.ends[j]
        closed = close_chunk(rule, after)
        state = closed if end is None else choose(ends, closed, leave_open(rule, before, chunks, j, end))
    return reads[0] if len(reads) == 1 else torch.cat(reads, 2), state


def _ends(chunks: Chunks, j: int) -> Tensor:
    """The rows (B,) that complete chunk j."""
    end, there = chunks.ends[j], None if chunks.there is None else chunks.there[:, j].any(-1)
    rows = torch.ones(len(chunks.q), dtype=torch.bool, device=chunks.q.device) if end is None else end == 0
    return rows if there is None else rows & there


def _wide(gate: Tensor) -> Tensor:
    """A gate broadcast to a weight: (B, H, N, n) gets two more axes."""
    return gate[..., None, None] if gate.dim() == 4 else gate


def _kept(rule: Rule, chunks: Chunks, name: str) -> tuple[Tensor, ...]:
    """For each chunk the products of 1 - forget through every token, (B, H, n, d_in or 1, d_out or
    1)."""
    keep = torch.ones_like(chunks.q[..., :1, None])
    if "forget" in rule.retention.gates:
        keep = 1 - _wide(gate_of(chunks.gates, "forget", name))
        if chunks.write is not None:
            keep = torch.where(chunks.write[:, None, ..., None, None], keep, 1)
    before, _ = through(keep.flatten(0, 1))
    return before.unflatten(0, keep.shape[:2]).unbind(2)


def _stepped(rule: Rule, x: Tensor, d: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of step_t x_t d_t^T, step (B, H, n, d_in or 1, d_out or 1)."""
    if rule.memory.elementwise or step.shape[-1] == 1:
        return x * step[..., 0], d
    return x, d * step[..., 0, :]


def _summed(rule: Rule, x: Tensor, d: Tensor, step: Tensor) -> Tensor:
    """sum_t step_t x_t d_t^T, (B, H, d_in, d_out)."""
    x, d = _stepped(rule, x, d, step)
    return (x * d).sum(2)[..., None] if rule.memory.elementwise else x.mT @ d


def _size(rule: Rule, x: Tensor, d: Tensor) -> Tensor:
    """|x_t d_t^T| of one weight, (B, H, n)."""
    return (x * d).norm(dim=-1) if rule.memory.elementwise else x.norm(dim=-1) * d.norm(dim=-1)


def _together(sizes: Tree) -> Tensor:
    return torch.stack(list(sizes.values())).norm(dim=0)
