"""The definition of a rule: the recurrence, one token at a time.

Shapes: B rows, H heads, T tokens, Dk key width, Dv value width; (d_in, d_out) one weight.
"""

from dataclasses import replace

import torch
from torch import Tensor

from miras.core.algorithm import bound_factors
from miras.core.check import check, place
from miras.core.observe import Watch, watching
from miras.core.rule import (
    Call,
    Gates,
    Rule,
    State,
    anchor_weights,
    base_of,
    beside,
    bias_gates,
    close_chunk,
    directed,
    formed,
    gate_of,
    init_state,
    inner_loss,
    per_head,
    spelled,
    weights,
)
from miras.core.state import Tree, apart, choose, ordinary


@apart
@ordinary
def recurrence(
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
    """The definition of a rule, one token at a time: (B, H, T, Dk) queries to (B, H, T, Dv) reads.

    q, k (B, H, T, Dk), v (B, H, T, Dv), gates {name or name.weight: (B, H, T), or channel-wise (B,
    H, T, d_in, 1) or (B, H, T, 1, d_out)}; `outer` {name: (H, width)} are a memory's outer
    parameters. Each token is read after its own write. A token outside `valid` changes nothing and
    reads 0. A token outside `write` reads and counts towards its chunk, but changes neither A nor
    S. `reset` marks a document's first token: it starts from the accumulators `initial`, S = 0 and
    a new chunk; a retention with towards="initial" always needs `initial`. Raises ValueError if
    shapes or gates do not fit.
    """
    call = Call.of(q, k, v, gates, valid, write, reset, initial, outer)
    check(rule, state, call)
    place(rule, state)
    return token_by_token(rule, state, call, watching("memory"))


def token_by_token(rule: Rule, state: State, call: Call, watch: Watch | None) -> tuple[Tensor, State]:
    """`recurrence` for a checked call; observations go to `watch`."""
    fresh = None if call.initial is None else init_state(rule, call.initial)
    base, steps = base_of(rule, call.initial), rule.algorithm.steps
    rule, call = unrolled(rule, call)
    B, _, T, _ = call.q.shape
    if 0 in (B, T):
        return call.v.new_zeros(call.v.shape)[:, :, steps - 1 :: steps], state
    everywhere = torch.ones(B, T, dtype=torch.bool, device=call.q.device)
    valid = everywhere if call.valid is None else call.valid
    writes = valid if call.write is None else valid & call.write
    starts = ~everywhere if call.reset is None else call.reset & valid
    call = silent(rule, call, valid)
    reads: list[Tensor] = []
    seen: list[Tree] = []
    for t in range(T):
        now = _token(call, t)
        if fresh is not None:
            state = choose(starts[:, t], fresh, state)
        y, state, trace = _read_and_write(rule, state, base, now, writes[:, t], valid[:, t])
        there = valid[:, None, t, None]
        reads.append(torch.where(there[..., None], y, 0))
        seen.append({n: torch.where(there, x.detach().reshape(*y.shape[:3]), 0) for n, x in trace.items()})
    if watch is not None:
        watch.record({name: torch.cat([s[name] for s in seen], -1) for name in seen[0]}, steps)
    return torch.cat(reads[steps - 1 :: steps], 2), state


def _token(call: Call, t: int) -> Call:
    """One token of every row."""
    now = slice(t, t + 1)
    q, k, v = (x[:, :, now] for x in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v, gates={n: g[:, :, now] for n, g in call.gates.items()})


def _read_and_write(
    rule: Rule, state: State, base: Tree, now: Call, writes: Tensor, there: Tensor
) -> tuple[Tensor, State, Tree]:
    """One token (T = 1): the read, the next state, and the values to observe; writes, there
    (B,)."""
    after, grad, loss, lr = write(rule, state, base, now, writes)
    moved = after.S if rule.algorithm.momentum else {n: -_wide(lr[n]) * grad[n] for n in grad}
    unmoved = state.S if rule.algorithm.momentum else {n: torch.zeros_like(x) for n, x in moved.items()}
    moved, after = choose(writes, moved, unmoved), choose(writes, after, state)
    if rule.schedule.gathers:
        after = choose(there & rule.schedule.due(state.phase, rule.chunk_size), taken(rule, after), after)
    at = {"after": after.A, "before": state.A}.get(rule.schedule.read)
    W = anchor_weights(rule, state.anchor, base) if at is None else weights(rule, at, base)
    y = rule.memory.apply(now.q, formed(W, now.outer))
    trace = observed(now.gates, lr, writes) | {"loss": loss}
    trace |= {
        "momentary": norm(grad),
        "accumulated": norm(moved),
        "weight": norm(weights(rule, after.A, base)),
    }
    phase = state.phase + there.long()
    after = replace(after, phase=phase, past=_passed(rule, state.past, now, writes, there))
    return y, choose(phase == rule.chunk_size, close_chunk(rule, after), after), trace


def write(
    rule: Rule, state: State, base: Tree, now: Call, writes: Tensor
) -> tuple[State, Tree, Tensor, Tree]:
    """Write one token: the next state, its gradient and inner loss, and the steps taken.

    S = momentum S - lr grad
    A = advance(A, 1 - forget, direction(S)), or later with one update per chunk
    """
    algorithm, retention, gathers = rule.algorithm, rule.retention, rule.schedule.gathers
    gate = lambda name, n: _wide(gate_of(now.gates, name, n))  # noqa: E731
    keep = {n: torch.ones_like(a[..., :1, :1]) for n, a in state.A.items()}
    if "forget" in retention.gates:
        keep = choose(writes, {n: 1 - gate("forget", n) for n in keep}, keep)
    retained = {n: r * keep[n] for n, r in state.retained.items()}
    grad, loss = gradient(rule, state, base, now, retained or keep)
    lr, recent = _steps(rule, state, now)
    S, A = {}, {}
    for n in state.A:
        step = -_wide(lr[n]) * grad[n]
        if gathers:
            S[n], A[n] = state.S[n] + step, state.A[n]
            continue
        momentum = gate("momentum", n) if algorithm.momentum else None
        surprise = algorithm.surprise(state.S.get(n), momentum, step)
        if algorithm.momentum:
            S[n] = surprise
        A[n] = retention.advance(state.A[n], keep[n], directed(rule, surprise))
    return replace(state, A=A, S=S, retained=retained, recent=recent), grad, loss, lr


def taken(rule: Rule, state: State) -> State:
    """The state after the update of a chunk: A = advance(A, retained, direction(S)), S = 0."""
    advance = rule.retention.advance
    return replace(
        state,
        A={n: advance(a, state.retained[n], directed(rule, state.S[n])) for n, a in state.A.items()},
        S={n: torch.zeros_like(x) for n, x in state.S.items()},
        retained={n: torch.ones_like(x) for n, x in state.retained.items()},
    )


def gradient(rule: Rule, state: State, base: Tree, now: Call, kept: Tree) -> tuple[Tree, Tensor]:
    """d bias(memory(k; W), v) / dW and the bias itself; W the weights of the chunk's start.

    If the gradient is taken after forgetting, W is multiplied by `kept`.
    """
    anchor = state.anchor
    trees = (anchor, base, kept, now.gates, now.outer, state.past, {"k": now.k, "v": now.v})
    create = torch.is_grad_enabled() and any(x.requires_grad for tree in trees for x in tree.values())
    with torch.enable_grad():
        if rule.algorithm.first_order:
            anchor, base = ({n: w.detach() for n, w in tree.items()} for tree in (anchor, base))
        if rule.retention.decayed:
            anchor = {n: w * kept[n] for n, w in anchor.items()}
        W = anchor_weights(rule, anchor, base)
        # A view: k and v may be computed from the same tensor, but are constants here.
        W = {
            n: w.view_as(w) if w.requires_grad and create else w.detach().requires_grad_()
            for n, w in W.items()
        }
        k, v, of_bias, share = _pairs(rule, state.past, now)
        loss = inner_loss(rule, rule.memory.apply(k, formed(W, now.outer)), v, of_bias)
        parts = torch.autograd.grad((loss * share).sum(), list(W.values()), create_graph=create)
    return dict(zip(W, parts, strict=True)), loss[..., -1:]


def _pairs(rule: Rule, past: Tree, now: Call) -> tuple[Tensor, Tensor, Tree, Tensor | float]:
    """The pairs of a token's loss window, the bias's gates for them, and their shares."""
    if not past:
        return now.k, now.v, bias_gates(rule, now.gates), 1.0
    pairs = {n: torch.cat([past[n], x], 2) for n, x in _own(rule, past, now).items()}
    return pairs["key"], pairs["value"], {n: pairs[f"bias_{n}"] for n in rule.bias.gates}, pairs["share"]


def _own(rule: Rule, past: Tree, now: Call) -> Tree:
    """The token's own pair; a gate of the bias may be one number per token where `past` holds
    channels."""
    own = {"key": now.k, "value": now.v, "share": now.gates["share", ""]}
    own |= {f"bias_{n}": g for n, g in bias_gates(rule, now.gates).items()}
    return {
        n: own[n].reshape(*own[n].shape[:3], -1).expand_as(x[:, :, :1]) if x.dim() > 3 else own[n]
        for n, x in past.items()
    }


def _passed(rule: Rule, past: Tree, now: Call, writes: Tensor, there: Tensor) -> Tree:
    """The loss window of the next token; a pair that was not written has share 0."""
    if not past:
        return past
    own = _own(rule, past, now)
    own["share"] = torch.where(writes[:, None, None], own["share"], 0)
    return choose(there, {n: torch.cat([past[n][:, :, 1:], x], 2) for n, x in own.items()}, past)


def _steps(rule: Rule, state: State, now: Call) -> tuple[Tree, Tree]:
    """The token's step for each weight, bounded by the earlier keys of its chunk, and these keys
    with its own."""
    algorithm = rule.algorithm
    sizes = {n: algorithm.step_size(gate_of(now.gates, "lr", n), now.k) for n in state.A}
    if not algorithm.step_bound:
        return sizes, {}
    met = (now.k @ state.recent["key"].mT).abs()
    bounds = {n: bound_factors(met, state.recent[n], algorithm.step_bound) for n in sizes}
    lr = {n: x * (bounds[n] if x.dim() == 3 else beside(bounds[n])) for n, x in sizes.items()}
    here = (torch.arange(rule.chunk_size, device=now.k.device) == state.phase[:, None])[:, None]
    recent = {"key": torch.where(here[..., None], now.k, state.recent["key"])}
    return lr, recent | {n: torch.where(here, per_head(x), state.recent[n]) for n, x in sizes.items()}


def _wide(gate: Tensor) -> Tensor:
    """One token's gate, broadcast to a weight: (B, H, 1) or (B, H, 1, i, o) to (B, H, 1 or i, 1 or
    o)."""
    return gate[:, :, 0] if gate.dim() == 5 else gate[..., None]


def unrolled(rule: Rule, call: Call) -> tuple[Rule, Call]:
    """Tokens with several steps as single-step tokens: the first forgets, all write, the last one
    is read."""
    n = rule.algorithm.steps
    if n == 1:
        return rule, call
    first = torch.arange(call.q.shape[2] * n, device=call.q.device) % n == 0

    def spread(name: str, gate: Tensor) -> Tensor:
        if name == "lr":
            return gate.flatten(2, 3)
        gate = gate.repeat_interleave(n, 2)
        return gate * first.view(-1, *[1] * (gate.dim() - 3)) if name == "forget" else gate

    valid, writes, reset = (
        None if m is None else m.repeat_interleave(n, 1) for m in (call.valid, call.write, call.reset)
    )
    call = replace(
        call,
        q=call.q.repeat_interleave(n, 2),
        k=call.k.flatten(2, 3),
        v=call.v.flatten(2, 3),
        gates={gate: spread(gate[0], g) for gate, g in call.gates.items()},
        valid=valid,
        write=writes,
        reset=None if reset is None else reset & first,
    )
    return rule.by_step, call


def silent(rule: Rule, call: Call, valid: Tensor) -> Call:
    """The call with padding tokens set to 0; valid (B, T).

    Gates of the bias are 1 there: it may divide by them, and NaN must not reach a gradient.
    """

    def silence(x: Tensor, quiet: float = 0.0) -> Tensor:  # (B, H, T, ...)
        return x.masked_fill(~valid[:, None].unflatten(-1, (-1, *[1] * (x.dim() - 3))), quiet)

    q, k, v = (silence(x) for x in (call.q, call.k, call.v))
    gates = {n: silence(g, float(n[0] in rule.bias.gates)) for n, g in call.gates.items()}
    return replace(call, q=q, k=k, v=v, gates=gates)


def observed(gates: Gates, lr: Tree, writes: Tensor | None) -> Tree:
    """The gates as shown in observations, (B, H, ...): `lr` after its bound, and 0 where nothing
    was written.

    A channel-wise gate is averaged.
    """
    shown: Tree = {}
    for (name, weight), gate in gates.items():
        if name == "lr":
            # The shared gate is shown for the first weight without a gate of its own.
            mine = weight or next((n for n in lr if ("lr", n) not in gates), "")
            mask = 1 if writes is None else writes.view(writes.shape[0], 1, -1)
            shown[spelled((name, weight))] = _mean(lr[mine]) * mask if mine else _mean(gate)
        else:
            shown[spelled((name, weight))] = _mean(gate)
    return shown


def _mean(gate: Tensor) -> Tensor:
    return gate.mean((-2, -1)) if gate.dim() == 5 else gate


def norm(tree: Tree) -> Tensor:
    """Euclidean norm over all weights of a memory: {weight: (B, H, ..., d_in, d_out)} -> (B, H,
    ...)."""
    return torch.stack([x.square().sum((-2, -1)) for x in tree.values()]).sum(0).sqrt()
