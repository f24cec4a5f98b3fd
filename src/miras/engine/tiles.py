"""Reads of a memory whose weights are a map of its accumulator: A_t of all tokens is formed tile by
tile.

    A_t = keep_t * A_{t-1} + keys_t d_t^T,   y_t = x_t link(A_t + base)

A tile is a few chunks of one head, small enough for a processor's cache. All computation on it
happens in place, forward and backward; only the inputs are saved for the backward pass.

Shapes: R rows and heads, N chunks of n tokens; x, keys (R, N, n, d_in), d (R, N, n, d_out), keep
(R, N, n, d_in or 1, d_out or 1), A before each chunk (R, N, d_in, d_out), base (R, d_in, d_out) or
none. In a tile R is missing.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from miras.core.retention import LqNorm, Retention, Simplex
from miras.engine.kernels import accumulate, recorded

TILE_BYTES = 1 << 19
"""About the size of a tile's A_t; there are up to three buffers of this size."""


def read(
    retention: Retention, x: Tensor, keys: Tensor, d: Tensor, keep: Tensor, A: Tensor, base: Tensor | None
) -> Tensor:
    """The read of every token, (R, N, n, d_out)."""
    return _Read.apply(retention, x, keys, d, keep, A, *(() if base is None else (base,)))


def _recording(retention: Retention, *inputs: Tensor) -> Tensor:
    """The same with operations that can be differentiated any number of times."""
    x, keys, d, keep, A, *base = inputs
    A = accumulate(keep, keys[..., None] * d[..., None, :], A)
    return (x[..., None, :] @ retention.link(A + base[0][:, None, None] if base else A))[..., 0, :]


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, retention: Retention, *inputs: Tensor) -> Tensor:
        ctx.retention = retention
        ctx.save_for_backward(*inputs)
        link = _map(retention)
        x, keys, d, keep, A, *base = inputs
        y = torch.empty_like(d)
        for r, cut, (formed, spare) in _tiles(A, x.shape[2], 2):
            _form(formed, keys[r, cut], d[r, cut], keep[r, cut], A[r, cut])
            if base:
                formed.add_(base[0][r])
            y[r, cut] = link.read(formed, spare, x[r, cut])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            again = lambda *inputs: _recording(ctx.retention, *inputs)  # noqa: E731
            return None, *recorded(needed, again, grads, inputs)
        link = _map(ctx.retention)
        x, keys, d, keep, A, *base = inputs
        by_x, by_keys, by_d, by_keep, by_A, *by_base = found = [torch.empty_like(i) for i in inputs]
        for total in by_base:
            total.zero_()
        for r, cut, (formed, spare, g) in _tiles(A, x.shape[2], 3):
            mine, share = A[r, cut], keep[r, cut]
            _form(formed, keys[r, cut], d[r, cut], share, mine)
            Z = torch.add(formed, base[0][r], out=spare) if base else formed
            by_x[r, cut] = link.back(Z, spare, x[r, cut], grads[0][r, cut], g)
            if base:
                by_base[0][r] += g.sum((0, 1))
            for t in range(g.shape[1] - 1, 0, -1):
                g[:, t - 1].addcmul_(share[:, t], g[:, t])
            by_keys[r, cut] = _row(d[r, cut], g.mT)
            by_d[r, cut] = _row(keys[r, cut], g)
            by_A[r, cut] = g[:, 0] * share[:, 0]
            if needed[3]:
                torch.mul(g[:, 0], mine, out=spare[:, 0])
                torch.mul(g[:, 1:], formed[:, :-1], out=spare[:, 1:])
                by_keep[r, cut] = spare.sum_to_size(share.shape)
        return None, *(x if need else None for x, need in zip(found, needed, strict=True))


def _tiles(A: Tensor, n: int, buffers: int) -> Iterator[tuple[int, slice, tuple[Tensor, ...]]]:
    """Head and chunks of every tile, and the given number of buffers of its size (chunks, n, d_in,
    d_out)."""
    R, N, *shape = A.shape
    size = max(1, min(N, TILE_BYTES // (n * shape[0] * shape[1] * A.element_size())))
    room = A.new_empty(buffers, size, n, *shape)
    for r in range(R):
        for at in range(0, N, size):
            count = min(size, N - at)
            yield r, slice(at, at + count), room[:, :count].unbind(0)


def _form(out: Tensor, keys: Tensor, d: Tensor, keep: Tensor, A: Tensor) -> None:
    """A_t of every token of a tile."""
    torch.mul(keys[..., None], d[..., None, :], out=out)
    for t in range(out.shape[1]):
        out[:, t].addcmul_(keep[:, t], out[:, t - 1] if t else A)


def _row(x: Tensor, W: Tensor) -> Tensor:
    """x_t W_t of every token."""
    return (x[..., None, :] @ W)[..., 0, :]


class _Map(Protocol):
    def read(self, Z: Tensor, spare: Tensor, x: Tensor) -> Tensor:
        """x link(Z). Both buffers are overwritten."""
        ...

    def back(self, Z: Tensor, spare: Tensor, x: Tensor, g: Tensor, by_Z: Tensor) -> Tensor:
        """The gradient by x, given g, that of the read; the gradient by Z goes into by_Z. spare is
        overwritten and may be Z."""
        ...


def _map(retention: Retention) -> _Map:
    if type(retention) is LqNorm and not retention.literal:
        return _Norm(retention.q)
    if type(retention) is Simplex and retention.axis == "input":
        return _Softmax(retention.scale)
    return _Any(retention)


class _Any:
    """Any link, by autograd."""

    def __init__(self, retention: Retention) -> None:
        self.link = retention.link

    def read(self, Z: Tensor, spare: Tensor, x: Tensor) -> Tensor:
        return _row(x, self.link(Z))

    def back(self, Z: Tensor, spare: Tensor, x: Tensor, g: Tensor, by_Z: Tensor) -> Tensor:
        Z = Z.detach().requires_grad_()
        with torch.enable_grad():
            W = self.link(Z)
        by_Z.copy_(torch.autograd.grad(W, Z, x[..., None] * g[..., None, :])[0])
        return _row(g, W.detach().mT)


class _Softmax:
    """W = scale softmax(Z) over the inputs, never normalised: x W is (x E) / (1 E) with
    E = exp(Z - max)."""

    def __init__(self, scale: float | None) -> None:
        self.scale = scale

    def read(self, Z: Tensor, spare: Tensor, x: Tensor) -> Tensor:
        top, bottom = (self._rows(x) @ self._exp(Z, Z)).unbind(-2)
        return top.div_(bottom).mul_(self._scale(Z))

    def back(self, Z: Tensor, spare: Tensor, x: Tensor, g: Tensor, by_Z: Tensor) -> Tensor:
        rows, E = self._rows(x), self._exp(Z, spare)
        top, bottom = (rows @ E).unbind(-2)
        by_top = g * (self._scale(E) / bottom)
        into = torch.stack([by_top, -by_top * top / bottom], -2)
        torch.bmm(rows.flatten(0, 1).mT, into.flatten(0, 1), out=by_Z.flatten(0, 1))
        by_Z.mul_(E)
        return _row(by_top, E.mT)

    def _scale(self, Z: Tensor) -> float:
        return Z.shape[-2] ** 0.5 if self.scale is None else self.scale

    @staticmethod
    def _rows(x: Tensor) -> Tensor:
        return torch.stack([x, torch.ones_like(x)], -2)

    @staticmethod
    def _exp(Z: Tensor, out: Tensor) -> Tensor:
        return torch.sub(Z, Z.amax(-2, keepdim=True), out=out).exp_()


class _Norm:
    """LqNorm's map: with u = Z / t, t the largest entry, s = u^2 + e^2 and P = sum s^(q/2), a
    constant t as there,

    W = t P^(2/q - 1) V,   V = u s^(q/2 - 1),
    dV/du = (q - 1) s^(q/2 - 1) - (q - 2) e^2 s^(q/2 - 2),   dP/du = q V
    """

    def __init__(self, q: float) -> None:
        self.q = q

    def read(self, Z: Tensor, spare: Tensor, x: Tensor) -> Tensor:
        top, _, u, s = self._parts(Z, spare, Z)
        power, size = self._size(s)
        return _row(x, u.mul_(power)) * self._scale(top, size)

    def back(self, Z: Tensor, spare: Tensor, x: Tensor, g: Tensor, by_Z: Tensor) -> Tensor:
        top, e, u, s = self._parts(Z, by_Z, spare)
        power, size = self._size(s)
        V = u.mul_(power)  # in by_Z
        g = g * self._scale(top, size)
        by_x = _row(g, V.mT)
        along = (x * by_x).sum(-1)[..., None, None] * (2 - self.q) / size
        if self.q == 4:
            slope = torch.add(-2 * e, s, alpha=3, out=s)
        else:
            slope = (self.q - 1) * power - (self.q - 2) * e * power / s
        slope.mul_((x / top[..., 0])[..., None])
        V.mul_(along / top).addcmul_(slope, g[..., None, :])
        return by_x

    def _parts(self, Z: Tensor, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """t and e^2, (..., 1, 1), and in the buffers u and s."""
        # separate min and max: several times as fast as aminmax, and |Z| is not formed
        flat = Z.flatten(-2)
        top = torch.maximum(flat.amax(-1), -flat.amin(-1)).clamp_min(1e-6)[..., None, None]
        e = (1e-6 / top).clamp_min(1e-7).square()
        torch.mul(Z, 1 / top, out=u)
        torch.addcmul(e, u, u, out=s)
        return top, e, u, s

    def _size(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """s^(q/2 - 1) and P."""
        if self.q == 4:
            return s, torch.linalg.vector_norm(s, dim=(-2, -1), keepdim=True).square()
        power = s.pow(self.q / 2 - 1)
        return power, (power * s).sum((-2, -1), keepdim=True)

    def _scale(self, top: Tensor, size: Tensor) -> Tensor:
        return (top * size.pow(2 / self.q - 1))[..., 0]
