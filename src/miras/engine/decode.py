"""Decoding: one token of every row through a memory, without gradients.

A weight's gradient is x d^T, and for a matrix and an MLP both factors have closed forms. So no
graph is recorded, no coefficients of a chunk are computed, and weights are updated in one pass.

Shapes: N = B H memories, n weights of each, C the chunk.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.core.activation import EPS, gelu_backward
from miras.core.bias import L2, Dot
from miras.core.memory import MLP, Matrix
from miras.core.rule import (
    Call,
    Rule,
    State,
    anchor_weights,
    base_of,
    bias_gates,
    close_chunk,
    directed,
    gate_of,
    inner_loss,
    per_head,
    weights,
)
from miras.core.state import Tree, choose
from miras.engine.plan import Plan

Backward = Callable[[Tensor], tuple[Tree, Tree]]
"""From d loss / d output (N, 1, Dv) to x (N, 1, d_in) and d (N, 1, d_out) of every weight."""


def has_form(rule: Rule) -> bool:
    """Whether the memory's gradient is written out here."""
    return type(rule.memory) in _APPLY


def compiles(rule: Rule) -> bool:
    """Whether `decode` consists of plain tensor operations for this rule, which can be compiled as
    one graph."""
    return has_form(rule) and type(rule.bias) in (L2, Dot)


def decode(rule: Rule, state: State, call: Call, plan: Plan) -> tuple[Tensor, State]:
    """One token of every row, without masks and gradients."""
    assert not torch.is_grad_enabled()
    q, k, v, gates = call.q, call.k, call.v, call.gates
    apply = _APPLY[type(rule.memory)]
    apart = {n: p[:, None].repeat(len(q), 1, 1) for n, p in call.outer.items()}
    forgets = "forget" in rule.retention.gates
    keep = {n: 1 - _beside(gate_of(gates, "forget", n)) for n in state.A} if forgets else {}

    anchor, retained = _flat(state.anchor), _flat(state.retained)
    if rule.retention.decayed:
        retained = {n: r * keep[n] for n, r in retained.items()}
        anchor = {n: w * (retained or keep)[n] for n, w in anchor.items()}
    base = _flat(base_of(rule, call.initial))
    anchor = anchor_weights(rule, anchor, base)
    pred, backward = apply(rule.memory, anchor, apart, k.flatten(0, 1))
    xs, ds = backward(_slope(rule, pred, v.flatten(0, 1), _flat(bias_gates(rule, gates))))

    sizes = {n: rule.algorithm.step_size(gate_of(gates, "lr", n), k) for n in state.A}
    bounds = _bounds(rule, state, k)
    A, S, surprise = _flat(state.A), {}, _flat(state.S)
    for n in state.A:
        x = xs[n].mT
        step = _beside(sizes[n]) * bounds[n] if bounds else _beside(sizes[n])
        if rule.algorithm.momentum:
            moved = _beside(gate_of(gates, "momentum", n)) * surprise[n]
            S[n] = moved.addcmul_(x * step, ds[n], value=-1)
        else:
            moved = x * step * -ds[n]
        moved = directed(rule, moved)
        A[n] = torch.addcmul(moved, keep[n], A[n]) if forgets else A[n] + moved
    y, _ = apply(rule.memory, weights(rule, A, base), apart, q.flatten(0, 1))

    back = lambda tree: {n: x.view(state.A[n].shape) for n, x in tree.items()}  # noqa: E731
    ends = [(place + 1) % rule.chunk_size == 0 for place in plan.place]
    after = replace(
        state,
        A=back(A),
        S=back(S),
        phase=state.phase + 1,
        retained=back(retained),
        recent=state.recent if all(ends) else _met(state, k, sizes),
    )
    if all(ends):
        after = close_chunk(rule, after)
    elif any(ends):
        after = choose(after.phase == rule.chunk_size, close_chunk(rule, after), after)
    return y.view(v.shape), after


def _flat(tree: Tree) -> Tree:
    """(B, H, ...) as (N, ...)."""
    return {n: x.flatten(0, 1) for n, x in tree.items()}


def _beside(gate: Tensor) -> Tensor:
    """One token's gate (B, H, 1) or (B, H, 1, d_in or 1, d_out or 1), broadcast to a weight: (N,
    d_in or 1, d_out or 1)."""
    return gate.flatten(0, 2) if gate.dim() == 5 else gate.reshape(-1, 1, 1)


def _slope(rule: Rule, pred: Tensor, v: Tensor, gates: Tree) -> Tensor:
    """The derivative of the inner loss by the prediction, (N, 1, Dv)."""
    if type(rule.bias) is L2:
        return pred - v
    if type(rule.bias) is Dot:
        return -v
    with torch.enable_grad():
        pred = pred.detach().requires_grad_()
        loss = inner_loss(rule, pred, v, gates)
        return torch.autograd.grad(loss.sum(), pred)[0]


def _matrix(memory: Matrix, W: Tree, outer: Tree, x: Tensor) -> tuple[Tensor, Backward]:
    """x (N, 1, Dk) through a matrix, and its backward pass."""
    return torch.bmm(x, W["w"]), lambda slope: ({"w": x}, {"w": slope})


def _mlp(memory: MLP, W: Tree, outer: Tree, x: Tensor) -> tuple[Tensor, Backward]:
    """x (N, 1, Dk) through an MLP, and its backward pass."""
    ins: list[Tensor] = []
    outs: list[Tensor] = []
    y = x
    for i in range(1, memory.depth + 1):
        ins.append(F.gelu(y) if i > 1 else y)
        y = torch.bmm(ins[-1], W[f"w{i}"])
        y = y + memory.constant(x.shape[-1]) * W[f"b{i}"] if memory.bias else y
        outs.append(y)
    normed = scale = y
    if memory.norm:
        y, _, scale = torch.native_layer_norm(y, y.shape[-1:], None, None, EPS)
        normed = y
    if memory.affine:
        y = y * outer["gain"] + outer["shift"]

    backward = partial(_mlp_back, memory, W, outer, ins, outs, normed, scale)
    return x + y if memory.residual else y, backward


def _mlp_back(
    memory: MLP,
    W: Tree,
    outer: Tree,
    ins: list[Tensor],
    outs: list[Tensor],
    normed: Tensor,
    scale: Tensor,
    slope: Tensor,
) -> tuple[Tree, Tree]:
    """The backward pass of an MLP, from inputs and outputs of its weights and the `scale` of its
    norm."""
    d = slope * outer["gain"] if memory.affine else slope
    if memory.norm:
        mean, along = d.mean(-1, keepdim=True), (d * normed).mean(-1, keepdim=True)
        d = torch.addcmul(d - mean, normed, along, value=-1).mul_(scale)
    xs: Tree = {}
    ds: Tree = {}
    for i in range(memory.depth, 0, -1):
        xs[f"w{i}"], ds[f"w{i}"] = ins[i - 1], d
        if memory.bias:
            xs[f"b{i}"], ds[f"b{i}"] = torch.full_like(d[..., :1], memory.constant(ins[0].shape[-1])), d
        if i > 1:
            d = gelu_backward(torch.bmm(d, W[f"w{i}"].mT), outs[i - 2])
    return xs, ds


_APPLY: dict[type, Callable[..., tuple[Tensor, Backward]]] = {Matrix: _matrix, MLP: _mlp}


def _bounds(rule: Rule, state: State, k: Tensor) -> Tree:
    """`bound_factors` of the token for each weight, (N, 1, 1); empty without the step bound."""
    if not state.recent:
        return {}
    met = torch.bmm(k.flatten(0, 1), state.recent["key"].flatten(0, 1).mT).abs_()
    steps = torch.stack([state.recent[n] for n in state.A], 2).flatten(0, 1)  # (N, n, C)
    factors = torch.rsub(steps * met, 1, alpha=rule.algorithm.step_bound).clamp_min_(0).prod(-1)
    return dict(zip(state.A, factors[..., None, None].unbind(1), strict=True))


def _met(state: State, k: Tensor, sizes: Tree) -> Tree:
    """`recent` with the token's key and steps at its place in the chunk."""
    if not state.recent:
        return {}
    B, H, _, width = k.shape
    place = state.phase.view(B, 1, 1).expand(B, H, 1)
    key = state.recent["key"].scatter(2, place[..., None].expand(B, H, 1, width), k)
    return {"key": key} | {n: state.recent[n].scatter(2, place, per_head(x)) for n, x in sizes.items()}
