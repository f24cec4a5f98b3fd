"""The pieces of the dual form that cost time, each with a backward pass of its own.

Tables of products, reading and advancing are multilinear, so their gradients are known whatever the memory, bias and
gates are. Written out they scale the narrower side of every product and accumulate in place.

Shapes, with R = B * H: x (R, n, d_in) what is asked, keys (R, n, d_in), d (R, n, d_out); table (R, n, n), what a
token reads of each token; A, S (B, H, d_in, d_out); first, first_S (R, n, 1), their shares in what a token reads;
last (R, n, 1), each token's share in S at the chunk's end; carry (R, 1, 1), that of S itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.core.activation import save_lean, saved_lean


def step(
    x: Tensor, keys: Tensor, d: Tensor, table: Tensor, first: Tensor, A: Tensor, *momentum: Tensor
) -> tuple[Tensor, ...]:
    """What every token reads, x_t A_t, and A after the last one, without forming the A_t before it.

    y_t = first_t x_t A + first_S_t x_t S + sum_i table_ti (x_t . keys_i) d_i, and A so too, with the last token's
    shares. With momentum = first_S, S, last, carry comes S after it: carry S + sum_i last_i keys_i d_i^T.
    """
    shape, A = A.shape, _flat(A)
    y = ((x @ keys.mT) * table) @ d + first * (x @ A)
    A = first[:, -1:] * A + (keys * table[:, -1, :, None]).mT @ d
    if not momentum:
        return y, A.view(shape)
    first_S, S, last, carry = momentum
    S = _flat(S)
    y, A = y + first_S * (x @ S), A + first_S[:, -1:] * S
    S = carry * S + (keys * last).mT @ d
    return y, A.view(shape), S.view(shape)


def fast_step(*inputs: Tensor) -> tuple[Tensor, ...]:
    """`step`, the same numbers."""
    return _Step.apply(*inputs) if torch.is_grad_enabled() else _stepped(*inputs)


def _stepped(
    x: Tensor, keys: Tensor, d: Tensor, table: Tensor, first: Tensor, A: Tensor, *momentum: Tensor
) -> tuple[Tensor, ...]:
    shape, A = A.shape, _flat(A)
    y = torch.bmm(torch.bmm(x, keys.mT).mul_(table), d)
    _add_read(y, x, A, first)
    after = [_add_written(A * first[:, -1:], keys, d, table[:, -1, :, None])]
    if momentum:
        first_S, S, last, carry = momentum
        S = _flat(S)
        _add_read(y, x, S, first_S)
        after[0].addcmul_(S, first_S[:, -1:])
        after.append(_add_written(S * carry, keys, d, last))
    return y, *(new.view(shape) for new in after)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, keys, d, *others = inputs
        save_lean(ctx, (x, keys, d), others)
        ctx.set_materialize_grads(False)
        return _stepped(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, keys, d, table, first, A, *momentum = saved_lean(ctx)
        if torch.is_grad_enabled():
            return recorded(ctx.needs_input_grad, step, grads, (x, keys, d, table, first, A, *momentum))
        shape, A = A.shape, _flat(A)
        g = torch.zeros_like(d) if grads[0] is None else grads[0]
        by_A, *by_S = (None if by is None else _flat(by) for by in grads[1:])
        met = torch.bmm(x, keys.mT)
        back = torch.bmm(g, d.mT)
        by_table = back * met
        by_d = torch.bmm(met.mul_(table).mT, g)
        back.mul_(table)
        by_keys = torch.bmm(back.mT, x)
        by_x = torch.bmm(back, keys)
        by_first, into_A = _read_back(g, x, A, first, by_x)
        if by_A is not None:
            by_table[:, -1].add_(_written_back(by_A, keys, d, table[:, -1, :, None], by_keys, by_d)[..., 0])
            by_first[:, -1:].add_(_dot(by_A, A))
            into_A.addcmul_(by_A, first[:, -1:])
        found = [by_x, by_keys, by_d, by_table, by_first, into_A.view(shape)]
        if momentum:
            first_S, S, last, carry = momentum
            S = _flat(S)
            by_first, into_S = _read_back(g, x, S, first_S, by_x)
            if by_A is not None:
                by_first[:, -1:].add_(_dot(by_A, S))
                into_S.addcmul_(by_A, first_S[:, -1:])
            by_last = by_carry = None
            if by_S[0] is not None:
                by_last = _written_back(by_S[0], keys, d, last, by_keys, by_d)
                by_carry = _dot(by_S[0], S)
                into_S.addcmul_(by_S[0], carry)
            found += [by_first, into_S.view(shape), by_last, by_carry]
        return tuple(found)


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


def _written_back(
    by_W: Tensor, keys: Tensor, d: Tensor, weight: Tensor, by_keys: Tensor, by_d: Tensor
) -> Tensor:
    """The gradient of weight in `_add_written`; those of keys and d are added to by_keys and by_d."""
    if by_W.shape[1] <= by_W.shape[2]:
        side = torch.bmm(d, by_W.mT)
        by_keys.addcmul_(side, weight)
        by_d.baddbmm_(keys * weight, by_W)
        return side.mul_(keys).sum(-1, keepdim=True)
    side = torch.bmm(keys, by_W)
    by_d.addcmul_(side, weight)
    by_keys.baddbmm_(d * weight, by_W.mT)
    return side.mul_(d).sum(-1, keepdim=True)


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
    """The gradients through recorded operations, for a caller who wants to differentiate them again."""
    with torch.enable_grad():
        # Inputs may depend on each other; aliases do not, so that each gets its own gradient and no other's.
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


def products(a: Tensor) -> tuple[Tensor, Tensor]:
    """[t] = a_1 ... a_t and [t, i] = a_{i+1} ... a_t, 1 for i = t, 0 above: (..., n) to (..., n) and (..., n, n).

    The first carries the initial state, the second the input of every token. Formed and differentiated by
    multiplication alone, so that values and gradients are exact where a gate is 0 or 1.
    """
    return _Products.apply(a)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> tuple[Tensor, Tensor]:
        at = torch.arange(a.shape[-1], device=a.device)
        first = a.cumprod(-1)
        table = torch.where(at < at[:, None], a[..., None], 1).cumprod(-2).tril_()
        ctx.save_for_backward(first, table)
        return first, table

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        # d [t, i] / d a_s is the product before s times the one after it, [s - 1, i] [t, s].
        first, table = ctx.saved_tensors
        by_first, by_table = grads
        found = F.pad(first[..., :-1], (1, 0), value=1) * (table.mT @ by_first[..., None])[..., 0]
        after = (table.mT @ by_table)[..., 1:, :]
        return found + F.pad((table[..., :-1, :] * after).sum(-1), (1, 0))


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
