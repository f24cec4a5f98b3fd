"""Retention gates: their formulas in high precision, the objectives they minimise, their limits and their edges.

Equations are those of MIRAS (arXiv 2504.13173). The high-precision oracles are written with mpmath, entry by entry.
"""

import re
from types import SimpleNamespace

import mpmath
import pytest
import torch
from mpmath import mp, mpf
from torch.nn.functional import softplus

from miras.core.memory import MLP, Matrix, Vector
from miras.core.retention import (
    RETENTIONS,
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

AXES = {"input": -2, "output": -1, "all": (-2, -1)}


def double_sigmoid(x):
    return 2 * x.sigmoid()


def pade(x):
    """f'(tau) = tau - 1 / tau, half the sum of a chi-square and a reverse KL: g grows linearly."""
    return (x + (x.square() + 4).sqrt()) / 2


GENERATORS = (torch.exp, softplus, double_sigmoid, pade)
LINKS = (
    Decay(),
    ElasticNet(0.3),
    ElasticNet(0.3, smooth=True),
    *(LqNorm(q, literal) for q in (1.5, 2.0, 2.5, 3.0, 4.0, 5.0) for literal in (False, True)),
    *(Simplex(axis) for axis in AXES),
    Simplex("output", scale=3.0),
    FDivergence(),
    Bregman(torch.tanh),
    Sigmoid(),
)
ADVANCES = (
    Keep(),
    Decay(),
    ProximalElasticNet(0.3),
    *(FDivergence(g, axis) for g in GENERATORS for axis in AXES),
)


def name(retention):
    """The same in every process: the repr of a function holds an address."""
    fields = (getattr(value, "__name__", str(value)) for value in vars(retention).values())
    return f"{type(retention).__name__}({','.join(fields)})"


def randn(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def precise(matrix):
    """A (d_in, d_out) tensor as rows of mpmath numbers."""
    mp.dps = 50
    return [[mpf(x) for x in row] for row in matrix.tolist()]


def plain(rows):
    return torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64)


def columns(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def test_every_choice_is_listed():
    names = "Keep Decay ElasticNet ProximalElasticNet LqNorm Simplex FDivergence Bregman Sigmoid"
    assert " ".join(r.__name__ for r in RETENTIONS) == names


@pytest.mark.parametrize(
    ("retention", "gates", "linear", "direct", "along"),
    [
        (Keep(), (), True, True, None),
        (Decay(), ("forget",), True, True, None),
        (Decay(decayed=True), ("forget",), True, True, None),
        (ElasticNet(0.1), ("forget",), True, False, None),
        (ElasticNet(0.0, smooth=True), ("forget",), True, True, None),
        (ProximalElasticNet(0.1), ("forget",), False, True, None),
        (ProximalElasticNet(0), ("forget",), True, True, None),
        (LqNorm(), ("forget",), True, False, None),
        (LqNorm(2), ("forget",), True, True, None),
        (Simplex(), ("forget",), True, False, "input"),
        (Simplex("all"), ("forget",), True, False, "all"),
        (FDivergence(), (), False, False, None),
        (Bregman(torch.tanh), ("forget",), True, False, None),
        (Sigmoid(), ("forget",), True, False, None),
    ],
)
def test_what_a_retention_says_of_itself(retention, gates, linear, direct, along):
    assert (retention.gates, retention.linear, retention.direct, retention.along) == (
        gates,
        linear,
        direct,
        along,
    )
    A, step = randn(0, 2, 3, 4), randn(1, 2, 3, 4)
    assert torch.equal(retention.link(A), A) == direct
    assert torch.equal(retention.advance(A, 0.7, step), 0.7 * A + step) == linear
    assert retention.decayed == (retention == Decay(decayed=True))
    assert hash(retention) == hash(retention) and retention == type(retention)(**vars(retention))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ElasticNet(-0.1), "ElasticNet: gamma must be a number of at least 0, got -0.1"),
        (lambda: ElasticNet(True), "ElasticNet: gamma must be a finite number, got True"),
        (
            lambda: ProximalElasticNet(float("nan")),
            "ProximalElasticNet: gamma must be a finite number, got nan",
        ),
        (lambda: LqNorm(1), "LqNorm: q must be a number above 1, got 1"),
        (lambda: LqNorm(float("inf")), "LqNorm: q must be a finite number, got inf"),
        (lambda: Simplex("rows"), "Simplex: axis must be one of 'input', 'output', 'all', got 'rows'"),
        (lambda: Simplex(scale=0), "Simplex: scale must be a positive number or None, got 0"),
        (lambda: FDivergence(axis=0), "FDivergence: axis must be one of 'input', 'output', 'all', got 0"),
        (lambda: FDivergence(iterations=0), "FDivergence: iterations must be an integer of at least 1"),
        (lambda: FDivergence(inverse=1), "FDivergence: inverse must be a function of a tensor"),
        (lambda: Bregman("exp"), "Bregman: inverse must be a function of a tensor"),
        # Not positive; decreasing; never above 1; never below 1; undefined on the left.
        *(
            (
                lambda g=g: FDivergence(g),
                "FDivergence: inverse must be positive and increasing on the whole line",
            )
            for g in (
                lambda x: 1 + x / 2,
                lambda x: (-x).exp(),
                torch.sigmoid,
                lambda x: 1 + x.sigmoid(),
                torch.sqrt,
            )
        ),
    ],
)
def test_fields_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make()


@pytest.mark.parametrize("kind", [Simplex, FDivergence])
@pytest.mark.parametrize(
    ("memory", "refused"),
    [
        (Matrix(), ()),
        (MLP(), ()),
        (Vector(), ("input", "output")),
        (MLP(bias=True), ("input",)),  # b (1, width): one entry along the inputs
    ],
)
def test_a_simplex_needs_entries_to_share_it(kind, memory, refused):
    rule = SimpleNamespace(memory=memory)
    assert tuple(axis for axis in AXES if kind(axis=axis).refusal(rule)) == refused
    assert all('axis="all"' in kind(axis=axis).refusal(rule) for axis in refused)
    assert all(r.refusal(rule) is None for r in (Keep(), Decay(), LqNorm(), ElasticNet(1.0), Sigmoid()))


def test_soft_threshold():
    # eq. 23, S_gamma(z) = sign(z) max(0, |z| - gamma), gamma = .5
    A = torch.tensor([[1.25, -0.75, 0.25], [-0.5, 0.0, 0.5]])
    expected = torch.tensor([[0.75, -0.25, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(ElasticNet(0.5).link(A), expected)
    # eq. 22, W = S_gamma(keep W + step): S_.5(.5 [2.5, -1.5, .5] + [0, 0, 0]), and with a step of 1
    W = torch.tensor([[2.5, -1.5, 0.5], [-1.0, 0.0, 1.0]])
    assert torch.equal(ProximalElasticNet(0.5).advance(W, 0.5, torch.zeros(2, 3)), expected)
    moved = torch.tensor([[1.75, 0.0, 0.75], [0.0, 0.5, 1.0]])  # S_.5([2.25, .25, 1.25], [.5, 1, 1.5])
    assert torch.equal(ProximalElasticNet(0.5).advance(W, torch.tensor(0.5), torch.ones(2, 3)), moved)


def test_smooth_threshold():
    # eq. 22, remark: |z| arctan(z / gamma) / (pi / 2); at z = gamma half of it, far out z - 2 gamma / pi
    A, net = randn(0, 3, 4), ElasticNet(0.3, smooth=True)
    expected = [[abs(x) * mpmath.atan(x / mpf(0.3)) / (mp.pi / 2) for x in row] for row in precise(A)]
    close(net.link(A), plain(expected), 1e-15)
    far = torch.tensor([[0.3, -1e6]], dtype=torch.float64)
    close(net.link(far), torch.tensor([[0.15, -1e6 + 0.6 / torch.pi]], dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("q", [1.5, 2.5, 3.0, 4.0, 5.0])
@pytest.mark.parametrize("literal", [False, True])
def test_lq_norm(q, literal):
    # eq. 24, W = A / ||A||_q^(q-2); mirror with the factor |A|^(q-2) in front
    A = randn(1, 2, 3, 4)
    W = LqNorm(q, literal).link(A)
    for a, w in zip(A, W, strict=True):
        rows = precise(a)
        norm = sum(abs(x) ** q for row in rows for x in row) ** (1 / mpf(q))
        expected = [
            [x * (1 if literal else abs(x) ** (q - 2)) / norm ** (q - 2) for x in row] for row in rows
        ]
        # What holds it away from 0: 1e-6 beside |A|^2 in a norm of about 2; 1e-12 beside each A^2.
        close(w, plain(expected), 1e-5 if literal else 1e-9)


@pytest.mark.parametrize(("axis", "count"), [("input", 3), ("output", 4), ("all", 12)])
@pytest.mark.parametrize("kind", [Simplex, FDivergence])
def test_softmax(kind, axis, count):
    # eq. 27 with the scale c of eq. 21: W = c exp(A) / sum exp(A)
    A = randn(2, 3, 4)
    for scale, c in ((None, mpmath.sqrt(count)), (2.5, mpf(2.5))):
        rows = [[mpmath.exp(x) for x in row] for row in precise(A)]
        if axis == "input":
            expected = columns([[c * x / sum(column) for x in column] for column in columns(rows)])
        elif axis == "output":
            expected = [[c * x / sum(row) for x in row] for row in rows]
        else:
            total = sum(sum(row) for row in rows)
            expected = [[c * x / total for x in row] for row in rows]
        close(kind(axis=axis, scale=scale).link(A), plain(expected), 1e-15)


def test_kl_step():
    # eq. 21: W_t = c softmax((1 - lambda) log W_{t-1} - eta' grad), the log-domain accumulator over three tokens.
    retention, A = Simplex("output"), randn(3, 2, 4)
    W = precise(retention.link(A))
    c = mpmath.sqrt(4)
    for t in range(3):
        keep, step = 0.9 - 0.2 * t, randn(4 + t, 2, 4)
        A = retention.advance(A, keep, step)
        logits = [
            [mpf(keep) * mpmath.log(w) + s for w, s in zip(*rows, strict=True)]
            for rows in zip(W, precise(step), strict=True)
        ]
        W = [[c * mpmath.exp(x) / sum(map(mpmath.exp, row)) for x in row] for row in logits]
    close(retention.link(A), plain(W), 1e-14)


@pytest.mark.parametrize(
    ("inverse", "g"),
    [
        (torch.exp, mpmath.exp),
        (softplus, lambda x: mpmath.log1p(mpmath.exp(x))),
        (double_sigmoid, lambda x: 2 / (1 + mpmath.exp(-x))),
        (pade, lambda x: (x + mpmath.sqrt(x * x + 4)) / 2),
    ],
    ids=["exp", "softplus", "sigmoid", "pade"],
)
def test_f_divergence_step(inverse, g):
    # eq. 18: W_t = W_{t-1} g(step - zeta) with ||W_t||_1 = c, zeta found anew at 50 digits.
    retention = FDivergence(inverse, "input", scale=1.5)
    A, step = randn(5, 3, 2), 2 * randn(6, 3, 2)
    W, steps = columns(precise(retention.link(A))), columns(precise(step))
    expected = []
    for w, s in zip(W, steps, strict=True):
        excess = lambda z, w=w, s=s: sum(a * g(b - z) for a, b in zip(w, s, strict=True)) - 1.5  # noqa: E731
        zeta = mpmath.findroot(excess, (min(s) - 2, max(s) + 2), solver="anderson")
        expected.append([a * g(b - zeta) for a, b in zip(w, s, strict=True)])
    after = retention.advance(A, 1.0, step)
    close(retention.link(after), plain(columns(expected)), 1e-13)
    close(1.5 * after.exp(), plain(columns(expected)), 1e-13)  # A is log(W / c)


def test_bregman():
    # W = g(F'(W') + step): F' = atanh by hand, sigmoid against sigmoid(ln(W' / (1 - W')) + step)
    W, step = 0.9 * torch.rand(3, 4, generator=torch.Generator().manual_seed(7)).double(), randn(8, 3, 4)
    close(Bregman(torch.tanh).link(W.atanh() + step), (W.atanh() + step).tanh(), 0)
    A = Sigmoid().advance(W.logit(), 1.0, step)
    expected = [
        [1 / (1 + mpmath.exp(-(mpmath.log(w / (1 - w)) + s))) for w, s in zip(*rows, strict=True)]
        for rows in zip(precise(W), precise(step), strict=True)
    ]
    close(Sigmoid().link(A), plain(expected), 1e-15)
    assert torch.equal(Sigmoid().link(A), Bregman(torch.sigmoid).link(A))
    for t in range(20):
        A = Sigmoid().advance(A, 1.0, randn(t, 3, 4))
        assert ((Sigmoid().link(A) > 0) & (Sigmoid().link(A) < 1)).all()


def is_minimum(objective, W, moves):
    """No move of W, long or short, makes the objective smaller."""
    for i, move in enumerate(moves):
        for size in (1e-1, 1e-3, 1e-5):
            assert objective(W + size * move) >= objective(W) - 1e-13, (i, size)


def moves(W, dims=None):
    """Random directions and single entries; within dims their sum is kept."""
    free = [randn(100 + i, *W.shape) for i in range(50)]
    free += [s * e.view(W.shape) for e in torch.eye(W.numel(), dtype=W.dtype) for s in (1, -1)]
    return free if dims is None else [d - d.mean(dims, keepdim=True) for d in free]


def test_elastic_net_minimises():
    A, gamma = randn(10, 4, 5), 0.6
    W = ElasticNet(gamma).link(A)
    assert (W == 0).any() and (W != 0).any()
    is_minimum(lambda w: (-A * w + w.square() / 2 + gamma * w.abs()).sum(), W, moves(W))


def test_proximal_elastic_net_minimises():
    before, step, keep, gamma = randn(11, 4, 5), randn(12, 4, 5), 0.8, 0.6
    W = ProximalElasticNet(gamma).advance(before, keep, step)
    assert (W == 0).any() and (W != 0).any()

    def objective(w):
        local, far = (w - before).square() / 2, w.square() / 2
        return (-step * w + keep * local + (1 - keep) * far + gamma * w.abs()).sum()

    is_minimum(objective, W, moves(W))


@pytest.mark.parametrize("q", [1.5, 2.0, 3.0, 4.0])
def test_the_mirror_map_minimises(q):
    A, r = randn(13, 4, 5), q / (q - 1)
    W = LqNorm(q).link(A)
    is_minimum(lambda w: (-A * w).sum() + w.abs().pow(r).sum() ** (2 / r) / 2, W, moves(W))
    # The norms of a pair of dual vectors are equal, and <A, W> is their product.
    close(W.abs().pow(r).sum() ** (1 / r), A.abs().pow(q).sum() ** (1 / q), 1e-9)


@pytest.mark.parametrize("axis", AXES)
def test_kl_minimises_with_forgetting(axis):
    retention, keep = Simplex(axis, scale=2.0), 0.7
    A, step = randn(14, 4, 5), randn(15, 4, 5)
    before, W = retention.link(A), retention.link(retention.advance(A, keep, step))

    def objective(w):
        w = w.clamp_min(0)
        far, local = torch.xlogy(w, w), torch.xlogy(w, w / before)
        return (-step * w + keep * local + (1 - keep) * far).sum()

    is_minimum(objective, W, [W.min() * d for d in moves(W, AXES[axis])])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    ("inverse", "f"),
    [
        (torch.exp, lambda t: t * t.log() - t),
        (pade, lambda t: t.square() / 2 - t.log()),
        # g = 2 sigmoid: f' = ln(t / (2 - t))
        (double_sigmoid, lambda t: t * t.log() + (2 - t) * (2 - t).log()),
    ],
    ids=["exp", "pade", "sigmoid"],
)
def test_an_f_divergence_step_minimises(inverse, f, axis):
    retention = FDivergence(inverse, axis, scale=2.0)
    A, step = randn(16, 4, 5), randn(17, 4, 5) / 2
    before, W = retention.link(A), retention.link(retention.advance(A, 1.0, step))
    close(W.sum(AXES[axis]), torch.full_like(W.sum(AXES[axis]), 2.0))
    objective = lambda w: (-step * w + before * f(w / before)).sum()  # noqa: E731
    # Stay inside the domain: every entry and its ratio to the one before.
    room = torch.minimum(W, 2 * before - W if inverse is double_sigmoid else W).min()
    is_minimum(objective, W, [room * d for d in moves(W, AXES[axis])])
    w = W.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(w), w)  # stationary: one multiplier per slice
    close(slope - slope.mean(AXES[axis], keepdim=True), torch.zeros_like(slope))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limits_are_decay(dtype):
    A, step = randn(20, 2, 3, 4, dtype=dtype), randn(21, 2, 3, 4, dtype=dtype)
    A[0, 1, 2] = 0
    for identity in (LqNorm(2), LqNorm(2, literal=True), ElasticNet(0), ElasticNet(0, smooth=True)):
        assert identity.link(A) is A
    assert torch.equal(ProximalElasticNet(0).advance(A, 0.3, step), Decay().advance(A, 0.3, step))
    assert torch.equal(Keep().advance(A, 1.0, step), Decay().advance(A, 1.0, step))


def test_q_near_2_is_near_the_identity():
    A = randn(22, 3, 4)
    for literal in (False, True):
        for q in (2 - 1e-9, 2 + 1e-9):
            close(LqNorm(q, literal).link(A), A, 1e-7)


def test_degrees():
    # 9.7: the mirror map has degree 1, the literal one 3 - q: forgetting half at q = 4 doubles the weights.
    A = randn(23, 3, 4)
    for q in (1.5, 3.0, 4.0):
        close(LqNorm(q).link(A / 2), LqNorm(q).link(A) / 2, 1e-9)
        close(LqNorm(q, literal=True).link(A / 2), LqNorm(q, literal=True).link(A) / 2 ** (3 - q), 1e-4)


def test_heads_do_not_meet():
    A, step = randn(24, 2, 3, 4, 5), randn(25, 2, 3, 4, 5)
    for retention in (*LINKS, *ADVANCES):
        whole = retention.link(retention.advance(A, 0.9, step))
        for b in range(2):
            for h in range(3):
                close(whole[b, h], retention.link(retention.advance(A[b, h], 0.9, step[b, h])), 1e-14)


@pytest.mark.parametrize("kind", [Simplex, FDivergence])
@pytest.mark.parametrize("axis", AXES)
def test_a_constant_per_slice_changes_nothing(kind, axis):
    retention, A, step = kind(axis=axis), randn(26, 2, 3, 4), randn(27, 2, 3, 4)
    shift = randn(28, 2, 3, 4).mean(AXES[axis], keepdim=True)
    expected = retention.link(retention.advance(A, 0.8, step))
    close(retention.link(retention.advance(A + 50 * shift, 0.8, step)), expected)
    close(retention.link(retention.advance(A, 0.8, step + 50 * shift)), expected)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_kl_divergence_is_the_simplex_without_forgetting(axis, dtype, tolerance):
    simplex, divergence = Simplex(axis), FDivergence(torch.exp, axis)
    a = b = randn(29, 2, 3, 4, dtype=dtype).requires_grad_()
    steps = [3 * randn(30 + t, 2, 3, 4, dtype=dtype) for t in range(6)]
    for step in steps:
        a, b = simplex.advance(a, 1.0, step.requires_grad_()), divergence.advance(b, 1.0, step)
        close(divergence.link(b), simplex.link(a), tolerance)
        a.retain_grad()
    weight = randn(40, 2, 3, 4, dtype=dtype)
    expected = torch.autograd.grad((weight * simplex.link(a)).sum(), steps)
    found = torch.autograd.grad((weight * divergence.link(b)).sum(), steps)
    for x, y in zip(found, expected, strict=True):
        close(x, y, 10 * tolerance)


def test_fewer_iterations_are_less_exact():
    A, step = randn(41, 3, 4), 3 * randn(42, 3, 4)
    exact = FDivergence(pade).advance(A, 1.0, step)
    errors = [
        (FDivergence(pade, iterations=n).advance(A, 1.0, step) - exact).abs().max().item()
        for n in (3, 12, 40)
    ]
    assert errors[0] > 1e-3 > errors[1] > 1e-5 and errors[2] < 1e-10


@pytest.mark.parametrize("retention", LINKS, ids=name)
def test_derivatives_of_links(retention):
    A = randn(50, 2, 3, 4)
    assert torch.autograd.gradcheck(retention.link, A.requires_grad_())
    assert torch.autograd.gradgradcheck(retention.link, A)


@pytest.mark.parametrize("retention", ADVANCES, ids=name)
def test_derivatives_of_advances(retention):
    A, step, keep = randn(51, 2, 3), 2 * randn(52, 2, 3), torch.tensor(0.8, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (A, step)]
    assert torch.autograd.gradcheck(lambda a, s: retention.advance(a, keep, s), leaves)
    assert torch.autograd.gradgradcheck(lambda a, s: retention.advance(a, keep, s), leaves)


def test_a_divergence_step_differentiates_one_of_its_inputs():
    A, step = randn(53, 2, 3).requires_grad_(), randn(54, 2, 3).requires_grad_()
    retention = FDivergence(softplus, "all")
    both = torch.autograd.grad(retention.advance(A, 1.0, step).square().sum(), (A, step))
    alone = (
        torch.autograd.grad(retention.advance(A, 1.0, step.detach()).square().sum(), A)[0],
        torch.autograd.grad(retention.advance(A.detach(), 1.0, step).square().sum(), step)[0],
    )
    assert all(map(torch.equal, both, alone))
    with torch.no_grad():
        after = retention.advance(A, 1.0, step)
    assert not after.requires_grad and torch.equal(after, retention.advance(A, 1.0, step))


def edges(dtype=torch.float32):
    """Accumulators at 0, large, tiny, mixed, with rows of zeros and with ties."""
    A = randn(60, 4, 5, dtype=dtype)
    mixed = 10.0 ** torch.linspace(-20, 4, 20, dtype=dtype).view(4, 5) * A.sign()
    holes = A * (torch.arange(5) % 2)
    alone = torch.zeros(4, 5, dtype=dtype)
    alone[1, 2] = 1e4
    return {
        "zero": torch.zeros(4, 5, dtype=dtype),
        "large": 1e4 * A,
        "tiny": 1e-20 * A,
        "mixed": mixed,
        "holes": holes,
        "large holes": 1e4 * holes,
        "alone": alone,
        "equal": torch.ones(4, 5, dtype=dtype),
        "at the threshold": torch.full((4, 5), 0.3, dtype=dtype),
    }


def finite_twice(function, *leaves):
    leaves = [x.clone().requires_grad_() for x in leaves]
    y = function(*leaves)
    draw = lambda seed, x: randn(seed, *x.shape, dtype=torch.float32).to(x.dtype)  # noqa: E731
    first = torch.autograd.grad((draw(61, y) * y).sum(), leaves, create_graph=True)
    total = sum((draw(62, g) * g).sum() for g in first)
    second = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else ()
    for x in (y, *first, *second):
        assert x is None or x.isfinite().all()
    return y, first


@pytest.mark.parametrize("edge", edges())
@pytest.mark.parametrize("retention", LINKS, ids=name)
def test_links_are_finite_at_the_edges(retention, edge):
    A = edges()[edge]
    W, (slope,) = finite_twice(retention.link, A)
    exact, (exact_slope,) = finite_twice(retention.link, A.double())
    # One rounding of A moves W and its slope by so much; at the threshold itself the slope jumps.
    torch.testing.assert_close(W.double(), exact, rtol=2e-5, atol=1e-6 * A.abs().max().item())
    if edge != "at the threshold":
        torch.testing.assert_close(slope.double(), exact_slope, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("edge", edges())
@pytest.mark.parametrize("retention", ADVANCES, ids=name)
def test_advances_are_finite_at_the_edges(retention, edge):
    for step in edges().values():
        A, _ = finite_twice(lambda a, s: retention.advance(a, 0.9, s), edges()[edge], step)
        finite_twice(retention.link, A.detach())


def test_slopes_at_zero():
    """What is said of the maps at A = 0: n^-(1 - 2/q), 1e6, and 0 inside the threshold."""
    A = torch.zeros(4, 4)
    slope = lambda r: torch.autograd.functional.jacobian(r.link, A).view(16, 16).diagonal()  # noqa: E731
    close(slope(LqNorm(4)), torch.full((16,), 16**-0.5), 1e-6)
    torch.testing.assert_close(slope(LqNorm(4, literal=True)), torch.full((16,), 1e6), rtol=1e-5, atol=0)
    close(slope(ElasticNet(0.0)), torch.ones(16), 0)
    close(slope(ElasticNet(0.1)), torch.zeros(16), 0)
    close(slope(ElasticNet(0.1, smooth=True)), torch.zeros(16), 0)
    near = torch.linspace(-5, 1, 1000).exp2().mul(1e-3)[:, None, None]
    assert 499 < LqNorm(4, literal=True).link(near).max() <= 500


def test_nothing_that_is_no_number_goes_unseen():
    A = torch.full((2, 2), torch.nan)
    for retention in (*LINKS, *ADVANCES):
        assert retention.link(retention.advance(A, 0.5, torch.ones(2, 2))).isnan().all(), retention
