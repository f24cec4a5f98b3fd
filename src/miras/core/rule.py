"""A learned memory as four choices, its state, and its definition: the token-by-token recurrence.

Shapes: B rows, H heads, T tokens, Dk key width, Dv value width, C = chunk_size; (d_in, d_out) one weight.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from miras.core.algorithm import Algorithm, GradientDescent, bound_factors
from miras.core.bias import L2, Bias
from miras.core.memory import Matrix, Memory, Weights
from miras.core.observe import observing, per_token
from miras.core.retention import Decay, Retention
from miras.core.state import Record, Tree, apart, choose, known, ordinary
from miras.core.typed import Typed


@dataclass(frozen=True)
class Rule(Typed):
    """A sequence model as memory structure x attentional bias x retention gate x memory algorithm (MIRAS 4.4).

    S_t = momentum_t S_{t-1} - lr_t grad_t
    A_t = (1 - forget_t) A_{t-1} + direction(S_t)
    W_t = link(A_t),  y_t = memory(q_t; W_t)
    grad_t = d bias(memory(k_t; W_anchor), v_t) / d W,  W_anchor = the weights at the start of t's chunk

    With retention.towards = "initial" the second line is A_t = A_0 + (1 - forget_t) (A_{t-1} - A_0) + direction(S_t).
    `chunk_size` is the number of tokens that share one anchor. It is part of the model, not a speed setting.
    Raises TypeError for a choice of the wrong kind, ValueError for a combination that has no meaning.
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
        super().__post_init__()
        if self.chunk_size < 1:
            raise ValueError(f"Rule: chunk_size must be at least 1, got {self.chunk_size}")
        for name in _AXES:
            if reason := getattr(self, name).refusal(self):
                raise ValueError(
                    f"Rule: {', '.join(repr(getattr(self, n)) for n in _AXES)} has no meaning: {reason}"
                )

    def gates(self) -> tuple[str, ...]:
        """Names of the gates the four choices read, each given per token and head, or channel-wise."""
        return (*self.algorithm.gates, *self.retention.gates, *self.bias.gates)


_AXES: dict[str, type] = {"memory": Memory, "bias": Bias, "retention": Retention, "algorithm": Algorithm}
_EXAMPLES = {"memory": "Matrix()", "bias": "L2()", "retention": "Decay()", "algorithm": "GradientDescent()"}


@dataclass(frozen=True)
class State(Record):
    """All that a memory needs to go on, as a value.

    A: accumulator, S: surprise (empty without momentum), anchor: the weights gradients are taken at; each
    {weight: (B, H, d_in, d_out)}. Where forgetting leads back to the initial accumulator A_0, A holds the difference
    from it, and anchor that difference at the chunk's start: A_0 stays the model's, so that the outer loop moves it
    also under a state that is carried. phase: (B,) int64, tokens already read of the open chunk (steps, where a
    token takes several). retained: the same shapes, running product of 1 - forget in the open chunk (only if the
    gradient is taken at the decayed memory and a chunk is longer than a token). recent: the open chunk's "key"
    (B, H, C, Dk) and steps {weight: (B, H, C)}, zero where nothing was written (only with the step bound).
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


def weights(rule: Rule, A: Tree, base: Tree) -> Tree:
    """The weights that belong to an accumulator; base as `base_of` gives it."""
    return {n: linked(rule, a + base[n] if base else a) for n, a in A.items()}


def linked(rule: Rule, A: Tensor) -> Tensor:
    """link(A). Raises ValueError where it has not the shape of A."""
    return _like(A, rule.retention.link(A), f"{type(rule.retention).__name__}.link")


def directed(rule: Rule, S: Tensor) -> Tensor:
    """direction(S). Raises ValueError where it has not the shape of S."""
    return _like(S, rule.algorithm.direction(S), f"{type(rule.algorithm).__name__}.direction")


def inner_loss(rule: Rule, pred: Tensor, target: Tensor, gates: Tree) -> Tensor:
    """The bias's loss of every token, (..., d_value) to (...,).

    Raises ValueError where it has another shape: a sum over tokens or rows would make each gradient depend on all.
    """
    _like(target, pred, f"{type(rule.memory).__name__}.apply")
    loss = rule.bias.loss(pred, target, gates)
    if loss.shape != pred.shape[:-1]:
        raise ValueError(
            f"{type(rule.bias).__name__}.loss must give one number per token, {tuple(pred.shape[:-1])} for "
            f"predictions {tuple(pred.shape)}; got {tuple(loss.shape)}. Reduce over the last axis only, as "
            f".sum(-1) does"
        )
    return loss


def _like(old: Tensor, new: Tensor, what: str) -> Tensor:
    if new.shape != old.shape:
        raise ValueError(f"{what} must give the shape {tuple(old.shape)}; got {tuple(new.shape)}")
    return new


def anchor_weights(rule: Rule, anchor: Tree, base: Tree) -> Tree:
    """The weights that a state's anchor stands for."""
    return weights(rule, anchor, base) if base else anchor


def base_of(rule: Rule, initial: Tree | None) -> Tree:
    """The accumulator that a state's A counts from: A_0 where forgetting leads back to it, else none."""
    return initial or {} if rule.retention.returns else {}


def _anchor(rule: Rule, A: Tree) -> Tree:
    """What a state keeps, at a chunk's start, of the weights of its accumulator."""
    return A if rule.retention.returns else weights(rule, A, {})


def init_state(rule: Rule, A0: Tree) -> State:
    """The state before the first token, from initial accumulators {weight: (B, H, d_in, d_out)}.

    Names and shapes are those of `rule.memory.shapes(Dk, Dv)`. Raises ValueError when they are not.
    """
    if not A0 or any(a.dim() != 4 for a in A0.values()):
        raise ValueError(
            "init_state: every weight must be (B, H, d_in, d_out); got "
            + (", ".join(f"{n} {tuple(a.shape)}" for n, a in A0.items()) or "no weights")
        )
    first = next(iter(A0.values()))
    B, H = first.shape[:2]
    d_key, d_value = rule.memory.widths({n: (a.shape[2], a.shape[3]) for n, a in A0.items()})
    expected = rule.memory.shapes(d_key, d_value)
    if {n: tuple(a.shape) for n, a in A0.items()} != {n: (B, H, *shape) for n, shape in expected.items()}:
        raise ValueError(
            f"init_state: {type(rule.memory).__name__} at widths {d_key}, {d_value} needs weights "
            f"{expected} behind (B, H); got { ({n: tuple(a.shape) for n, a in A0.items()}) }"
        )
    rule = stepwise(rule)
    # Copies: what a state holds does not change when an optimizer changes the A0 of a model.
    begin = torch.zeros_like if rule.retention.returns else torch.clone
    A = {n: begin(a, memory_format=torch.contiguous_format) for n, a in A0.items()}
    retained, recent = {}, {}
    if carries_retained(rule):
        retained = {n: torch.ones_like(a) for n, a in A0.items()}
    if rule.algorithm.step_bound:
        recent = {"key": first.new_zeros(B, H, rule.chunk_size, d_key)}
        recent |= {n: first.new_zeros(B, H, rule.chunk_size) for n in A0}
    return State(
        A=A,
        S={n: torch.zeros_like(a) for n, a in A0.items()} if rule.algorithm.momentum else {},
        anchor=_anchor(rule, A),
        phase=torch.zeros(B, dtype=torch.long, device=first.device),
        retained=retained,
        recent=recent,
    )


def stepwise(rule: Rule) -> Rule:
    """The rule whose tokens are the single steps of this one's: the same, unless a token takes several."""
    steps = rule.algorithm.steps
    if steps == 1:
        return rule
    size = 1 if rule.chunk_size == 1 else rule.chunk_size * steps
    return replace(rule, algorithm=replace(rule.algorithm, steps=1), chunk_size=size)  # pyright: ignore


def carries_retained(rule: Rule) -> bool:
    """Whether the open chunk's product of 1 - forget is part of the state."""
    return rule.retention.decayed and rule.chunk_size > 1


def close_chunk(rule: Rule, state: State) -> State:
    """The state at a chunk's end: gradients are taken at the weights of now from here on."""
    return State(
        A=state.A,
        S=state.S,
        anchor=_anchor(rule, state.A),
        phase=torch.zeros_like(state.phase),
        retained={n: torch.ones_like(r) for n, r in state.retained.items()},
        recent={n: torch.zeros_like(r) for n, r in state.recent.items()},
    )


def gate_of(gates: Tree, name: str, weight: str) -> Tensor:
    """The gate `name` for one weight of the memory: its own (`name.weight`) if given, else the shared one."""
    own = gates.get(f"{name}.{weight}")
    return gates[name] if own is None else own


def beside(gate: Tensor) -> Tensor:
    """A gate (B, H, ...tokens) or (B, H, ...tokens, d_in or 1, d_out or 1) with the axes of a weight at its end."""
    return gate[..., None, None]


def bias_gates(rule: Rule, gates: Tree) -> Tree:
    """What the bias reads: per token (B, H, T), or channel-wise (B, H, T, d_value)."""
    return {n: gates[n].squeeze(-2) if gates[n].dim() == 5 else gates[n] for n in rule.bias.gates}


def per_head(lr: Tensor) -> Tensor:
    """The largest size over the channels of a step (B, H, T) or (B, H, T, d_in or 1, d_out or 1)."""
    return lr.abs().amax((-2, -1)) if lr.dim() == 5 else lr.abs()


def check(
    rule: Rule,
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tree,
    masks: Masks,
    initial: Tree | None,
    outer: Tree | None,
) -> None:
    """Raise ValueError when the arguments of a scan do not fit together."""
    steps = rule.algorithm.steps
    if steps > 1:
        if k.dim() != 5 or k.shape[3] != steps or v.dim() != 5 or v.shape[3] != steps:
            raise ValueError(
                f"scan: with {steps} steps per token k must be (B, H, T, {steps}, Dk) and v (B, H, T, {steps}, Dv); "
                f"got k {tuple(k.shape)}, v {tuple(v.shape)}"
            )
        k_token, v_token = k[:, :, :, 0], v[:, :, :, 0]
    else:
        k_token, v_token = k, v
    if q.dim() != 4 or k_token.shape != q.shape or v_token.shape[:3] != q.shape[:3] or v_token.dim() != 4:
        raise ValueError(
            f"scan: q and k must be (B, H, T, Dk) and v (B, H, T, Dv); got q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    B, H, T, d_key = q.shape
    want = rule.memory.shapes(d_key, v.shape[-1])
    got = {n: tuple(a.shape) for n, a in state.A.items()}
    if got != {n: (B, H, *shape) for n, shape in want.items()}:
        raise ValueError(
            f"scan: the state belongs to another memory: for {B} rows, {H} heads and widths {d_key}, "
            f"{v.shape[-1]} the weights are {want}, the state holds {got}"
        )
    parts = {
        "S": (bool(state.S), rule.algorithm.momentum, "momentum"),
        "retained": (bool(state.retained), carries_retained(rule), "a gradient at the decayed memory"),
        "recent": (bool(state.recent), rule.algorithm.step_bound > 0, "the step bound"),
    }
    for name, (there, needed, why) in parts.items():
        if there != needed:
            raise ValueError(
                f"scan: the state belongs to another rule: it holds {'a' if there else 'no'} {name}, which rules "
                f"with {why} have; begin with init_state(rule, A0)"
            )
    size = stepwise(rule).chunk_size
    if max(known(state.phase), default=0) >= size or (state.recent and state.recent["key"].shape[2] != size):
        raise ValueError(
            f"scan: the state belongs to a rule with another chunk size than this one's {rule.chunk_size}; "
            f"chunk_size is part of the model"
        )
    _check_gates(rule, gates, want, (B, H, T), v.shape[-1])
    for name, mask in masks._asdict().items():
        if mask is not None and (mask.shape != (B, T) or mask.dtype != torch.bool):
            raise ValueError(
                f"scan: {name} must be a bool mask (B, T) = {(B, T)}, got {mask.dtype} {tuple(mask.shape)}"
            )
    if masks.reset is not None and initial is None:
        raise ValueError("scan: reset goes back to the initial accumulators; give them as initial=A0")
    if rule.retention.returns and initial is None:
        raise ValueError(
            f"scan: {rule.retention} decays towards the initial accumulators; give them as initial=A0"
        )
    given = {n: tuple(a.shape) for n, a in (initial or {}).items()}
    if initial is not None and given != got:
        raise ValueError(f"scan: initial must have the shapes of the state's weights, {got}; got {given}")
    shapes = {n: (H, width) for n, (width, _) in rule.memory.outer(d_key, v.shape[-1]).items()}
    if {n: tuple(p.shape) for n, p in (outer or {}).items()} != shapes:
        raise ValueError(
            f"scan: {rule.memory} needs the outer parameters {shapes or 'none'}; got "
            f"{({n: tuple(p.shape) for n, p in (outer or {}).items()}) or 'none'}; give them as outer="
        )


def _check_gates(
    rule: Rule, gates: Tree, weights: dict[str, tuple[int, int]], tokens: tuple[int, int, int], d_value: int
) -> None:
    read, of_bias = rule.gates(), rule.bias.gates
    steps = rule.algorithm.steps
    for name, gate in gates.items():
        base, dot, weight = name.partition(".")
        if base not in read or (dot and (weight not in weights or base in of_bias)):
            raise ValueError(f"scan: unknown gate {name!r}; this rule reads {', '.join(rule.gates())}")
        if base == "lr" and steps > 1:
            if gate.shape != (*tokens, steps):
                raise ValueError(
                    f"scan: gate {name!r} must be (B, H, T, steps) = {(*tokens, steps)}, got {tuple(gate.shape)}"
                )
            continue
        if gate.shape == tokens:
            continue
        if base in of_bias:
            allowed = [(1, d_value)] if base in rule.bias.channelwise else []
        else:
            mine = [weights[weight]] if weight else list(weights.values())
            allowed = [(mine[0][0], 1)] * (len({m[0] for m in mine}) == 1)
            allowed += [(1, mine[0][1])] * (len({m[1] for m in mine}) == 1)
            if base == "lr" and not rule.algorithm.channelwise:
                allowed = []
            varies = gate.dim() == 5 and gate.shape[3:].numel() > 1 and ("output", "input")[gate.shape[3] > 1]
            if base == "forget" and varies and rule.retention.along in (varies, "all"):
                raise ValueError(
                    f"scan: gate {name!r} varies along the axis over which {rule.retention} normalises; forgetting "
                    f"must be constant there (MIRAS' log-domain form): give it per head or along the other axis; "
                    f"got {tuple(gate.shape)}"
                )
        if gate.dim() != 5 or gate.shape[:3] != tokens or tuple(gate.shape[3:]) not in allowed:
            choices = [tokens, *((*tokens, *tail) for tail in allowed)]
            raise ValueError(
                f"scan: gate {name!r} must be (B, H, T){' or channel-wise' if allowed else ''}, one of "
                f"{', '.join(map(str, choices))}; got {tuple(gate.shape)}"
            )
    for name in read:
        if name not in gates and not all(f"{name}.{n}" in gates for n in weights):
            raise ValueError(f"scan: gate {name!r} is missing; this rule reads {', '.join(rule.gates())}")


Inputs = tuple[Tensor, Tensor, Tensor, Tree]


def unrolled(rule: Rule, inputs: Inputs, masks: Masks) -> tuple[Rule, Inputs, Masks]:
    """Tokens of several steps as tokens of one: the first of them forgets, all write, the last one's read counts."""
    n = rule.algorithm.steps
    if n == 1:
        return rule, inputs, masks
    q, k, v, gates = inputs
    first = torch.arange(q.shape[2] * n, device=q.device) % n == 0

    def spread(name: str, gate: Tensor) -> Tensor:
        if name.split(".")[0] == "lr":
            return gate.flatten(2, 3)
        gate = gate.repeat_interleave(n, 2)
        if name.split(".")[0] == "forget":
            gate = gate * first.view(-1, *[1] * (gate.dim() - 3))
        return gate

    many = Masks(*(None if m is None else m.repeat_interleave(n, 1) for m in masks))
    if many.reset is not None:
        many = many._replace(reset=many.reset & first)
    inputs = (
        q.repeat_interleave(n, 2),
        k.flatten(2, 3),
        v.flatten(2, 3),
        {m: spread(m, g) for m, g in gates.items()},
    )
    return stepwise(rule), inputs, many


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

    q, k (B, H, T, Dk), v (B, H, T, Dv), gates {name or name.weight: (B, H, T), or channel-wise (B, H, T, d_in, 1) or
    (B, H, T, 1, d_out)}; `outer` {name: (H, width)} what a memory's outer parameters are. Reads are post-update and
    include their own token. A token outside `valid` changes nothing and reads 0. A token outside `write` reads
    and takes its place in its chunk, but changes neither A nor S. `reset` marks a document's first token: back
    to the accumulators `initial`, S = 0, a new chunk; a retention with towards="initial" needs them always. Raises
    ValueError when shapes or gates do not fit.
    """
    check(rule, state, q, k, v, gates, Masks(valid, write, reset), initial, outer)
    fresh = None if initial is None else init_state(rule, initial)
    base = base_of(rule, initial)
    steps = rule.algorithm.steps
    rule, (q, k, v, gates), masks = unrolled(rule, (q, k, v, gates), Masks(valid, write, reset))
    B, _, T, _ = q.shape
    if 0 in (B, T):
        return v.new_zeros(v.shape)[:, :, steps - 1 :: steps], state
    everywhere = torch.ones(B, T, dtype=torch.bool, device=q.device)
    valid = everywhere if masks.valid is None else masks.valid
    writes = valid if masks.write is None else valid & masks.write
    starts = ~everywhere if masks.reset is None else masks.reset & valid
    q, k, v = (silence(x, valid) for x in (q, k, v))
    gates = {n: silence(g, valid) for n, g in gates.items()}
    reads, seen = [], []
    for t in range(T):
        if fresh is not None:
            state = choose(starts[:, t], fresh, state)
        now = slice(t, t + 1)
        token = {name: gate[:, :, now] for name, gate in gates.items()}
        y, state, trace = _token(
            rule,
            state,
            base,
            q[:, :, now],
            k[:, :, now],
            v[:, :, now],
            token,
            outer,
            valid[:, t],
            writes[:, t],
        )
        reads.append(y)
        seen.append(trace)
    if (observation := observing()) is not None:
        with per_token(steps):
            observation.record({name: torch.cat([s[name] for s in seen], -1) for name in seen[0]})
    return torch.cat(reads[steps - 1 :: steps], 2), state


def silence(x: Tensor, valid: Tensor) -> Tensor:
    """x (B, H, T, ...) with 0 in place of whatever padding tokens hold."""
    return x.masked_fill(~valid[:, None].unflatten(-1, (-1, *[1] * (x.dim() - 3))), 0)


def _token(
    rule: Rule,
    state: State,
    base: Tree,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tree,
    outer: Tree | None,
    valid: Tensor,
    writes: Tensor,
) -> tuple[Tensor, State, Tree]:
    """One token (T = 1) of every row; valid and writes (B,)."""
    algorithm, retention = rule.algorithm, rule.retention
    at = lambda name, n: _now(gate_of(gates, name, n))  # noqa: E731  (B, H, 1 or d_in, 1 or d_out)
    where = lambda new, old: torch.where(writes.view(-1, *[1] * (old.dim() - 1)), new, old)  # noqa: E731
    forgets = "forget" in retention.gates
    keep = {
        n: 1 - at("forget", n) if forgets else torch.ones_like(a[..., :1, :1]) for n, a in state.A.items()
    }

    # A chunk of one token has nothing retained before it.
    retained = {n: where(r * keep[n], r) for n, r in state.retained.items()}
    scaled = retained
    if retention.decayed and not retained:
        scaled = {n: where(x, torch.ones_like(x)) for n, x in keep.items()}
    inputs = (
        *state.anchor.values(),
        *base.values(),
        *scaled.values(),
        k,
        v,
        *gates.values(),
        *(outer or {}).values(),
    )
    create = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    with torch.enable_grad():
        anchor, origin = state.anchor, base
        if algorithm.first_order:
            anchor, origin = ({n: w.detach() for n, w in tree.items()} for tree in (anchor, base))
        W = anchor_weights(rule, {n: w * scaled[n] if scaled else w for n, w in anchor.items()}, origin)
        # A view: k and v may be made of the same tensor, and do not move with it here.
        W = {
            n: w.view_as(w) if w.requires_grad and create else w.detach().requires_grad_()
            for n, w in W.items()
        }
        loss = inner_loss(rule, rule.memory.apply(k, formed(W, outer)), v, bias_gates(rule, gates))
        parts = torch.autograd.grad(loss.sum(), list(W.values()), create_graph=create)
    grad = dict(zip(W, parts, strict=True))

    sizes = {n: algorithm.step_size(gate_of(gates, "lr", n), k) for n in state.A}
    lr = dict(sizes)
    if algorithm.step_bound:
        met = (k @ state.recent["key"].mT).abs()
        for n, x in sizes.items():
            factor = bound_factors(met, state.recent[n], algorithm.step_bound)
            lr[n] = x * (factor if x.dim() == 3 else beside(factor))
    S, A, moved = {}, {}, {}
    for n in state.A:
        before = state.S.get(n)
        surprise = -_now(lr[n]) * grad[n]
        if before is not None:
            surprise = at("momentum", n) * before + surprise
            S[n] = where(surprise, before)
        moved[n] = where(surprise, torch.zeros_like(surprise) if before is None else before)
        A[n] = where(retention.advance(state.A[n], keep[n], directed(rule, surprise)), state.A[n])

    W_now = weights(rule, A, base)
    y = rule.memory.apply(q, formed(W_now, outer))
    y = torch.where(valid[:, None, None, None], y, torch.zeros_like(y))

    recent = state.recent
    if algorithm.step_bound:
        here = torch.arange(rule.chunk_size, device=q.device) == state.phase[:, None]
        here = (here & writes[:, None])[:, None, :]
        recent = {"key": torch.where(here[..., None], k, recent["key"])} | {
            n: torch.where(here, per_head(x), recent[n]) for n, x in sizes.items()
        }
    phase = state.phase + valid.long()
    state = State(A=A, S=S, anchor=state.anchor, phase=phase, retained=retained, recent=recent)
    state = choose(phase == rule.chunk_size, close_chunk(rule, state), state)

    seen = observed(gates, lr, writes) | {"loss": loss}
    seen |= {"momentary": norm(grad), "accumulated": norm(moved), "weight": norm(W_now)}
    seen = {n: x.detach().reshape(*k.shape[:2], 1) for n, x in seen.items()}
    return y, state, {n: torch.where(valid[:, None, None], x, 0) for n, x in seen.items()}


def _now(gate: Tensor) -> Tensor:
    """The one token's gate beside a weight: (B, H, 1) or (B, H, 1, i, o) to (B, H, 1 or i, 1 or o)."""
    return gate[:, :, 0] if gate.dim() == 5 else gate[..., None]


def formed(W: Tree, outer: Tree | None) -> Weights:
    """Weights (B, H, d_in, d_out) that are there as such, and outer parameters (H, width), beside (B, H, T, d)."""
    return Weights(
        linear=lambda n, x: x @ W[n],
        scale=lambda n, x: x * W[n].mT,
        outer={n: p[:, None] for n, p in (outer or {}).items()},
    )


def observed(gates: Tree, lr: Tree, writes: Tensor | None) -> Tree:
    """The gates as an observation shows them, (B, H, ...): `lr` after its bound, and 0 where nothing was written.

    Of a channel-wise gate it is the mean.
    """
    shown = dict(gates)
    for name in gates:
        if name.split(".")[0] == "lr":
            weight = name.removeprefix("lr.")
            if weight not in lr:  # the gate that weights without their own share
                weight = next((n for n in lr if f"lr.{n}" not in gates), "")
            if weight:
                mask = 1 if writes is None else writes.view(writes.shape[0], 1, -1)
                shown[name] = _mean(lr[weight]) * mask
    return {n: _mean(g) for n, g in shown.items()}


def _mean(gate: Tensor) -> Tensor:
    return gate.mean((-2, -1)) if gate.dim() == 5 else gate


def norm(tree: Tree) -> Tensor:
    """Euclidean norm over all weights of a memory: {weight: (B, H, ..., d_in, d_out)} -> (B, H, ...)."""
    return torch.stack([x.square().sum((-2, -1)) for x in tree.values()]).sum(0).sqrt()
