"""`scan` and `recurrence` are the published recurrences: values, final states and outer gradients of every oracle.

A case draws its tensors, says which rule and gates a model is, and calls the model's own loop for one row and
head. Rows B, heads H, tokens T (no multiple of a chunk), widths DK and DV, or D where both are equal.
"""

import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import oracles
from cases import Problem, same
from miras.core.algorithm import GradientDescent, Implicit
from miras.core.bias import HUBER_KINDS, L2, Dot, Huber, Lp
from miras.core.memory import MLP, Matrix
from miras.core.recurrence import recurrence
from miras.core.retention import Decay, Keep, LqNorm, Simplex
from miras.core.rule import Rule, init_state
from miras.engine import scan

B, H, T, DK, DV, D = 2, 2, 19, 4, 3, 5
Tree = dict[str, Tensor]
At = tuple[int, int]
"""A row and a head."""


class Case(NamedTuple):
    """A model as a rule with its inputs, its own loop `one`, and how to read the loop's names off a scan."""

    rule: Rule
    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tree
    A0: Tree
    one: Callable[[At], oracles.Result]
    outer: Tree | None = None
    seen: Callable[[Tensor, Tree], Tree] = lambda y, state: {"y": y} | state


class Draw:
    """Random fp64 leaves from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.leaves: list[Tensor] = []

    def leaf(self, x: Tensor) -> Tensor:
        self.leaves.append(x.requires_grad_())
        return x

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.leaf(scale * torch.randn(*shape, generator=self.generator, dtype=torch.float64))

    def tokens(self, *tail: int) -> Tensor:
        return self.normal(B, H, T, *tail)

    def keys(self, *tail: int) -> Tensor:
        x = torch.randn(B, H, T, *tail, generator=self.generator, dtype=torch.float64)
        return self.leaf(torch.nn.functional.normalize(x, dim=-1))

    def gate(self, *tail: int, top: float = 1.0, ends: tuple[float, ...] = (0.0, 1.0)) -> Tensor:
        """Gates (B, H, T, ...tail) between 0 and `top`; about a tenth each is exactly one of `ends` times `top`."""
        x = torch.rand(B, H, T, *tail, generator=self.generator, dtype=torch.float64)
        draw = torch.rand(x.shape, generator=self.generator)
        for i, end in enumerate(ends):
            x[(draw > 0.1 * i) & (draw < 0.1 * (i + 1))] = end
        return self.leaf(top * x)

    def forget(self, *tail: int) -> Tensor:
        """`forget` of a deep memory, exactly 1 near the end only: behind a norm, what is near 0 has few digits."""
        with torch.no_grad():
            x = self.gate(*tail, top=0.3, ends=(0.0,))
            x[:, :, T - 2] = 1
        return x

    def matrix(self) -> Tensor:
        return self.normal(B, H, DK, DV)

    def weights(self, memory: MLP, scale: float = 2.0) -> Tree:
        return {
            n: self.normal(B, H, *shape, scale=scale * (shape[0] ** -0.5 if n[0] == "w" else 0.3))
            for n, shape in memory.shapes(D, D).items()
        }


def by_weight(**trees: Tree) -> Tree:
    return {f"{gate}.{n}": x for gate, tree in trees.items() for n, x in tree.items()}


def pick(tree: Tree, at: At) -> Tree:
    return {n: x[at] for n, x in tree.items()}


def ones(*tail: int) -> Tensor:
    return torch.ones(B, H, T, *tail, dtype=torch.float64)


def linear_attention(draw: Draw, chunk: int) -> Case:
    q, k, v, A = draw.tokens(DK), draw.tokens(DK), draw.tokens(DV), draw.matrix()
    rule = Rule(Matrix(), Dot(), Keep(), chunk_size=chunk)
    one = lambda at: oracles.linear_attention(q[at], k[at], v[at], A[at])  # noqa: E731
    return Case(rule, q, k, v, {"lr": ones()}, {"w": A}, one)


def retnet(draw: Draw, chunk: int) -> Case:
    q, k, v, A = draw.tokens(DK), draw.tokens(DK), draw.tokens(DV), draw.matrix()
    decay = draw.leaf(torch.tensor([0.9, 1.0], dtype=torch.float64))
    gates = {"lr": ones(), "forget": (1 - decay[:, None]).expand(B, H, T)}
    rule = Rule(Matrix(), Dot(), Decay(), chunk_size=chunk)
    one = lambda at: oracles.retnet(q[at], k[at], v[at], decay[at[1]], A[at])  # noqa: E731
    return Case(rule, q, k, v, gates, {"w": A}, one)


def mamba2(draw: Draw, chunk: int) -> Case:
    q, k, v, A = draw.tokens(DK), draw.tokens(DK), draw.tokens(DV), draw.matrix()
    forget, lr = draw.gate(), draw.gate(top=2.0)
    rule = Rule(Matrix(), Dot(), Decay(), chunk_size=chunk)
    one = lambda at: oracles.mamba2(q[at], k[at], v[at], forget[at], lr[at], A[at])  # noqa: E731
    return Case(rule, q, k, v, {"lr": lr, "forget": forget}, {"w": A}, one)


def gla(draw: Draw, chunk: int) -> Case:
    q, k, v, A = draw.tokens(DK), draw.tokens(DK), draw.tokens(DV), draw.matrix()
    keep = draw.gate(DK)
    rule = Rule(Matrix(), Dot(), Decay(), chunk_size=chunk)
    one = lambda at: oracles.gla(q[at], k[at], v[at], keep[at], A[at])  # noqa: E731
    return Case(rule, q, k, v, {"lr": ones(), "forget": (1 - keep)[..., None]}, {"w": A}, one)


def hgrn2(draw: Draw, chunk: int) -> Case:
    q, v, A, keep = draw.tokens(DK), draw.tokens(DV), draw.matrix(), draw.gate(DK)
    rule = Rule(Matrix(), Dot(), Decay(), chunk_size=chunk)
    one = lambda at: oracles.hgrn2(q[at], keep[at], v[at], A[at])  # noqa: E731
    return Case(rule, q, 1 - keep, v, {"lr": ones(), "forget": (1 - keep)[..., None]}, {"w": A}, one)


def deltanet(draw: Draw) -> Case:
    q, k, v, A, beta = draw.tokens(DK), draw.keys(DK), draw.tokens(DV), draw.matrix(), draw.gate()
    rule = Rule(Matrix(), L2(), Keep(), chunk_size=1)
    one = lambda at: oracles.deltanet(q[at], k[at], v[at], beta[at], A[at])  # noqa: E731
    return Case(rule, q, k, v, {"lr": beta}, {"w": A}, one)


def gated_deltanet(draw: Draw) -> Case:
    q, k, v, A = draw.tokens(DK), draw.keys(DK), draw.tokens(DV), draw.matrix()
    beta, alpha = draw.gate(), draw.gate()
    rule = Rule(Matrix(), L2(), Decay(decayed=True), chunk_size=1)
    one = lambda at: oracles.gated_deltanet(q[at], k[at], v[at], beta[at], alpha[at], A[at])  # noqa: E731
    return Case(rule, q, k, v, {"lr": beta, "forget": 1 - alpha}, {"w": A}, one)


def deltaproduct(draw: Draw, steps: int) -> Case:
    tail = (steps,) if steps > 1 else ()
    q, k, v, A = draw.tokens(DK), draw.keys(*tail, DK), draw.tokens(*tail, DV), draw.matrix()
    beta, alpha = draw.gate(*tail, top=2.0), draw.gate()
    rule = Rule(Matrix(), L2(), Decay(decayed=True), GradientDescent(steps=steps), chunk_size=1)

    def one(at: At) -> oracles.Result:
        pairs = (x[at].reshape(T, steps, *x.shape[3 + len(tail) :]) for x in (k, v, beta))
        return oracles.deltaproduct(q[at], *pairs, alpha[at], A[at])

    return Case(rule, q, k, v, {"lr": beta, "forget": 1 - alpha}, {"w": A}, one)


def longhorn(draw: Draw) -> Case:
    q, k, v, A, beta = draw.tokens(DK), draw.tokens(DK), draw.tokens(DV), draw.matrix(), draw.gate(top=20.0)
    rule = Rule(Matrix(), L2(), Keep(), Implicit(), chunk_size=1)
    one = lambda at: oracles.longhorn(q[at], k[at], v[at], beta[at], A[at])  # noqa: E731
    return Case(rule, q, k, v, {"lr": beta}, {"w": A}, one)


def longhorn_by_channel(draw: Draw) -> Case:
    """Steps per output channel: the rule takes them as gradient steps of the closed form's size."""
    q, k, v, A = draw.tokens(DK), draw.tokens(DK), draw.tokens(DV), draw.matrix()
    beta = draw.gate(DV, top=20.0)
    lr = (beta / (1 + beta * k.square().sum(-1, keepdim=True)))[..., None, :]
    rule = Rule(Matrix(), L2(), Keep(), chunk_size=1)
    one = lambda at: oracles.longhorn(q[at], k[at], v[at], beta[at], A[at])  # noqa: E731
    return Case(rule, q, k, v, {"lr": lr}, {"w": A}, one)


def mlstm(draw: Draw, chunk: int) -> Case:
    """The normaliser is one more value channel, always 1; dividing by it is the caller's."""
    q, k, v, f, i = draw.tokens(DK), draw.tokens(DK), draw.tokens(DV), draw.gate(), draw.gate(top=5.0)
    rule = Rule(Matrix(), Dot(), Decay(), chunk_size=chunk)
    A = torch.zeros(B, H, DK, DV + 1, dtype=torch.float64)

    def seen(y: Tensor, state: Tree) -> Tree:
        C = state["A.w"]
        return {"y": y[..., :-1] / y[..., -1:].abs().clamp_min(1), "A.w": C[..., :-1], "n": C[..., -1]}

    one = lambda at: oracles.mlstm(q[at], k[at], v[at], f[at], i[at])  # noqa: E731
    return Case(rule, q, k, torch.cat([v, ones(1)], -1), {"lr": i, "forget": 1 - f}, {"w": A}, one, seen=seen)


TAILS = {"heads": (), "inputs": (DK, 1), "outputs": (1, DV)}


def titans_linear(draw: Draw, chunk: int, decayed: bool, by: tuple[str, str, str]) -> Case:
    """`by`: whether lr, momentum and forget are per head or per channel."""
    q, k, v, A = draw.tokens(DK), draw.keys(DK), draw.tokens(DV), draw.matrix()
    lr, momentum, forget = (draw.gate(*TAILS[x], top=top) for x, top in zip(by, (0.5, 1.0, 1.0), strict=True))
    gates = {"lr": lr, "momentum": momentum, "forget": forget}
    rule = Rule(Matrix(), L2(), Decay(decayed), GradientDescent(momentum=True), chunk)

    def one(at: At) -> oracles.Result:
        return oracles.titans_linear(
            q[at], k[at], v[at], lr[at], momentum[at], forget[at], chunk, decayed, A[at]
        )

    return Case(rule, q, k, v, gates, {"w": A}, one)


def titans_deep(draw: Draw, chunk: int, depth: int, channels: bool, returning: bool = False) -> Case:
    memory = MLP(depth=depth, expansion=2)
    q, k, v, A = draw.tokens(D), draw.keys(D), draw.tokens(D), draw.weights(memory)
    # Input channels in the first weight, output channels in the last, per head between.
    tails = {n: () for n in A}
    if channels:
        tails |= {"w1": (D, 1), f"w{depth}": (1, D)}
    lr, momentum = ({n: draw.gate(*tails[n], top=top) for n in A} for top in (0.1, 1.0))
    forget = {n: draw.forget(*tails[n]) for n in A}
    towards = "initial" if returning else "zero"
    rule = Rule(memory, L2(), Decay(towards=towards), GradientDescent(momentum=True), chunk)

    def one(at: At) -> oracles.Result:
        trees = (pick(x, at) for x in (lr, momentum, forget, A))
        return oracles.titans_deep(q[at], k[at], v[at], *trees, chunk=chunk, returning=returning)

    def seen(y: Tensor, state: Tree) -> Tree:
        whole = {f"A.{n}": state[f"A.{n}"] + A[n] for n in A} if returning else {}
        return {"y": y} | state | whole

    gates = by_weight(lr=lr, momentum=momentum, forget=forget)
    return Case(rule, q, k, v, gates, A, one, seen=seen)


def ttt(draw: Draw, chunk: int, depth: int, slow_bias: bool = False) -> Case:
    memory = MLP(depth=depth, expansion=2, bias=True, affine=True, bias_input="key" if slow_bias else "one")
    constant = D**-0.5 if slow_bias else 1.0
    q, k, v, A, lr = draw.tokens(D), draw.keys(D), draw.tokens(D), draw.weights(memory), draw.gate(top=0.3)
    gain, shift = draw.normal(H, D), draw.normal(H, D)
    names = {"w1": "w", "b1": "b"} if depth == 1 else {n: n for n in A}

    def one(at: At) -> oracles.Result:
        start = {names[n]: constant * a[at][0] if n[0] == "b" else a[at] for n, a in A.items()}
        loop = partial(oracles.ttt_mlp, A0=start)
        if depth == 1:
            loop = partial(oracles.ttt_linear, W0=start["w"], b0=start["b"])
        norm = {"ln_weight": gain[at[1]], "ln_bias": shift[at[1]]}
        return loop(q[at], k[at], v[at], lr[at], **norm, chunk=chunk, bias_rate=constant**2)

    def seen(y: Tensor, state: Tree) -> Tree:
        A = {new: state[f"A.{old}"] for old, new in names.items()}
        return {"y": y} | {f"A.{n}": constant * a[..., 0, :] if n[0] == "b" else a for n, a in A.items()}

    rule = Rule(memory, L2(), Keep(), chunk_size=chunk)
    return Case(rule, q, k, v, {"lr": lr}, A, one, {"gain": gain, "shift": shift}, seen)


def yaad(draw: Draw, chunk: int, kind: str, channels: bool) -> Case:
    memory = MLP(expansion=2)
    q, k, v, A = draw.tokens(D), draw.keys(D), draw.tokens(D), draw.weights(memory)
    tails = {n: (1, a.shape[-1]) if channels else () for n, a in A.items()}
    lr = {n: draw.gate(*tails[n], top=0.2) for n in A}
    forget = {n: draw.forget(*tails[n]) for n in A}
    # Thresholds on both sides of the residuals, whose coordinates are near 1 and whose norms are near 3.
    per_channel = channels and kind == "coordinate"
    delta = draw.gate(*([D] if per_channel else []), top=1.5 if kind == "coordinate" else 5.0)
    gates = by_weight(lr=lr, forget=forget) | {"delta": delta[..., None, :] if per_channel else delta}
    rule = Rule(memory, Huber(kind), Decay(), chunk_size=chunk)

    def one(at: At) -> oracles.Result:
        return oracles.yaad(
            q[at], k[at], v[at], pick(lr, at), pick(forget, at), delta[at], pick(A, at), chunk, kind
        )

    return Case(rule, q, k, v, gates, A, one)


def moneta(
    draw: Draw,
    chunk: int,
    channels: bool,
    p: float = 3.0,
    q: float = 4.0,
    literal: bool = False,
    size: float = 30.0,
) -> Case:
    """`size` of the accumulators: our maps differ from the printed ones near 0, by 1e-6 in the norm or an entry."""
    memory = MLP(expansion=2)
    x, k, v, A = draw.tokens(D), draw.keys(D), draw.tokens(D), draw.weights(memory, scale=size)
    tails = {n: (1, a.shape[-1]) if channels else () for n, a in A.items()}
    lr = {n: draw.gate(*tails[n], top=size / 30) for n in A}
    # Where all is forgotten and nothing written the printed maps are 0 / 0.
    forget = {n: draw.gate(*tails[n], top=0.1, ends=(0.0,)) for n in A}
    rule = Rule(memory, Lp(p), LqNorm(q, literal), chunk_size=chunk)

    def one(at: At) -> oracles.Result:
        trees = (pick(t, at) for t in (lr, forget, A))
        return oracles.moneta(x[at], k[at], v[at], *trees, chunk=chunk, p=p, q_exp=q, literal=literal)

    return Case(rule, x, k, v, by_weight(lr=lr, forget=forget), A, one)


def memora(draw: Draw, chunk: int, channels: bool) -> Case:
    memory = MLP(expansion=2)
    q, k, v, A = draw.tokens(D), draw.keys(D), draw.tokens(D), draw.weights(memory, scale=4.0)
    tails = {n: (1, a.shape[-1]) if channels else () for n, a in A.items()}
    lr = {n: draw.gate(*tails[n], top=0.3) for n in A}
    forget = {n: draw.forget(*tails[n]) for n in A}
    rule = Rule(memory, L2(), Simplex(), chunk_size=chunk)

    def one(at: At) -> oracles.Result:
        return oracles.memora(q[at], k[at], v[at], pick(lr, at), pick(forget, at), pick(A, at), chunk=chunk)

    return Case(rule, q, k, v, by_weight(lr=lr, forget=forget), A, one)


PER_HEAD = ("heads", "heads", "heads")
CHANNELS = (
    ("heads", "heads", "inputs"),
    ("outputs", "outputs", "outputs"),
    ("inputs", "outputs", "heads"),
    ("outputs", "heads", "inputs"),
)
CASES: dict[str, Callable[[Draw], Case]] = {
    **{
        f"{model.__name__}-{chunk}": partial(model, chunk=chunk)
        for model in (linear_attention, retnet, mamba2, gla, hgrn2, mlstm)
        for chunk in (1, 4)
    },
    "deltanet": deltanet,
    "gated_deltanet": gated_deltanet,
    **{f"deltaproduct-{n}": partial(deltaproduct, steps=n) for n in (1, 2, 3)},
    "longhorn": longhorn,
    "longhorn_by_channel": longhorn_by_channel,
    **{
        f"titans_linear-{chunk}-{'decayed' if decayed else 'plain'}-{','.join(by)}": partial(
            titans_linear, chunk=chunk, decayed=decayed, by=by
        )
        for chunk, decayed, by in (
            *itertools.product((1, 4, 16), (False, True), (PER_HEAD,)),
            *itertools.product((4,), (False, True), CHANNELS),
            *((1, True, by) for by in CHANNELS[::2]),
        )
    },
    **{
        f"titans_deep-{chunk}-{depth}-{'channels' if channels else 'heads'}": partial(
            titans_deep, chunk=chunk, depth=depth, channels=channels
        )
        for chunk, depth, channels in (
            *((1, depth, depth == 2) for depth in (2, 3)),
            *((4, depth, depth == 3) for depth in (2, 3)),
            *((16, depth, depth == 2) for depth in (2, 3)),
        )
    },
    **{f"ttt_linear-{chunk}": partial(ttt, chunk=chunk, depth=1) for chunk in (1, 4, 16)},
    **{f"ttt_mlp-{chunk}": partial(ttt, chunk=chunk, depth=2) for chunk in (1, 4, 16)},
    **{f"ttt-{depth}-slow_bias": partial(ttt, chunk=4, depth=depth, slow_bias=True) for depth in (1, 2)},
    **{
        f"yaad-{chunk}-{kind}-{'channels' if channels else 'heads'}": partial(
            yaad, chunk=chunk, kind=kind, channels=channels
        )
        for chunk, kind, channels in (
            *((1, kind, kind == "mixture") for kind in HUBER_KINDS),
            *((4, kind, kind != "mixture") for kind in HUBER_KINDS),
            (4, "coordinate", False),
        )
    },
    **{
        f"moneta-{chunk}-{'channels' if channels else 'heads'}": partial(
            moneta, chunk=chunk, channels=channels
        )
        for chunk, channels in itertools.product((1, 4), (False, True))
    },
    "moneta-p2.5-q3": partial(moneta, chunk=4, channels=False, p=2.5, q=3.0),
    "moneta-literal": partial(moneta, chunk=4, channels=False, literal=True, size=100.0),
    "moneta-literal-channels": partial(moneta, chunk=4, channels=True, literal=True, size=100.0),
    "moneta-literal-q3": partial(moneta, chunk=4, channels=True, q=3.0, literal=True, size=1e4),
    **{
        f"memora-{chunk}-{'channels' if channels else 'heads'}": partial(
            memora, chunk=chunk, channels=channels
        )
        for chunk, channels in itertools.product((1, 4), (False, True))
    },
    **{
        f"titans_deep-returning-{chunk}-{'channels' if channels else 'heads'}": partial(
            titans_deep, chunk=chunk, depth=2, channels=channels, returning=True
        )
        for chunk, channels in ((1, False), (4, True), (16, False))
    },
}


def outcome(found: Tree, leaves: list[Tensor]) -> Tree:
    """Values, and the gradients by every leaf of one fixed random functional of them."""
    total = torch.zeros((), dtype=torch.float64)
    for n, x in found.items():
        weights = torch.randn(x.shape, generator=Problem.generator(n), dtype=torch.float64)
        total = total + (weights * x).sum() / x.detach().abs().max()
    by_leaf = torch.autograd.grad(total, leaves)
    return {n: x.detach() for n, x in found.items()} | {f"d{i}": d for i, d in enumerate(by_leaf)}


@cache
def published(name: str) -> Tree:
    """The outcome of the oracle, row by row and head by head."""
    draw = Draw(list(CASES).index(name))
    case = CASES[name](draw)
    runs = [case.one(at) for at in itertools.product(range(B), range(H))]
    trees = [{"y": y} | state for y, state in runs]
    found = {n: torch.stack([t[n] for t in trees]).unflatten(0, (B, H)) for n in trees[0]}
    return outcome(found, draw.leaves)


@pytest.mark.parametrize("function", [scan, recurrence])
@pytest.mark.parametrize("name", CASES)
def test_a_rule_is_its_published_model(name, function):
    draw = Draw(list(CASES).index(name))
    case, expected = CASES[name](draw), published(name)
    inside = torch.randperm(T - 1, generator=draw.generator)[:3].add(1).sort().values.tolist()
    state, reads = init_state(case.rule, case.A0), []
    for a, b in itertools.pairwise([0, *inside, T]):
        q, k, v = (x[:, :, a:b] for x in (case.q, case.k, case.v))
        gates = {n: g[:, :, a:b] for n, g in case.gates.items()}
        y, state = function(case.rule, state, q, k, v, gates, initial=case.A0, outer=case.outer)
        reads.append(y)
    found = case.seen(torch.cat(reads, 2), state.tensors())
    same(outcome({n: found[n] for n in found if n in expected}, draw.leaves), expected)
