"""Layout of tokens on chunks: whatever the masks, the fast paths see whole chunks only.

Shapes: B rows, H heads, N chunks, n tokens of a chunk (or of the part of it in this call), Dk, Dv
widths.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.core.observe import Watch
from miras.core.recurrence import silent, unrolled
from miras.core.rule import Call, Gates, Rule, State, base_of, init_state
from miras.core.state import Tree, choose
from miras.engine.plan import Even, Grid, Plan
from miras.engine.recompute import recomputed

ACTIVATION_BYTES = 168 << 20
"""About the bytes kept for the backward pass; chunks before the last ones that fit are
recomputed."""


class Fixed(NamedTuple):
    """Constants of a call: base {weight: (B, H, d_in, d_out)}, the accumulator that a state's A is
    relative to (empty for 0), and outer {name: (H, width)}, a memory's outer parameters."""

    base: Tree
    outer: Tree

    def by_head(self, rows: int) -> "Fixed":
        """The same with rows and heads merged into one axis."""
        outer = {n: p.repeat(rows, 1) for n, p in self.outer.items()}
        return Fixed({n: a.flatten(0, 1) for n, a in self.base.items()}, outer)


class Chunks(NamedTuple):
    """Several chunks of a call.

    q, k (B, H, N, n, Dk), v (B, H, N, n, Dv), gates (B, H, N, n), or channel-wise with two more
    axes; write (B, N, n) or None for all; there (B, N, n) which tokens exist, or None for all;
    slots (B or 1, n) the places of the n tokens in their chunk; open: whether some row had already
    read part of the first chunk; starts, per chunk, (B,) rows that begin a document there, or None;
    ends, per chunk, (B,) the phase after it, or None if all rows complete it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates
    fixed: Fixed
    write: Tensor | None
    there: Tensor | None
    slots: Tensor
    open: bool
    starts: tuple[Tensor | None, ...]
    ends: tuple[Tensor | None, ...]


Run = Callable[[Rule, State, State | None, Chunks, "list[Tree] | None"], tuple[Tensor, State]]
"""Runs chunks through a memory: (rule, state, fresh state, chunks, trace)."""


def by_chunks(
    run: Run, rule: Rule, state: State, call: Call, plan: Plan, states: bool = True
) -> tuple[Tensor, State]:
    """A call, laid out on chunks of rule.chunk_size and run through the memory by `run`.

    states: whether `run` keeps the weights of every chunk for the backward pass.
    """
    fresh = None if call.reset is None or call.initial is None else init_state(rule, call.initial)
    fixed, steps = Fixed(base_of(rule, call.initial), call.outer), rule.algorithm.steps
    rule, call = unrolled(rule, call)
    layout = plan.steps(steps).chunks(rule.chunk_size)
    y, state = laid_out(run, rule, state, fresh, call, layout, fixed, plan.watch, steps, states)
    return y[:, :, steps - 1 :: steps], state


def laid_out(
    run: Run,
    rule: Rule,
    state: State,
    fresh: State | None,
    call: Call,
    layout: Even | Grid,
    fixed: Fixed,
    watch: Watch | None,
    steps: int,
    states: bool = True,
) -> tuple[Tensor, State]:
    """Single-step tokens, on a layout with chunks of rule.chunk_size tokens."""
    if 0 in call.q.shape[:3]:
        return call.v.new_zeros(call.v.shape), state
    trace: list[Tree] | None = None if watch is None else []
    if isinstance(layout, Even):
        y, state, place = _even(run, rule, state, fresh, call, layout, fixed, trace, states)
    else:
        y, state, place = _grid(run, rule, state, fresh, call, layout, fixed, trace, states)
    if watch is not None and trace is not None:
        seen = {name: torch.cat([t[name] for t in trace], -1) for name in trace[0]}
        if place is not None:
            index = place.clamp_min(0)[:, None].expand(-1, call.q.shape[1], -1)
            seen = {n: torch.where(place[:, None] < 0, 0, x.gather(2, index)) for n, x in seen.items()}
        watch.record(seen, steps)
    return y, state


def _even(
    run: Run,
    rule: Rule,
    state: State,
    fresh: State | None,
    call: Call,
    layout: Even,
    fixed: Fixed,
    trace: list[Tree] | None,
    states: bool,
) -> tuple[Tensor, State, Tensor | None]:
    """The rest of the open chunk, whole chunks, the remainder; or a single token. Returns reads,
    state, places of the tokens."""
    T, C, phase, opened = call.q.shape[2], rule.chunk_size, layout.phase, layout.open
    # Masks may exist without effect: on this layout only those of a single token have one.
    valid, start, write = (call.valid, call.reset, call.write) if T == 1 else (None, None, call.write)
    if valid is not None:  # keep padding values out of every product
        call = silent(rule, call, valid)
        write = valid if write is None else valid & write
    if start is not None:
        start = (start if valid is None else start & valid)[:, 0]
    reads: list[Tensor] = []
    at = 0
    while at < T:
        n = min(C - phase, T - at) if T > 1 else 1
        N = max(1, (T - at) // C) if n == C else 1
        cut = slice(at, at + N * n)
        begin = state.phase if start is None else torch.where(start, 0, state.phase)
        end: Tensor | None = None
        if T == 1:
            end = (begin + (1 if valid is None else valid[:, 0].long())) % C
        elif n < C - phase:
            end = begin + n
        chunks = Chunks(
            *(x[:, :, cut].unflatten(2, (N, n)) for x in (call.q, call.k, call.v)),
            gates={name: g[:, :, cut].unflatten(2, (N, n)) for name, g in call.gates.items()},
            fixed=fixed,
            write=None if write is None else write[:, cut].unflatten(1, (N, n)),
            there=None if valid is None else valid[:, None],
            slots=begin[:, None] + torch.arange(n, device=call.q.device),
            open=opened,
            starts=(start,) * N,
            ends=(end,) * N,
        )
        y, state = in_groups(run, rule, state, fresh, chunks, trace, states)
        reads.append(y)
        at, phase, opened = cut.stop, 0, False
    y = reads[0] if len(reads) == 1 else torch.cat(reads, 2)
    if valid is None:
        return y, state, None
    return y.masked_fill(~valid[:, None, :, None], 0), state, torch.where(valid, 0, -1)


def _grid(
    run: Run,
    rule: Rule,
    state: State,
    fresh: State | None,
    call: Call,
    layout: Grid,
    fixed: Fixed,
    trace: list[Tree] | None,
    states: bool,
) -> tuple[Tensor, State, Tensor]:
    """Rows at different phases, holes and documents: one gather moves each row to its own chunk
    grid."""
    q, k, v, gates, write = call.q, call.k, call.v, call.gates, call.write
    (B, H, T, _), N, C = q.shape, layout.count, rule.chunk_size
    if layout.anew is not None and fresh is not None:
        # A row that starts a document must not keep an open chunk, whose values would reach the
        # gradients.
        state = choose(layout.anew, fresh, state)
    if (source := layout.source) is not None:

        def spread(x: Tensor, quiet: float = 0.0) -> Tensor:  # (B, H, T, ...) to (B, H, N * C, ...)
            flat = x.flatten(3) if x.dim() > 3 else x[..., None]
            index = source[:, None, :, None].expand(B, H, N * C, flat.shape[-1])
            return F.pad(flat, (0, 0, 0, 1), value=quiet).gather(2, index).view(B, H, N * C, *x.shape[3:])

        q, k, v = spread(q), spread(k), spread(v)
        # In empty slots gates of the bias are 1 and everything else is 0, as in `silent`.
        gates = {n: spread(g, float(n[0] in rule.bias.gates)) for n, g in gates.items()}
        write = None if write is None else F.pad(write, (0, 1)).gather(1, source)
    if write is not None:
        write = write.unflatten(1, (N, C))
    if layout.there is not None:
        write = layout.there if write is None else write & layout.there
    chunks = Chunks(
        *(x.unflatten(2, (N, C)) for x in (q, k, v)),
        gates={name: g.unflatten(2, (N, C)) for name, g in gates.items()},
        fixed=fixed,
        write=write,
        there=layout.there,
        slots=torch.arange(C, device=q.device)[None],
        open=layout.open,
        starts=layout.starts,
        ends=layout.ends,
    )
    y, state = in_groups(run, rule, state, fresh, chunks, trace, states)
    back = layout.place.clamp_min(0)[:, None, :, None].expand(B, H, T, y.shape[-1])
    there = (layout.place >= 0)[:, None, :, None]
    return torch.where(there, y.gather(2, back), 0), state, layout.place


def in_groups(
    run: Run,
    rule: Rule,
    state: State,
    fresh: State | None,
    chunks: Chunks,
    trace: list[Tree] | None,
    states: bool = True,
) -> tuple[Tensor, State]:
    """All chunks in order; if their activations are large, in groups that the backward pass
    recomputes."""
    N = size = chunks.q.shape[2]
    if torch.is_grad_enabled() and N > 1:
        size = min(
            N, max(math.isqrt(N - 1) + 1, ACTIVATION_BYTES // _activation_bytes(chunks, state, states))
        )
    *early, last = [chunks] if size == N else _parts(chunks, size)
    reads: list[Tensor] = []
    for part in early:
        y, state = _run_again(run, rule, state, fresh, part, trace)
        reads.append(y)
    # The backward pass starts with the last group, and would recompute it immediately.
    y, state = run(rule, state, fresh, last, trace)
    return torch.cat([*reads, y], 2) if reads else y, state


def _activation_bytes(chunks: Chunks, state: State, states: bool) -> int:
    """About the bytes one chunk keeps for the backward pass: weights, their inputs and outputs, and
    its coefficients."""
    n, rows = chunks.q.shape[3], chunks.q.shape[0] * chunks.q.shape[1]
    parts = states * (1 + bool(state.S))
    weights = sum(
        parts * a.shape[-2] * a.shape[-1] + 4 * n * (a.shape[-2] + a.shape[-1]) // 2 for a in state.A.values()
    )
    return rows * (weights + 4 * n * n) * chunks.q.element_size()


def _parts(chunks: Chunks, size: int) -> list[Chunks]:
    """Groups of `size` chunks; the first has the remainder.

    Split, not sliced: the gradient of a slice has the size of the whole tensor.
    """
    N = chunks.q.shape[2]
    sizes = [N % size] * (N % size > 0) + [size] * (N // size)
    q, k, v = (x.split(sizes, 2) for x in chunks[:3])
    gates = {n: g.split(sizes, 2) for n, g in chunks.gates.items()}
    write = None if chunks.write is None else chunks.write.split(sizes, 1)
    there = None if chunks.there is None else chunks.there.split(sizes, 1)
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [
        chunks._replace(
            q=q[i],
            k=k[i],
            v=v[i],
            gates={n: g[i] for n, g in gates.items()},
            write=None if write is None else write[i],
            there=None if there is None else there[i],
            open=chunks.open and i == 0,
            starts=chunks.starts[bounds[i] : bounds[i + 1]],
            ends=chunks.ends[bounds[i] : bounds[i + 1]],
        )
        for i in range(len(q))
    ]


def _run_again(
    run: Run, rule: Rule, state: State, fresh: State | None, chunks: Chunks, trace: list[Tree] | None
) -> tuple[Tensor, State]:
    """`run` that saves only its inputs and runs again in the backward pass: the boundary of
    activation memory."""
    traces = [trace]
    names = list(state.tensors())

    def again(
        inputs: Tree, mine: Tree, start: Tree, gates: Gates, base: Tree, outer: Tree
    ) -> tuple[Tensor, ...]:
        y, end = run(
            rule,
            state.with_tensors(mine),
            None if fresh is None else fresh.with_tensors(start),
            chunks._replace(**inputs, gates=gates, fixed=Fixed(base, outer)),
            traces.pop() if traces else None,  # observations record the forward pass only
        )
        return (y, *(end.tensors()[name] for name in names))

    inputs = {"q": chunks.q, "k": chunks.k, "v": chunks.v}
    start = {} if fresh is None else fresh.tensors()
    y, *end = recomputed(again, inputs, state.tensors(), start, chunks.gates, *chunks.fixed)
    return y, state.with_tensors(dict(zip(names, end, strict=True)))


def begun(state: State, fresh: State | None, chunks: Chunks, j: int) -> State:
    """The state at the start of chunk j: `fresh` in the rows that begin a document there."""
    start = chunks.starts[j]
    return state if start is None or fresh is None else choose(start, fresh, state)


def written(chunks: Chunks, j: int) -> Tensor | None:
    """Which tokens of chunk j write, (B, n), None for all."""
    return None if chunks.write is None else chunks.write[:, j]


def contiguous(state: State) -> State:
    """A fixed memory layout, whether in memory or loaded: rounding depends on it, and resuming must
    be bit-exact."""
    return state.map(torch.Tensor.contiguous)
