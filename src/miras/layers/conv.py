"""Causal depthwise convolution over a stream, and what follows it: (x, tail) -> (y, tail).

Shapes: B rows, T tokens, D channels, K taps.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from miras.engine.kernels import recorded


def conv(
    x: Tensor,
    tail: Tensor,
    weight: Tensor,
    *,
    activation: Callable[[Tensor], Tensor] = torch.clone,
    length: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = activation(sum_j weight[:, j] x_{t - K + 1 + j}): x (B, T, D), tail (B, K - 1, D),
    weight (D, K).

    `tail` holds the K - 1 inputs before x (zeros at a stream's start). `length` (B,) is the number
    of tokens of each row, followed by padding; `reset` (B, T) marks tokens that start a document,
    which do not see anything before. Returns y (B, T, D) and the tail of the stream so far.
    """
    B, T, _ = x.shape
    if T == 0:
        return activation(x), tail
    K = weight.shape[1]
    stream = torch.cat([tail, x], 1)
    document = None if reset is None else reset.cumsum(1)
    if document is None and T == 1:
        y = activation((stream * weight.mT).sum(1, keepdim=True))
    elif document is None and torch.compiler.is_compiling():  # which fuses it
        y = activation(_sum_of_taps(stream, weight))
    elif document is None:
        y = _Taps.apply(activation, stream, weight)
    else:
        y = x * weight[:, -1]
        for back in range(1, K):
            before = torch.cat([document.new_zeros(B, back), document], 1)[:, :T]
            # Not multiplied by 0: NaN and infinity of another document would remain.
            tap = stream[:, K - 1 - back : K - 1 - back + T].masked_fill((before != document)[..., None], 0)
            y = y + tap * weight[:, K - 1 - back]
        y = activation(y)
    if length is None and reset is None:
        # A view would keep the whole stream alive.
        return y, stream[:, T:].clone(memory_format=torch.contiguous_format)
    length = torch.full((B,), T, device=x.device) if length is None else length
    # positions of the tail in `stream`
    last = length[:, None] + torch.arange(K - 1, device=x.device)
    tail = stream.gather(1, last[..., None].expand(-1, -1, x.shape[-1]))
    if document is not None:
        known = torch.cat([document.new_zeros(B, K - 1), document], 1)
        newest = known.gather(1, (length + K - 2).clamp_min(0)[:, None])
        tail = tail.masked_fill((known.gather(1, last) != newest)[..., None], 0)
    return y, tail


class _Taps(torch.autograd.Function):
    """activation(`_sum_of_taps`), accumulated in place; what lies between the two is made again
    when it is needed."""

    @staticmethod
    def forward(ctx: Any, activation: Callable[[Tensor], Tensor], stream: Tensor, weight: Tensor) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(stream, weight)
        return activation(_accumulated(stream, weight))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (g,) = grads
        stream, weight = ctx.saved_tensors
        activation: Callable[[Tensor], Tensor] = ctx.activation
        if torch.is_grad_enabled():
            whole = lambda stream, weight: activation(_sum_of_taps(stream, weight))  # noqa: E731
            return None, *recorded(ctx.needs_input_grad[1:], whole, (g,), (stream, weight))
        y = _accumulated(stream, weight).requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(activation(y), y, g)
        to_stream = torch.zeros_like(stream)
        for tap, row in zip(_taps(to_stream, weight), weight.mT.contiguous(), strict=True):
            tap.addcmul_(g, row)
        to_weight = [(g * tap).sum((0, 1)) for tap in _taps(stream, weight)]
        return None, to_stream, torch.stack(to_weight, 1)


def _accumulated(stream: Tensor, weight: Tensor) -> Tensor:
    """`_sum_of_taps`, not recorded."""
    # One row per tap: strided columns would cost five times as much.
    last, *before = reversed(list(zip(_taps(stream, weight), weight.mT.contiguous(), strict=True)))
    y = last[0] * last[1]
    for tap, row in before:
        y.addcmul_(tap, row)
    return y


def _sum_of_taps(stream: Tensor, weight: Tensor) -> Tensor:
    """sum_j weight[:, j] stream[:, t + j]: (B, T + K - 1, D) to (B, T, D)."""
    return torch.stack([tap * row for tap, row in zip(_taps(stream, weight), weight.mT, strict=True)]).sum(0)


def _taps(stream: Tensor, weight: Tensor) -> list[Tensor]:
    size = stream.shape[1] - weight.shape[1] + 1
    return [stream[:, j : j + size] for j in range(weight.shape[1])]
