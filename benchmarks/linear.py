"""The linear presets' layers beside a straightforward chunked form of the same recurrence, and beside full attention.

    python benchmarks/linear.py

Forward and backward, batch 1, width 256, 4 heads, fp32. "Straightforward" is the same layer with its memory's scan
replaced by the textbook chunkwise form in a few lines of PyTorch (chunks of 64, decay through logarithms, 16 for
decay by channel), which keeps no state between calls, knows no masks and is wrong where a gate is exactly 0. Cases
take turns in one process; medians. The attention layer is ours, full, on PyTorch's scaled_dot_product_attention.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

import miras
import miras.nn.memory
from miras.nn.attention import AttentionLayer

PRESETS = (
    "linear-attention",
    "retnet",
    "mamba2",
    "gla",
    "hgrn2",
    "deltanet",
    "gated-deltanet",
    "longhorn",
    "mlstm",
    "titans-linear",
)
WIDTH, HEADS = 256, 4


def textbook(
    rule: miras.Rule,
    state: miras.State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor],
    **_: object,
):
    """(B, H, T, D) through the chunkwise form that papers print; q, k, v as the layer makes them."""
    gates = {name.removesuffix(".w"): gate for name, gate in gates.items()}
    lr = gates["lr"]
    forget = gates.get("forget", torch.zeros_like(lr))
    if isinstance(rule.algorithm, miras.Implicit):
        lr = lr / (1 + lr * k.square().sum(-1))
    if forget.dim() == 5:
        return by_channel(q, k, v * lr[..., None], torch.log1p(-forget[..., 0])), state
    if rule.algorithm.momentum:
        return with_momentum(q, k, v, lr, forget, gates["momentum"], state.A["w"], rule.chunk_size), state
    if isinstance(rule.bias, miras.Dot):
        return hebbian(q, k, v * lr[..., None], torch.log1p(-forget)), state
    return delta(q, k, v, lr, torch.log1p(-forget)), state


def blocks(C: int, *xs: Tensor) -> list[Tensor]:
    return [x.unflatten(2, (-1, C)) for x in xs]


def decays(g: Tensor) -> tuple[Tensor, Tensor]:
    a = g.cumsum(-1)
    C = a.shape[-1]
    later = ~torch.ones(C, C, dtype=torch.bool).tril()
    return a, (a[..., :, None] - a[..., None, :]).masked_fill(later, -torch.inf).exp()


def hebbian(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, k, v, g = blocks(64, q, k, v, g)
    a, D = decays(g)
    S, out = torch.zeros(*q.shape[:2], k.shape[-1], v.shape[-1]), []
    inside = ((q @ k.mT) * D) @ v
    to_end, through = (a[..., -1:] - a).exp()[..., None], a.exp()[..., None]
    for i in range(q.shape[2]):
        out.append((q[:, :, i] * through[:, :, i]) @ S)
        S = through[:, :, i, -1:] * S + (k[:, :, i] * to_end[:, :, i]).mT @ v[:, :, i]
    return (inside + torch.stack(out, 2)).flatten(2, 3)


def delta(q: Tensor, k: Tensor, v: Tensor, lr: Tensor, g: Tensor) -> Tensor:
    q, k, v, lr, g = blocks(64, q, k, v, lr, g)
    a, D = decays(g)
    L = ((lr[..., None] * k) @ k.mT * D).tril(-1) + torch.eye(64)
    right = torch.cat([(lr * a.exp())[..., None] * k, lr[..., None] * v], -1)
    W, U = torch.linalg.solve_triangular(L, right, upper=False, unitriangular=True).split(
        [k.shape[-1], v.shape[-1]], -1
    )
    S, out, met = torch.zeros(*q.shape[:2], k.shape[-1], v.shape[-1]), [], (q @ k.mT) * D
    to_end, through = (a[..., -1:] - a).exp()[..., None], a.exp()[..., None]
    for i in range(q.shape[2]):
        u = U[:, :, i] - W[:, :, i] @ S
        out.append((q[:, :, i] * through[:, :, i]) @ S + met[:, :, i] @ u)
        S = through[:, :, i, -1:] * S + (k[:, :, i] * to_end[:, :, i]).mT @ u
    return torch.stack(out, 2).flatten(2, 3)


def by_channel(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, k, v, g = blocks(16, q, k, v, g)
    a = g.cumsum(-2)
    later = ~torch.ones(16, 16, dtype=torch.bool).tril()[..., None]
    D = (a[..., :, None, :] - a[..., None, :, :]).masked_fill(later, -torch.inf).exp()
    inside = torch.einsum("bhnid,bhnjd,bhnijd->bhnij", q, k, D) @ v
    S, out = torch.zeros(*q.shape[:2], k.shape[-1], v.shape[-1]), []
    for i in range(q.shape[2]):
        out.append((q[:, :, i] * a[:, :, i].exp()) @ S)
        end = a[:, :, i, -1:]
        S = end.exp().mT * S + (k[:, :, i] * (end - a[:, :, i]).exp()).mT @ v[:, :, i]
    return (inside + torch.stack(out, 2)).flatten(2, 3)


def with_momentum(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, forget: Tensor, momentum: Tensor, A: Tensor, C: int
) -> Tensor:
    """Gradients at the block's start for blocks of C > 1, exact through a solve for C = 1 (in blocks of 64)."""
    exact, C = C == 1, 64 if C == 1 else C
    q, k, v, lr, keep, momentum = blocks(C, q, k, v, lr, torch.log1p(-forget), momentum.log())
    (a, K), (m, M) = decays(keep), decays(momentum)
    H = M * lr[..., None, :]
    G, first = K @ H, (K @ m.exp()[..., None])
    S = torch.zeros_like(A)
    out, met = [], (q @ k.mT) * G
    shift = torch.cat([torch.zeros_like(G[..., :1, :]), G[..., :-1, :]], -2)
    inner = (k @ k.mT) * shift + torch.eye(C)
    through = a.exp()[..., None]
    before = torch.cat([torch.ones_like(through[..., :1, :]), through[..., :-1, :]], -2)
    before_S = torch.cat([torch.zeros_like(first[..., :1, :]), first[..., :-1, :]], -2)
    for i in range(q.shape[2]):
        x, y = k[:, :, i], q[:, :, i]
        if exact:
            right = before[:, :, i] * (x @ A) + before_S[:, :, i] * (x @ S) - v[:, :, i]
            u = torch.linalg.solve_triangular(inner[:, :, i], right, upper=False, unitriangular=True)
        else:
            u = x @ A - v[:, :, i]
        out.append(through[:, :, i] * (y @ A) + first[:, :, i] * (y @ S) - met[:, :, i] @ u)
        end = G[:, :, i, -1, :, None], H[:, :, i, -1, :, None]
        A = through[:, :, i, -1:] * A + first[:, :, i, -1:] * S - (x * end[0]).mT @ u
        S = m[:, :, i, -1, None, None].exp() * S - (x * end[1]).mT @ u
    return torch.stack(out, 2).flatten(2, 3)


def clock(layer: torch.nn.Module, x: Tensor, scan: Callable[..., Any] | None = None) -> float:
    """Seconds of one forward and backward pass."""
    ours = miras.nn.memory.scan
    if scan is not None:
        miras.nn.memory.scan = scan
    try:
        layer.zero_grad(set_to_none=True)
        began = time.perf_counter()
        y, _ = layer(x)
        y.square().mean().backward()
        return time.perf_counter() - began
    finally:
        miras.nn.memory.scan = ours


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    short, long = torch.randn(1, 4096, WIDTH), torch.randn(1, 16_384, WIDTH)
    attention = AttentionLayer(WIDTH, HEADS)
    full = median(clock(attention, long) for _ in range(3))
    print(f"torch {torch.__version__}, {options.threads} threads, median of {options.rounds}; milliseconds")
    print(f"full attention, 16,384 tokens: {full * 1e3:,.0f}")
    print(
        "| preset | 4,096 tokens | straightforward | ratio | outputs differ by | 16,384 tokens | attention's time |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in options.presets:
        # At chunk_size 1, where titans-linear is the unchunked rule and has no step bound.
        config = miras.preset(name, hidden_size=WIDTH, num_heads=HEADS, num_hidden_layers=1, chunk_size=1)
        layer = config.mixer(0).build(config)
        times: dict[str, list[float]] = {"ours": [], "textbook": []}
        for _ in range(options.rounds + 1):
            times["ours"].append(clock(layer, short))
            times["textbook"].append(clock(layer, short, textbook))
        with torch.no_grad():
            gap = layer(short)[0]
            ours = miras.nn.memory.scan
            miras.nn.memory.scan = textbook
            gap = (gap - layer(short)[0]).abs().max() / gap.abs().max()
            miras.nn.memory.scan = ours
        mine, theirs = (median(t[1:]) for t in times.values())
        far = median(clock(layer, long) for _ in range(2))
        print(
            f"| {name} | {mine * 1e3:,.0f} | {theirs * 1e3:,.0f} | {mine / theirs:.2f} | {gap:.0e} "
            f"| {far * 1e3:,.0f} | {far / full:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
