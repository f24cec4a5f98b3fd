"""Causal depthwise convolution over a stream: (x, tail) -> (y, tail).

Shapes: B rows, T tokens, D channels, K taps.
"""

import torch
from torch import Tensor


def conv(
    x: Tensor,
    tail: Tensor,
    weight: Tensor,
    *,
    length: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = sum_j weight[:, j] x_{t - K + 1 + j}: x (B, T, D), tail (B, K - 1, D), weight (D, K).

    `tail` holds the K - 1 inputs before x (zeros at a stream's start). `length` (B,) is the number of tokens of
    each row, the rest of the row being padding behind them; `reset` (B, T) marks tokens that start a document,
    before which nothing is seen. Returns y (B, T, D) and the tail of the stream so far.
    """
    B, T, _ = x.shape
    if T == 0:
        return x, tail
    K = weight.shape[1]
    stream = torch.cat([tail, x], 1)
    y = x * weight[:, -1]
    document = None if reset is None else reset.cumsum(1)
    for back in range(1, K):
        tap = stream[:, K - 1 - back : K - 1 - back + T]
        if document is not None:
            before = torch.cat([document.new_zeros(B, back), document], 1)[:, :T]
            tap = tap * (before == document)[..., None]
        y = y + tap * weight[:, K - 1 - back]
    if length is None and reset is None:
        return y, stream[:, T:].clone()  # a view would keep the whole stream
    length = torch.full((B,), T, device=x.device) if length is None else length
    last = length[:, None] + torch.arange(K - 1, device=x.device)  # places of the tail in `stream`
    tail = stream.gather(1, last[..., None].expand(-1, -1, x.shape[-1]))
    if document is not None:
        known = torch.cat([document.new_zeros(B, K - 1), document], 1)
        newest = known.gather(1, (length + K - 2).clamp_min(0)[:, None])
        tail = tail * (known.gather(1, last) == newest)[..., None]
    return y, tail
