"""The whole scan of an MLP memory with L2 as one function with a written-out backward pass.

Through x_1 = k, h_i = x_i W_i, x_{i+1} = gelu(h_i) and e = [k +] norm(h_L) - v the gradient of W_i
at token t is the rank-one x_i d_i^T with d_L = norm'(h_L) e and d_i = gelu'(h_i) * (d_{i+1}
W_{i+1}^T), as in `factors`; coefficients are those of `dual`. Only gradients and updates run chunk
by chunk. Reads, whose states are known by then, and everything that depends on activations only are
computed for a group of chunks at once. The backward pass keeps the states at the groups' starts and
recomputes the others.

The parts of a weight are stored together as Z (R, p, s, l): A, with momentum S, and the initial
accumulator if A is the difference from it; s is the narrower side and l the wider one. A read
is x Z with x repeated for every part, each multiplied by its share.

Shapes: R = B * H rows and heads, N chunks of n tokens, L the depth, m chunks of a group, c parts
that are written.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.core.activation import EPS, gelu_backward, gelu_bend, layer_norm_backward, layer_norm_bend
from miras.core.memory import MLP
from miras.core.rule import Rule, State, close_chunk
from miras.core.state import Tree
from miras.engine.chunks import Chunks, begun, contiguous
from miras.engine.factors import phi, recorded_factors
from miras.engine.gradient import leave_open
from miras.engine.kernels import recorded
from miras.engine.tables import Coefficients, coefficients

GROUP = 256
"""About the number of tokens read at once."""


class Form(NamedTuple):
    """The static arguments of the function.

    tall: which weights have more rows than columns, and are stored transposed. tables: the index of
    each weight's tables. starts, per chunk, (R,) rows that begin a document there, or None; opens,
    per chunk, (R,) rows that leave it open, or None if all complete it. apart: whether the anchor
    initially differs from A; base: whether the last part is the accumulator that A is relative to;
    group: number of chunks read at once.
    """

    residual: bool
    norm: bool
    first_order: bool
    tall: tuple[bool, ...]
    tables: tuple[int, ...]
    starts: tuple[Tensor | None, ...]
    opens: tuple[Tensor | None, ...]
    apart: bool
    base: bool
    group: int


class Table(NamedTuple):
    """table (N, R, n, n) and share (N, R, n, p) of the reads; late (N, R, n, c) the contribution of
    each token to the parts after the chunk; move (N, R, c, c) that of the parts before it."""

    table: Tensor
    share: Tensor
    late: Tensor
    move: Tensor


class Inputs(NamedTuple):
    """q, k, v (N, R, n, D), and for every weight its parts Z (R, p, s, l), the anchor (R, s, l) if
    it differs from A, and the parts (R, c, s, l) at the start of a document."""

    q: Tensor
    k: Tensor
    v: Tensor
    tables: list[Table]
    Z: list[Tensor]
    anchor: list[Tensor]
    fresh: list[Tensor]

    @classmethod
    def of(cls, form: Form, flat: Sequence[Tensor]) -> "Inputs":
        """The inverse of `flat`."""
        it, L = iter(flat), len(form.tall)
        q, k, v = islice(it, 3)
        tables = [Table(*islice(it, 4)) for _ in range(max(form.tables) + 1)]
        Z, anchor = list(islice(it, L)), list(islice(it, L * form.apart))
        return cls(q, k, v, tables, Z, anchor, list(it))

    def flat(self) -> list[Tensor]:
        return [*self[:3], *(x for t in self.tables for x in t), *self.Z, *self.anchor, *self.fresh]


def run(
    rule: Rule, state: State, fresh: State | None, chunks: Chunks, trace: list[Tree] | None
) -> tuple[Tensor, State]:
    """Run chunks through the memory."""
    assert trace is None and isinstance(rule.memory, MLP)
    (B, H, N, n), R = chunks.q.shape[:4], chunks.q.shape[:2].numel()
    state = begun(state, fresh, chunks, 0)
    base, names = chunks.fixed.base, list(state.A)
    of_weight = coefficients(rule, state, chunks, False)
    tables = list({id(c): c for c in of_weight.values()}.values())
    rows = lambda x: None if x is None else x.repeat_interleave(H)  # noqa: E731
    begin = [None] * N if fresh is None else [None, *map(rows, chunks.starts[1:])]
    form = Form(
        rule.memory.residual,
        rule.memory.norm,
        rule.algorithm.first_order,
        tall=tuple(a.shape[2] > a.shape[3] for a in state.A.values()),
        tables=tuple(next(i for i, c in enumerate(tables) if c is of_weight[name]) for name in names),
        starts=tuple(begin),
        opens=tuple(None if end is None else rows(end != 0) for end in chunks.ends),
        # In a later group a row may already have ended, with its last chunk open.
        apart=chunks.open or any(end is not None for end in chunks.ends),
        base=bool(base),
        group=max(1, GROUP // n),
    )

    def laid(*trees: Tree) -> list[Tensor]:
        """The parts of every weight, stored together."""
        parts = ([x[name].reshape(R, *x[name].shape[-2:]) for x in trees if x] for name in names)
        return [
            torch.stack([x.mT if tall else x for x in of], 1)
            for of, tall in zip(parts, form.tall, strict=True)
        ]

    def tree(parts: Iterable[Tensor]) -> Tree:
        return {
            name: (x.mT if tall else x).unflatten(0, (B, H))
            for name, x, tall in zip(names, parts, form.tall, strict=True)
        }

    given = Inputs(
        *(x.flatten(0, 1).transpose(0, 1).contiguous() for x in chunks[:3]),
        tables=[_table(c, rule.schedule.read, bool(base)) for c in tables],
        Z=laid(state.A, state.S, base),
        anchor=[z[:, 0] for z in laid(state.anchor)] if form.apart else [],
        fresh=laid(fresh.A, fresh.S) if fresh is not None and any(x is not None for x in begin) else [],
    )
    y, *ends = scanned(form, given)
    Z, anchor = ends[: len(names)], ends[len(names) :]
    A, S = tree(z[:, 0] for z in Z), tree(z[:, 1] for z in Z) if state.S else {}
    state = replace(_places(rule, state, fresh, chunks), A=A, S=S, anchor=tree(anchor) if anchor else A)
    return y.transpose(0, 1).flatten(1, 2).unflatten(0, (B, H)), contiguous(state)


def scanned(form: Form, given: Inputs) -> list[Tensor]:
    """y (N, R, n, Dv), the parts after the last chunk, and the anchor if some row leaves that chunk
    open."""
    flat = given.flat()
    if torch.is_grad_enabled() and any(x.requires_grad for x in flat):
        return list(_Scan.apply(form, *flat))
    return _forward(form, given, None)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: Form, *flat: Tensor) -> tuple[Tensor, ...]:
        kept = _Kept()
        outputs = _forward(form, Inputs.of(form, flat), kept)
        ctx.form, (ctx.names, tensors) = form, kept.flat()
        ctx.save_for_backward(*flat, *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed, saved = ctx.needs_input_grad[1:], ctx.saved_tensors
        flat, tensors = saved[: len(needed)], saved[len(needed) :]
        if torch.is_grad_enabled():
            return None, *recorded(needed, partial(_recorded, ctx.form), grads, flat)
        return None, *_backward(
            ctx.form, Inputs.of(ctx.form, flat), _Kept.of(ctx.names, tensors), *grads
        ).flat()


def _table(c: Coefficients, read: str, base: bool) -> Table:
    """The coefficients of one weight by parts, chunks first."""
    seen = c.earlier() if read == "before" else c
    share, late, move = [seen.first], [c.late], [c.kept]
    if c.first_S is not None and c.last is not None and c.kept_S is not None and c.carry is not None:
        assert seen.first_S is not None
        share.append(seen.first_S)
        late.append(c.last)
        move += [c.kept_S, torch.zeros_like(c.carry), c.carry]
    share += [torch.ones_like(seen.first)] * base
    moves = torch.cat(move, -1).unflatten(-1, (len(late), len(late))).squeeze(-3)
    parts = (seen.table, torch.cat(share, -1), torch.cat(late, -1), moves)
    return Table(*(x.flatten(0, 1).transpose(0, 1).contiguous() for x in parts))


def _places(rule: Rule, state: State, fresh: State | None, chunks: Chunks) -> State:
    """The state after the last chunk without weights: phase, and the keys and steps for the step
    bound."""
    bare = lambda x: replace(x, A={}, S={}, anchor={})  # noqa: E731
    state, fresh = bare(state), fresh and bare(fresh)
    closed = close_chunk(rule, state)
    if all(end is None for end in chunks.ends):
        return closed
    for j, end in enumerate(chunks.ends):
        state = begun(state, fresh, chunks, j)
        state = closed if end is None else leave_open(rule, state, chunks, j, end)
    return state


class _Kept(dict[tuple[int, str], list[Tensor]]):
    """Tensors saved for the backward pass, by the number of a group's first chunk and a name.

    start: the parts at the group's start; h, u, d, stats: of `_gradients`; r, side, ends: of
    `_reads`; and by the number of a chunk its anchor, if it differs from A.
    """

    def flat(self) -> tuple[list[tuple[tuple[int, str], int]], list[Tensor]]:
        """The number of tensors of each name, and all tensors."""
        return [(name, len(x)) for name, x in self.items()], [x for each in self.values() for x in each]

    @classmethod
    def of(cls, names: list[tuple[tuple[int, str], int]], flat: Iterable[Tensor]) -> "_Kept":
        it = iter(flat)
        return cls({name: list(islice(it, count)) for name, count in names})


def _forward(form: Form, given: Inputs, kept: _Kept | None) -> list[Tensor]:
    q, k, v, tables, Z, anchor, fresh = given
    N, y = len(q), list[Tensor]()
    held = anchor or None
    room = _room(form, N, Z)
    for a in range(0, N, form.group):
        m = min(form.group, N - a)
        if kept is not None:
            kept[a, "start"] = [z[0].clone() for z in room]
        each: list[list[list[Tensor]]] = []
        for j, old, new in _chunks(room, a, m):
            held = _restarted(form.starts[j], fresh, old, held)
            W = _anchors(form, old, held)
            if kept is not None and held is not None:
                kept[j, "anchor"] = held
            each.append(_gradients(form, k[j], v[j], W))
            xs, ds = each[-1][:2]
            _advance(form, tables, j, old, new, xs, ds)
            held = _left(form.opens[j], old, new, held)
        xs, ds, hs, us, stats = (
            [torch.stack(x) for x in zip(*of, strict=True)] for of in zip(*each, strict=True)
        )
        cut = [Table(*(x[a : a + m].flatten(0, 1) for x in t)) for t in tables]
        flat = [[x.flatten(0, 1) for x in each] for each in (xs, ds, [z[:m] for z in room])]
        read, rs, sides, ends = _reads(form, q[a : a + m].flatten(0, 1), cut, *flat)
        y.append(read.unflatten(0, (m, -1)))
        if kept is not None:
            found = {"h": hs, "u": us, "d": ds[-1:], "stats": stats, "r": rs, "side": sides, "ends": ends}
            kept |= {(a, name): tensors for name, tensors in found.items()}
        for z in room:
            z[0] = z[m]
    outputs = [torch.cat(y), *(z[0].clone() for z in room)]
    return outputs if held is None else [*outputs, *held]


def _room(form: Form, N: int, Z: list[Tensor]) -> list[Tensor]:
    """Buffers for every weight's parts at the starts of a group's chunks and after it; the first is
    filled."""
    room = [z.new_empty(min(form.group, N) + 1, *z.shape) for z in Z]
    for each, z in zip(room, Z, strict=True):
        each[:, :, -1] = z[:, -1]  # the accumulator that A is relative to does not change
        each[0] = z
    return room


def _chunks(room: list[Tensor], a: int, m: int) -> Iterator[tuple[int, list[Tensor], list[Tensor]]]:
    """For each of the m chunks from a on: its number, the parts before it and the buffer for those
    after it."""
    steps = [list(each) for each in zip(*(z.unbind(0) for z in room), strict=True)]
    return zip(range(a, a + m), steps[:m], steps[1 : m + 1], strict=True)


def _restarted(
    start: Tensor | None, fresh: list[Tensor], Z: list[Tensor], held: list[Tensor] | None
) -> list[Tensor] | None:
    """The anchors, if they differ from A, reset to `fresh` in rows that begin a document; the parts
    in place."""
    if start is None:
        return held
    for z, f in zip(Z, fresh, strict=True):
        z[:, : f.shape[1]] = torch.where(start[:, None, None, None], f, z[:, : f.shape[1]])
    if held is None:
        return None
    return [torch.where(start[:, None, None], f[:, 0], w) for w, f in zip(held, fresh, strict=True)]


def _anchors(form: Form, Z: list[Tensor], held: list[Tensor] | None) -> list[Tensor]:
    """The weights at which a chunk's gradients are taken."""
    W = [z[:, 0] for z in Z] if held is None else held
    return [w + z[:, -1] for w, z in zip(W, Z, strict=True)] if form.base else W


def _left(
    opened: Tensor | None, old: list[Tensor], new: list[Tensor], held: list[Tensor] | None
) -> list[Tensor] | None:
    """The anchors after a chunk: they differ from A if some row leaves it open."""
    if opened is None:
        return None
    before = [z[:, 0] for z in old] if held is None else held
    return [torch.where(opened[:, None, None], w, z[:, 0]) for w, z in zip(before, new, strict=True)]


def _gradients(form: Form, k: Tensor, v: Tensor, W: list[Tensor]) -> list[list[Tensor]]:
    """x_1 ... x_L, d_1 ... d_L, h_1 ... h_L, u_1 ... u_{L-1}, and h_L's mean and scale under a
    norm."""
    xs, hs, us = [k], list[Tensor](), list[Tensor]()
    for w, tall in zip(W, form.tall, strict=True):
        if hs:
            xs.append(F.gelu(hs[-1]))
        hs.append(_times(xs[-1], w, tall))
    z = e = hs[-1]
    stats: list[Tensor] = []
    if form.norm:
        e, *stats = torch.native_layer_norm(z, z.shape[-1:], None, None, EPS)
    e = (e + k if form.residual else e) - v
    ds = [_slope(e, z, *stats) if form.norm else e]
    for w, tall, h in zip(W[:0:-1], form.tall[:0:-1], hs[-2::-1], strict=True):
        us.insert(0, _against(ds[0], w, tall))
        ds.insert(0, gelu_backward(us[0], h))
    return [xs, ds, hs, us, stats]


def _advance(
    form: Form,
    tables: list[Table],
    j: int,
    old: list[Tensor],
    new: list[Tensor],
    xs: Sequence[Tensor],
    ds: Sequence[Tensor],
) -> None:
    """The parts after chunk j."""
    for a, b, tall, i, x, d in zip(old, new, form.tall, form.tables, xs, ds, strict=True):
        late, move = tables[i].late[j], tables[i].move[j]
        c = move.shape[-1]
        torch.mul(a[:, :c], _own(move), out=b[:, :c])
        if c > 1:
            b[:, 0].addcmul_(a[:, 1], move[:, :1, 1:])
        near, far = (d, x) if tall else (x, d)
        b[:, :c].flatten(1, 2).baddbmm_(_beside(near, late).mT, far)


def _reads(
    form: Form, q: Tensor, tables: list[Table], xs: list[Tensor], ds: list[Tensor], Z: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """y; what every weight gives out; before the shares where it is tall; mean and scale of the
    last one."""
    rs, sides, stats = list[Tensor](), list[Tensor](), list[Tensor]()
    x = q
    for z, tall, i, key, d in zip(Z, form.tall, form.tables, xs, ds, strict=True):
        if rs:
            x = F.gelu(rs[-1])
        r = torch.bmm(torch.bmm(x, key.mT).mul_(tables[i].table), d)
        if tall:
            sides.append(torch.bmm(x, z.flatten(1, 2).mT))
            _add_parts(r, sides[-1], tables[i].share)
        else:
            r.baddbmm_(_beside(x, tables[i].share), z.flatten(1, 2))
        rs.append(r)
    y = rs[-1]
    if form.norm:
        y, *stats = torch.native_layer_norm(y, y.shape[-1:], None, None, EPS)
    return (y + q if form.residual else y), rs, sides, stats


def _backward(form: Form, given: Inputs, kept: _Kept, *grads: Tensor) -> Inputs:
    q, k, v, tables, Z, anchor, fresh = given
    N, L = len(q), len(Z)
    by_y, by_Z, by_held = grads[0], [g.clone() for g in grads[1 : L + 1]], list(grads[L + 1 :])
    by_q, by_k, by_v = (torch.empty_like(x) for x in (q, k, v))
    by_tables = [Table(*(torch.zeros_like(x) for x in t)) for t in tables]
    by_fresh = [torch.zeros_like(f) for f in fresh]
    room = _room(form, N, Z)
    for a in reversed(range(0, N, form.group)):
        m = min(form.group, N - a)
        cut = slice(a, a + m)
        group = {name: tensors for (at, name), tensors in kept.items() if at == a}
        hs, us = group["h"][:-1], group["u"]
        slopes = [gelu_backward(torch.ones_like(h), h) for h in hs]
        xs = [k[cut], *map(F.gelu, hs)]
        ds = [*(u * slope for u, slope in zip(us, slopes, strict=True)), *group["d"]]
        for each, start in zip(room, group["start"], strict=True):
            each[0] = start
        for j, old, new in _chunks(room, a, m):
            _restarted(form.starts[j], fresh, old, None)
            _advance(form, tables, j, old, new, [x[j - a] for x in xs], [d[j - a] for d in ds])
        reads = _reads_back(
            form, q[cut], by_y[cut], tables, by_tables, cut, group, xs, ds, [z[:m] for z in room]
        )
        by_q[cut], by_x, by_d, pairs = reads
        bent = [gelu_bend(h).mul_(u) for h, u in zip(hs, us, strict=True)]
        for j, old, _ in reversed(list(_chunks(room, a, m))):
            i = j - a
            held = kept.get((j, "anchor"))
            by_held = _left_back(form.opens[j], by_Z, by_held)
            x, d, by_x_, by_d_ = ([each[i] for each in of] for of in (xs, ds, by_x, by_d))
            _advance_back(form, tables, by_tables, j, old, by_Z, x, d, by_x_, by_d_)
            for z, (near, far) in zip(by_Z, pairs, strict=True):
                z.flatten(1, 2).baddbmm_(near[i].mT, far[i])
            if held is None:
                for z, b in zip(by_Z, by_held, strict=False):
                    z[:, 0] += b
                by_held = []
            stats = [s[i] for s in group["stats"]]
            acts = ([s[i] for s in slopes], [b[i] for b in bent], group["h"][-1][i], stats)
            by_k[j], by_v[j], by_W = _gradients_back(
                form, k[j], v[j], _anchors(form, old, held), x, d, acts, by_x_, by_d_
            )
            if not form.first_order:
                for z, w in zip(by_Z, by_W, strict=True):
                    if form.base:
                        z[:, -1] += w
                    if held is None:
                        z[:, 0] += w
                if held is not None:
                    by_held = [b + w for b, w in zip(by_held, by_W, strict=True)] if by_held else by_W
            by_held = _restarted_back(form.starts[j], by_fresh, by_Z, by_held)
    by_anchor = by_held or [torch.zeros_like(w) for w in anchor]
    return Inputs(by_q, by_k, by_v, by_tables, by_Z, by_anchor, by_fresh)


def _left_back(opened: Tensor | None, by_Z: list[Tensor], by_held: list[Tensor]) -> list[Tensor]:
    """Backward through `_left`: the anchors after a chunk are A in the rows that complete it."""
    for z, b in zip(by_Z, by_held, strict=False):
        z[:, 0] += b if opened is None else b.masked_fill(opened[:, None, None], 0)
    return [] if opened is None else [b.masked_fill(~opened[:, None, None], 0) for b in by_held]


def _restarted_back(
    start: Tensor | None, by_fresh: list[Tensor], by_Z: list[Tensor], by_held: list[Tensor]
) -> list[Tensor]:
    """Backward through `_restarted`."""
    if start is None:
        return by_held
    rows = start[:, None, None]
    for f, z in zip(by_fresh, by_Z, strict=True):
        mine = z[:, : f.shape[1]]
        f += mine.masked_fill(~rows[..., None], 0)
        mine.masked_fill_(rows[..., None], 0)
    for f, b in zip(by_fresh, by_held, strict=False):
        f[:, 0] += b.masked_fill(~rows, 0)
    return [b.masked_fill(rows, 0) for b in by_held]


def _reads_back(
    form: Form,
    q: Tensor,
    by_y: Tensor,
    tables: list[Table],
    by_tables: list[Table],
    cut: slice,
    group: dict[str, list[Tensor]],
    xs: list[Tensor],
    ds: list[Tensor],
    Z: list[Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Backward through `_reads` of a group: the gradients of q, of every x_i and d_i, and those of
    the parts as products of a near and a far side."""
    flat = lambda x: x.flatten(0, 1)  # noqa: E731
    whole = lambda x: x.unflatten(0, (len(q), -1))  # noqa: E731
    rs, sides = group["r"], list(group["side"])
    g = flat(by_y).contiguous()
    by_q = g.clone() if form.residual else torch.zeros_like(flat(q))
    if form.norm:
        g = _slope(g, rs[-1], *group["ends"])
    by_x: list[Tensor] = []
    by_d: list[Tensor] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    for i in reversed(range(len(Z))):
        table, share = (flat(t[cut]) for t in tables[form.tables[i]][:2])
        into = by_tables[form.tables[i]]
        x, key, d, z = F.gelu(rs[i - 1]) if i else flat(q), flat(xs[i]), flat(ds[i]), flat(Z[i]).flatten(1, 2)
        met, back = torch.bmm(x, key.mT), torch.bmm(g, d.mT)
        flat(into.table[cut]).addcmul_(back, met)
        met.mul_(table)
        back.mul_(table)
        by_d.insert(0, whole(torch.bmm(met.mT, g)))
        by_x.insert(0, whole(torch.bmm(back.mT, x)))
        through = torch.bmm(back, key)
        if form.tall[i]:
            near, far = _beside(g, share), x
            through.baddbmm_(near, z)
            by_share = _by_parts(sides.pop(), g)
        else:
            V = torch.bmm(g, z.mT)
            near, far = _beside(x, share), g
            _add_parts(through, V, share)
            by_share = _by_parts(V, x)
        flat(into.share[cut]).add_(by_share)
        pairs.insert(0, (whole(near), whole(far)))
        if i:
            g = gelu_backward(through, rs[i - 1])
        else:
            by_q += through
    return whole(by_q), by_x, by_d, pairs


def _advance_back(
    form: Form,
    tables: list[Table],
    by_tables: list[Table],
    j: int,
    Z: list[Tensor],
    by_Z: list[Tensor],
    xs: list[Tensor],
    ds: list[Tensor],
    by_x: list[Tensor],
    by_d: list[Tensor],
) -> None:
    """Backward through `_advance`, in place: by_Z is the gradient of the parts after the chunk,
    then of those before it."""
    for z, by, tall, i, x, d, gx, gd in zip(Z, by_Z, form.tall, form.tables, xs, ds, by_x, by_d, strict=True):
        late, move, into = tables[i].late[j], tables[i].move[j], by_tables[i]
        c = move.shape[-1]
        near, far, by_near, by_far = (d, x, gd, gx) if tall else (x, d, gx, gd)
        mine = by[:, :c]
        V = torch.bmm(far, mine.flatten(1, 2).mT)
        _add_parts(by_near, V, late)
        by_far.baddbmm_(_beside(near, late), mine.flatten(1, 2))
        into.late[j].add_(_by_parts(V, near))
        into.move[j].baddbmm_(mine.flatten(2), z[:, :c].flatten(2).mT)
        moved = by[:, 0] * move[:, :1, 1:] if c > 1 else None
        mine.mul_(_own(move))
        if moved is not None:
            by[:, 1] += moved


def _gradients_back(
    form: Form,
    k: Tensor,
    v: Tensor,
    W: list[Tensor],
    xs: list[Tensor],
    ds: list[Tensor],
    activations: tuple[list[Tensor], list[Tensor], Tensor, list[Tensor]],
    by_x: list[Tensor],
    by_d: list[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Backward through `_gradients`: the gradients of k, v and the weights; by_x and by_d are added
    to in place.

    activations: gelu'(h_i), gelu''(h_i) u_i, h_L, and its mean and scale.
    """
    slopes, bent, z, stats = activations
    by_h: list[Tensor] = []
    by_W: list[Tensor] = [torch.zeros_like(W[0])]
    for i, slope in enumerate(slopes):
        # d_i = gelu'(h_i) u_i, u_i = d_{i+1} W_{i+1}^T
        by_h.append(bent[i] * by_d[i])
        through, d, tall = by_d[i] * slope, ds[i + 1], form.tall[i + 1]
        by_W.append(torch.bmm(d.mT, through) if tall else torch.bmm(through.mT, d))
        by_d[i + 1] += _times(through, W[i + 1], tall)
    g = by_e = by_z = by_d[-1]
    if form.norm:
        mean, scale = stats
        normed = (z - mean).mul_(scale)
        e = (normed + k if form.residual else normed) - v
        by_e = _slope(g, z, mean, scale)
        by_z = _slope(by_e, z, mean, scale)
        by_z = by_z.add_(layer_norm_bend(g, e, by_e, ds[-1], normed, scale))
    back = by_z
    for i in reversed(range(len(W))):
        x, tall = xs[i], form.tall[i]
        by_W[i].baddbmm_(*((back.mT, x) if tall else (x.mT, back)))
        by_x[i] += _against(back, W[i], tall)
        if i:
            back = torch.addcmul(by_h[i - 1], by_x[i], slopes[i - 1])
    by_k = by_x[0] + by_e if form.residual else by_x[0]
    return by_k, -by_e, by_W


def _recorded(form: Form, *flat: Tensor) -> tuple[Tensor, ...]:
    """The scan with operations that can be differentiated any number of times."""
    q, k, v, tables, Z, anchor, fresh = Inputs.of(form, flat)
    held, y = anchor or None, list[Tensor]()
    for j in range(len(q)):
        Z = [z.clone() for z in Z]
        held = _restarted(form.starts[j], fresh, Z, held)
        W = [w.mT if tall else w for w, tall in zip(_anchors(form, Z, held), form.tall, strict=True)]
        W = [w.detach() for w in W] if form.first_order else W
        found = recorded_factors(form.residual, form.norm, k[j], v[j], *W)
        xs, ds = [k[j], *found[: len(Z) - 1]], found[len(Z) - 1 : 2 * len(Z) - 1]
        r, new = q[j], list[Tensor]()
        for i, (z, tall, x, d) in enumerate(zip(Z, form.tall, xs, ds, strict=True)):
            t = Table(*(part[j] for part in tables[form.tables[i]]))
            r = r * phi(r) if i else r
            each = [_times(r, part, tall) for part in z.unbind(1)]
            r = ((r @ x.mT) * t.table) @ d + sum(
                t.share[..., p : p + 1] * part for p, part in enumerate(each)
            )
            near, far = (d, x) if tall else (x, d)
            c = t.late.shape[-1]
            moved = torch.einsum("rab,rbsl->rasl", t.move, z[:, :c])
            new.append(torch.cat([moved + torch.einsum("rnc,rns,rnl->rcsl", t.late, near, far), z[:, c:]], 1))
        if form.norm:
            centred = r - r.mean(-1, keepdim=True)
            r = centred * (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
        y.append(r + q[j] if form.residual else r)
        held = _left(form.opens[j], Z, new, held)
        Z = new
    return torch.stack(y), *Z, *(held or ())


def _own(move: Tensor) -> Tensor:
    """The factor with which each part is kept, (R, c, c) to (R, c, 1, 1)."""
    return move.diagonal(dim1=-2, dim2=-1)[..., None, None]


def _times(x: Tensor, W: Tensor, tall: bool) -> Tensor:
    """x W, for a weight that is stored transposed if it is tall."""
    return torch.bmm(x, W.mT if tall else W)


def _against(x: Tensor, W: Tensor, tall: bool) -> Tensor:
    """x W^T."""
    return torch.bmm(x, W if tall else W.mT)


def _beside(x: Tensor, share: Tensor) -> Tensor:
    """x (..., d) repeated for every part, times its share (..., p): (..., p d)."""
    return (x.unsqueeze(-2) * share.unsqueeze(-1)).flatten(-2)


def _add_parts(y: Tensor, V: Tensor, share: Tensor) -> None:
    """y (..., d) += the parts of V (..., p d), each times its share (..., p)."""
    for i, part in enumerate(V.split(y.shape[-1], -1)):
        y.addcmul_(part, share[..., i : i + 1])


def _by_parts(V: Tensor, x: Tensor) -> Tensor:
    """The product of x (..., d) with each part of V (..., p d): (..., p)."""
    return torch.stack([(part * x).sum(-1) for part in V.split(x.shape[-1], -1)], -1)


def _slope(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """The gradient of a layer norm's input x from that of its output, given x's mean and
    1 / deviation."""
    return layer_norm_backward(g, x, x.shape[-1:], mean, scale, None, None, [True, False, False])[0]
