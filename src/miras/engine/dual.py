"""The dual form: without maps and with gates per head, a read is masked attention over a chunk, and
no weights are formed per token.

With gradients frozen at a chunk's start, token i's gradient is the rank-one x_i d_i^T in every
weight, and S_t and A_t are linear in the gradients (papers: Titans eq. 16 to 18; the dual form of
TTT, appendix A):

    S_t = H[t,0] S_0 - sum_i H[t,i] lr_i x_i d_i^T
    A_t = K[t,0] A_0 + G[t,0] S_0 - sum_i G[t,i] x_i d_i^T

with H the products of momentum, K the products of 1 - forget, and G = K H diag(lr). So a read
x A_t is K[t,0] x A_0 + G[t,0] x S_0 - ((x X^T) . G) D. With forgetting towards the initial
accumulator, A is the difference from it, and a read adds x A_0.

Shapes: B rows, H heads, R = B * H, N chunks, n tokens of a chunk, Dk, Dv widths.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from miras.core.memory import Weights
from miras.core.recurrence import norm, observed
from miras.core.rule import Rule, State, anchor_weights, close_chunk
from miras.core.state import Tree
from miras.engine.chunks import Chunks, Fixed, begun, contiguous, written
from miras.engine.gradient import gates_of_bias, gradient_factors, leave_open
from miras.engine.kernels import fast_advance, fast_read
from miras.engine.tables import Coefficients, coefficients
from miras.engine.window import windowed


def dual(
    rule: Rule,
    state: State,
    fresh: State | None,
    chunks: Chunks,
    trace: list[Tree] | None,
    factors: "Factors | None" = None,
) -> tuple[Tensor, State]:
    """Chunks one after the other; whatever depends on gates and keys only is computed for all at
    once.

    Rows and heads are merged into one axis, so that products need no reshaping.
    """
    factors = at_the_anchor if factors is None else factors
    state = begun(state, fresh, chunks, 0)
    B, H = chunks.q.shape[:2]
    tables = {n: _each(c) for n, c in coefficients(rule, state, chunks, trace is not None).items()}
    gates = {name: by_chunk(g) for name, g in gates_of_bias(rule, chunks).items()}
    fixed = chunks.fixed.by_head(B)
    q, k, v = map(by_chunk, chunks[:3])
    closed: State | None = None
    reads: list[Tensor] = []
    for j in range(len(q)):
        state = state if j == 0 else begun(state, fresh, chunks, j)
        coefs = {n: c[j] for n, c in tables.items()}
        pairs, of_bias = (k[j], v[j]), {n: g[j] for n, g in gates.items()}
        window = windowed(rule, state, chunks, j) if state.past else None
        if window is not None:
            pairs, of_bias = (window.k, window.v), window.gates
            coefs = {n: c.banded(window.band) for n, c in coefs.items()}
        xs, ds, loss = factors(rule, state, *pairs, of_bias, fixed, coefs)
        if window is not None:
            ds = {n: d * window.share for n, d in ds.items()}
        reads.append(read(rule, state, q[j], xs, ds, _at_read(rule, coefs), fixed))
        if trace is not None:
            trace.append(_watch(chunks, j, state, fixed.base, xs, ds, coefs, loss))
        after = advance(state, xs, ds, coefs)
        if window is not None:
            after = replace(after, past=window.past)
        end = chunks.ends[j]
        if end is not None:
            kept = {n: coefs[n].kept.unflatten(0, (B, H)) for n in state.retained}
            after = replace(after, retained={n: r * kept[n] for n, r in state.retained.items()})
            state = leave_open(rule, after, chunks, j, end)
        else:
            closed = close_chunk(rule, state) if closed is None else closed
            state = replace(closed, A=after.A, S=after.S, anchor=after.A, past=after.past)
    y = reads[0] if len(reads) == 1 else torch.cat(reads, 1)
    return y.unflatten(0, (B, H)), contiguous(state)


def read(
    rule: Rule,
    state: State,
    q: Tensor,
    xs: Tree,
    ds: Tree,
    coefs: "dict[str, Coefficients]",
    fixed: Fixed,
) -> Tensor:
    """The reads of a chunk's tokens, (R, n, Dv): each at the weights that its coefficients form
    from A and S."""
    if rule.schedule.read == "start":
        start = anchor_weights(rule, {n: a.flatten(0, 1) for n, a in state.anchor.items()}, fixed.base)
        return rule.memory.apply(q, formed_flat(start, fixed.outer))

    def linear(name: str, x: Tensor) -> Tensor:
        c = coefs[name]
        parts = [c.first, state.A[name]]
        if c.first_S is not None:
            parts += [c.first_S, state.S[name]]
        y = fast_read(x, xs[name], ds[name], c.table, *parts)
        return torch.baddbmm(y, x, fixed.base[name]) if fixed.base else y

    def scale(name: str, x: Tensor) -> Tensor:
        raise AssertionError(f"weight {name!r} scales: such memories have their weights formed")

    return rule.memory.apply(q, Weights(linear, scale, {n: p[:, None] for n, p in fixed.outer.items()}))


def formed_flat(W: Tree, outer: Tree) -> Weights:
    """Explicit weights (R, d_in, d_out) and outer parameters (R, width), for inputs (R, n, d)."""
    return Weights(lambda n, x: x @ W[n], lambda n, x: x * W[n].mT, {n: p[:, None] for n, p in outer.items()})


def _at_read(rule: Rule, coefs: "dict[str, Coefficients]") -> "dict[str, Coefficients]":
    """The coefficients of each token's read: its own, or those of the previous token."""
    return {n: c.earlier() for n, c in coefs.items()} if rule.schedule.read == "before" else coefs


def advance(state: State, xs: Tree, ds: Tree, coefs: "dict[str, Coefficients]") -> State:
    """The state with A and S after a chunk."""
    A, S = {}, {}
    for n, c in coefs.items():
        parts = [c.kept, state.A[n]]
        if c.kept_S is not None and c.last is not None and c.carry is not None:
            parts += [c.kept_S, state.S[n]]
            S[n] = fast_advance(xs[n], ds[n], c.last, c.carry, state.S[n])
        A[n] = fast_advance(xs[n], ds[n], c.late, *parts)
    return replace(state, A=A, S=S)


def by_chunk(x: Tensor) -> tuple[Tensor, ...]:
    """(B, H, N, ...) to N of (R, ...)."""
    return x.flatten(0, 1).unbind(1)


def _each(c: Coefficients) -> list[Coefficients]:
    parts: list[Any] = [[None] * c.lr.shape[2] if x is None else by_chunk(x) for x in c]
    return [Coefficients(*chunk) for chunk in zip(*parts, strict=True)]


Factors = Callable[
    [Rule, State, Tensor, Tensor, Tree, Fixed, dict[str, Coefficients]], tuple[Tree, Tree, Tensor]
]
"""Computes the factors x_t, d_t of a chunk's gradients, and the inner loss: (rule, state, k, v,
gates, fixed, coefficients), fixed with rows and heads merged into one axis."""


def at_the_anchor(
    rule: Rule,
    state: State,
    k: Tensor,
    v: Tensor,
    gates: Tree,
    fixed: Fixed,
    coefs: dict[str, Coefficients],
) -> tuple[Tree, Tree, Tensor]:
    """Every token's gradient at the chunk's anchor: the chunkwise rule."""
    kept = {n: c.first[..., None] for n, c in coefs.items()} if rule.retention.decayed else None
    return gradient_factors(rule, state, k, v, gates, fixed, kept)


def _watch(
    chunks: Chunks,
    j: int,
    state: State,
    base: Tree,
    xs: Tree,
    ds: Tree,
    coefs: dict[str, Coefficients],
    loss: Tensor,
) -> Tree:
    """The observed values of a chunk, (B, H, n); only here are per-token weights formed."""
    rank_one = {n: torch.einsum("rid,rie->ride", x, ds[n]) for n, x in xs.items()}
    moved: Tree = {}
    weights: Tree = {}
    for n, c in coefs.items():
        grown = lambda first, old: first[..., None, None] * old.flatten(0, 1)[:, None]  # noqa: E731
        summed = lambda table, n=n: torch.einsum("rti,ride->rtde", table, rank_one[n])  # noqa: E731
        weights[n] = grown(c.first[..., 0], state.A[n]) + summed(c.table)
        weights[n] = weights[n] + base[n][:, None] if base else weights[n]
        if c.first_S is not None and c.H is not None and c.H0 is not None:
            weights[n] = weights[n] + grown(c.first_S[..., 0], state.S[n])
            moved[n] = grown(c.H0, state.S[n]) + summed(c.H)
        else:
            moved[n] = rank_one[n] * c.lr[..., None, None]
    momentary = torch.stack([x.norm(dim=-1) * ds[n].norm(dim=-1) for n, x in xs.items()]).norm(dim=0)
    seen = {"momentary": momentary, "accumulated": norm(moved), "weight": norm(weights), "loss": loss}
    seen = {n: x.unflatten(0, chunks.q.shape[:2]) for n, x in seen.items()}
    lr = {n: c.lr.unflatten(0, chunks.q.shape[:2]) for n, c in coefs.items()}
    seen |= observed({name: g[:, :, j] for name, g in chunks.gates.items()}, lr, written(chunks, j))
    return {n: x.detach() for n, x in seen.items()}
