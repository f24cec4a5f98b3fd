"""The pieces of the dual form that cost time, each with a backward pass of its own.

Tables of products, reading and advancing are multilinear, so their gradients are known whatever the memory, bias and
gates are. Written out they scale the narrower side of every product, meet A and S in one product, and accumulate in
place: half the time that recorded operations need.

A weight's A and S are held as one tensor (B, H, parts * a, b), A above S, with a the narrower side of the weight and
b the wider one (so transposed where d_in > d_out); parts is 2 with momentum, else 1.

Shapes: x (B, H, n, d_in), d (B, H, n, d_out); first (B, H, n, parts), what a token reads of A and S; table
(B, H, n, n) what it reads of each token; last_table (B, H, n, parts) the same at the chunk's end; carry
(B, H, parts, parts), the share of A and S there in A and in S.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def hold(A: Tensor, S: Tensor | None) -> Tensor:
    """A and S (B, H, d_in, d_out) as one tensor (B, H, parts * a, b)."""
    parts = [A] if S is None else [A, S]
    if A.shape[-2] > A.shape[-1]:
        parts = [x.mT for x in parts]
    return torch.cat(parts, -2)


def release(held: Tensor, wide_in: bool, parts: int) -> tuple[Tensor, ...]:
    """What `hold` took: (A,) or (A, S)."""
    return tuple(x.mT if wide_in else x for x in held.chunk(parts, -2))


def read(x: Tensor, keys: Tensor, d: Tensor, held: Tensor, first: Tensor, table: Tensor) -> Tensor:
    """x_t A_t for every token: K0 x A + G0 x S + ((x keys^T) . G) d, without forming any A_t."""
    y = ((x @ keys.mT) * table) @ d
    kept = release(held, x.shape[-1] > d.shape[-1], first.shape[-1])
    return y + sum(share * (x @ part) for share, part in zip(first.split(1, -1), kept, strict=True))


def advance(x: Tensor, d: Tensor, held: Tensor, carry: Tensor, last_table: Tensor) -> tuple[Tensor, Tensor]:
    """K A + G0 S + sum_i G_i x_i d_i^T and H0 S + sum_i H_i x_i d_i^T, held; and the first by itself."""
    wide_in = x.shape[-1] > d.shape[-1]
    s, w = (d, x) if wide_in else (x, d)
    after = (carry @ _stacked(held, carry)).view_as(held) + _weigh(s, last_table).mT @ w
    A = after[..., : s.shape[-1], :]
    return after, A.mT if wide_in else A


def fast_read(x: Tensor, keys: Tensor, d: Tensor, held: Tensor, first: Tensor, table: Tensor) -> Tensor:
    """`read`, the same numbers."""
    return _Read.apply(x, keys, d, held, first, table)


def fast_advance(
    x: Tensor, d: Tensor, held: Tensor, carry: Tensor, last_table: Tensor
) -> tuple[Tensor, Tensor]:
    """`advance`, the same numbers."""
    return _Advance.apply(x, d, held, carry, last_table)


def _weigh(s: Tensor, weights: Tensor) -> Tensor:
    """[s w_1 | s w_2]: (..., n, a) and (..., n, parts) to (..., n, parts * a)."""
    if weights.shape[-1] == 1:
        return s * weights
    return (weights[..., None] * s[..., None, :]).flatten(-2)


def _shares(weighed: Tensor, s: Tensor, parts: int) -> Tensor:
    """The gradient of the weights in `_weigh`: (..., n, parts * a) and (..., n, a) to (..., n, parts)."""
    return (weighed.unflatten(-1, (parts, -1)) * s[..., None, :]).sum(-1)


def _gathered(weighed: Tensor, weights: Tensor) -> Tensor:
    """The gradient of s in `_weigh`: (..., n, parts * a) and (..., n, parts) to (..., n, a)."""
    one, *more = weighed.chunk(weights.shape[-1], -1)
    total = one * weights[..., :1]
    for part, weight in zip(more, weights.split(1, -1)[1:], strict=True):
        total.addcmul_(part, weight)
    return total


def _stacked(held: Tensor, carry: Tensor) -> Tensor:
    """(B, H, parts * a, b) as (B, H, parts, a * b)."""
    return held.reshape(*carry.shape[:-1], -1)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:])


def _recorded(
    ctx: Any,
    fn: Callable[..., Any],
    grads: tuple[Tensor | None, ...],
    saved: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients through recorded operations, for a caller who wants to differentiate them again."""
    needed = ctx.needs_input_grad
    with torch.enable_grad():
        # Inputs may depend on each other; aliases do not, so that each gets its own gradient and no other's.
        inputs = [x.view_as(x) for x in (ctx.saved_tensors if saved is None else saved)]
        outputs = fn(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
        )
    )
    return tuple(next(found) if need else None for need in needed)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, keys: Tensor, d: Tensor, held: Tensor, first: Tensor, table: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, keys, d, held, first, table)
        shape = d.shape
        x, keys, d, held, first, table = map(_flat, (x, keys, d, held, first, table))
        y = torch.bmm(torch.bmm(x, keys.mT).mul_(table), d)
        if x.shape[-1] <= d.shape[-1]:
            y.baddbmm_(_weigh(x, first), held)
        else:
            y += _gathered(torch.bmm(x, held.mT), first)
        return y.view(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (g,) = grads
        if torch.is_grad_enabled():
            return _recorded(ctx, read, (g,))
        saved = ctx.saved_tensors
        x, keys, d, held, first, table = map(_flat, saved)
        g, parts = _flat(g), first.shape[-1]
        met = torch.bmm(x, keys.mT)
        back = torch.bmm(g, d.mT)
        by_table = back * met
        by_d = torch.bmm(met.mul_(table).mT, g)
        back.mul_(table)
        by_keys = torch.bmm(back.mT, x)
        by_x = torch.bmm(back, keys)
        if x.shape[-1] <= d.shape[-1]:
            through = torch.bmm(g, held.mT)
            by_x += _gathered(through, first)
            by_first = _shares(through, x, parts)
            by_held = torch.bmm(_weigh(x, first).mT, g)
        else:
            by_first = _shares(torch.bmm(x, held.mT), g, parts)
            weighed = _weigh(g, first)
            by_x.baddbmm_(weighed, held)
            by_held = torch.bmm(weighed.mT, x)
        found = by_x, by_keys, by_d, by_held, by_first, by_table
        return tuple(t.view(s.shape) for t, s in zip(found, saved, strict=True))


class _Advance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, d: Tensor, held: Tensor, carry: Tensor, last_table: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, d, held, carry, last_table)
        ctx.set_materialize_grads(False)
        wide_in = x.shape[-1] > d.shape[-1]
        s, w = (d, x) if wide_in else (x, d)
        after = _weigh(s, last_table).mT @ w
        _flat(_stacked(after, carry)).baddbmm_(_flat(carry), _flat(_stacked(held, carry)))
        A = after[..., : s.shape[-1], :]
        return after, A.mT if wide_in else A

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        g, g_A = grads
        if torch.is_grad_enabled():
            return _recorded(ctx, advance, (g, g_A))
        x, d, held, carry, last_table = ctx.saved_tensors
        wide_in, parts = x.shape[-1] > d.shape[-1], carry.shape[-1]
        s, w = (d, x) if wide_in else (x, d)
        if g is None and g_A is None:
            return None, None, None, None, None
        if g_A is not None:
            g_A = g_A.mT if wide_in else g_A
            own = torch.empty_like(held) if g is None else torch.empty_like(g)
            halves = own.chunk(parts, -2)
            rest = own[..., halves[0].shape[-2] :, :]
            if g is None:
                halves[0].copy_(g_A)
                rest.zero_()
            else:
                torch.add(g.chunk(parts, -2)[0], g_A, out=halves[0])
                rest.copy_(g[..., halves[0].shape[-2] :, :])
            g = own
        assert g is not None  # for the type checker
        stacked = _stacked(g, carry)
        by_held = (carry.mT @ stacked).view_as(held)
        by_carry = torch.einsum("bhpn,bhqn->bhpq", stacked, _stacked(held, carry))
        side = w @ g.mT
        by_last = _shares(side, s, parts)
        by_s = _gathered(side, last_table)
        by_w = _weigh(s, last_table) @ g
        return (
            (by_w, by_s, by_held, by_carry, by_last) if wide_in else (by_s, by_w, by_held, by_carry, by_last)
        )


def products(a: Tensor) -> Tensor:
    """[t, i] = a_i ... a_t for i <= t, 1 for i = t + 1, else 0: (..., n) to (..., n, n + 1).

    Column 0 carries the initial state, column i + 1 the input of token i. Formed and differentiated by
    multiplication alone, so that values and gradients are exact where a gate is 0 or 1.
    """
    return _Products.apply(a)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        n = a.shape[-1]
        row, column = torch.arange(n, device=a.device)[:, None], torch.arange(n + 1, device=a.device)
        table = torch.where(column <= row, a[..., None], 1).cumprod(-2).mul_(column <= row + 1)
        ctx.save_for_backward(table)
        return table

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (g,) = grads
        # d [t, i] / d a_s is the product before s times the one after it, [s - 1, i] [t, s + 1].
        (table,) = ctx.saved_tensors
        before = F.pad(table[..., :-1, :], (0, 0, 1, 0))
        before[..., 0, 0] = 1
        return (before * (table[..., 1:].mT @ g)).sum(-1)


def accumulate(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    """x_t = a_t x_{t-1} + b_t for every t: a (B, H, n, d_in or 1, d_out or 1), b (B, H, n, d_in, d_out)."""
    return _Accumulate.apply(a, b, initial)


def _accumulated(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    x, xs = initial, list[Tensor]()
    for share, new in zip(a.unbind(2), b.unbind(2), strict=True):
        x = share * x + new
        xs.append(x)
    return torch.stack(xs, 2)


class _Accumulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
        out = torch.empty_like(b)
        x = initial
        for now, share, new in zip(out.unbind(2), a.unbind(2), b.unbind(2), strict=True):
            x = torch.addcmul(new, share, x, out=now)
        ctx.save_for_backward(a, b, initial, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (g,) = grads
        a, b, initial, out = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _recorded(ctx, _accumulated, (g,), (a, b, initial))
        by_b = torch.empty_like(b)
        shares, parts = a.unbind(2), list(zip(by_b.unbind(2), g.unbind(2), strict=True))
        after = None
        for t in reversed(range(len(parts))):
            now, mine = parts[t]
            after = now.copy_(mine) if after is None else torch.addcmul(mine, shares[t + 1], after, out=now)
        before = torch.cat([initial[:, :, None], out[:, :, :-1]], 2)
        by_a = (by_b * before).sum_to_size(a.shape)
        assert after is not None
        return by_a, by_b, shares[0] * after
