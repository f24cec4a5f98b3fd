"""No weight is formed per token: where maps allow it and gates are per head, a read is masked attention over a chunk.

With gradients frozen at a chunk's start, token i's gradient is the rank-one x_i d_i^T in every weight, and S_t and
A_t are linear in the gradients (papers: Titans eq. 16 to 18; the dual form of TTT, appendix A):

    S_t = H[t,0] S_0 - sum_i H[t,i] lr_i x_i d_i^T          H: products of momentum
    A_t = K[t,0] A_0 + G[t,0] S_0 - sum_i G[t,i] x_i d_i^T   K: products of 1 - forget, G = K H diag(lr)

so a read x A_t is K[t,0] x A_0 + G[t,0] x S_0 - ((x X^T) . G) D. Where forgetting leads back to the initial
accumulator, A is the difference from it and a read has x A_0 besides.

Shapes: B rows, H heads, R = B * H, N chunks, n tokens of a chunk, Dk, Dv widths.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.core.memory import Weights
from miras.core.recurrence import norm, observed
from miras.core.rule import Rule, State, anchor_weights, close_chunk, gate_of
from miras.core.state import Tree
from miras.engine.chunks import Chunks, Fixed, begun, contiguous, written
from miras.engine.gradient import gates_of_bias, gradient_factors, leave_open, step_sizes
from miras.engine.kernels import fast_advance, fast_read, products
from miras.engine.window import windowed


def dual(
    rule: Rule,
    state: State,
    fresh: State | None,
    chunks: Chunks,
    trace: list[Tree] | None,
    factors: "Factors | None" = None,
) -> tuple[Tensor, State]:
    """Chunks one after the other; what depends on gates and keys alone is done for all at once.

    Inside, rows and heads are one axis, so that products need no reshaping.
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
    """What the tokens of a chunk read, (R, n, Dv): each at the weights that its coefficients make of A and S."""
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
    """Weights (R, d_in, d_out) that are there as such, and outer parameters (R, width), beside (R, n, d)."""
    return Weights(lambda n, x: x @ W[n], lambda n, x: x * W[n].mT, {n: p[:, None] for n, p in outer.items()})


def _at_read(rule: Rule, coefs: "dict[str, Coefficients]") -> "dict[str, Coefficients]":
    """The coefficients of what each token reads: its own, or those of the token before."""
    return {n: c.earlier() for n, c in coefs.items()} if rule.schedule.read == "before" else coefs


def advance(state: State, xs: Tree, ds: Tree, coefs: "dict[str, Coefficients]") -> State:
    """The state with A and S as they are behind a chunk."""
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


class Coefficients(NamedTuple):
    """What one weight's update is made of, chunk by chunk, with the signs of the equations at the top of the file.

    lr (..., n) the bounded step, keep (..., n). A read: first (..., n, 1), K0; table (..., n, n), -G; with momentum
    first_S (..., n, 1), G0. A behind the chunk: late (..., n, 1), kept and with momentum kept_S (..., 1, 1), those
    of the last token; S behind it: last (..., n, 1), -H, and carry (..., 1, 1), H0. H (..., n, n), -H, and H0
    (..., n) are for an observer only.
    """

    lr: Tensor
    keep: Tensor
    first: Tensor
    table: Tensor
    late: Tensor
    kept: Tensor
    first_S: Tensor | None = None
    kept_S: Tensor | None = None
    last: Tensor | None = None
    carry: Tensor | None = None
    H: Tensor | None = None
    H0: Tensor | None = None

    def banded(self, band: Tensor) -> "Coefficients":
        """Where a token writes the pairs that its row of the band (..., n, m + n) names, and not its own alone."""
        wide = lambda x: None if x is None else (x.mT @ band).mT  # noqa: E731
        late, last = wide(self.late), wide(self.last)
        assert late is not None
        return self._replace(table=self.table @ band, late=late, last=last)

    def earlier(self) -> "Coefficients":
        """Of a read, those of the token before."""
        first, table, first_S = _late(self.first, 1), _late(self.table, 0), _late(self.first_S, 0)
        assert first is not None and table is not None
        return self._replace(first=first, table=table, first_S=first_S)

    @staticmethod
    def of(lr: Tensor, keep: Tensor, first: Tensor, table: Tensor, **more: Tensor | None) -> "Coefficients":
        """With those of the last token."""
        return Coefficients(
            lr, keep, first, table, late=table[..., -1, :, None], kept=first[..., -1:, :], **more
        )


def _late(x: Tensor | None, first: float) -> Tensor | None:
    """x (..., n, m) one token later, with `first` for the first one."""
    return None if x is None else F.pad(x[..., :-1, :], (0, 0, 1, 0), value=first)


def _each(c: Coefficients) -> list[Coefficients]:
    parts: list[Any] = [[None] * c.lr.shape[2] if x is None else by_chunk(x) for x in c]
    return [Coefficients(*chunk) for chunk in zip(*parts, strict=True)]


def coefficients(rule: Rule, state: State, chunks: Chunks, watched: bool) -> dict[str, Coefficients]:
    """The coefficients of every weight, all chunks at once, from gates and keys."""
    write = None if chunks.write is None else chunks.write[:, None]
    open_chunk = rule.algorithm.step_bound > 0 and chunks.open
    shared: dict[tuple[int, ...], Coefficients] = {}
    table: dict[str, Coefficients] = {}
    for name in state.A:
        mine = [gate_of(chunks.gates, g, name) for g in (*rule.algorithm.gates, *rule.retention.gates)]
        key = tuple(id(g) for g in mine)
        # Weights that share their gates share these too, but for what each may have met in an open chunk.
        if key not in shared or open_chunk:
            lr = step_sizes(rule, state, chunks, name)
            keep = torch.ones_like(lr)
            if "forget" in rule.retention.gates:
                keep = 1 - gate_of(chunks.gates, "forget", name)
                keep = keep if write is None else torch.where(write, keep, 1)
            K0, steps = products(keep)
            if write is not None:
                steps = steps * write[..., None, :]
            step = -lr[..., None, :]
            if rule.algorithm.momentum:
                momentum = gate_of(chunks.gates, "momentum", name)
                H0, H = products(momentum if write is None else torch.where(write, momentum, 1))
                first_S = steps @ H0[..., None]
                shared[key] = Coefficients.of(
                    lr,
                    keep,
                    first=K0[..., None],
                    table=steps @ H * step,
                    first_S=first_S,
                    kept_S=first_S[..., -1:, :],
                    last=(H[..., -1, :] * step[..., 0, :])[..., None],
                    carry=H0[..., -1, None, None],
                    H=H * step if watched else None,
                    H0=H0 if watched else None,
                )
            else:
                shared[key] = Coefficients.of(lr, keep, K0[..., None], steps * step)
        table[name] = shared[key]
    return table


Factors = Callable[
    [Rule, State, Tensor, Tensor, Tree, Fixed, dict[str, Coefficients]], tuple[Tree, Tree, Tensor]
]
"""What finds the factors x_t, d_t of a chunk's gradients, and the inner loss: (rule, state, k, v, gates, fixed,
coefficients), fixed with rows and heads as one axis."""


def at_the_anchor(
    rule: Rule,
    state: State,
    k: Tensor,
    v: Tensor,
    gates: Tree,
    fixed: Fixed,
    coefs: dict[str, Coefficients],
) -> tuple[Tree, Tree, Tensor]:
    """Every token's gradient at the weights of the chunk's start: the chunkwise rule."""
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
    """What an observation shows of a chunk, (B, H, n); here, and only here, per-token weights are formed."""
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
