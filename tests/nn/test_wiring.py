"""Memory as context, as gate and as layer are Titans eq. 21 to 31, written down as loops over tokens and segments.

The loops share no code with `miras`: one row, one token after the other, every read and write where the equations
have it. Only the parameters come from the layer, by name.
"""

import math
import re

import pytest
import torch
from torch import Tensor

import oracles
from miras.core.algorithm import GradientDescent
from miras.core.memory import MLP
from miras.core.rule import Rule
from miras.nn.gates import Gate, Gates
from miras.nn.memory import Features
from miras.nn.mixer import Mixer
from miras.nn.part import Sizes
from miras.nn.titans import MACConfig, MAGConfig, MALConfig

D, H, HEAD, CHUNK, SEGMENT, WINDOW, T = 12, 2, 6, 3, 6, 5, 23
BOUND = 10.0
RULE = Rule(MLP(expansion=2), algorithm=GradientDescent(momentum=True, step_bound=BOUND), chunk_size=CHUNK)
GATES = {
    "lr": Gate(scale=0.25, per_weight=True),
    "momentum": Gate(scale=0.9, per_weight=True),
    "forget": Gate(bias=-1.0, per_weight=True),
}
TURNED = Features(scaled=True, rotary=True)  # queries and keys have a position, queries a scale
Tree = dict[str, Tensor]


class Parameters:
    """A module's parameters by the ends of their names."""

    def __init__(self, values: Tree) -> None:
        self.values = values

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def under(self, prefix: str) -> "Parameters":
        return Parameters({n.removeprefix(prefix): p for n, p in self.values.items() if n.startswith(prefix)})


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def by_head(x: Tensor) -> Tensor:
    return x.reshape(H, -1)


class Path:
    """One projection: linear, causal convolution over its last four values, SiLU; l2 norm by head where asked."""

    def __init__(self, p: Parameters, name: str) -> None:
        self.weight, self.taps = p[f"{name}.proj.weight"], p[f"{name}.conv"]
        self.past: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.past.append(self.weight @ x)
        last = self.past[-self.taps.shape[1] :]
        y = silu(sum(tap * z for tap, z in zip(self.taps.T[-len(last) :], last, strict=True)))
        return by_head(y)


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


class Memory:
    """A deep memory per head: eq. 13, 14 and 18, gates and keys made from what it is given."""

    def __init__(self, p: Parameters, names: list[str], turned: bool = False) -> None:
        self.p, self.names, self.turned = p, names, turned
        self.q, self.k, self.v = (Path(p, name) for name in "qkv")
        self.W = [{n: p[f"A0.{n}"][h] for n in ("w1", "w2")} for h in range(H)]
        self.S = [{n: torch.zeros_like(w) for n, w in W.items()} for W in self.W]
        self.count = 0

    def gates(self, x: Tensor) -> dict[str, Tensor]:
        raw = (self.p["gates.proj.weight"] @ x + self.p["gates.proj.bias"]).reshape(len(self.names), H)
        scale = {"lr": 0.25 * (1 - 0.9), "momentum": 0.9, "forget": 1.0}
        return {n: scale[n.split(".")[0]] * sigmoid(part) for n, part in zip(self.names, raw, strict=True)}

    def write(self, x: Tensor, position: int = 0) -> None:
        if self.count % CHUNK == 0:
            self.anchor, self.met = [dict(W) for W in self.W], []
        self.count += 1
        k, v, gates = unit(self.k(x)), self.v(x), self.gates(x)
        k = Attention.turn(k, position) if self.turned else k
        lr = {n: gates[f"lr.{n}"].clone() for n in ("w1", "w2")}
        for n in lr:
            for key, step in self.met:
                overlap = (key * k).sum(-1).abs()
                lr[n] = lr[n] * (1 - BOUND * step[n] * overlap).clamp_min(0)
        self.met.append((k, {n: gates[f"lr.{n}"] for n in lr}))
        for h in range(H):
            grad = oracles._gradient(lambda r: 0.5 * r.square().sum(), self.anchor[h], k[h], v[h])
            for n in ("w1", "w2"):
                self.S[h][n] = gates[f"momentum.{n}"][h] * self.S[h][n] - lr[n][h] * grad[n]
                self.W[h][n] = (1 - gates[f"forget.{n}"][h]) * self.W[h][n] + self.S[h][n]

    def read(self, q: Tensor, W: list[Tree], position: int = 0) -> Tensor:
        q = Attention.turn(unit(q), position) / math.sqrt(HEAD) if self.turned else unit(q)
        return torch.cat([oracles._mlp(q[h], W[h]) for h in range(H)])


class Attention:
    """Softmax attention of one token over keys with positions, and over persistent tokens without."""

    def __init__(self, p: Parameters) -> None:
        self.p = p

    def key(self, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
        return self.turn(by_head(self.p["k.weight"] @ x), position), by_head(self.p["v.weight"] @ x)

    @staticmethod
    def turn(x: Tensor, position: int) -> Tensor:
        """Pairs (i, i + HEAD / 2) as complex numbers, turned by position / 10000^(2 i / HEAD)."""
        half = HEAD // 2
        angle = torch.tensor([position * 10_000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
        z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], -1)

    def __call__(self, x: Tensor, position: int, seen: list[tuple[Tensor, Tensor]]) -> Tensor:
        plain = by_head(self.p["q.weight"] @ x)
        q = self.turn(plain, position)
        free_k, free_v = self.p["persistent"]
        out = []
        for h in range(H):
            score = [plain[h] @ key for key in free_k[h]] + [q[h] @ key[h] for key, _ in seen]
            weight = (torch.stack(score) / math.sqrt(HEAD)).softmax(0)
            values = [*free_v[h], *(value[h] for _, value in seen)]
            out.append(sum(w * value for w, value in zip(weight, values, strict=True)))
        return torch.cat(out)


def mac(p: Parameters, names: list[str], x: Tensor, pool: int, turned: bool = False) -> Tensor:
    """eq. 21 to 25, causal: h_t = M_{t-1}(q_t), y = Attn(P || h || S), M_t = M_{t-1}(y), o = y (x) M_t(y)."""
    memory, attention = Memory(p.under("memory."), names, turned), Attention(p.under("attention."))
    asking = Path(p.under("memory."), "q")  # W_Q on x; memory.q is W_Q on y
    queries: list[Tensor] = []
    outputs = []
    for start in range(0, T, SEGMENT):
        before = [dict(W) for W in memory.W]
        seen: list[tuple[Tensor, Tensor]] = []
        for j in range(start, min(start + SEGMENT, T)):
            queries.append(asking(x[j]))
            if (j - start) % pool == pool - 1:
                read = memory.read(sum(queries[-pool:]) / pool, before, j)
                h = rms(p["read.weight"] @ read, p["norm_context.weight"])
                seen.append(attention.key(h, j))
            seen.append(attention.key(x[j], j))
            y = p["attended.weight"] @ attention(x[j], j, seen)
            memory.write(y, j)
            m = p["read.weight"] @ memory.read(memory.q(y), memory.W, j)
            outputs.append(p["out.weight"] @ (y * sigmoid(rms(m, p["norm_gate.weight"]))))
    return torch.stack(outputs)


def mag(p: Parameters, names: list[str], x: Tensor, gate) -> Tensor:
    """eq. 26 to 28: y = SW-Attn(P || x), o = y (x) M(x)."""
    memory, attention = Memory(p.under("memory."), names), Attention(p.under("attention."))
    seen, outputs = [], []
    for t in range(T):
        seen.append(attention.key(x[t], t))
        y = attention(x[t], t, seen[-WINDOW:])
        memory.write(x[t])
        m = memory.read(memory.q(x[t]), memory.W)
        outputs.append(p["out.weight"] @ (rms(y, p["norm_a.weight"]) * gate(rms(m, p["norm_b.weight"]))))
    return torch.stack(outputs)


def mal(p: Parameters, names: list[str], x: Tensor) -> Tensor:
    """eq. 29 to 31: y = M(x), o = SW-Attn(P || y)."""
    memory = Memory(p.under("memory.reader."), names)
    attention = Attention(p.under("attention.reader."))
    seen, outputs = [], []
    for t in range(T):
        memory.write(x[t])
        read = by_head(memory.read(memory.q(x[t]), memory.W))
        read = torch.cat([rms(read[h], p["memory.norm.weight"]) for h in range(H)])
        y = p["memory.out.weight"] @ (read * silu(p["memory.gate.weight"] @ x[t]))
        y = rms(y, p["norm.weight"])
        seen.append(attention.key(y, t))
        outputs.append(p["attention.out.weight"] @ attention(y, t, seen[-WINDOW:]))
    return torch.stack(outputs)


SIZES = Sizes(hidden_size=D, num_heads=H)
WINDOWED = {"rule": RULE, "gates": GATES, "window_size": WINDOW, "num_persistent": 2}
SEGMENTED = {"rule": RULE, "gates": GATES, "segment_size": SEGMENT, "num_persistent": 2}
WIRINGS = {
    "mac": (
        lambda: MACConfig().changed(SEGMENTED).build(SIZES),
        lambda p, names, x: mac(p, names, x, 1),
    ),
    "mac-pooled": (
        lambda: MACConfig().changed(SEGMENTED | {"pool": 3}).build(SIZES),
        lambda p, names, x: mac(p, names, x, 3),
    ),
    "mac-turned": (
        lambda: MACConfig().changed(SEGMENTED | {"pool": 2, "features": TURNED}).build(SIZES),
        lambda p, names, x: mac(p, names, x, 2, turned=True),
    ),
    "mag": (
        lambda: MAGConfig().changed(WINDOWED).build(SIZES),
        lambda p, names, x: mag(p, names, x, silu),
    ),
    "mag-sigmoid": (
        lambda: MAGConfig().changed(WINDOWED | {"mag_gate": "sigmoid"}).build(SIZES),
        lambda p, names, x: mag(p, names, x, sigmoid),
    ),
    "mal": (
        lambda: MALConfig().changed(WINDOWED).build(SIZES),
        lambda p, names, x: mal(p, names, x),
    ),
}


def built(kind: str) -> tuple[Mixer, list[str]]:
    """A layer with lively gates and norms, and its gates in the order in which they are made."""
    torch.manual_seed(0)
    layer = WIRINGS[kind][0]().double()
    names: list[str] = []
    with torch.no_grad():
        for name, part in layer.named_modules():
            if isinstance(part, Gates):
                part.proj.weight.normal_(std=0.5)
                names = [o.name for o in part.made]
            if "norm" in name:
                part.weight.uniform_(0.5, 1.5)
    return layer, names


@pytest.mark.parametrize("kind", WIRINGS)
def test_a_wiring_is_its_equations(kind):
    layer, names = built(kind)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, T, D, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, T, D, generator=g, dtype=torch.float64)
    p = dict(layer.named_parameters())
    y, _ = layer(x)
    expected = torch.stack([WIRINGS[kind][1](Parameters(p), names, row) for row in x])
    found = torch.autograd.grad((y * weight).sum(), [x, *p.values()])
    wanted = torch.autograd.grad((expected * weight).sum(), [x, *p.values()])
    for name, a, b in zip(["y", "x", *p], [y, *found], [expected, *wanted], strict=True):
        assert b.abs().max() > 0, name
        assert (a - b).abs().max() <= 1e-9 * b.abs().max(), name


@pytest.mark.parametrize("kind", ["mac", "mac-pooled"])
@torch.no_grad()
def test_a_memory_token_is_seen_from_its_own_token_on_and_no_later_write_is_read(kind):
    # A random vector in mid-segment, mid-chunk: nothing before it moves, its own token and those behind it do.
    layer, _ = built(kind)
    x = torch.randn(1, T, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for at in range(T):
        other = x.clone()
        other[:, at] = torch.randn(D, generator=torch.Generator().manual_seed(at + 3), dtype=torch.float64)
        before, after = layer(x)[0], layer(other)[0]
        assert torch.equal(before[:, :at], after[:, :at])
        assert ((before - after)[:, at : at + SEGMENT].abs().amax(-1) > 1e-9).all()


@pytest.mark.parametrize("kind", ["mac", "mac-pooled"])
@torch.no_grad()
def test_every_cut_of_segments(kind):
    # Inside a chunk, at a chunk's end, at a segment's end, and one token after each.
    layer, _ = built(kind)
    x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole, last = layer(x)
    for cut in range(1, T):
        first, state = layer(x[:, :cut])
        second, state = layer(x[:, cut:], state)
        assert (torch.cat([first, second], 1) - whole).abs().max() < 1e-10
        for (name, a), b in zip(state.tensors().items(), last.tensors().values(), strict=True):
            assert a.shape == b.shape and (a - b).abs().max() < 1e-10, name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"segment_size": 7}, "segment_size must be a multiple of chunk_size 3, got 7"),
        ({"segment_size": 0}, "segment_size must be a multiple of chunk_size 3, got 0"),
        ({"segment_size": 6, "pool": 4}, "pool must divide segment_size 6, got 4"),
    ],
)
def test_segments_that_cannot_be(changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MACConfig().changed({"rule": RULE, "gates": GATES} | changed)
