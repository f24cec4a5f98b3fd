"""A learned memory as four choices, its state, and its definition: the token-by-token recurrence.

Shapes: B rows, H heads, T tokens, Dk key width, Dv value width, C = chunk_size; (d_in, d_out) one weight.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from miras.core.algorithm import Algorithm, GradientDescent, bound_factors
from miras.core.bias import L2, Bias
from miras.core.memory import Matrix, Memory
from miras.core.observe import observing
from miras.core.retention import Decay, Retention
from miras.core.state import Record, Tree, choose, ordinary


@dataclass(frozen=True)
class Rule:
    """A sequence model as memory structure x attentional bias x retention gate x memory algorithm (MIRAS 4.4).

    S_t = momentum_t S_{t-1} - lr_t grad_t
    A_t = (1 - forget_t) A_{t-1} + S_t
    W_t = link(A_t),  y_t = memory(q_t; W_t)
    grad_t = d bias(memory(k_t; W_anchor), v_t) / d W,  W_anchor = the weights at the start of t's chunk

    `chunk_size` is the number of tokens that share one anchor. It is part of the model, not a speed setting.
    """

    memory: Memory = Matrix()
    bias: Bias = L2()
    retention: Retention = Decay()
    algorithm: Algorithm = GradientDescent()
    chunk_size: int = 16

    def __post_init__(self) -> None:
        for name, kind in _AXES.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(
                    f"Rule: {name} must be a {kind.__name__}, got {getattr(self, name)!r}; "
                    f"write for instance Rule({name}={_EXAMPLES[name]})"
                )
        if isinstance(self.chunk_size, bool) or not isinstance(self.chunk_size, int) or self.chunk_size < 1:  # pyright: ignore
            raise ValueError(
                f"Rule: chunk_size must be a whole number of at least 1, got {self.chunk_size!r}"
            )

    def gates(self) -> tuple[str, ...]:
        """Names of the gates the four choices read, each given once per token and head."""
        return (*self.algorithm.all_gates(), *self.retention.gates, *self.bias.gates)


_AXES: dict[str, type] = {"memory": Memory, "bias": Bias, "retention": Retention, "algorithm": Algorithm}
_EXAMPLES = {"memory": "Matrix()", "bias": "L2()", "retention": "Decay()", "algorithm": "GradientDescent()"}


@dataclass(frozen=True)
class State(Record):
    """All that a memory needs to go on, as a value.

    A: accumulator, S: surprise (empty without momentum), anchor: the weights gradients are taken at; each
    {weight: (B, H, d_in, d_out)}. phase: (B,) int64, tokens already read of the open chunk.
    retained: {weight: (B, H)} running product of 1 - forget in the open chunk (only if the gradient is taken
    at the decayed memory). recent: the open chunk's "key" (B, H, C, Dk) and steps {weight: (B, H, C)}, zero
    where nothing was written (only with the step bound).
    """

    A: Tree
    S: Tree
    anchor: Tree
    phase: Tensor
    retained: Tree
    recent: Tree


class Masks(NamedTuple):
    """Which tokens exist, write, and start a document; each (B, T) bool, or None for all, all, none."""

    valid: Tensor | None = None
    write: Tensor | None = None
    reset: Tensor | None = None

    def time(self, tokens: slice) -> "Masks":
        """The same masks for some of the tokens."""
        return Masks(*(None if m is None else m[:, tokens] for m in self))


def link(rule: Rule, A: Tree) -> Tree:
    """The weights that belong to an accumulator."""
    return {n: rule.retention.link(a) for n, a in A.items()}


def init_state(rule: Rule, A0: Tree) -> State:
    """The state before the first token, from initial accumulators {weight: (B, H, d_in, d_out)}.

    Names and shapes are those of `rule.memory.shapes(Dk, Dv)`. Raises ValueError when they are not.
    """
    if not A0 or any(a.dim() != 4 for a in A0.values()):
        raise ValueError(
            "init_state: every weight must be (B, H, d_in, d_out); got "
            + (", ".join(f"{n} {tuple(a.shape)}" for n, a in A0.items()) or "no weights")
        )
    first, last = next(iter(A0.values())), list(A0.values())[-1]
    B, H, d_key, _ = first.shape
    expected = rule.memory.shapes(d_key, last.shape[-1])
    if {n: tuple(a.shape) for n, a in A0.items()} != {n: (B, H, *shape) for n, shape in expected.items()}:
        raise ValueError(
            f"init_state: {type(rule.memory).__name__} at widths {d_key}, {last.shape[-1]} needs weights "
            f"{expected} behind (B, H); got { ({n: tuple(a.shape) for n, a in A0.items()}) }"
        )
    retained, recent = {}, {}
    if rule.retention.decayed:
        retained = {n: first.new_ones(B, H) for n in A0}
    if rule.algorithm.step_bound:
        recent = {"key": first.new_zeros(B, H, rule.chunk_size, d_key)}
        recent |= {n: first.new_zeros(B, H, rule.chunk_size) for n in A0}
    return State(
        A=dict(A0),
        S={n: torch.zeros_like(a) for n, a in A0.items()} if rule.algorithm.momentum else {},
        anchor=link(rule, A0),
        phase=torch.zeros(B, dtype=torch.long, device=first.device),
        retained=retained,
        recent=recent,
    )


def close_chunk(rule: Rule, state: State) -> State:
    """The state at a chunk's end: gradients are taken at the weights of now from here on."""
    return State(
        A=state.A,
        S=state.S,
        anchor=link(rule, state.A),
        phase=torch.zeros_like(state.phase),
        retained={n: torch.ones_like(r) for n, r in state.retained.items()},
        recent={n: torch.zeros_like(r) for n, r in state.recent.items()},
    )


def gate_of(gates: Tree, name: str, weight: str) -> Tensor:
    """The gate `name` for one weight of the memory: its own (`name.weight`) if given, else the shared one."""
    own = gates.get(f"{name}.{weight}")
    return gates[name] if own is None else own


def check(
    rule: Rule, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Tree, masks: Masks, initial: Tree | None
) -> None:
    """Raise ValueError when the arguments of a scan do not fit together."""
    if q.dim() != 4 or k.shape != q.shape or v.shape[:3] != k.shape[:3] or v.dim() != 4:
        raise ValueError(
            f"scan: q and k must be (B, H, T, Dk) and v (B, H, T, Dv); got q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    B, H, T, d_key = k.shape
    want = rule.memory.shapes(d_key, v.shape[-1])
    got = {n: tuple(a.shape) for n, a in state.A.items()}
    if got != {n: (B, H, *shape) for n, shape in want.items()}:
        raise ValueError(
            f"scan: the state belongs to another memory: for {B} rows, {H} heads and widths {d_key}, "
            f"{v.shape[-1]} the weights are {want}, the state holds {got}"
        )
    parts = {
        "S": (bool(state.S), rule.algorithm.momentum, "momentum"),
        "retained": (bool(state.retained), rule.retention.decayed, "a gradient at the decayed memory"),
        "recent": (bool(state.recent), rule.algorithm.step_bound > 0, "the step bound"),
    }
    for name, (there, needed, why) in parts.items():
        if there != needed:
            raise ValueError(
                f"scan: the state belongs to another rule: it holds {'a' if there else 'no'} {name}, which rules "
                f"with {why} have; begin with init_state(rule, A0)"
            )
    if int(state.phase.max()) >= rule.chunk_size or (
        state.recent and state.recent["key"].shape[2] != rule.chunk_size
    ):
        raise ValueError(
            f"scan: the state belongs to a rule with another chunk size than this one's {rule.chunk_size}; "
            f"chunk_size is part of the model"
        )
    known = {f"{name}{tail}" for name in rule.gates() for tail in ("", *(f".{n}" for n in want))}
    for name, gate in gates.items():
        if name not in known:
            raise ValueError(f"scan: unknown gate {name!r}; this rule reads {', '.join(rule.gates())}")
        if gate.shape != (B, H, T):
            raise ValueError(f"scan: gate {name!r} must be (B, H, T) = {(B, H, T)}, got {tuple(gate.shape)}")
    for name in rule.gates():
        if name not in gates and not all(f"{name}.{n}" in gates for n in want):
            raise ValueError(f"scan: gate {name!r} is missing; this rule reads {', '.join(rule.gates())}")
    for name, mask in masks._asdict().items():
        if mask is not None and (mask.shape != (B, T) or mask.dtype != torch.bool):
            raise ValueError(
                f"scan: {name} must be a bool mask (B, T) = {(B, T)}, got {mask.dtype} {tuple(mask.shape)}"
            )
    if masks.reset is not None and initial is None:
        raise ValueError("scan: reset goes back to the initial accumulators; give them as initial=A0")


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
) -> tuple[Tensor, State]:
    """The definition of a rule, one token at a time: (B, H, T, Dk) queries to (B, H, T, Dv) reads.

    q, k (B, H, T, Dk), v (B, H, T, Dv), gates {name or name.weight: (B, H, T)}. Reads are post-update and
    include their own token. A token outside `valid` changes nothing and reads 0. A token outside `write` reads
    and takes its place in its chunk, but changes neither A nor S. `reset` marks a document's first token: back
    to the accumulators `initial`, S = 0, a new chunk. Raises ValueError when shapes or gates do not fit.
    """
    check(rule, state, q, k, v, gates, Masks(valid, write, reset), initial)
    B, _, T, _ = q.shape
    if T == 0:
        return v.new_zeros(v.shape), state
    everywhere = torch.ones(B, T, dtype=torch.bool, device=q.device)
    valid = everywhere if valid is None else valid
    writes = valid if write is None else valid & write
    starts = ~everywhere if reset is None else reset & valid
    hole = ~valid[:, None, :]
    q, k, v = (x.masked_fill(hole[..., None], 0) for x in (q, k, v))
    gates = {n: g.masked_fill(hole, 0) for n, g in gates.items()}
    fresh = None if initial is None else init_state(rule, initial)
    reads, seen = [], []
    for t in range(T):
        if fresh is not None:
            state = choose(starts[:, t], fresh, state)
        now = slice(t, t + 1)
        token = {name: gate[:, :, now] for name, gate in gates.items()}
        y, state, trace = _token(
            rule, state, q[:, :, now], k[:, :, now], v[:, :, now], token, valid[:, t], writes[:, t]
        )
        reads.append(y)
        seen.append(trace)
    if (observation := observing()) is not None:
        observation.record({name: torch.cat([s[name] for s in seen], -1) for name in seen[0]})
    return torch.cat(reads, 2), state


def _token(
    rule: Rule, state: State, q: Tensor, k: Tensor, v: Tensor, gates: Tree, valid: Tensor, writes: Tensor
) -> tuple[Tensor, State, Tree]:
    """One token (T = 1) of every row; valid and writes (B,)."""
    at = lambda name, n: gate_of(gates, name, n)[..., None]  # noqa: E731  (B, H, 1, 1), beside a weight
    where = lambda new, old: torch.where(writes.view(-1, *[1] * (old.dim() - 1)), new, old)  # noqa: E731
    keep = {n: 1 - at("forget", n) for n in state.A}

    retained = {n: where(r * keep[n][..., 0, 0], r) for n, r in state.retained.items()}
    inputs = (*state.anchor.values(), *retained.values(), k, v, *gates.values())
    create = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    with torch.enable_grad():
        W = {n: w * retained[n][..., None, None] if retained else w for n, w in state.anchor.items()}
        W = {n: w if w.requires_grad and create else w.detach().requires_grad_() for n, w in W.items()}
        loss = rule.bias.loss(rule.memory.apply(k, lambda n, x: x @ W[n]), v, gates)
        parts = torch.autograd.grad(loss.sum(), list(W.values()), create_graph=create)
    grad = dict(zip(W, parts, strict=True))

    lr = {n: gate_of(gates, "lr", n) for n in state.A}
    if rule.algorithm.step_bound:
        met = (k @ state.recent["key"].mT).abs()
        lr = {n: x * bound_factors(met, state.recent[n], rule.algorithm.step_bound) for n, x in lr.items()}
    S, A, steps = {}, {}, {}
    for n in state.A:
        before = state.S.get(n)
        step = -lr[n][..., None] * grad[n]
        if before is not None:
            step = at("momentum", n) * before + step
            S[n] = where(step, before)
        steps[n] = where(step, torch.zeros_like(step) if before is None else before)
        A[n] = where(keep[n] * state.A[n] + step, state.A[n])

    W_now = link(rule, A)
    y = rule.memory.apply(q, lambda n, x: x @ W_now[n])
    y = torch.where(valid[:, None, None, None], y, torch.zeros_like(y))

    recent = state.recent
    if rule.algorithm.step_bound:
        here = torch.arange(rule.chunk_size, device=q.device) == state.phase[:, None]
        here = (here & writes[:, None])[:, None, :]
        recent = {"key": torch.where(here[..., None], k, recent["key"])} | {
            n: torch.where(here, gate_of(gates, "lr", n), recent[n]) for n in state.A
        }
    phase = state.phase + valid.long()
    state = State(A=A, S=S, anchor=state.anchor, phase=phase, retained=retained, recent=recent)
    state = choose(phase == rule.chunk_size, close_chunk(rule, state), state)

    seen = observed(rule, gates, lr, writes) | {"loss": loss}
    seen |= {"momentary": norm(grad), "accumulated": norm(steps), "weight": norm(W_now)}
    seen = {n: x.detach().reshape(*k.shape[:2], 1) for n, x in seen.items()}
    return y, state, {n: torch.where(valid[:, None, None], x, 0) for n, x in seen.items()}


def observed(rule: Rule, gates: Tree, lr: Tree, writes: Tensor | None) -> Tree:
    """The gates (B, H, ...) as an observation shows them: `lr` after its bound, and 0 where nothing was written."""
    shown = dict(gates)
    for name in gates:
        if name.split(".")[0] == "lr":
            weight = name.removeprefix("lr.")
            if weight not in lr:  # the gate that weights without their own share
                weight = next((n for n in lr if f"lr.{n}" not in gates), "")
            if weight:
                mask = 1 if writes is None else writes.view(writes.shape[0], 1, -1)
                shown[name] = lr[weight] * mask
    return shown


def norm(tree: Tree) -> Tensor:
    """Euclidean norm over all weights of a memory: {weight: (B, H, ..., d_in, d_out)} -> (B, H, ...)."""
    return torch.stack([x.square().sum((-2, -1)) for x in tree.values()]).sum(0).sqrt()
