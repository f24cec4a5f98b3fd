"""Numbers worked out by hand, and the models that are limits of the rule, each as its own loop.

Equations are those of Titans (arXiv 2501.00663) and MIRAS (arXiv 2504.13173) unless another paper is named. W
is one column of two weights, keys have two entries and values one, and every sum stands beside its number.
"""

import pytest
import torch
import torch.nn.functional as F

from miras.core.algorithm import GradientDescent
from miras.core.bias import L2, Dot
from miras.core.memory import MLP, Matrix, Weights
from miras.core.recurrence import recurrence
from miras.core.retention import Decay
from miras.core.rule import Rule, init_state
from miras.engine import scan

both = pytest.mark.parametrize("function", [scan, recurrence])


def row(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)[None, None]


def read(function, rule, *tokens, W=(1.0, 2.0)):
    """The memory W after `tokens` (key, value, gates), and the reads at (1, 1): sums of its entries."""
    state = init_state(rule, {"w": row([W[0]], [W[1]])})
    k = row(*(list(key) for key, _, _ in tokens))
    v = row(*([value] for _, value, _ in tokens))
    gates = {n: row(*(gate[n] for _, _, gate in tokens)) for n in rule.gates()}
    y, state = function(rule, state, torch.ones_like(k), k, v, gates)
    return state, y.flatten().tolist()


def is_close(found, expected):
    assert found == pytest.approx(expected, rel=0, abs=1e-14)


@both
def test_dot(function):
    # MIRAS 4.5, Hebbian: loss -<k W, v>, gradient -k v.
    # W = .9 [1, 2] + .5 [1, 0] 3 = [.9 + 1.5, 1.8] = [2.4, 1.8]
    rule = Rule(bias=Dot(), chunk_size=1)
    state, y = read(function, rule, ((1, 0), 3, {"lr": 0.5, "forget": 0.1}))
    is_close(state.A["w"].flatten().tolist(), [2.4, 1.8])
    is_close(y, [4.2])


@both
def test_l2_undecayed(function):
    # Titans eq. 12, halved: loss (k W - v)^2 / 2, gradient k (k W - v) = [1, 0] (1 - 3) = [-2, 0].
    # Titans eq. 13 without momentum: W = .9 [1, 2] - .5 [-2, 0] = [1.9, 1.8]
    state, y = read(function, Rule(chunk_size=1), ((1, 0), 3, {"lr": 0.5, "forget": 0.1}))
    is_close(state.A["w"].flatten().tolist(), [1.9, 1.8])
    is_close(y, [3.7])


@both
def test_window(function):
    # ATLAS' Omega rule with c = 2 and shares .5 (arXiv 2505.23735): a token's gradient is that of its own loss and
    # of the loss of the pair before it, both at the weights that the token finds.
    # t = 1: .5 [1, 0] (1 - 3) = [-1, 0];                                   W = .9 [1, 2] + .5 [1, 0] = [1.4, 1.8]
    # t = 2: .5 [1, 0] (1.4 - 3) + .5 [0, 1] (1.8 - 1) = [-.8, .4];         W = .9 [1.4, 1.8] - .5 [-.8, .4]
    # t = 3: .5 [0, 1] (1.42 - 1) + .5 [1, 1] (1.66 + 1.42 - 0) = [1.54, 1.75]; W = .9 [1.66, 1.42] - .5 [...]
    gates = {"lr": 0.5, "forget": 0.1, "share": 0.5}
    rule = Rule(algorithm=GradientDescent(window=2), chunk_size=1)
    tokens = (((1, 0), 3, gates), ((0, 1), 1, gates), ((1, 1), 0, gates))
    state, y = read(function, rule, *tokens)
    is_close(state.A["w"].flatten().tolist(), [0.9 * 1.66 - 0.77, 0.9 * 1.42 - 0.875])
    is_close(y, [3.2, 3.08, 1.127])


@both
def test_l2_decayed(function):
    # Gated DeltaNet (Yang et al. 2025): the gradient at .9 W: [1, 0] (.9 - 3) = [-2.1, 0].
    # W = .9 [1, 2] - .5 [-2.1, 0] = [.9 + 1.05, 1.8] = [1.95, 1.8]
    rule = Rule(retention=Decay(decayed=True), chunk_size=1)
    state, y = read(function, rule, ((1, 0), 3, {"lr": 0.5, "forget": 0.1}))
    is_close(state.A["w"].flatten().tolist(), [1.95, 1.8])
    is_close(y, [3.75])


FIRST = ((1, 0), 3, {"lr": 0.5, "momentum": 0.8, "forget": 0.1})
SECOND = ((0, 1), 0, {"lr": 0.25, "momentum": 0.4, "forget": 0.5})
THIRD = ((1, 1), 0, {"lr": 1.0, "momentum": 0.0, "forget": 0.0})


@both
def test_momentum(function):
    # Titans eq. 13 and 14, one token after the other.
    # 1: gradient [-2, 0]             S = .8 [0, 0] - .5 [-2, 0] = [1, 0]
    #                                 W = .9 [1, 2] + S = [1.9, 1.8]
    # 2: gradient [0, 1] (1.8 - 0)    S = .4 [1, 0] - .25 [0, 1.8] = [.4, -.45]
    #                                 W = .5 [1.9, 1.8] + S = [1.35, .45]
    rule = Rule(algorithm=GradientDescent(momentum=True), chunk_size=1)
    state, y = read(function, rule, FIRST, SECOND)
    is_close(state.S["w"].flatten().tolist(), [0.4, -0.45])
    is_close(state.A["w"].flatten().tolist(), [1.35, 0.45])
    is_close(y, [3.7, 1.8])


@both
def test_a_chunk_takes_its_gradients_at_one_point(function):
    # Titans eq. 16 and 18: both gradients of the chunk at [1, 2], the third token's at the weights before it.
    # 2: gradient [0, 1] (2 - 0)      S = .4 [1, 0] - .25 [0, 2] = [.4, -.5]
    #                                 W = .5 [1.9, 1.8] + S = [1.35, .4]
    # 3: gradient [1, 1] (1.75 - 0)   S = 0 S - [1.75, 1.75]
    #                                 W = [1.35, .4] + S = [-.4, -1.35]
    rule = Rule(algorithm=GradientDescent(momentum=True), chunk_size=2)
    state, y = read(function, rule, FIRST, SECOND)
    is_close(state.S["w"].flatten().tolist(), [0.4, -0.5])
    is_close(state.A["w"].flatten().tolist(), [1.35, 0.4])
    is_close(y, [3.7, 1.75])
    assert state.phase.item() == 0 and torch.equal(state.anchor["w"], state.A["w"])
    state, y = read(function, rule, FIRST, SECOND, THIRD)
    is_close(state.A["w"].flatten().tolist(), [-0.4, -1.35])
    is_close(y, [3.7, 1.75, -1.75])
    assert state.phase.item() == 1
    is_close(state.anchor["w"].flatten().tolist(), [1.35, 0.4])


@both
def test_a_decayed_chunk(function):
    # The anchor [1, 2] times the product of 1 - forget through the token itself.
    # 1: at .9 [1, 2]:        gradient [1, 0] (.9 - 3);    W = .9 [1, 2] + .5 [2.1, 0] = [1.95, 1.8]
    # 2: at .9 .5 [1, 2]:     gradient [0, 1] (.9 - 0);    W = .5 [1.95, 1.8] - .25 [0, .9] = [.975, .675]
    # 3: a new chunk, at W:   gradient [1, 1] (1.65 - 0);  W = [.975 - 1.65, .675 - 1.65] = [-.675, -.975]
    rule = Rule(retention=Decay(decayed=True), chunk_size=2)
    _, y = read(function, rule, FIRST, SECOND, THIRD)
    is_close(y, [3.75, 1.65, -1.65])


@both
def test_step_bound(function):
    # lr_2 = .5 (1 - .5 |[1, 0] . [.6, -.8]|) = .5 (1 - .5 .6) = .35
    # 1: gradient [1, 0] (1 - 3);              W = [1, 2] + .5 [2, 0] = [2, 2]
    # 2: gradient [.6, -.8] (.6 - 1.6 - 0);    W = [2, 2] + .35 [.6, -.8] = [2.21, 1.72]
    # 3: a new chunk looks back at nothing; gradient [1, 0] (2.21 - 0);
    #                                          W = [2.21 - .5 2.21, 1.72] = [1.105, 1.72]
    rule = Rule(algorithm=GradientDescent(step_bound=1.0), chunk_size=2)
    gate = {"lr": 0.5, "forget": 0.0}
    _, y = read(function, rule, ((1, 0), 3, gate), ((0.6, -0.8), 0, gate), ((1, 0), 0, gate))
    is_close(y, [4.0, 3.93, 2.825])


@both
def test_a_stronger_step_bound(function):
    # Strength 2: lr_2 = .5 (1 - 2 .5 .6) = .2, and W = [2, 2] + .2 [.6, -.8] = [2.12, 1.84], then [1.06, 1.84].
    # Strength 4: lr_2 = .5 max(0, 1 - 4 .5 .6) = 0, and W stays [2, 2], then [1, 2].
    gate = {"lr": 0.5, "forget": 0.0}
    for strength, expected in ((2.0, [4.0, 3.96, 2.9]), (4.0, [4.0, 4.0, 3.0])):
        rule = Rule(algorithm=GradientDescent(step_bound=strength), chunk_size=2)
        _, y = read(function, rule, ((1, 0), 3, gate), ((0.6, -0.8), 0, gate), ((1, 0), 0, gate))
        is_close(y, expected)


@both
def test_a_deep_memory(function):
    # M(x) = gelu(x w1) w2 with the exact gelu, g(1) = Phi(1) = .8413447460685429, g'(1) = Phi(1) + phi(1).
    # k = 1, w1 = 1, w2 = 2, v = 0: error e = 2 g(1);  gradients: w1: k g'(1) w2 e,  w2: g(1) e.
    rule = Rule(memory=MLP(depth=2, expansion=1, residual=False, norm=False), chunk_size=1)
    g, slope = 0.8413447460685429, 0.8413447460685429 + 0.24197072451914337
    state = init_state(rule, {"w1": row([1.0]), "w2": row([2.0])})
    gates = {"lr": row(0.1), "forget": row(0.25)}
    _, state = function(rule, state, row([1.0]), row([1.0]), row([0.0]), gates)
    is_close(state.A["w1"].item(), 0.75 * 1 - 0.1 * slope * 2 * 2 * g)
    is_close(state.A["w2"].item(), 0.75 * 2 - 0.1 * g * 2 * g)


def test_a_deep_memory_with_residual_and_norm():
    # Titans (NeurIPS version), depth 1: M(x) = x + LN(x W). x = [1, 0], x W = [3, 1]: mean 2, variance 1,
    # LN = [1, -1] / sqrt(1 + 1e-5), so M = [1 + r, -r] with r = 1 / sqrt(1.00001).
    memory, r = MLP(depth=1), 1.00001**-0.5
    W = torch.tensor([[3.0, 1.0], [5.0, 7.0]], dtype=torch.float64)
    y = memory.apply(
        torch.tensor([1.0, 0.0], dtype=torch.float64),
        Weights(linear=lambda name, x: x @ W, scale=lambda name, x: x),
    )
    is_close(y.tolist(), [1 + r, -r])


# Limits. B rows, H heads, T tokens.

B, H, T, DK, DV = 2, 2, 23, 5, 3


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rand(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Stream:
    def __init__(self, dv=DV, seed=0):
        self.q, self.v = randn(seed, B, H, T, DK), randn(seed + 1, B, H, T, dv)
        self.k = F.normalize(randn(seed + 2, B, H, T, DK), dim=-1)
        self.lr, self.forget = rand(seed + 3, B, H, T), rand(seed + 4, B, H, T) * 0.5
        self.momentum = rand(seed + 5, B, H, T)
        self.W = randn(seed + 6, B, H, DK, dv)

    def through(self, function, rule, **gates):
        y, state = function(rule, init_state(rule, {"w": self.W}), self.q, self.k, self.v, gates)
        return y, state.A["w"]


def same(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@both
def test_deltanet(function):
    # Yang et al. 2024 (Titans, appendix C), in columns: S_t = S_{t-1} - b_t (S_{t-1} k_t - v_t) k_t^T.
    s = Stream()
    for b in range(B):
        for h in range(H):
            S, reads = s.W[b, h].mT, []
            for q, k, v, beta in zip(s.q[b, h], s.k[b, h], s.v[b, h], s.lr[b, h], strict=True):
                S = S - beta * torch.outer(S @ k - v, k)
                reads.append(S @ q)
            y, W = s.through(function, Rule(chunk_size=1), lr=s.lr, forget=torch.zeros_like(s.lr))
            same(y[b, h], torch.stack(reads))
            same(W[b, h].mT, S)


@both
def test_gated_deltanet(function):
    # Yang et al. 2025: S_t = S_{t-1} a_t (I - b_t k_t k_t^T) + b_t v_t k_t^T.
    s = Stream()
    rule = Rule(retention=Decay(decayed=True), chunk_size=1)
    y, W = s.through(function, rule, lr=s.lr, forget=s.forget)
    for b in range(B):
        for h in range(H):
            S, reads = s.W[b, h].mT, []
            for t in range(T):
                k, beta, alpha = s.k[b, h, t], s.lr[b, h, t], 1 - s.forget[b, h, t]
                S = S @ (alpha * (torch.eye(DK, dtype=torch.float64) - beta * torch.outer(k, k)))
                S = S + beta * torch.outer(s.v[b, h, t], k)
                reads.append(S @ s.q[b, h, t])
            same(y[b, h], torch.stack(reads))
            same(W[b, h].mT, S)


@both
@pytest.mark.parametrize("chunk_size", [1, 4, 16])
def test_retnet(function, chunk_size):
    # Sun et al. 2023, the parallel form: (Q K^T * D) V with D[n, m] = gamma^(n - m) for m <= n. The gradient
    # of the dot bias holds no memory, so the chunk does not matter.
    s, gamma = Stream(), 1 - 0.15
    s.W = torch.zeros_like(s.W)
    steps = torch.arange(T)[:, None] - torch.arange(T)
    D = torch.where(steps >= 0, gamma ** steps.clamp_min(0).double(), 0.0)
    one = torch.ones_like(s.lr)
    y, _ = s.through(function, Rule(bias=Dot(), chunk_size=chunk_size), lr=one, forget=one * 0.15)
    same(y, (s.q @ s.k.mT * D) @ s.v)


@both
@pytest.mark.parametrize("chunk_size", [1, 4, 16])
@pytest.mark.parametrize("bias", [L2(), Dot()], ids=repr)
def test_momentum_0_is_no_momentum(function, bias, chunk_size):
    s = Stream()
    plain = Rule(bias=bias, chunk_size=chunk_size)
    heavy = Rule(bias=bias, algorithm=GradientDescent(momentum=True), chunk_size=chunk_size)
    gates = {"lr": s.lr * 0.2, "forget": s.forget}
    found = s.through(function, heavy, **gates, momentum=torch.zeros_like(s.lr))
    same(found, s.through(function, plain, **gates))


@both
@pytest.mark.parametrize("chunk_size", [1, 4, 16])
def test_an_mlp_of_depth_1_is_a_matrix(function, chunk_size):
    s = Stream()
    gates = {"lr": s.lr * 0.2, "forget": s.forget, "momentum": s.momentum}
    rules = [
        Rule(memory=memory, algorithm=GradientDescent(momentum=True, step_bound=1.0), chunk_size=chunk_size)
        for memory in (Matrix(), MLP(depth=1, residual=False, norm=False))
    ]
    results = []
    for rule, name in zip(rules, ("w", "w1"), strict=True):
        y, state = function(rule, init_state(rule, {name: s.W}), s.q, s.k, s.v, gates)
        results.append((y, state.A[name], state.S[name], state.anchor[name]))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*results, strict=True))


@both
@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_titans_as_a_loop_over_whole_networks(function, chunk_size):
    # Titans eq. 13 and 14 with the paper's two-layer memory, differentiated by torch one head at a time.
    memory = MLP(depth=2, expansion=2)
    rule = Rule(memory=memory, algorithm=GradientDescent(momentum=True), chunk_size=chunk_size)
    s = Stream(dv=DK)
    A0 = {n: randn(20 + i, B, H, *x) / 2 for i, (n, x) in enumerate(memory.shapes(DK, DK).items())}
    lr = s.lr * 0.1
    y, state = function(
        rule, init_state(rule, A0), s.q, s.k, s.v, {"lr": lr, "momentum": s.momentum, "forget": s.forget}
    )

    def network(x, first, second):
        return x + F.layer_norm(F.gelu(x @ first) @ second, (DK,))

    for b in range(B):
        for h in range(H):
            W = [a[b, h] for a in A0.values()]
            S = [torch.zeros_like(w) for w in W]
            for t in range(T):
                if t % chunk_size == 0:
                    anchor = [w.clone().requires_grad_() for w in W]
                loss = (network(s.k[b, h, t], *anchor) - s.v[b, h, t]).square().sum() / 2
                grads = torch.autograd.grad(loss, anchor)
                S = [s.momentum[b, h, t] * x - lr[b, h, t] * g for x, g in zip(S, grads, strict=True)]
                W = [(1 - s.forget[b, h, t]) * w + x for w, x in zip(W, S, strict=True)]
                same(y[b, h, t], network(s.q[b, h, t], *W), 1e-11)
            for w, x, n in zip(W, S, A0, strict=True):
                same(state.A[n][b, h], w, 1e-11)
                same(state.S[n][b, h], x, 1e-11)


@both
def test_a_bounded_chunk_of_one_pair_is_the_delta_rule(function):
    # A unit key and its value, over and over: read at the key, the chunked rule goes the way of the unchunked
    # one, r_t = prod (1 - lr_j) r_0, though all its gradients are taken at one point.
    s = Stream()
    s.k, s.v = s.k[:, :, :1].expand_as(s.k), s.v[:, :, :1].expand_as(s.v)
    s.q = s.k
    gates = {"lr": s.lr, "forget": torch.zeros_like(s.lr)}
    bounded = Rule(algorithm=GradientDescent(step_bound=1.0), chunk_size=T + 5)
    found = s.through(function, bounded, **gates)
    same(found, s.through(function, Rule(chunk_size=1), **gates))
    left = (1 - s.lr).cumprod(-1)[..., None]
    same(found[0] - s.v, left * ((s.k @ s.W) - s.v))
    unbounded = s.through(function, Rule(chunk_size=T + 5), **gates)
    assert (unbounded[0] - s.v).abs().max() > 2 * (found[0] - s.v).abs().max()


@both
def test_the_step_bound_does_nothing_to_orthogonal_keys(function):
    s = Stream()
    order = torch.arange(T) % DK
    s.k = torch.eye(DK, dtype=torch.float64)[order].expand(B, H, T, DK)
    gates = {"lr": s.lr, "forget": s.forget}
    bounded = Rule(algorithm=GradientDescent(step_bound=1.0), chunk_size=DK)
    same(s.through(function, bounded, **gates), s.through(function, Rule(chunk_size=DK), **gates), 0.0)
