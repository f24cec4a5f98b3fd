"""Choices that coincide where theory says so: special values of a gate, an exponent, a width or a threshold.

Every test runs `scan` in fp64 on one random stream of B rows, H heads and T tokens, cut nowhere, and compares
reads and accumulators.
"""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import oracles
from cases import same
from miras.core.algorithm import GradientDescent, Implicit, Muon
from miras.core.bias import L1, L2, Dot, Huber, LInf, Lp, Robust
from miras.core.memory import MLP, GatedMLP, Matrix, Vector
from miras.core.retention import (
    Bregman,
    Decay,
    ElasticNet,
    FDivergence,
    Keep,
    LqNorm,
    ProximalElasticNet,
    Sigmoid,
    Simplex,
)
from miras.core.rule import Rule, init_state
from miras.engine import scan

B, H, T, D, C = 2, 2, 14, 4, 4
Tree = dict[str, Tensor]
Momentum = GradientDescent(momentum=True)
DEEP = MLP(expansion=2)
TOPS = {"lr": 0.3, "momentum": 0.9, "forget": 0.2, "delta": 1.0, "radius": 1.0}


def brief(choice: object) -> str:
    """A choice as the name of a test, the same in every process: without the addresses of functions."""
    return re.sub(r" at 0x\w+", "", str(choice)).replace(" ", "")


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gate(name: str, *tail: int) -> Tensor:
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    return TOPS[name] * torch.rand(B, H, T, *tail, generator=g, dtype=torch.float64)


def constant(value: float) -> Tensor:
    return torch.full((B, H, T), value, dtype=torch.float64)


def weights(rule: Rule, width: int = D) -> Tree:
    """Initial accumulators, by the place of a weight and not by its name."""
    shapes = rule.memory.shapes(width, width)
    return {n: randn(7 + i, B, H, *s) / s[0] ** 0.5 for i, (n, s) in enumerate(shapes.items())}


def run(
    rule: Rule, changed: Tree | None = None, A0: Tree | None = None, width: int = D, **given: Tensor
) -> Tree:
    """Reads and the last A of a rule on the stream; `changed` and `given` replace gates, and q, k, v."""
    q, k, v = (given.get(n, randn(i, B, H, T, width)) for i, n in enumerate("qkv"))
    k = given.get("k", F.normalize(k, dim=-1))
    changed = changed or {}
    own = {n.split(".")[0] for n in changed if "." in n}
    gates = {n: gate(n) for n in rule.gates() if n not in own} | changed
    y, state = scan(rule, init_state(rule, weights(rule, width) if A0 is None else A0), q, k, v, gates)
    return {"y": y} | {f"A.{n}": a for n, a in state.A.items()}


def coincide(a: Tree, b: Tree, tolerance: float = 1e-9) -> None:
    """Equal reads and accumulators, in the order of the weights: names may differ."""
    same(dict(zip(b, a.values(), strict=True)), b, tolerance)


def published(loop, *gates: Tensor) -> Tree:
    """An oracle of a matrix memory on the stream, row by row and head by head."""
    q, k, v = (randn(i, B, H, T, D) for i in range(3))
    k, A0 = F.normalize(k, dim=-1), weights(Rule())["w"]
    rows = [[loop(*(x[b, h] for x in (q, k, v, *gates)), A0=A0[b, h]) for h in range(H)] for b in range(B)]
    return {
        "y": torch.stack([torch.stack([y for y, _ in row]) for row in rows]),
        "A.w": torch.stack([torch.stack([state["A.w"] for _, state in row]) for row in rows]),
    }


def test_no_momentum_and_no_forgetting_is_deltanet():
    rule = Rule(Matrix(), L2(), Decay(), Momentum, chunk_size=1)
    found = run(rule, {"momentum": constant(0), "forget": constant(0)})
    same(found, published(oracles.deltanet, gate("lr")))
    coincide(found, run(Rule(Matrix(), L2(), Keep(), chunk_size=1)))


@pytest.mark.parametrize("chunk_size", [1, C])
def test_similarity_with_a_constant_retain_is_retnet(chunk_size):
    rule = Rule(Matrix(), Dot(), Decay(), chunk_size=chunk_size)
    found = run(rule, {"lr": constant(1), "forget": constant(0.1)})
    same(found, published(oracles.retnet, constant(0.9)[..., 0]))


@pytest.mark.parametrize(
    ("decayed", "loop"), [(True, oracles.gated_deltanet), (False, oracles.titans_linear)]
)
def test_chunks_of_one_token_are_the_unchunked_rule(decayed, loop):
    found = run(Rule(Matrix(), L2(), Decay(decayed), chunk_size=1))
    if decayed:
        expected = published(loop, gate("lr"), 1 - gate("forget"))
    else:
        unchunked = lambda *x, A0: loop(*x, chunk=1, A0=A0)  # noqa: E731
        expected = published(unchunked, gate("lr"), constant(0), gate("forget"))
    same(found, expected)


RETENTIONS = (
    Keep(),
    Decay(),
    ElasticNet(0.05),
    ElasticNet(0.05, smooth=True),
    ProximalElasticNet(0.02),
    LqNorm(4.0),
    LqNorm(4.0, literal=True),
    LqNorm(3.0),
    Simplex("all"),
    FDivergence(axis="all"),
    Sigmoid(),
)


@pytest.mark.parametrize("retention", RETENTIONS, ids=brief)
@pytest.mark.parametrize("memory", [Matrix(), Vector(), DEEP, GatedMLP(expansion=2)], ids=brief)
def test_where_only_the_first_token_of_a_chunk_learns_its_size_is_all_one(memory, retention):
    # Its anchor is the memory as the token before it left it: the unchunked rule.
    first = (torch.arange(T) % C == 0) * gate("lr")
    rules = (Rule(memory, L2(), retention, Momentum, chunk_size=size) for size in (C, 1))
    coincide(*(run(rule, {"lr": first}) for rule in rules))


@pytest.mark.parametrize("algorithm", [GradientDescent(), Momentum, Muon()], ids=brief)
@pytest.mark.parametrize("retention", [*RETENTIONS, Decay(decayed=True)], ids=brief)
def test_similarity_does_not_depend_on_the_chunk(retention, algorithm):
    # The gradient -k v of a matrix holds no weight.
    one, *others = (run(Rule(Matrix(), Dot(), retention, algorithm, size)) for size in (1, 3, C, 16))
    for other in others:
        coincide(other, one)


def identity(A: Tensor) -> Tensor:
    return A


@pytest.mark.parametrize("memory", [Matrix(), Vector(), DEEP], ids=brief)
@pytest.mark.parametrize("algorithm", [GradientDescent(), Momentum], ids=brief)
@pytest.mark.parametrize(
    ("retention", "tolerance"),
    [
        (LqNorm(2), 0),
        (LqNorm(2, literal=True), 0),
        (LqNorm(2 + 1e-9), 1e-6),
        (LqNorm(2 - 1e-9, literal=True), 1e-6),
        (ElasticNet(0), 0),
        (ElasticNet(1e-12), 1e-9),
        (ProximalElasticNet(0), 0),
        (ProximalElasticNet(1e-12), 1e-9),
        (Bregman(identity), 1e-9),
    ],
    ids=brief,
)
def test_retentions_that_become_decay(retention, tolerance, algorithm, memory):
    decay = run(Rule(memory, L2(), Decay(), algorithm, C))
    coincide(run(Rule(memory, L2(), retention, algorithm, C)), decay, tolerance)


@pytest.mark.parametrize("memory", [Matrix(), DEEP], ids=brief)
def test_retentions_without_their_forgetting(memory):
    none = {"forget": constant(0)}
    kept = run(Rule(memory, L2(), Keep(), chunk_size=C))
    coincide(run(Rule(memory, L2(), Decay(), chunk_size=C), none), kept)
    coincide(run(Rule(memory, L2(), Decay(decayed=True), chunk_size=C), none), kept)
    sigmoid = run(Rule(memory, L2(), Sigmoid(), chunk_size=C))
    coincide(run(Rule(memory, L2(), Bregman(torch.sigmoid), chunk_size=C)), sigmoid)


@pytest.mark.parametrize("memory", [Matrix(), DEEP], ids=brief)
@pytest.mark.parametrize("axis", ["input", "output", "all"])
def test_the_exponential_divergence_is_the_simplex_that_forgets_nothing(axis, memory):
    simplex, divergence = Simplex(axis), FDivergence(axis=axis)
    expected = run(Rule(memory, L2(), simplex, chunk_size=C), {"forget": constant(0)})
    found = run(Rule(memory, L2(), divergence, chunk_size=C))
    # Accumulators may differ by a constant for each simplex.
    linked = [
        {n: retention.link(x) if n != "y" else x for n, x in tree.items()}
        for retention, tree in ((divergence, found), (simplex, expected))
    ]
    coincide(*linked)


HIGH = 1e6
"""A threshold above every residual."""
BIASES = (
    *((Huber(kind), {"delta": constant(HIGH)}, L2(), {}, D) for kind in ("norm", "coordinate", "mixture")),
    *((Huber(kind, delta=HIGH), {}, L2(), {}, D) for kind in ("norm", "coordinate", "mixture")),
    (Huber("coordinate"), {"delta": constant(HIGH)[..., None, None].expand(B, H, T, 1, D)}, L2(), {}, D),
    *((Robust(ball), {"radius": constant(0)}, L2(), {}, D) for ball in ("l2", "l1", "linf")),
    (Lp(2), {}, L2(), {"lr": 2 * gate("lr")}, D),
    (Lp(3, clip=HIGH), {}, Lp(3), {}, D),
    (Lp(1, eps=1e-4), {}, L1(eps=1e-4), {}, D),
    # Values of one channel have one norm.
    (LInf(eps=1e-4), {}, L1(eps=1e-4), {}, 1),
    (Huber("norm"), {}, Huber("coordinate"), {}, 1),
    (Robust("l1"), {}, Robust("l2"), {}, 1),
    (Robust("linf"), {}, Robust("l2"), {}, 1),
)


@pytest.mark.parametrize(("bias", "gates", "other", "changed", "width"), BIASES)
@pytest.mark.parametrize("memory", [Matrix(), Vector(), MLP(expansion=2, norm=False, depth=2)], ids=brief)
def test_biases_that_coincide(memory, bias, gates, other, changed, width):
    found = run(Rule(memory, bias, Decay(), Momentum, C), gates, width=width)
    coincide(found, run(Rule(memory, other, Decay(), Momentum, C), changed, width=width))


@pytest.mark.parametrize("algorithm", [GradientDescent(), Momentum, GradientDescent(True, 2.0)], ids=brief)
@pytest.mark.parametrize("retention", [Decay(), Decay(decayed=True), LqNorm(4.0), Simplex()], ids=brief)
def test_one_layer_without_residual_and_norm_is_a_matrix(retention, algorithm):
    deep = Rule(MLP(depth=1, residual=False, norm=False), L2(), retention, algorithm, C)
    coincide(run(deep), run(Rule(Matrix(), L2(), retention, algorithm, C)))


@pytest.mark.parametrize("bias", [L2(), Dot(), L1(), Lp(3), LInf(), Huber(), Robust()], ids=brief)
@pytest.mark.parametrize("retention", RETENTIONS, ids=brief)
def test_a_vector_of_one_channel_is_a_matrix(retention, bias):
    vector, matrix = (Rule(memory, bias, retention, Momentum, C) for memory in (Vector(), Matrix()))
    coincide(run(vector, width=1), run(matrix, width=1))


def test_a_vector_is_the_channels_of_a_matrix_that_see_one_channel_each():
    vector = run(Rule(Vector(), L2(), Decay(), chunk_size=C))
    q, k, v = (randn(i, B, H, T, D) for i in range(3))
    k = F.normalize(k, dim=-1)
    for d in range(D):
        one = {"q": q[..., d : d + 1], "k": k[..., d : d + 1], "v": v[..., d : d + 1]}
        A0 = {"w": weights(Rule(Vector()))["w"][:, :, d : d + 1]}
        channel = run(Rule(Matrix(), L2(), Decay(), chunk_size=C), A0=A0, **one)
        coincide({"y": vector["y"][..., d : d + 1], "A.w": vector["A.w"][:, :, d : d + 1]}, channel)


def hidden(memory, W: Tree, x: Tensor) -> Tensor:
    """What the last weight of a memory of depth 2 takes in."""
    gated = isinstance(memory, GatedMLP)
    return F.silu(x @ W["w1"]) * (x @ W["w3"]) if gated else F.gelu(x @ W["w1"])


@pytest.mark.parametrize("algorithm", [GradientDescent(), Momentum, Muon()], ids=brief)
@pytest.mark.parametrize("retention", [Decay(), LqNorm(3.0)], ids=brief)
@pytest.mark.parametrize("kind", [MLP, GatedMLP])
def test_where_only_the_last_layer_learns_it_is_a_matrix_on_features(kind, retention, algorithm):
    memory = kind(expansion=2, residual=False, norm=False)
    rule = Rule(memory, L2(), retention, algorithm, C)
    A0 = weights(rule)
    gates = {f"{g}.{n}": gate(g) if n == "w2" else constant(0) for g in rule.gates() for n in A0}
    found = run(rule, gates)
    W = {n: retention.link(a) for n, a in A0.items()}
    q, k = randn(0, B, H, T, D), F.normalize(randn(1, B, H, T, D), dim=-1)
    matrix = Rule(Matrix(), L2(), retention, algorithm, C)
    features = {"q": hidden(memory, W, q), "k": hidden(memory, W, k), "v": randn(2, B, H, T, D)}
    expected = run(matrix, A0={"w": A0["w2"]}, **features)
    coincide({"y": found["y"], "A.w": found["A.w2"]}, expected)


@pytest.mark.parametrize("norm", [True, False])
def test_biases_and_an_affine_norm_that_do_nothing(norm):
    plain = MLP(expansion=2, norm=norm)
    rule = Rule(MLP(expansion=2, norm=norm, bias=True, affine=norm), L2(), Decay(), Momentum, C)
    A0 = weights(Rule(plain))
    b = {"b1": torch.zeros(B, H, 1, 2 * D).double(), "b2": torch.zeros(B, H, 1, D).double()}
    gates = {f"lr.{n}": gate("lr") if n in A0 else constant(0) for n in (*A0, *b)}
    gates |= {"momentum": gate("momentum"), "forget": gate("forget")}
    outer = {"gain": torch.ones(H, D).double(), "shift": torch.zeros(H, D).double()} if norm else None
    q, k, v = (randn(i, B, H, T, D) for i in range(3))
    state = init_state(rule, {n: (A0 | b)[n] for n in rule.memory.shapes(D, D)})
    y, state = scan(rule, state, q, F.normalize(k, dim=-1), v, gates, outer=outer)
    expected = run(Rule(plain, L2(), Decay(), Momentum, C))
    same({"y": y} | {f"A.{n}": state.A[n] for n in A0}, expected)


@pytest.mark.parametrize("bound", [1.0, 3.0])
def test_a_step_bound_has_nothing_to_bound_in_chunks_of_one_token(bound):
    free, bounded = (Rule(DEEP, L2(), Decay(), GradientDescent(True, c), 1) for c in (0.0, bound))
    coincide(run(bounded), run(free))


@pytest.mark.parametrize("size", [1, C])
@pytest.mark.parametrize("retention", [Keep(), Decay(decayed=True)], ids=brief)
def test_an_implicit_step_is_a_shorter_gradient_step(retention, size):
    k = 2 * randn(5, B, H, T, D)
    lr = 50 * gate("lr")
    shorter = lr / (1 + lr * k.square().sum(-1))
    implicit = run(Rule(Matrix(), L2(), retention, Implicit(), size), {"lr": lr}, k=k)
    coincide(implicit, run(Rule(Matrix(), L2(), retention, chunk_size=size), {"lr": shorter}, k=k))


def test_an_implicit_step_of_any_size_stores_the_pair():
    k, v = randn(5, B, H, T, D), randn(2, B, H, T, D)
    found = run(Rule(Matrix(), L2(), Keep(), Implicit(), 1), {"lr": constant(1e12)}, k=k, q=k)
    same({"y": found["y"]}, {"y": v})


@pytest.mark.parametrize("memory", [Matrix(), DEEP], ids=brief)
@pytest.mark.parametrize("retention", [Decay(), Sigmoid()], ids=brief)
@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_orthogonal_steps_do_not_see_the_scale_of_lr(factor, retention, memory):
    rule = Rule(memory, L2(), retention, Muon(scale=0.3), C)
    coincide(run(rule, {"lr": factor * gate("lr")}), run(rule))


@pytest.mark.parametrize("size", [1, C])
@pytest.mark.parametrize("retention", [Keep(), Decay(), Decay(decayed=True), LqNorm(4.0)], ids=brief)
@pytest.mark.parametrize("memory", [Matrix(), DEEP], ids=brief)
def test_of_several_steps_of_which_one_has_a_length_it_is_the_step(memory, retention, size):
    n = 3
    k, v = F.normalize(randn(1, B, H, T, D), dim=-1), randn(2, B, H, T, D)
    kept = torch.randint(n, (T,), generator=torch.Generator().manual_seed(3))
    if not retention.decayed and retention.gates and size == 1:
        kept = torch.zeros_like(kept)  # a later step starts from what the forgetting before it left
    given = {"k": k[..., None, :].expand(B, H, T, n, D), "v": v[..., None, :].expand(B, H, T, n, D)}
    lr = gate("lr")[..., None] * F.one_hot(kept, n)
    many = Rule(memory, L2(), retention, GradientDescent(steps=n), size)
    coincide(run(many, {"lr": lr}, **given), run(Rule(memory, L2(), retention, chunk_size=size)))


def test_equal_steps_are_one_longer_step():
    # Each of them leaves 1 - lr of the error along a key of norm 1.
    n, lr = 3, gate("lr")
    k, v = F.normalize(randn(1, B, H, T, D), dim=-1), randn(2, B, H, T, D)
    given = {"k": k[..., None, :].expand(B, H, T, n, D), "v": v[..., None, :].expand(B, H, T, n, D)}
    many = Rule(Matrix(), L2(), Decay(decayed=True), GradientDescent(steps=n), 1)
    one = Rule(Matrix(), L2(), Decay(decayed=True), chunk_size=1)
    found = run(many, {"lr": lr[..., None].expand(B, H, T, n)}, **given)
    coincide(found, run(one, {"lr": 1 - (1 - lr) ** n}))


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("name", ["lr", "momentum", "forget"])
@pytest.mark.parametrize(
    ("memory", "retention", "bound"),
    [
        (Matrix(), Decay(), 0.0),
        (Matrix(), Decay(decayed=True), 2.0),
        (DEEP, Decay(decayed=True), 0.0),
        (DEEP, LqNorm(4.0), 2.0),
        (MLP(expansion=1, bias=True, norm=False), ElasticNet(0.05), 0.0),
        (GatedMLP(expansion=2), Decay(), 2.0),
    ],
)
def test_a_gate_that_is_equal_in_all_channels_is_one_per_head(memory, retention, bound, name, side):
    rule = Rule(memory, L2(), retention, GradientDescent(True, bound), C)
    shapes = memory.shapes(D, D)
    tails = {n: (d_in, 1) if side == "input" else (1, d_out) for n, (d_in, d_out) in shapes.items()}
    wide = {f"{name}.{n}": gate(name)[..., None, None].expand(B, H, T, *tail) for n, tail in tails.items()}
    coincide(run(rule, wide), run(rule))
