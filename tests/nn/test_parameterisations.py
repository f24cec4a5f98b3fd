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
Weights = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor, int, int], Tensor]


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
        self.A0 = {n.rpartition(".")[2]: a for n, a in self.p.items() if ".A0." in n}

    def path(self, name: str, activation: Callable[[Tensor], Tensor], taps: int) -> Tensor:
        """Linear, a convolution of so many taps, and the activation: (T, H, numbers of a head)."""
        z = self.x @ self.p[f"reader.{name}.proj.weight"].T
        assert (f"reader.{name}.conv" in self.p) == (taps > 0)
        if taps:
            weight = self.p[f"reader.{name}.conv"]
            assert weight.shape[1] == taps
            z = torch.stack(
                [sum(weight[:, -1 - j] * z[t - j] for j in range(taps) if t >= j) for t in range(len(z))]
            )
        return activation(z).view(len(z), H, -1)

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

    def per_output(self, i: int) -> Tensor:
        """x U V + b of the i-th gate that has one number per output channel: (T, H, channels)."""
        down, up = (self.p[f"reader.gates.channels.{i}.{n}.weight"] for n in ("down", "up"))
        assert down.shape == (32, D)
        z = self.x @ down.T @ up.T + self.p[f"reader.gates.channels.{i}.up.bias"]
        return z.view(len(z), H, -1)

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
        W = given.A0["w"][h]
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


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def mlp(W: Weights, x: Tensor) -> Tensor:
    return x + norm(gelu(x @ W["w1"]) @ W["w2"])


def half_square(y: Tensor, v: Tensor, t: int, h: int) -> Tensor:
    return (y - v).square().sum() / 2


def same(W: Weights) -> Weights:
    return W


def deep_reads(
    given: Given,
    lr: Weights,
    forget: Weights | None,
    momentum: Weights | None = None,
    bound: float = 1.0,
    loss: Loss = half_square,
    link: Callable[[Weights], Weights] = same,
    memory: Callable[[Weights, Tensor, int], Tensor] = lambda W, x, h: mlp(W, x),
    activation: Callable[[Tensor], Tensor] = silu,
    chunk: int = 16,
) -> Tensor:
    """A <- A_0 + (1 - forget) (A - A_0) + S, S <- momentum S - b lr grad at the weights of the chunk's start; read.

    lr, forget, momentum {weight: (T, H, 1) or by output channel (T, H, width)}; b_t = prod_j max(0, 1 - bound lr_j
    |k_j . k_t|) over the chunk's earlier tokens, with the largest lr_j of all channels.
    """
    q, k, v = (given.path(n, activation, 4) for n in "qkv")
    q, k = unit(q), unit(k)
    found = []
    for h in range(H):
        A0 = {n: a[h] for n, a in given.A0.items()}
        A, S = A0, {n: torch.zeros_like(a) for n, a in A0.items()}
        for t in range(len(q)):
            if t % chunk == 0:
                start, first = link(A), t
            with torch.enable_grad():
                W = {n: w.detach().requires_grad_() for n, w in start.items()}
                error = loss(memory(W, k[t, h], h), v[t, h], t, h)
                grads = dict(zip(W, torch.autograd.grad(error, list(W.values())), strict=True))
            for n, grad in grads.items():
                b = 1.0
                for j in range(first, t):
                    b *= max(0.0, 1 - bound * float(lr[n][j, h].max()) * abs(float(k[j, h] @ k[t, h])))
                S[n] = (momentum[n][t, h] * S[n] if momentum else 0) - b * lr[n][t, h] * grad
            keep = {n: 1 - forget[n][t, h] if forget else 1.0 for n in A}
            A = {n: A0[n] + keep[n] * (A[n] - A0[n]) + S[n] for n in A}
            found.append(memory(link(A), q[t, h], h))
    return torch.stack(found).view(H, len(q), -1).transpose(0, 1)


def titans_lmm(g: Given) -> Tensor:
    parts = g.gates().view(len(g.x), 6, H, 1).unbind(1)
    lr, momentum, forget = (dict(zip(("w1", "w2"), parts[i : i + 2], strict=True)) for i in (0, 2, 4))
    return deep_reads(
        g,
        lr={n: 0.1 * 0.25 * sigmoid(z) for n, z in lr.items()},
        momentum={n: 0.9 * sigmoid(z) for n, z in momentum.items()},
        forget={n: sigmoid(z) for n, z in forget.items()},
        bound=10.0,
    )


def by_output(g: Given, largest: float) -> tuple[Weights, Weights]:
    """lr and forget, one number per output channel of each weight."""
    lr = {n: largest * sigmoid(g.per_output(i)) for i, n in enumerate(("w1", "w2"))}
    return lr, {n: sigmoid(g.per_output(2 + i)) for i, n in enumerate(("w1", "w2"))}


def yaad(g: Given) -> Tensor:
    delta = softplus(g.gates())

    def huber(y: Tensor, v: Tensor, t: int, h: int) -> Tensor:
        size, d = (y - v).square().sum().sqrt(), delta[t, h]
        return size.square() / 2 if size <= d else d * (size - d / 2)

    return deep_reads(g, *by_output(g, 0.35), loss=huber)


def moneta(g: Given) -> Tensor:
    def cubed(y: Tensor, v: Tensor, t: int, h: int) -> Tensor:
        # Beyond 1 the line goes on with the slope that it has at 1.
        r, edge = y - v, math.sqrt(1 + 1e-6)
        return torch.where(r.abs() <= 1, (r.square() + 1e-6) ** 1.5, 3 * edge * r.abs()).sum()

    def bounded(A: Weights) -> Weights:
        size = {n: a.square() + 1e-12 for n, a in A.items()}
        return {n: a * size[n] / size[n].square().sum().sqrt() for n, a in A.items()}

    return deep_reads(g, *by_output(g, 0.02), loss=cubed, link=bounded)


def memora(g: Given) -> Tensor:
    def shares(A: Weights) -> Weights:
        return {n: math.sqrt(len(a)) * a.exp() / a.exp().sum(0, keepdim=True) for n, a in A.items()}

    return deep_reads(g, *by_output(g, 0.25), link=shares)


def ttt(g: Given, largest: float, depth: int) -> Tensor:
    def memory(W: Weights, x: Tensor, h: int) -> Tensor:
        z = x
        for i in range(1, depth + 1):
            z = gelu(z) if i > 1 else z
            z = z @ W[f"w{i}"] + W[f"b{i}"][0] / math.sqrt(WIDTH)
        return x + g.p["reader.outer.gain"][h] * norm(z) + g.p["reader.outer.shift"][h]

    lr = largest * sigmoid(g.gates())[..., None]
    return deep_reads(g, dict.fromkeys(g.A0, lr), None, memory=memory, activation=plain)


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
    "ttt-linear": lambda g: ttt(g, 1.0, 1),
    "ttt-mlp": lambda g: ttt(g, 0.1, 2),
    "titans-lmm": titans_lmm,
    "yaad": yaad,
    "moneta": moneta,
    "memora": memora,
}
CHUNKS = ("ttt-linear", "ttt-mlp", "titans-lmm", "yaad", "moneta", "memora")


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
    x = torch.randn(21 if name in CHUNKS else T, D, dtype=torch.float64)
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
