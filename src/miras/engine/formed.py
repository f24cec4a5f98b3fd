"""For any maps and gates: every S_t and A_t of a chunk is formed.

Shapes: B rows, H heads, N chunks, n tokens of a chunk; (d_in, d_out) one weight.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from miras.core.memory import Weights
from miras.core.recurrence import norm, observed
from miras.core.rule import Gates, Rule, State, close_chunk, directed, gate_of, linked
from miras.core.state import Tree
from miras.engine.chunks import Chunks, begun, written
from miras.engine.gradient import gates_of_bias, gradient_factors, leave_open
from miras.engine.kernels import accumulate, through
from miras.engine.recompute import recomputed
from miras.engine.tables import step_sizes


def formed_per_token(
    rule: Rule, state: State, fresh: State | None, chunks: Chunks, trace: list[Tree] | None
) -> tuple[Tensor, State]:
    """Chunks one after the other, forming S_t and A_t: for any maps and channel-wise gates."""
    state = begun(state, fresh, chunks, 0)
    made = _token_gates(rule, state, chunks)
    q, k, v = (x.unbind(2) for x in chunks[:3])
    gates = {name: g.unbind(2) for name, g in gates_of_bias(rule, chunks).items()}
    passed = {n: _passed(made["keep", n]) for n in state.A} if rule.retention.decayed else {}
    reads: list[Tensor] = []
    for j in range(len(q)):
        state = state if j == 0 else begun(state, fresh, chunks, j)
        mine = {name: g[j] for name, g in made.items()}
        write, end = written(chunks, j), chunks.ends[j]
        kept = {n: kept[j] for n, kept in passed.items()} if rule.retention.decayed else None
        of_bias = {name: g[j] for name, g in gates.items()}
        xs, ds, loss = gradient_factors(rule, state, k[j], v[j], of_bias, chunks.fixed, kept)

        form = partial(_form, rule, write, trace is not None)
        y, *rest = recomputed(form, {"q": q[j]}, xs, ds, state.A, state.S, mine, *chunks.fixed)
        reads.append(y)
        A = dict(zip(state.A, rest, strict=False))
        S = dict(zip(state.S, rest[len(A) :], strict=False))
        if trace is not None:
            momentary = torch.stack([_size(rule, xs[n], ds[n]) for n in xs]).norm(dim=0)
            here = {name: g[:, :, j] for name, g in chunks.gates.items()}
            seen = observed(here, {n: mine["lr", n] for n in A}, write) | {"loss": loss}
            seen |= {"momentary": momentary, "accumulated": rest[-2], "weight": rest[-1]}
            trace.append({n: x.detach() for n, x in seen.items()})
        retained = {n: r * kept[n][:, :, -1] for n, r in state.retained.items()} if kept else {}
        state = replace(state, A=A, S=S, retained=retained)
        state = close_chunk(rule, state) if end is None else leave_open(rule, state, chunks, j, end)
    return reads[0] if len(reads) == 1 else torch.cat(reads, 2), state


def _passed(keep: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """For each chunk the products of keep through every token, (B, H, n, d_in or 1, d_out or 1)."""
    before, _ = through(torch.stack(keep, 2).flatten(0, 1))
    return before.unflatten(0, keep[0].shape[:2]).unbind(2)


def _form(
    rule: Rule,
    write: Tensor | None,
    watched: bool,
    q: Tree,
    xs: Tree,
    ds: Tree,
    A: Tree,
    S: Tree,
    gates: Gates,
    base: Tree,
    outer: Tree,
) -> tuple[Tensor, ...]:
    """A chunk's reads, its last A and S, and if observed |S_t| and |W_t|, from S_t and A_t of every
    token."""
    last: dict[str, list[Tensor]] = {"A": [], "S": []}
    W: Tree = {}
    moved: Tree = {}
    for n in A:
        x, d = xs[n], ds[n]
        surprise = (x * d)[..., None] if rule.memory.elementwise else x[..., None] * d[..., None, :]
        surprise = surprise * -gates["lr", n]
        if rule.algorithm.momentum:
            surprise = accumulate(gates["momentum", n], surprise, S[n])
            # a view would keep those of every token alive
            last["S"].append(surprise[:, :, -1].clone())
        moved[n] = surprise
        step = directed(rule, surprise)
        if write is not None:
            step = torch.where(write[:, None, :, None, None], step, 0)
        grown = accumulate(gates["keep", n], step, A[n])
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


def _token_gates(rule: Rule, state: State, chunks: Chunks) -> dict[tuple[str, str], tuple[Tensor, ...]]:
    """lr, keep and momentum of every weight by chunk, (B, H, n, d_in or 1, d_out or 1); tokens that
    do not write change nothing."""
    write = None if chunks.write is None else chunks.write[:, None, ..., None, None]
    made: dict[tuple[str, str], tuple[Tensor, ...]] = {}

    def put(name: str, weight: str, gate: Tensor, else_: float) -> None:
        made[name, weight] = (gate if write is None else torch.where(write, gate, else_)).unbind(2)

    for n in state.A:
        put("lr", n, _wide(step_sizes(rule, state, chunks, n, gate_of(chunks.gates, "lr", n))), 0)
        lr = gate_of(chunks.gates, "lr", n)
        forget = (
            gate_of(chunks.gates, "forget", n) if "forget" in rule.retention.gates else torch.zeros_like(lr)
        )
        put("keep", n, 1 - _wide(forget), 1)
        if rule.algorithm.momentum:
            put("momentum", n, _wide(gate_of(chunks.gates, "momentum", n)), 1)
    return made


def _wide(gate: Tensor) -> Tensor:
    """A gate broadcast to a weight: (B, H, N, n) gets two more axes."""
    return gate[..., None, None] if gate.dim() == 4 else gate
