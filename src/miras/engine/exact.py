"""Exact per-token rules of a matrix memory (chunk_size = 1), block by block instead of token by
token.

For L2 the gradients of a block solve one unit triangular system: u_t = k_t W_{t-1} - v_t, and
W_{t-1} is linear in the previous u (DeltaNet's UT transform, here with momentum and decay in the
coefficients of the dual form). For Dot u_t = -v_t needs no solve, and without momentum all blocks
are computed in parallel; decay may then differ by key channel (GLA, HGRN2).
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.core.algorithm import Algorithm, GradientDescent
from miras.core.bias import L2
from miras.core.recurrence import unrolled
from miras.core.retention import Decay, Keep
from miras.core.rule import Call, Gates, Rule, State, base_of, gate_of, init_state
from miras.core.state import Tree, choose
from miras.engine.chunks import Chunks, Fixed, Run, laid_out
from miras.engine.dual import dual
from miras.engine.kernels import accumulate
from miras.engine.plan import Plan
from miras.engine.tables import Coefficients, products

BLOCK = 64
"""Tokens of a block; not part of the model."""


def blockwise(rule: Rule, state: State, call: Call, plan: Plan) -> tuple[Tensor, State]:
    """Gradients of a block at once, with one solve for L2."""
    return _by_blocks(
        partial(dual, factors=partial(_solved, rule.retention.decayed)), rule, state, call, plan
    )


def hebbian(rule: Rule, state: State, call: Call, plan: Plan) -> tuple[Tensor, State]:
    """All blocks in parallel: Dot without momentum, not observed."""
    return _by_blocks(_all_blocks, rule, state, call, plan)


def _by_blocks(run: Run, rule: Rule, state: State, call: Call, plan: Plan) -> tuple[Tensor, State]:
    steps = rule.algorithm.steps
    fresh = None if call.reset is None or call.initial is None else _opened(init_state(rule, call.initial))
    fixed = Fixed(base_of(rule, call.initial), {})
    rule, call = unrolled(rule, call)
    call = replace(call, gates=_plain(rule, call.gates, call.k))
    tile = Rule(
        rule.memory,
        rule.bias,
        Decay(towards=rule.retention.towards) if rule.retention.gates else Keep(),
        GradientDescent(momentum=rule.algorithm.momentum),
        BLOCK,
    )
    layout = plan.steps(steps).blocks(BLOCK)
    y, after = laid_out(run, tile, _opened(state), fresh, call, layout, fixed, plan.watch, steps)
    return y[:, :, steps - 1 :: steps], replace(state, A=after.A, S=after.S, anchor=after.A)


def _opened(state: State) -> State:
    """What a block needs from a state: with chunk_size 1 its chunk is always empty."""
    return replace(state, retained={}, recent={}, phase=torch.zeros_like(state.phase))


def _plain(rule: Rule, gates: Gates, k: Tensor) -> Gates:
    """The algorithm's step size instead of its gate."""
    if type(rule.algorithm).step_size is Algorithm.step_size:
        return gates
    return {n: rule.algorithm.step_size(g, k) if n[0] == "lr" else g for n, g in gates.items()}


def _solved(
    decayed: bool,
    rule: Rule,
    state: State,
    k: Tensor,
    v: Tensor,
    gates: Tree,
    fixed: Fixed,
    coefs: dict[str, Coefficients],
) -> tuple[Tree, Tree, Tensor]:
    """Every token's gradient at the weights after the previous token: (x, d) of a block, and the
    inner loss."""
    c = coefs["w"]
    late = lambda x, first: F.pad(x[..., :-1, :], (0, 0, 1, 0), value=first)  # noqa: E731
    table = late(c.table, 0) * (k @ k.mT)
    pred = late(c.first, 1) * (k @ state.A["w"].flatten(0, 1))
    if c.first_S is not None:
        pred = pred + late(c.first_S, 0) * (k @ state.S["w"].flatten(0, 1))
    if decayed:
        pred, table = pred * c.keep[..., None], table * c.keep[..., None]
    if fixed.base:
        pred = torch.baddbmm(pred, k, fixed.base["w"])
    if isinstance(rule.bias, L2):
        d = torch.linalg.solve_triangular(-table, pred - v, upper=False, unitriangular=True)
        pred = d + v
    else:
        d = -v
        pred = pred + table @ d
    return {"w": k}, {"w": d}, rule.bias.loss(pred, v, gates)


def _all_blocks(
    rule: Rule, state: State, fresh: State | None, chunks: Chunks, trace: list[Tree] | None
) -> tuple[Tensor, State]:
    """Hebbian writing, blocks in parallel: W_t = keep_t W_{t-1} + lr_t k_t v_t^T, keep by head or
    key channel."""
    q, k, v, gates = chunks.q, chunks.k, chunks.v, chunks.gates
    write = None if chunks.write is None else chunks.write[:, None]
    assert trace is None, "what an observation shows is formed elsewhere"
    lr = gate_of(gates, "lr", "w")
    keep = 1 - gate_of(gates, "forget", "w") if rule.retention.gates else torch.ones_like(lr)
    by_channel = keep.dim() == 6
    if write is not None:
        lr = torch.where(write, lr, 0)
        keep = torch.where(write[..., None, None] if by_channel else write, keep, 1)
    written = v * lr[..., None]
    if by_channel:
        y, before, after = met_by_key_channel(q, k, written, keep[..., 0])
    else:
        before, table = products(keep)
        before, after = before[..., None], table[..., -1, :, None]
        y = ((q @ k.mT) * table) @ written
    grown = (k * after).mT @ written  # (B, H, N, Dk, Dv), what each block adds
    share = before[..., -1, :, None]  # (B, H, N, 1 or Dk, 1), what it keeps
    starts = _states(state, fresh, chunks, share, grown)
    y = y + (q * before) @ torch.stack(starts[:-1], 2)
    if chunks.fixed.base:
        y = y + q @ chunks.fixed.base["w"][:, :, None]
    last = starts[-1].clone()  # a view would keep the memories of all blocks alive
    end = replace(state, A={"w": last}, anchor={"w": last})
    return y.flatten(2, 3), end


def met_by_key_channel(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reads from a block's own tokens, and the products of keep through each token and after it,
    all (..., n, D).

    By halves: reads of the second half of a range from the first half cross the boundary between
    them, so their decay is a product before it times one after it: a scaled key and a scaled query.
    Only products of keep occur, no quotients.
    """
    n = q.shape[-2]
    size = 1 << (n - 1).bit_length()
    q, k, v = (F.pad(x, (0, 0, 0, size - n)) for x in (q, k, v))
    before = F.pad(keep, (0, 0, 0, size - n), value=1.0)
    after = torch.ones_like(before)
    y = (q * k).sum(-1, keepdim=True) * v
    half = 1
    while half < size:
        pair = lambda x: x.unflatten(-2, (-1, 2, half)).unbind(-3)  # noqa: B023, E731
        (_, q2), (k1, _), (v1, _) = pair(q), pair(k), pair(v)
        (b1, b2), (a1, a2), (y1, y2) = pair(before), pair(after), pair(y)
        y2 = y2 + ((q2 * b2) @ (k1 * a1).mT) @ v1
        whole = lambda x1, x2: torch.stack([x1, x2], -3).flatten(-4, -2)  # noqa: E731
        y = whole(y1, y2)
        before, after = whole(b1, b2 * b1[..., -1:, :]), whole(a1 * b2[..., -1:, :], a2)
        half *= 2
    return y[..., :n, :], before[..., :n, :], after[..., :n, :]


def _states(state: State, fresh: State | None, chunks: Chunks, share: Tensor, grown: Tensor) -> list[Tensor]:
    """The memory before every block, and after the last."""
    if all(s is None for s in chunks.starts):
        return [state.A["w"], *accumulate(share, grown, state.A["w"]).unbind(2)]
    A = state.A["w"]
    starts: list[Tensor] = []
    for j, (keep, new) in enumerate(zip(share.unbind(2), grown.unbind(2), strict=True)):
        start = chunks.starts[j]
        if start is not None and fresh is not None:
            A = choose(start, fresh.A["w"], A)
        starts.append(A)
        A = keep * A + new
    return [*starts, A]
