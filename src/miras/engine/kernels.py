"""The expensive operations of the dual form, each with a written-out backward pass.

Coefficient matrices, reads and updates are multilinear, so their gradients are known for every
memory, bias and gate. Written out, they scale the narrower side of every product and accumulate in
place.

Shapes, with R = B * H: x (R, n, d_in) the queries, keys (R, n, d_in), d (R, n, d_out); A, S (B, H,
d_in, d_out).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from miras.core.activation import save_lean, saved_lean


def read(x: Tensor, keys: Tensor, d: Tensor, table: Tensor, *parts: Tensor) -> Tensor:
    """The read x_t A_t of every token, without forming A_t; parts are pairs first (R, n, 1), W (B,
    H, d_in, d_out).

    y_t = sum_i table_ti (x_t . keys_i) d_i + sum over the parts of first_t x_t W: of A, and with
    momentum of S.
    """
    y = ((x @ keys.mT) * table) @ d
    for first, W in _pairs(parts):
        y = y + first * (x @ _flat(W))
    return y


def advance(keys: Tensor, d: Tensor, late: Tensor, *parts: Tensor) -> Tensor:
    """A or S after a chunk: late (R, n, 1) is each token's factor, parts are pairs share (R, 1, 1),
    W as above.

    sum_i late_i keys_i d_i^T + sum over the parts of share W
    """
    W = (keys * late).mT @ d
    for share, before in _pairs(parts):
        W = W + share * _flat(before)
    return W.view(parts[1].shape)


def fast_read(*inputs: Tensor) -> Tensor:
    """`read`, by recorded operations."""
    return _Read.apply(*inputs) if torch.is_grad_enabled() else _read(*inputs)


def fast_advance(*inputs: Tensor) -> Tensor:
    """`advance`, by recorded operations."""
    return _Advance.apply(*inputs) if torch.is_grad_enabled() else _advance(*inputs)


def _read(x: Tensor, keys: Tensor, d: Tensor, table: Tensor, *parts: Tensor) -> Tensor:
    y = torch.bmm(torch.bmm(x, keys.mT).mul_(table), d)
    for first, W in _pairs(parts):
        _add_read(y, x, _flat(W), first)
    return y


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        save_lean(ctx, inputs[:3], inputs[3:])
        return _read(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, keys, d, table, *parts = saved_lean(ctx)
        if torch.is_grad_enabled():
            return recorded(ctx.needs_input_grad, read, grads, (x, keys, d, table, *parts))
        (g,) = grads
        met = torch.bmm(x, keys.mT)
        back = torch.bmm(g, d.mT)
        by_table = back * met
        by_d = torch.bmm(met.mul_(table).mT, g)
        back.mul_(table)
        found = [torch.bmm(back, keys), torch.bmm(back.mT, x), by_d, by_table]
        for first, W in _pairs(parts):
            by_first, by_W = _read_back(g, x, _flat(W), first, found[0])
            found += [by_first, by_W.view(W.shape)]
        return tuple(found)


def _advance(keys: Tensor, d: Tensor, late: Tensor, *parts: Tensor) -> Tensor:
    (share, W), *others = _pairs(parts)
    new = _add_written(_flat(W) * share, keys, d, late)
    for share, more in others:
        new.addcmul_(_flat(more), share)
    return new.view(W.shape)


class _Advance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        save_lean(ctx, inputs[:2], inputs[2:])
        return _advance(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        keys, d, late, *parts = saved_lean(ctx)
        if torch.is_grad_enabled():
            return recorded(ctx.needs_input_grad, advance, grads, (keys, d, late, *parts))
        g = _flat(grads[0])
        found = list(_written_back(g, keys, d, late))
        for share, W in _pairs(parts):
            found += [_dot(g, _flat(W)), (g * share).view(W.shape)]
        return tuple(found)


def _pairs(parts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(parts[::2], parts[1::2], strict=True))


def _add_read(y: Tensor, x: Tensor, W: Tensor, share: Tensor) -> None:
    """y += share * (x W)."""
    if W.shape[1] <= W.shape[2]:
        y.baddbmm_(x * share, W)
    else:
        y.addcmul_(torch.bmm(x, W), share)


def _read_back(g: Tensor, x: Tensor, W: Tensor, share: Tensor, by_x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of share and W in `_add_read`; that of x is added to by_x."""
    through = torch.bmm(g, W.mT)
    by_x.addcmul_(through, share)
    by_W = torch.bmm((x * share).mT, g) if W.shape[1] <= W.shape[2] else torch.bmm(x.mT, g * share)
    return through.mul_(x).sum(-1, keepdim=True), by_W


def _add_written(W: Tensor, keys: Tensor, d: Tensor, weight: Tensor) -> Tensor:
    """W += sum_i weight_i keys_i d_i^T."""
    if W.shape[1] <= W.shape[2]:
        return W.baddbmm_((keys * weight).mT, d)
    return W.baddbmm_(keys.mT, d * weight)


def _written_back(by_W: Tensor, keys: Tensor, d: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of keys, d and weight in `_add_written`."""
    if by_W.shape[1] <= by_W.shape[2]:
        side, by_d = torch.bmm(d, by_W.mT), torch.bmm(keys * weight, by_W)
        return side * weight, by_d, side.mul_(keys).sum(-1, keepdim=True)
    side, by_keys = torch.bmm(keys, by_W), torch.bmm(d * weight, by_W.mT)
    return by_keys, side * weight, side.mul_(d).sum(-1, keepdim=True)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a * b, (R, i, j) and (R, i, j) to (R, 1, 1)."""
    return (a * b).sum((-2, -1), keepdim=True)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:])


def recorded(
    needed: Sequence[bool],
    fn: Callable[..., Any],
    grads: tuple[Tensor | None, ...],
    saved: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients through recorded operations, for higher derivatives."""
    with torch.enable_grad():
        # Inputs may depend on each other; aliases do not, so each gets only its own gradient.
        inputs = [x.view_as(x) for x in saved]
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


def accumulate(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    """x_t = a_t x_{t-1} + b_t for every t: a (B, H, n, d_in or 1, d_out or 1), b (B, H, n, d_in,
    d_out)."""
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
            return recorded(ctx.needs_input_grad, _accumulated, (g,), (a, b, initial))
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


def through(keep: Tensor) -> tuple[Tensor, Tensor]:
    """keep_1 ... keep_t and keep_{t+1} ... keep_n for every t, (R, N, n, ...) like both."""
    return _Through.apply(keep)


def _through(keep: Tensor) -> tuple[Tensor, Tensor]:
    late = torch.cat([keep[:, :, 1:], torch.ones_like(keep[:, :, :1])], 2)
    return keep.cumprod(2), late.flip(2).cumprod(2).flip(2)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keep: Tensor) -> tuple[Tensor, Tensor]:
        before, after = _through(keep)
        ctx.save_for_backward(keep, before, after)
        return before, after

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor | None:
        keep, before, after = ctx.saved_tensors
        if torch.is_grad_enabled():
            return recorded(ctx.needs_input_grad, _through, grads, (keep,))[0]
        # d before_t / d keep_s is the product before s times the one from s to t; after likewise.
        by_before, by_after = grads
        found = torch.zeros_like(keep)
        n = keep.shape[2]
        share = keep.unbind(2)
        sums = by_before[:, :, -1]
        for s in reversed(range(n)):
            sums = sums if s == n - 1 else torch.addcmul(by_before[:, :, s], share[s + 1], sums)
            found[:, :, s] = sums * before[:, :, s - 1] if s else sums
        for s in range(1, n):
            sums = by_after[:, :, 0] if s == 1 else torch.addcmul(by_after[:, :, s - 1], share[s - 1], sums)
            found[:, :, s].addcmul_(sums, after[:, :, s])
        return found
