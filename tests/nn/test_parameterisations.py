"""Presets are the layers of their pages (docs/presets): projections, links and scales written down again, as loops.

The loops share no code with `miras`. Only the parameters come from the layer, by name.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from miras.nn.lm import LM
from miras.nn.memory import MemoryLayer
from miras.zoo import preset

D, H, WIDTH, T = 12, 2, 6, 9


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def softplus(x: Tensor) -> Tensor:
    return (1 + x.exp()).log()


def plain(x: Tensor) -> Tensor:
    return x


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def turned(x: Tensor) -> Tensor:
    """x (T, H, WIDTH), pairs (i, i + WIDTH / 2) turned at token t by t / 10000^(2 i / WIDTH)."""
    half = WIDTH // 2
    out = torch.empty_like(x)
    for t in range(len(x)):
        for i in range(half):
            angle = t / 10_000 ** (2 * i / WIDTH)
            a, b = x[t, :, i], x[t, :, i + half]
            out[t, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[t, :, i + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


class Given:
    """A layer's parameters, and what is made of its input x (T, D) with them."""

    def __init__(self, layer: MemoryLayer, x: Tensor) -> None:
        self.p, self.x = dict(layer.named_parameters()), x
        self.A0 = self.p["reader.A0.w"]

    def path(self, name: str, activation: Callable[[Tensor], Tensor], taps: int) -> Tensor:
        """Linear, a convolution of so many taps, and the activation: (T, H, numbers of a head)."""
        z = self.x @ self.p[f"reader.{name}.proj.weight"].T
        assert (f"reader.{name}.conv" in self.p) == (taps > 0)
        if taps:
            weight = self.p[f"reader.{name}.conv"]
            assert weight.shape[1] == taps
            z = torch.stack(
                [sum(weight[:, -1 - j] * z[t - j] for j in range(taps) if t >= j) for t in range(T)]
            )
        return activation(z).view(T, H, -1)

    def gates(self) -> Tensor:
        """x W + b of the gates that have one number, or a few, per head: (T, all of them)."""
        return self.x @ self.p["reader.gates.proj.weight"].T + self.p["reader.gates.proj.bias"]

    def rate(self) -> Tensor:
        return self.p["reader.gates.log_rates.0"].exp()

    def by_channel(self) -> Tensor:
        """x W + b, or x U V + b, of the gate that has one number per key channel: (T, H, WIDTH)."""
        down = self.p.get("reader.gates.channels.0.down.weight")
        z = self.x if down is None else self.x @ down.T
        z = z @ self.p["reader.gates.channels.0.up.weight"].T + self.p["reader.gates.channels.0.up.bias"]
        return z.view(T, H, WIDTH)

    def answer(self, reads: Tensor) -> Tensor:
        """Reads (T, H, WIDTH) normed by head, gated, projected."""
        y = reads / (reads.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.p["norm.weight"]
        return (y.flatten(1) * silu(self.x @ self.p["gate.weight"].T)) @ self.p["out.weight"].T


def reads(
    given: Given,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor | float = 1.0,
    keep: Tensor | float = 1.0,
    correct: bool = False,
) -> Tensor:
    """W <- keep W, then for each of a token's pairs W <- W + lr k^T (v - k W), or + lr k^T v; read after them.

    q, k, v (T, H, WIDTH), k and v (T, H, steps, WIDTH) with several steps; lr (T, H) or (T, H, steps); keep (T, H),
    (H,) or by key channel (T, H, WIDTH).
    """
    if k.dim() == 3:
        k, v = k[:, :, None], v[:, :, None]
    lr = torch.as_tensor(lr).to(q).expand(T, H) if not isinstance(lr, Tensor) or lr.dim() < 3 else lr
    lr = lr[..., None] if lr.dim() == 2 else lr
    keep = torch.as_tensor(keep).to(q)
    keep = keep[..., None] if keep.dim() < 3 else keep
    keep = keep.expand(T, H, WIDTH)
    found = []
    for h in range(H):
        W = given.A0[h]
        for t in range(T):
            W = keep[t, h][:, None] * W
            for i in range(k.shape[2]):
                key, value = k[t, h, i], v[t, h, i]
                W = W + lr[t, h, i] * torch.outer(key, value - key @ W if correct else value)
            found.append(q[t, h] @ W)
    return torch.stack(found).view(H, T, -1).transpose(0, 1)


def linear_attention(g: Given) -> Tensor:
    elu1 = lambda x: torch.where(x > 0, x + 1, x.exp())  # noqa: E731
    return reads(g, g.path("q", elu1, 0), g.path("k", elu1, 0), g.path("v", plain, 0))


def retnet(g: Given) -> Tensor:
    q, k, v = (g.path(n, plain, 0) for n in "qkv")
    keep = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(H)], dtype=torch.float64)
    return reads(g, turned(q) / math.sqrt(WIDTH), turned(k), v, keep=keep)


def mamba2(g: Given) -> Tensor:
    dt = softplus(g.gates())
    return reads(g, *(g.path(n, silu, 4) for n in "qkv"), lr=dt, keep=(-g.rate() * dt).exp())


def gla(g: Given) -> Tensor:
    q, k, v = (g.path(n, plain, 0) for n in "qkv")
    assert g.p["reader.gates.channels.0.down.weight"].shape == (16, D)
    return reads(g, q / math.sqrt(WIDTH), k, v, keep=sigmoid(-g.by_channel()) ** (1 / 16))


def hgrn2(g: Given) -> Tensor:
    forget = sigmoid(g.by_channel())
    return reads(g, g.path("q", silu, 0), forget, g.path("v", plain, 0), keep=1 - forget)


def mlstm(g: Given) -> Tensor:
    z = g.gates()
    v = torch.cat([g.path("v", plain, 4), torch.ones(T, H, 1, dtype=torch.float64)], -1)
    lr, keep = (15 * torch.tanh(z[:, :H] / 15)).exp(), 1 - sigmoid(z[:, H:])
    y = reads(g, g.path("q", silu, 4) / math.sqrt(WIDTH), g.path("k", silu, 4), v, lr, keep)
    return y[..., :-1] / y[..., -1:].abs().clamp(min=1)


def deltanet(g: Given) -> Tensor:
    q, k, v = (g.path(n, silu, 4) for n in "qkv")
    return reads(g, unit(q), unit(k), v, lr=sigmoid(g.gates()), correct=True)


def gated_deltanet(g: Given) -> Tensor:
    q, k, v = (g.path(n, silu, 4) for n in "qkv")
    z = g.gates()
    keep = (-g.rate() * softplus(z[:, H:])).exp()
    return reads(g, unit(q), unit(k), v, sigmoid(z[:, :H]), keep, correct=True)


def deltaproduct(g: Given) -> Tensor:
    q, k, v = (g.path(n, silu, 4) for n in "qkv")
    k, v = (x.unflatten(-1, (2, WIDTH)) for x in (k, v))
    z = g.gates()
    lr, keep = 2 * sigmoid(z[:, : 2 * H]).view(T, H, 2), (-g.rate() * softplus(z[:, 2 * H :])).exp()
    return reads(g, unit(q), unit(k), v, lr, keep, correct=True)


def longhorn(g: Given) -> Tensor:
    q, k, v = (g.path(n, silu, 4) for n in "qkv")
    lr = sigmoid(g.gates())
    return reads(g, q, k, v, lr / (1 + lr * k.square().sum(-1)), correct=True)


PAGES = {
    "linear-attention": linear_attention,
    "retnet": retnet,
    "mamba2": mamba2,
    "gla": gla,
    "hgrn2": hgrn2,
    "mlstm": mlstm,
    "deltanet": deltanet,
    "gated-deltanet": gated_deltanet,
    "deltaproduct": deltaproduct,
    "longhorn": longhorn,
}


def layer_of(name: str) -> MemoryLayer:
    torch.manual_seed(0)
    config = preset(name, vocab_size=8, hidden_size=D, num_heads=H, num_hidden_layers=1)
    return LM(config).double().model.layers[0].mixer


@pytest.mark.parametrize("name", PAGES)
@torch.no_grad()
def test_a_preset_is_the_layer_of_its_page(name):
    layer = layer_of(name)
    for part, p in layer.named_parameters():
        if "A0" in part or ("gates" in part and "rate" not in part):
            p.normal_(std=0.4)
        elif "norm" in part:
            p.uniform_(0.5, 1.5)
    x = torch.randn(T, D, dtype=torch.float64)
    given = Given(layer, x)
    torch.testing.assert_close(layer(x[None])[0][0], given.answer(PAGES[name](given)), rtol=1e-9, atol=1e-10)


FIRST = {
    "mamba2": {"lr": (0.001, 0.1), "forget": (0.001, 0.8)},
    "gated-deltanet": {"lr": (0.5, 0.5), "forget": (0.001, 0.8)},
    "deltaproduct": {"lr": (1.0, 1.0), "forget": (0.001, 0.8)},
    "gla": {"lr": (1.0, 1.0), "forget": (1 - 0.5 ** (1 / 16),) * 2},
    "hgrn2": {"lr": (1.0, 1.0), "forget": (1 / (1 + math.exp(3)),) * 2},
    "mlstm": {"lr": (1.0, 1.0), "forget": (1 / (1 + math.exp(6)), 1 / (1 + math.exp(3)))},
    "retnet": {"lr": (1.0, 1.0), "forget": (2.0**-6, 2.0**-5)},
    "deltanet": {"lr": (0.5, 0.5)},
    "longhorn": {"lr": (0.5, 0.5)},
    "ttt-linear": {"lr": (0.5, 0.5)},
    "ttt-mlp": {"lr": (0.05, 0.05)},
}
"""What each gate is between at first, for an input of 0."""


@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_gates_begin_where_the_page_says(name):
    layer = layer_of(name)
    gates = layer.reader.gates(torch.zeros(1, 1, D, dtype=torch.float64))
    assert {n.partition(".")[0] for n in gates} == set(FIRST[name])
    for n, value in gates.items():
        low, high = FIRST[name][n.partition(".")[0]]
        assert (value >= low - 1e-5 - 1e-2 * low).all() and (value <= high + 1e-5 + 1e-2 * high).all(), n
    rates = [p.exp() for n, p in layer.named_parameters() if "log_rates" in n]
    assert bool(rates) == (name in ("mamba2", "gated-deltanet", "deltaproduct"))


@torch.no_grad()
def test_rates_of_decay_are_drawn_between_1_and_16():
    torch.manual_seed(0)
    for name in ("mamba2", "gated-deltanet"):
        config = preset(name, vocab_size=8, hidden_size=512, num_heads=256, num_hidden_layers=1)
        gates = LM(config).model.layers[0].mixer.reader.gates
        rate = gates.log_rates[0].exp()
        assert 1 <= rate.min() < 1.5 and 15.5 < rate.max() <= 16 and 8 < rate.mean() < 9
        dt = softplus(gates.proj.bias.view(-1, 256)[-1])  # log-uniform but for its ends
        assert 0.00099 < dt.min() < 0.0012 and 0.08 < dt.max() < 0.11
