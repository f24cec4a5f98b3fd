"""The same numbers as `recurrence`, chunkwise parallel: wherever the maps allow it, no weight is formed per token.

With gradients frozen at a chunk's start, token i's gradient is the rank-one x_i d_i^T in every weight, and S_t and
A_t are linear in the gradients (papers: Titans eq. 16 to 18; the dual form of TTT, appendix A):

    S_t = H[t,0] S_0 - sum_i H[t,i] lr_i x_i d_i^T          H: products of momentum
    A_t = K[t,0] A_0 + G[t,0] S_0 - sum_i G[t,i] x_i d_i^T   K: products of 1 - forget, G = K H diag(lr)

so a read x A_t is masked attention over the chunk: K[t,0] x A_0 + G[t,0] x S_0 - ((x X^T) . G) D. Where a map stands
between S and A or between A and the weights, or gates are channel-wise, the chunk's S_t and A_t are formed. Where
forgetting leads back to the initial accumulator, A is the difference from it and a read has x A_0 besides.

Shapes: B rows, H heads, N chunks, n tokens of a chunk (or of the piece of one that this call brings), Dk, Dv widths.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.core.algorithm import bound_factors
from miras.core.memory import Weights
from miras.core.observe import observe, observing, per_token
from miras.core.rule import (
    Inputs,
    Masks,
    Rule,
    State,
    anchor_weights,
    base_of,
    bias_gates,
    check,
    close_chunk,
    directed,
    gate_of,
    init_state,
    inner_loss,
    linked,
    norm,
    observed,
    per_head,
    recurrence,
    silence,
    unrolled,
)
from miras.core.state import Tree, apart, choose, known, ordinary
from miras.engine.kernels import accumulate, fast_step, products
from miras.engine.rows import grid

ACTIVATION_BYTES = 168 << 20
"""About as many bytes are kept for the backward pass; chunks before the last ones that fit are recomputed in it."""


@apart
@ordinary
def scan(
    rule: Rule,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tree,
    *,
    valid: Tensor | None = None,
    write: Tensor | None = None,
    reset: Tensor | None = None,
    initial: Tree | None = None,
    outer: Tree | None = None,
) -> tuple[Tensor, State]:
    """Any number of tokens through a memory; arguments, meaning and numbers are those of `recurrence`.

    The result does not depend on where a stream is cut. Activation memory grows with the square root of T. A
    retention whose `advance` is not the linear one has no chunkwise form: it runs the recurrence.
    """
    masks = Masks(valid, write, reset)
    if not rule.retention.linear:
        return recurrence(rule, state, q, k, v, gates, **masks._asdict(), initial=initial, outer=outer)
    run = dual if has_dual_form(rule, gates) else formed_per_token
    return scan_by(run, rule, state, (q, k, v, gates), masks, initial, outer)


def scan_by(
    run: "Run",
    rule: Rule,
    state: State,
    inputs: Inputs,
    masks: Masks,
    initial: Tree | None,
    outer: Tree | None,
) -> tuple[Tensor, State]:
    """`scan` of inputs q, k, v, gates, its chunks taken through the memory by `run`."""
    check(rule, state, *inputs, masks, initial, outer)
    fresh = None if initial is None else init_state(rule, initial)
    steps = rule.algorithm.steps
    rule, inputs, masks = unrolled(rule, inputs, masks)
    with per_token(steps):
        y, state = chunked(run, rule, state, fresh, inputs, masks, Fixed(base_of(rule, initial), outer or {}))
    return y[:, :, steps - 1 :: steps], state


def has_dual_form(rule: Rule, gates: Tree) -> bool:
    """Whether no weight need be formed per token: no map in the way, matrices, one gate per head."""
    maps = rule.retention.direct and rule.algorithm.direct and not rule.memory.elementwise
    names = (*rule.algorithm.gates, *rule.retention.gates)
    return maps and all(g.dim() < 5 for n, g in gates.items() if n.split(".")[0] in names)


class Fixed(NamedTuple):
    """What is the same for all tokens: base {weight: (B, H, d_in, d_out)}, the accumulator that a state's A counts
    from (empty for 0), and outer {name: (H, width)}, a memory's outer parameters."""

    base: Tree
    outer: Tree


def chunked(
    run: "Run", rule: Rule, state: State, fresh: State | None, inputs: Inputs, masks: Masks, fixed: Fixed
) -> tuple[Tensor, State]:
    """Lay the tokens out on chunks of rule.chunk_size, whatever the masks and phases, and run them."""
    T = inputs[0].shape[2]
    phases = known(state.phase)
    if not phases or T == 0:
        return inputs[2].new_zeros(inputs[2].shape), state
    if T == 1 or (masks.valid is None and masks.reset is None and len(set(phases)) == 1):
        return _aligned(run, rule, state, fresh, inputs, masks, fixed, phases[0])
    return _ragged(run, rule, state, fresh, inputs, masks, fixed)


class Chunks(NamedTuple):
    """Chunks side by side, as `_run` takes them.

    q, k (B, H, N, n, Dk), v (B, H, N, n, Dv), gates {name: (B, H, N, n), or channel-wise with two more axes}; write
    (B, N, n) or None for all; slots (B or 1, n) the places of the n tokens in their chunk;
    starts, per chunk, (B,) rows that begin a document there, or None; ends, per chunk, (B,) the phase after it, or
    True where all rows complete it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tree
    fixed: Fixed
    write: Tensor | None
    slots: Tensor
    starts: list[Tensor | None]
    ends: list[Tensor | bool]


Run = Callable[[Rule, State, State | None, Chunks, list[Tree] | None], tuple[Tensor, State]]
"""What takes chunks through a memory one after the other: (rule, state, fresh state, chunks, trace)."""


def _aligned(
    run: Run,
    rule: Rule,
    state: State,
    fresh: State | None,
    inputs: Inputs,
    masks: Masks,
    fixed: Fixed,
    phase: int,
) -> tuple[Tensor, State]:
    """All rows at one phase (or a single token): the open chunk's rest, whole chunks, the remainder."""
    q, k, v, gates = inputs
    T, C = q.shape[2], rule.chunk_size
    write = masks.write
    if masks.valid is not None:  # T == 1: keep the padding's numbers, whatever they are, out of every product
        write = masks.valid if write is None else masks.valid & write
        q, k, v = (silence(x, masks.valid) for x in (q, k, v))
        gates = {n: silence(g, masks.valid) for n, g in gates.items()}
    reads: list[Tensor] = []
    at = 0
    while at < T:
        n = min(C - phase, T - at) if T > 1 else 1
        N = max(1, (T - at) // C) if n == C else 1
        cut = slice(at, at + N * n)
        start = masks.reset  # T == 1 wherever there are resets here
        if start is not None:
            start = (start if masks.valid is None else start & masks.valid)[:, 0]
        begin = state.phase if start is None else torch.where(start, 0, state.phase)
        end: Tensor | bool = True
        if T == 1:
            end = (begin + (1 if masks.valid is None else masks.valid[:, 0].long())) % C
        elif n < C - phase:
            end = begin + n
        chunks = Chunks(
            *(x[:, :, cut].unflatten(2, (N, n)) for x in (q, k, v)),
            gates={name: g[:, :, cut].unflatten(2, (N, n)) for name, g in gates.items()},
            fixed=fixed,
            write=None if write is None else write[:, cut].unflatten(1, (N, n)),
            slots=begin[:, None] + torch.arange(n, device=q.device),
            starts=[start] * N,
            ends=[end] * N,
        )
        seen_at = None if masks.valid is None else torch.where(masks.valid, 0, -1)
        y, state = _groups(run, rule, state, fresh, chunks, observe_at=seen_at)
        reads.append(y)
        at, phase = cut.stop, 0
    y = reads[0] if len(reads) == 1 else torch.cat(reads, 2)
    if masks.valid is not None:
        y = y.masked_fill(~masks.valid[:, None, :, None], 0)
    return y, state


def _ragged(
    run: Run, rule: Rule, state: State, fresh: State | None, inputs: Inputs, masks: Masks, fixed: Fixed
) -> tuple[Tensor, State]:
    """Rows at different phases, holes and documents: one gather puts each row on its own chunk grid."""
    q, k, v, gates = inputs
    B, H, T, _ = q.shape
    C = rule.chunk_size
    everywhere = torch.ones(B, T, dtype=torch.bool, device=q.device)
    valid = everywhere if masks.valid is None else masks.valid
    reset = ~everywhere if masks.reset is None else masks.reset & valid
    if masks.reset is not None and fresh is not None:
        # A row that begins anew has no rest of a chunk before it, whose numbers would reach the gradients.
        state = choose((reset & (valid.cumsum(1) == 1)).any(1), fresh, state)
    place = grid(state.phase, valid, reset, C)
    N = max(1, -(-(int(place.max()) + 1) // C))
    source = torch.full((B, N * C + 1), T, dtype=torch.long, device=q.device)
    source = source.scatter(
        1, torch.where(valid, place, N * C), torch.arange(T, device=q.device).expand(B, T)
    )
    source = source[:, : N * C]
    there = source < T

    if N * C != T or not bool((source == torch.arange(N * C, device=q.device)).all()):

        def spread(x: Tensor) -> Tensor:  # (B, H, T, ...) to (B, H, N * C, ...), zeros where no token is
            flat = x.flatten(3) if x.dim() > 3 else x[..., None]
            index = source[:, None, :, None].expand(B, H, N * C, flat.shape[-1])
            return F.pad(flat, (0, 0, 0, 1)).gather(2, index).view(B, H, N * C, *x.shape[3:])

        q, k, v = spread(q), spread(k), spread(v)
        gates = {n: spread(g) for n, g in gates.items()}

    def on_grid(mask: Tensor) -> Tensor:  # (B, T) to (B, N, C)
        return F.pad(mask, (0, 1)).gather(1, source).unflatten(1, (N, C))

    occupied = there.unflatten(1, (N, C))
    write = occupied if masks.write is None else on_grid(masks.write) & occupied
    last = torch.where(occupied, torch.arange(1, C + 1, device=q.device), 0).amax(-1)
    starts = on_grid(reset)[..., 0]
    ends: list[Tensor | bool] = []
    phase = state.phase
    everyone = occupied[..., -1].all(0).tolist()
    for j in range(N):
        phase = torch.where(last[:, j] > 0, last[:, j] % C, phase)
        ends.append(True if everyone[j] else phase)
    anyone = starts.any(0).tolist()
    chunks = Chunks(
        *(x.unflatten(2, (N, C)) for x in (q, k, v)),
        gates={name: g.unflatten(2, (N, C)) for name, g in gates.items()},
        fixed=fixed,
        write=None if bool(write.all()) else write,
        slots=torch.arange(C, device=q.device)[None],
        starts=[starts[:, j] if anyone[j] else None for j in range(N)],
        ends=ends,
    )
    y, state = _groups(run, rule, state, fresh, chunks, observe_at=place)
    back = place.clamp_min(0)[:, None, :, None].expand(B, H, T, y.shape[-1])
    return torch.where(valid[:, None, :, None], y.gather(2, back), 0), state


def _groups(
    run: Run,
    rule: Rule,
    state: State,
    fresh: State | None,
    chunks: Chunks,
    observe_at: Tensor | None = None,
) -> tuple[Tensor, State]:
    """All chunks in order; when their activations are large, in groups that the backward pass recomputes.

    observe_at (B, T) places of the tokens among the chunks' slots, where an observation wants them.
    """
    N = chunks.q.shape[2]
    observation = observing()
    trace: list[Tree] | None = None if observation is None else []
    size = N
    if torch.is_grad_enabled() and N > 1:
        size = min(N, max(math.isqrt(N - 1) + 1, ACTIVATION_BYTES // _activation_bytes(chunks, state)))
    parts = [chunks] if size == N else _parts(chunks, size)
    reads: list[Tensor] = []
    for part in parts:  # the backward pass begins with the last one: nothing is won by recomputing it
        if part is parts[-1]:
            y, state = run(rule, state, fresh, part, trace)
        else:
            y, state = _run_again(run, rule, state, fresh, part, trace)
        reads.append(y)
    if observation is not None and trace is not None:
        seen = {name: torch.cat([t[name] for t in trace], -1) for name in trace[0]}
        if observe_at is not None:
            index = observe_at.clamp_min(0)[:, None].expand(-1, chunks.q.shape[1], -1)
            seen = {n: torch.where(observe_at[:, None] < 0, 0, x.gather(2, index)) for n, x in seen.items()}
        observation.record(seen)
    return reads[0] if len(reads) == 1 else torch.cat(reads, 2), state


def _activation_bytes(chunks: Chunks, state: State) -> int:
    """About what one chunk keeps for the backward pass: weights, what goes in and out of them, and its tables."""
    n, rows, parts = chunks.q.shape[3], chunks.q.shape[0] * chunks.q.shape[1], 1 + bool(state.S)
    weights = sum(
        parts * a.shape[-2] * a.shape[-1] + 4 * n * (a.shape[-2] + a.shape[-1]) // 2 for a in state.A.values()
    )
    return rows * (weights + 4 * n * n) * chunks.q.element_size()


def _parts(chunks: Chunks, size: int) -> list[Chunks]:
    """Groups of `size` chunks, the first one of what is left over.

    Split, not sliced: the gradient of a slice is as large as what it was cut from.
    """
    N = chunks.q.shape[2]
    sizes = [N % size] * (N % size > 0) + [size] * (N // size)
    q, k, v = (x.split(sizes, 2) for x in chunks[:3])
    gates = {n: g.split(sizes, 2) for n, g in chunks.gates.items()}
    write = None if chunks.write is None else chunks.write.split(sizes, 1)
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [
        Chunks(
            q=q[i],
            k=k[i],
            v=v[i],
            gates={n: g[i] for n, g in gates.items()},
            fixed=chunks.fixed,
            write=None if write is None else write[i],
            slots=chunks.slots,
            starts=chunks.starts[bounds[i] : bounds[i + 1]],
            ends=chunks.ends[bounds[i] : bounds[i + 1]],
        )
        for i in range(len(q))
    ]


def _run_again(
    run: Run, rule: Rule, state: State, fresh: State | None, chunks: Chunks, trace: list[Tree] | None
) -> tuple[Tensor, State]:
    """`run` that keeps only its inputs and runs again in the backward pass: the boundary of activation memory."""
    traces = [trace]
    names = list(state.tensors())

    def again(
        inputs: Tree, mine: Tree, start: Tree, gates: Tree, base: Tree, outer: Tree
    ) -> tuple[Tensor, ...]:
        y, end = run(
            rule,
            state.with_tensors(mine),
            None if fresh is None else fresh.with_tensors(start),
            chunks._replace(**inputs, gates=gates, fixed=Fixed(base, outer)),
            traces.pop() if traces else None,  # an observation sees the forward pass only
        )
        return (y, *(end.tensors()[name] for name in names))

    inputs = {"q": chunks.q, "k": chunks.k, "v": chunks.v}
    start = {} if fresh is None else fresh.tensors()
    y, *end = recomputed(again, inputs, state.tensors(), start, chunks.gates, *chunks.fixed)
    return y, state.with_tensors(dict(zip(names, end, strict=True)))


def recomputed(fn: Callable[..., tuple[Tensor, ...]], *trees: Tree) -> tuple[Tensor, ...]:
    """fn(*trees) of which only the inputs are kept for the backward pass."""

    def again(*leaves: Tensor) -> tuple[Tensor, ...]:
        values = iter(leaves)
        return fn(*({name: next(values) for name in tree} for tree in trees))

    return _Recompute.apply(again, *(x for tree in trees for x in tree.values()))


class _Recompute(torch.autograd.Function):
    """Calls a function of tensors without keeping its graph; the backward pass calls it again with one."""

    @staticmethod
    def forward(ctx: Any, fn: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.fn = fn
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            outputs = fn(*inputs)
        taken = {id(x) for x in inputs}
        distinct: list[Tensor] = []
        for x in outputs:  # one output must not be another one or an input
            distinct.append(x.clone() if id(x) in taken else x)
            taken.add(id(x))
        ctx.mark_non_differentiable(*(x for x in distinct if not x.is_floating_point()))
        return tuple(distinct)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed, again = ctx.needs_input_grad[1:], torch.is_grad_enabled()
        # Inputs may depend on each other; aliases do not, so that each gets its own gradient and no other's.
        inputs = [
            x.view_as(x) if again else x.detach().requires_grad_(need)
            for x, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad(), observe(active=False):
            outputs = ctx.fn(*inputs)
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, create_graph=again
            )
        )
        return (None, *(next(found) if need else None for need in needed))


def dual(
    rule: Rule,
    state: State,
    fresh: State | None,
    chunks: Chunks,
    trace: list[Tree] | None,
    factors: "Factors | None" = None,
) -> tuple[Tensor, State]:
    """Chunks one after the other in the dual form; what depends on gates and keys alone is done for all at once.

    Inside, rows and heads are one axis (R = B * H), so that products need no reshaping.
    """
    factors = at_the_anchor if factors is None else factors
    if chunks.starts[0] is not None and fresh is not None:
        state = choose(chunks.starts[0], fresh, state)
    B, H = chunks.q.shape[:2]
    table = _coefficients(rule, state, chunks, trace is not None)
    per_chunk = {n: _by_chunk(c) for n, c in table.items()}
    gates = {name: _cut(g.squeeze(-2) if g.dim() == 6 else g) for name, g in chunks.gates.items()}
    fixed = Fixed(
        {n: a.flatten(0, 1) for n, a in chunks.fixed.base.items()},
        {n: p.repeat(B, 1) for n, p in chunks.fixed.outer.items()},
    )
    q, k, v = map(_cut, chunks[:3])
    closed: State | None = None
    reads: list[Tensor] = []
    for j in range(len(q)):
        start, end = chunks.starts[j], chunks.ends[j]
        if j > 0 and start is not None and fresh is not None:
            state = choose(start, fresh, state)
        coefs = {n: c[j] for n, c in per_chunk.items()}
        gates_j = {name: g[j] for name, g in gates.items()}
        xs, ds, loss = factors(rule, state, k[j], v[j], gates_j, fixed, coefs)

        after: dict[str, list[Tensor]] = {}
        read = partial(_step, state, fixed.base, xs, ds, coefs, after)
        reads.append(rule.memory.apply(q[j], _weights(read, fixed.outer)))
        if trace is not None:
            seen = {
                n: x.unflatten(0, (B, H))
                for n, x in (_watch(state, fixed.base, xs, ds, coefs) | {"loss": loss}).items()
            }
            lr = {n: c.lr.unflatten(0, (B, H)) for n, c in coefs.items()}
            write = None if chunks.write is None else chunks.write[:, j]
            seen |= observed({n: g[:, :, j] for n, g in chunks.gates.items()}, lr, write)
            trace.append({n: x.detach() for n, x in seen.items()})
        A, S = {n: after[n][0] for n in state.A}, {n: after[n][1] for n in state.S}
        if isinstance(end, Tensor):
            kept = {n: coefs[n].first[:, -1:].unflatten(0, (B, H)) for n in state.retained}
            retained = {n: r * kept[n] for n, r in state.retained.items()}
            state = State(A, S, state.anchor, state.phase, retained, state.recent)
            state = leave_open(rule, state, chunks, j, end)
        else:
            closed = close_chunk(rule, state) if closed is None else closed
            state = replace(closed, A=A, S=S, anchor=A)
    # In one layout whether it was held or loaded: a product's rounding depends on it, and resuming is bit for bit.
    state = state.map(torch.Tensor.contiguous)
    y = reads[0] if len(reads) == 1 else torch.cat(reads, 1)
    return y.unflatten(0, (B, H)), state


def _cut(x: Tensor) -> tuple[Tensor, ...]:
    """(B, H, N, ...) to N of (R, ...)."""
    return x.flatten(0, 1).unbind(1)


def _step(
    state: State,
    base: Tree,
    xs: Tree,
    ds: Tree,
    coefs: "dict[str, Coefficients]",
    after: dict[str, list[Tensor]],
    name: str,
    x: Tensor,
) -> Tensor:
    """A weight's part of the reads; what the chunk leaves of its A and S goes to `after`."""
    c = coefs[name]
    momentum = [t for t in (c.first_S, state.S.get(name), c.last, c.carry) if t is not None]
    y, *after[name] = fast_step(x, xs[name], ds[name], c.table, c.first, state.A[name], *momentum)
    return torch.baddbmm(y, x, base[name]) if base else y


def _weights(linear: Callable[[str, Tensor], Tensor], outer: Tree) -> Weights:
    def scale(name: str, x: Tensor) -> Tensor:
        raise AssertionError(f"weight {name!r} scales: such memories have their weights formed")

    return Weights(linear, scale, {n: p[:, None] for n, p in outer.items()})


def formed_per_token(
    rule: Rule, state: State, fresh: State | None, chunks: Chunks, trace: list[Tree] | None
) -> tuple[Tensor, State]:
    """Chunks one after the other, each with its S_t and A_t formed: for any maps and channel-wise gates."""
    if chunks.starts[0] is not None and fresh is not None:
        state = choose(chunks.starts[0], fresh, state)
    made = _token_gates(rule, state, chunks)
    q, k, v = (x.unbind(2) for x in chunks[:3])
    gates = {name: g.unbind(2) for name, g in chunks.gates.items()}
    reads: list[Tensor] = []
    for j in range(len(q)):
        start, end = chunks.starts[j], chunks.ends[j]
        if j > 0 and start is not None and fresh is not None:
            state = choose(start, fresh, state)
        gates_j = {name: g[j] for name, g in gates.items()}
        mine = {name: g[j] for name, g in made.items()}
        write = None if chunks.write is None else chunks.write[:, j]
        kept = {n: mine[f"keep.{n}"].cumprod(2) for n in state.A} if rule.retention.decayed else None
        xs, ds, loss = gradient_factors(rule, state, k[j], v[j], gates_j, chunks.fixed, kept)

        form = partial(_form, rule, write, trace is not None)
        y, *rest = recomputed(form, {"q": q[j]}, xs, ds, state.A, state.S, mine, *chunks.fixed)
        reads.append(y)
        A = dict(zip(state.A, rest, strict=False))
        S = dict(zip(state.S, rest[len(A) :], strict=False))
        if trace is not None:
            momentary = torch.stack([_size(rule, xs[n], ds[n]) for n in xs]).norm(dim=0)
            seen = observed(gates_j, {n: mine[f"lr.{n}"] for n in A}, write) | {"loss": loss}
            seen |= {"momentary": momentary, "accumulated": rest[-2], "weight": rest[-1]}
            trace.append({n: x.detach() for n, x in seen.items()})
        retained = {n: r * kept[n][:, :, -1] for n, r in state.retained.items()} if kept else {}
        state = State(A, S, state.anchor, state.phase, retained if state.retained else {}, state.recent)
        if end is True:
            state = close_chunk(rule, state)
        elif isinstance(end, Tensor):
            state = leave_open(rule, state, chunks, j, end)
    return reads[0] if len(reads) == 1 else torch.cat(reads, 2), state


def _form(
    rule: Rule,
    write: Tensor | None,
    watched: bool,
    q: Tree,
    xs: Tree,
    ds: Tree,
    A: Tree,
    S: Tree,
    gates: Tree,
    base: Tree,
    outer: Tree,
) -> tuple[Tensor, ...]:
    """A chunk's reads, its last A and S, and if watched |S_t| and |W_t|, from S_t and A_t of every token."""
    last: dict[str, list[Tensor]] = {"A": [], "S": []}
    W: Tree = {}
    moved: Tree = {}
    for n in A:
        x, d = xs[n], ds[n]
        surprise = (x * d)[..., None] if rule.memory.elementwise else x[..., None] * d[..., None, :]
        surprise = surprise * -gates[f"lr.{n}"]
        if rule.algorithm.momentum:
            surprise = accumulate(gates[f"momentum.{n}"], surprise, S[n])
            last["S"].append(surprise[:, :, -1].clone())  # a view would keep those of every token
        moved[n] = surprise
        step = directed(rule, surprise)
        if write is not None:
            step = torch.where(write[:, None, :, None, None], step, 0)
        grown = accumulate(gates[f"keep.{n}"], step, A[n])
        last["A"].append(grown[:, :, -1].clone())
        W[n] = linked(rule, grown + base[n][:, :, None] if base else grown)
    weights = Weights(
        linear=lambda n, x: (x[..., None, :] @ W[n])[..., 0, :],
        scale=lambda n, x: x * W[n][..., 0],
        outer={n: p[:, None] for n, p in outer.items()},
    )
    y = rule.memory.apply(q["q"], weights)
    seen = (norm(moved), norm(W)) if watched else ()
    return (y, *last["A"], *last["S"], *seen)


def _size(rule: Rule, x: Tensor, d: Tensor) -> Tensor:
    """|grad_t| of one weight."""
    return (x * d).norm(dim=-1) if rule.memory.elementwise else x.norm(dim=-1) * d.norm(dim=-1)


def _token_gates(rule: Rule, state: State, chunks: Chunks) -> dict[str, tuple[Tensor, ...]]:
    """lr, keep and momentum of every weight by chunk, (B, H, n, d_in or 1, d_out or 1); what is unwritten stays."""
    write = None if chunks.write is None else chunks.write[:, None, ..., None, None]
    made: dict[str, tuple[Tensor, ...]] = {}

    def put(name: str, gate: Tensor, else_: float) -> None:
        made[name] = (gate if write is None else torch.where(write, gate, else_)).unbind(2)

    for n in state.A:
        put(f"lr.{n}", _wide(step_sizes(rule, state, chunks, n)), 0)
        lr = gate_of(chunks.gates, "lr", n)
        forget = (
            gate_of(chunks.gates, "forget", n) if "forget" in rule.retention.gates else torch.zeros_like(lr)
        )
        put(f"keep.{n}", 1 - _wide(forget), 1)
        if rule.algorithm.momentum:
            put(f"momentum.{n}", _wide(gate_of(chunks.gates, "momentum", n)), 1)
    return made


def _wide(gate: Tensor) -> Tensor:
    """A gate beside a weight: (B, H, N, n) gets two more axes."""
    return gate[..., None, None] if gate.dim() == 4 else gate


def step_sizes(rule: Rule, state: State, chunks: Chunks, name: str) -> Tensor:
    """One weight's steps, (B, H, N, n) or channel-wise, after the algorithm and the step bound; 0 unwritten."""
    algorithm = rule.algorithm
    lr = algorithm.step_size(gate_of(chunks.gates, "lr", name), chunks.k)
    if chunks.write is not None:
        write = chunks.write[:, None]
        lr = torch.where(write if lr.dim() == 4 else write[..., None, None], lr, 0)
    strength = algorithm.step_bound
    if not strength:
        return lr

    def factors(k: Tensor, lr: Tensor) -> tuple[Tensor]:
        return (bound_factors((k @ k.mT).abs().tril(-1), lr, strength),)

    head = lr.abs() if lr.dim() == 4 else lr.abs().amax((-2, -1))
    (bound,) = _Recompute.apply(factors, chunks.k, head)
    if any(known(state.phase)):
        met = (chunks.k[:, :, 0] @ state.recent["key"].mT).abs()
        first = bound_factors(met, state.recent[name], strength)
        bound = torch.cat([bound[:, :, :1] * first[:, :, None], bound[:, :, 1:]], 2)
    return lr * (bound if lr.dim() == 4 else bound[..., None, None])


def leave_open(rule: Rule, state: State, chunks: Chunks, j: int, phase: Tensor) -> State:
    """The state after a piece of a chunk: `recent` takes the piece's keys and steps at their places."""
    recent = state.recent
    if rule.algorithm.step_bound:
        k = chunks.k[:, :, j]
        B, H, n, _ = k.shape
        slots = chunks.slots.expand(B, n)
        write = None if chunks.write is None else chunks.write[:, j]

        def put(old: Tensor, new: Tensor) -> Tensor:  # (B, H, C, D) with new (B, H, n, D) at the slots
            index = slots[:, None, :, None].expand(B, H, n, new.shape[-1])
            if write is not None:
                new = torch.where(write[:, None, :, None], new, old.gather(2, index))
            return old.scatter(2, index, new)

        size = rule.algorithm.step_size
        lr = {n_: per_head(size(gate_of(chunks.gates, "lr", n_)[:, :, j], k)) for n_ in state.A}
        recent = {"key": put(state.recent["key"], k)}
        recent |= {n_: put(state.recent[n_][..., None], x[..., None])[..., 0] for n_, x in lr.items()}
    state = State(state.A, state.S, state.anchor, phase, state.retained, recent)
    return choose(phase == 0, close_chunk(rule, state), state)


class Coefficients(NamedTuple):
    """What one weight's update is made of, chunk by chunk, with the signs of the equations at the top of the file.

    lr (..., n) the bounded step, keep (..., n); first (..., n, 1), K0; table (..., n, n), -G of the equations. With
    momentum first_S (..., n, 1), G0, and at the chunk's last token last (..., n, 1), -H, and carry (..., 1, 1), H0.
    H (..., n, n), -H of the equations, and H0 (..., n) are for an observer only.
    """

    lr: Tensor
    keep: Tensor
    first: Tensor
    table: Tensor
    first_S: Tensor | None = None
    last: Tensor | None = None
    carry: Tensor | None = None
    H: Tensor | None = None
    H0: Tensor | None = None


def _by_chunk(c: Coefficients) -> list[Coefficients]:
    parts: list[Any] = [[None] * c.lr.shape[2] if x is None else _cut(x) for x in c]
    return [Coefficients(*chunk) for chunk in zip(*parts, strict=True)]


def _coefficients(rule: Rule, state: State, chunks: Chunks, watched: bool) -> dict[str, Coefficients]:
    """The coefficients of every weight, all chunks at once, from gates and keys."""
    write = None if chunks.write is None else chunks.write[:, None]
    open_chunk = rule.algorithm.step_bound > 0 and any(known(state.phase))
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
                shared[key] = Coefficients(
                    lr,
                    keep,
                    first=K0[..., None],
                    table=steps @ H * step,
                    first_S=steps @ H0[..., None],
                    last=(H[..., -1, :] * step[..., 0, :])[..., None],
                    carry=H0[..., -1, None, None],
                    H=H * step if watched else None,
                    H0=H0 if watched else None,
                )
            else:
                shared[key] = Coefficients(lr, keep, K0[..., None], steps * step)
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


def gradient_factors(
    rule: Rule, state: State, k: Tensor, v: Tensor, gates: Tree, fixed: Fixed, kept: Tree | None
) -> tuple[Tree, Tree, Tensor]:
    """For every token at once, the factors of its rank-one gradients x_t d_t^T, and its inner loss.

    x_t is what a linear map took in, d_t the derivative of the loss by what it gave out: one backward pass. A weight
    that scales has the gradient x_t * d_t. kept {weight: (B, H, n, d_in or 1, d_out or 1)} the products of 1 - forget
    from the chunk's start through each token, where the gradient is taken at the decayed memory.
    """
    anchor, base, outer = state.anchor, *fixed
    if rule.algorithm.first_order:
        anchor, base = ({n: w.detach() for n, w in tree.items()} for tree in (anchor, base))
    if kept is not None and state.retained:
        anchor = {n: w * state.retained[n] for n, w in anchor.items()}
    apart: Tree = {}  # what decay leaves alone, where the gradient is taken at the decayed memory
    if kept is None:
        base = {n: b.view_as(anchor[n]) for n, b in base.items()}
        anchor = anchor_weights(rule, anchor, base)
    else:
        apart = base
    # Where nothing asks for an outer gradient none is built, also outside of no_grad.
    inputs = (
        *anchor.values(),
        *apart.values(),
        *state.A.values(),
        k,
        v,
        *gates.values(),
        *outer.values(),
        *(kept or {}).values(),
    )
    create = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if not create:
        v = v.detach()
        anchor, apart, gates, outer = (
            {n: x.detach() for n, x in tree.items()} for tree in (anchor, apart, gates, outer)
        )
        kept = None if kept is None else {n: g.detach() for n, g in kept.items()}
    if not (create and k.requires_grad):
        k = k.detach().requires_grad_()
    xs: Tree = {}
    outs: Tree = {}

    def keep(name: str, x: Tensor, y: Tensor) -> Tensor:
        assert name not in xs, f"a memory uses its weight {name!r} twice: give each map its own"
        if kept is not None and kept[name].shape[-2] == 1:
            y = y * kept[name][..., 0, :]
        if apart:
            y = y + alone(name, x)
        if not y.requires_grad:  # a map of something else than k, such as a memory's inner bias
            y = y.requires_grad_()
        xs[name], outs[name] = x, y
        return y

    def seen(name: str, x: Tensor) -> Tensor:
        by_channel = kept is not None and kept[name].shape[-2] > 1
        return x * kept[name][..., 0] if by_channel else x  # pyright: ignore[reportOptionalSubscript]

    def alone(name: str, x: Tensor) -> Tensor:
        w = apart[name]
        return x * w.mT if rule.memory.elementwise else _product(x, w)

    weights = Weights(
        linear=lambda n, x: keep(n, x, _product(seen(n, x), anchor[n])),
        scale=lambda n, x: keep(n, x, seen(n, x) * anchor[n].mT),
        outer={n: p[:, None] for n, p in outer.items()},
    )
    with torch.enable_grad():
        loss = inner_loss(rule, rule.memory.apply(k, weights), v, bias_gates(rule, gates))
        ds = torch.autograd.grad(loss, list(outs.values()), torch.ones_like(loss), create_graph=create)
    if not create:
        xs, loss = {n: x.detach() for n, x in xs.items()}, loss.detach()
    return xs, dict(zip(outs, ds, strict=True)), loss


def _product(x: Tensor, W: Tensor) -> Tensor:
    """x W, x (R, n, d_in) or (B, H, n, d_in), W (B, H, d_in, d_out) or (R, d_in, d_out).

    It has less around it than x @ W.
    """
    return torch.bmm(x.flatten(0, -3), W.flatten(0, -3)).view(*x.shape[:-1], W.shape[-1])


def _watch(state: State, base: Tree, xs: Tree, ds: Tree, coefs: dict[str, Coefficients]) -> Tree:
    """|grad_t|, |S_t| and |W_t| of a chunk's tokens (R, n); here, and only here, per-token weights are formed."""
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
    return {"momentary": momentary, "accumulated": norm(moved), "weight": norm(weights)}
