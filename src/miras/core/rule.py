"""A learned memory as five choices (`Rule`), the inputs of a call (`Call`), and its state
(`State`).

Shapes: B rows, H heads, T tokens, Dk key width, Dv value width, C = chunk_size; (d_in, d_out) one
weight.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from miras.core.algorithm import Algorithm, GradientDescent
from miras.core.bias import L2, Bias
from miras.core.memory import Matrix, Memory, Weights
from miras.core.retention import Decay, Retention
from miras.core.schedule import Schedule
from miras.core.state import Record, Tree
from miras.core.typed import Typed


@dataclass(frozen=True)
class Rule(Typed):
    """A sequence model: memory structure x attentional bias x retention gate x algorithm (MIRAS
    4.4), and a schedule.

    S_t = momentum_t S_{t-1} - lr_t grad_t
    A_t = (1 - forget_t) A_{t-1} + direction(S_t)
    W_t = link(A_t),  y_t = memory(q_t; W_t)
    grad_t = d bias(memory(k_t; W_anchor), v_t) / d W,  W_anchor = the weights at t's chunk's start

    With retention.towards = "initial" the second line is A_t = A_0 + (1 - forget_t)
    (A_{t-1} - A_0) + direction(S_t). `chunk_size` is the number of tokens that share one anchor. It
    is part of the model, not a speed setting. `schedule` says which tokens update A, and whether
    y_t is read at W_t, at W_{t-1} or at the chunk's start. Raises TypeError for a choice of the
    wrong kind, ValueError for a combination that is not supported.
    """

    memory: Memory = Matrix()
    bias: Bias = L2()
    retention: Retention = Decay()
    algorithm: Algorithm = GradientDescent()
    chunk_size: int = 16
    schedule: Schedule = Schedule()
    form: frozenset[str] = field(init=False, repr=False, compare=False, default=frozenset())
    """What a path that runs it must support, beyond gradient steps on linear maps with decay."""
    held: "Held" = field(init=False, repr=False, compare=False)
    by_step: "Rule" = field(init=False, repr=False, compare=False)
    """The rule in which each step is a token; the same rule unless a token takes several steps."""
    update_gates: tuple[str, ...] = field(init=False, repr=False, compare=False, default=())
    """Names of the gates that the algorithm and the retention read."""

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
                    f"Rule: {', '.join(repr(getattr(self, n)) for n in _AXES)} is not supported: {reason}"
                )

        form = self.algorithm.form | self.retention.form | self.memory.form | self.schedule.form
        object.__setattr__(self, "form", form)
        object.__setattr__(self, "update_gates", (*self.algorithm.gates, *self.retention.gates))
        object.__setattr__(self, "held", Held(self))
        object.__setattr__(self, "by_step", self._by_step())

    def _by_step(self) -> "Rule":
        steps = self.algorithm.steps
        if steps == 1:
            return self
        size = 1 if self.chunk_size == 1 else self.chunk_size * steps
        return replace(self, algorithm=replace(self.algorithm, steps=1), chunk_size=size)  # pyright: ignore

    def gates(self) -> tuple[str, ...]:
        """Names of the gates that the choices read, each given per token and head, or
        channel-wise."""
        return (*self.update_gates, *self.bias.gates)


class Held:
    """A rule as a constant in graphs of `torch.compile`: the same object for equal rules."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and self.rule == other.rule

    def __hash__(self) -> int:
        return hash(self.rule)


_AXES: dict[str, type] = {
    "memory": Memory,
    "bias": Bias,
    "retention": Retention,
    "algorithm": Algorithm,
    "schedule": Schedule,
}
_EXAMPLES = {
    "memory": "Matrix()",
    "bias": "L2()",
    "retention": "Decay()",
    "algorithm": "GradientDescent()",
    "schedule": "Schedule()",
}


@dataclass(frozen=True)
class State(Record):
    """All that a memory needs to continue, as a value.

    A: accumulator, S: surprise (empty without momentum; with one update per chunk, the sum of the
    open chunk's steps), anchor: the weights at which gradients are taken; each {weight: (B, H,
    d_in, d_out)}. With forgetting towards the initial accumulator A_0, A holds the difference from
    A_0, and anchor this difference at the chunk's start: A_0 stays with the model, so the outer
    loop can update it while a state is carried. phase: (B,) int64, tokens read of the open chunk
    (steps, if a token takes several). retained: the same shapes, the product of 1 - forget over the
    open chunk (only if the gradient is taken at the decayed memory and chunks are longer than a
    token, or with one update per chunk). recent: the open chunk's "key" (B, H, C, Dk) and steps
    {weight: (B, H, C)}, zero where nothing was written (only with the step bound). past: the
    earlier pairs of the loss window, "key" (B, H, window - 1, Dk), "value", "share" (B, H,
    window - 1), 0 for none, and the bias's gates for them.
    """

    A: Tree
    S: Tree
    anchor: Tree
    phase: Tensor
    retained: Tree
    recent: Tree
    past: Tree = field(default_factory=dict[str, Tensor])


Gates = dict[tuple[str, str], Tensor]
"""Values of gates by name and weight; the weight is "" for all weights without a gate of their
own."""


@dataclass(frozen=True)
class Call(Record):
    """The inputs of a memory: T tokens, their gates and masks, and the model's learned parameters.

    q, k (B, H, T, Dk), v (B, H, T, Dv); with several steps per token k and v are (B, H, T, steps,
    D). gates (B, H, T) or channel-wise (B, H, T, d_in, 1) or (B, H, T, 1, d_out). valid, write,
    reset: (B, T) bool; None means all, all and none. initial: {weight: (B, H, d_in, d_out)}, None
    if nothing needs it; outer: {name: (H, width)}.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates
    valid: Tensor | None = None
    write: Tensor | None = None
    reset: Tensor | None = None
    initial: Tree | None = None
    outer: Tree = field(default_factory=dict[str, Tensor])

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Mapping[str, Tensor],
        valid: Tensor | None,
        write: Tensor | None,
        reset: Tensor | None,
        initial: Tree | None,
        outer: Tree | None,
    ) -> Self:
        """A call whose gates are named `name` or `name.weight`."""
        keyed = {named(n): g for n, g in gates.items()}
        return cls(q, k, v, keyed, valid, write, reset, initial, outer or {})


def named(gate: str) -> tuple[str, str]:
    """`name` or `name.weight` as (name, weight)."""
    name, _, weight = gate.partition(".")
    return (name, weight) if weight else (gate, "")


def spelled(gate: tuple[str, str]) -> str:
    """(name, weight) as `name` or `name.weight`."""
    return ".".join(filter(None, gate))


def weights(rule: Rule, A: Tree, base: Tree) -> Tree:
    """The weights for an accumulator; base as returned by `base_of`."""
    return {n: linked(rule, a + base[n] if base else a) for n, a in A.items()}


def linked(rule: Rule, A: Tensor) -> Tensor:
    """link(A). Raises ValueError unless it has the shape of A."""
    return _like(A, rule.retention.link(A), f"{type(rule.retention).__name__}.link")


def directed(rule: Rule, S: Tensor) -> Tensor:
    """direction(S). Raises ValueError unless it has the shape of S."""
    return _like(S, rule.algorithm.direction(S), f"{type(rule.algorithm).__name__}.direction")


def inner_loss(rule: Rule, pred: Tensor, target: Tensor, gates: Tree) -> Tensor:
    """The bias's loss of every token, (..., d_value) to (...,).

    Raises ValueError for another shape: with a sum over tokens or rows each gradient would depend
    on all of them.
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
    """The weights that a state's anchor represents."""
    return weights(rule, anchor, base) if base else anchor


def base_of(rule: Rule, initial: Tree | None) -> Tree:
    """The accumulator that a state's A is relative to: A_0 with forgetting towards it, else
    none."""
    return initial or {} if "returns" in rule.form else {}


def _anchor(rule: Rule, A: Tree) -> Tree:
    """The anchor of a state at a chunk's start."""
    return A if "returns" in rule.form else weights(rule, A, {})


def init_state(rule: Rule, A0: Tree) -> State:
    """The state before the first token, from initial accumulators {weight: (B, H, d_in, d_out)}.

    Names and shapes must be those of `rule.memory.shapes(Dk, Dv)`; else raises ValueError.
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
    rule = rule.by_step
    # Copies: a state must not change when an optimizer updates the model's A0.
    begin = torch.zeros_like if "returns" in rule.form else torch.clone
    A = {n: begin(a, memory_format=torch.contiguous_format) for n, a in A0.items()}
    retained, recent = {}, {}
    if carries_retained(rule):
        retained = {n: torch.ones_like(a) for n, a in A0.items()}
    if rule.algorithm.step_bound:
        recent = {"key": first.new_zeros(B, H, rule.chunk_size, d_key)}
        recent |= {n: first.new_zeros(B, H, rule.chunk_size) for n in A0}
    return State(
        A=A,
        S={n: torch.zeros_like(a) for n, a in A0.items()} if carries_surprise(rule) else {},
        anchor=_anchor(rule, A),
        phase=torch.zeros(B, dtype=torch.long, device=first.device),
        retained=retained,
        recent=recent,
        past=_past(rule, first.new_zeros(B, H, rule.algorithm.window - 1), d_key, d_value),
    )


def _past(rule: Rule, none: Tensor, d_key: int, d_value: int) -> Tree:
    """No pairs before the first token; none (B, H, window - 1) zeros."""
    if rule.algorithm.window == 1:
        return {}
    wide = lambda width: none[..., None].expand(*none.shape, width).clone()  # noqa: E731
    past = {"key": wide(d_key), "value": wide(d_value), "share": none}
    channels = rule.bias.channelwise
    return past | {
        f"bias_{n}": torch.ones_like(wide(d_value) if n in channels else none) for n in rule.bias.gates
    }


def pair_gates(rule: Rule) -> tuple[str, ...]:
    """Gates that belong to a pair of key and value, not to the weights: those of the bias, and
    `share`."""
    return (*rule.bias.gates, *["share"] * (rule.algorithm.window > 1))


def carries_surprise(rule: Rule) -> bool:
    """Whether S is part of the state: with momentum, or with one update per chunk."""
    return rule.algorithm.momentum or "update by chunk" in rule.form


def carries_retained(rule: Rule) -> bool:
    """Whether the open chunk's product of 1 - forget is part of the state."""
    return "update by chunk" in rule.form or (rule.retention.decayed and rule.chunk_size > 1)


def close_chunk(rule: Rule, state: State) -> State:
    """The state at a chunk's end: from here on gradients are taken at the current weights."""
    return replace(
        state,
        anchor=_anchor(rule, state.A),
        phase=torch.zeros_like(state.phase),
        retained={n: torch.ones_like(r) for n, r in state.retained.items()},
        recent={n: torch.zeros_like(r) for n, r in state.recent.items()},
    )


def gate_of(gates: Gates, name: str, weight: str) -> Tensor:
    """The gate `name` for one weight of the memory: its own if given, else the shared one."""
    own = gates.get((name, weight))
    return gates[name, ""] if own is None else own


def gates_of(gates: Gates, names: Iterable[str], weight: str) -> Tree:
    """The gates of these names for one weight of the memory."""
    return {name: gate_of(gates, name, weight) for name in names}


def beside(gate: Tensor) -> Tensor:
    """A gate (B, H, ...tokens) or (B, H, ...tokens, d_in or 1, d_out or 1) with the axes of a
    weight at its end."""
    return gate[..., None, None]


def bias_gates(rule: Rule, gates: Gates) -> Tree:
    """The bias's gates: per token (B, H, T), or channel-wise (B, H, T, d_value)."""
    found = {n: gates[n, ""] for n in rule.bias.gates}
    return {n: g.squeeze(-2) if g.dim() == 5 else g for n, g in found.items()}


def per_head(lr: Tensor) -> Tensor:
    """The largest size over the channels of a step (B, H, T) or (B, H, T, d_in or 1, d_out or
    1)."""
    return lr.abs().amax((-2, -1)) if lr.dim() == 5 else lr.abs()


def formed(W: Tree, outer: Tree) -> Weights:
    """Explicit weights (B, H, d_in, d_out) and outer parameters (H, width), for inputs (B, H, T,
    d)."""
    return Weights(
        linear=lambda n, x: x @ W[n],
        scale=lambda n, x: x * W[n].mT,
        outer={n: p[:, None] for n, p in outer.items()},
    )
