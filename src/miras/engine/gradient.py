"""Shared by all paths: the factors of a chunk's gradients, its steps, and the state after part of a
chunk.

Shapes: B rows, H heads, R = B * H, N chunks of n tokens, Dk, Dv widths; (d_in, d_out) one weight.
"""

from dataclasses import replace

import torch
from torch import Tensor

from miras.core.memory import Weights
from miras.core.rule import Rule, State, anchor_weights, close_chunk, gate_of, inner_loss, per_head
from miras.core.state import Tree, choose
from miras.engine.chunks import Chunks, Fixed, written


def gradient_factors(
    rule: Rule, state: State, k: Tensor, v: Tensor, gates: Tree, fixed: Fixed, kept: Tree | None
) -> tuple[Tree, Tree, Tensor]:
    """For all tokens at once, the factors of their rank-one gradients x_t d_t^T, and their inner
    losses.

    x_t is the input of a linear map, d_t the derivative of the loss by its output: one backward
    pass gives all. A weight that scales has the gradient x_t * d_t. gates {name: (B, H, n) or (B,
    H, n, Dv)}: the bias's gates; kept {weight: (B, H, n, d_in or 1, d_out or 1)} the products of
    1 - forget from the chunk's start through each token, if the gradient is taken at the decayed
    memory.
    """
    anchor, base, outer = state.anchor, *fixed
    if rule.algorithm.first_order:
        anchor, base = ({n: w.detach() for n, w in tree.items()} for tree in (anchor, base))
    if kept is not None and state.retained:
        anchor = {n: w * state.retained[n] for n, w in anchor.items()}
    apart: Tree = {}  # the part without decay, if the gradient is taken at the decayed memory
    if kept is None:
        base = {n: b.view_as(anchor[n]) for n, b in base.items()}
        anchor = anchor_weights(rule, anchor, base)
    else:
        apart = base
    # If nothing requires an outer gradient no graph is built, also outside of no_grad.
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
        if not y.requires_grad:  # a map of something other than k, such as a memory's inner bias
            y = y.requires_grad_()
        xs[name], outs[name] = x, y
        return y

    def seen(name: str, x: Tensor) -> Tensor:
        by_channel = kept is not None and kept[name].shape[-2] > 1
        return x * kept[name][..., 0] if by_channel else x  # pyright: ignore[reportOptionalSubscript]

    def alone(name: str, x: Tensor) -> Tensor:
        w = apart[name]
        return x * w.mT if rule.memory.elementwise else product(x, w)

    weights = Weights(
        linear=lambda n, x: keep(n, x, product(seen(n, x), anchor[n])),
        scale=lambda n, x: keep(n, x, seen(n, x) * anchor[n].mT),
        outer={n: p[:, None] for n, p in outer.items()},
    )
    with torch.enable_grad():
        loss = inner_loss(rule, rule.memory.apply(k, weights), v, gates)
        ds = torch.autograd.grad(loss, list(outs.values()), torch.ones_like(loss), create_graph=create)
    if not create:
        xs, loss = {n: x.detach() for n, x in xs.items()}, loss.detach()
    return xs, dict(zip(outs, ds, strict=True)), loss


def product(x: Tensor, W: Tensor) -> Tensor:
    """x W, x (R, n, d_in) or (B, H, n, d_in), W (B, H, d_in, d_out) or (R, d_in, d_out).

    It has less overhead than x @ W.
    """
    return torch.bmm(x.flatten(0, -3), W.flatten(0, -3)).view(*x.shape[:-1], W.shape[-1])


def gates_of_bias(rule: Rule, chunks: Chunks) -> Tree:
    """The bias's gates of all chunks, {name: (B, H, N, n) or channel-wise (B, H, N, n, Dv)}."""
    found = {n: chunks.gates[n, ""] for n in rule.bias.gates}
    return {n: g.squeeze(-2) if g.dim() == 6 else g for n, g in found.items()}


def leave_open(rule: Rule, state: State, chunks: Chunks, j: int, phase: Tensor) -> State:
    """The state after part of a chunk: its keys and steps are stored in `recent` at their
    places."""
    recent = state.recent
    if rule.algorithm.step_bound:
        k = chunks.k[:, :, j]
        B, H, n, _ = k.shape
        slots = chunks.slots.expand(B, n)
        write = written(chunks, j)

        # (B, H, C, D) with new (B, H, n, D) at the slots
        def put(old: Tensor, new: Tensor) -> Tensor:
            index = slots[:, None, :, None].expand(B, H, n, new.shape[-1])
            if write is not None:
                new = torch.where(write[:, None, :, None], new, old.gather(2, index))
            return old.scatter(2, index, new)

        size = rule.algorithm.step_size
        lr = {
            n_: per_head(size(gate_of(chunks.gates, "lr", n_)[:, :, j], k))
            for n_ in state.recent
            if n_ != "key"
        }
        recent = {"key": put(state.recent["key"], k)}
        recent |= {n_: put(state.recent[n_][..., None], x[..., None])[..., 0] for n_, x in lr.items()}
    state = replace(state, phase=phase, recent=recent)
    return choose(phase == 0, close_chunk(rule, state), state)
