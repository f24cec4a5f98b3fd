"""Every bias against its equation in 50 digits, at its kinks, and in the limits where it is another one.

Equations are those of MIRAS (arXiv 2504.13173). r = pred - target; the oracles type loss and gradient by hand.
"""

import math
from decimal import Decimal, localcontext

import pytest
import torch

from miras.core.bias import BIASES, L1, L2, Dot, Huber, LInf, Lp, Robust

EPS = Decimal("1e-6")
R = (0.25, -1.5, 2.0, -0.0625)
TARGET = (1.0, 2.0, -0.5, 4.0)
"""All are sums of a few powers of two, so that pred = target + r is exact. |R|_2 is about 2.513."""


def sgn(x):
    return Decimal((x > 0) - (x < 0))


def smooth(x):
    return (x * x + EPS).sqrt()


def norm(r):
    return sum(x * x for x in r).sqrt()


def half_square(r):
    return sum(x * x for x in r) / 2


def power(p):
    """Eq. 10 and 11 with the smooth |r|, and its derivative p r |r|_eps^(p-2)."""
    p = Decimal(p)
    return lambda r: (sum(smooth(x) ** p for x in r), [p * x * smooth(x) ** (p - 2) for x in r])


def clipped(p, c):
    """Eq. 10 up to |r_j| = c, its tangent beyond."""
    p, c = Decimal(p), Decimal(c)
    slope = p * c * smooth(c) ** (p - 2)
    term = lambda x: smooth(x) ** p if abs(x) <= c else smooth(c) ** p + slope * (abs(x) - c)  # noqa: E731
    grad = lambda x: p * x * smooth(x) ** (p - 2) if abs(x) <= c else sgn(x) * slope  # noqa: E731
    return lambda r: (sum(map(term, r)), [grad(x) for x in r])


def smooth_max(r, tau):
    weights = [(smooth(x) / tau).exp() for x in r]
    total = sum(weights)
    return tau * total.ln(), [w / total * x / smooth(x) for w, x in zip(weights, r, strict=True)]


def linf(tau):
    return lambda r: smooth_max(r, Decimal(tau))


def huber_norm(delta):
    """Eq. 15: H of the norm."""

    def oracle(r):
        d, n = Decimal(delta), norm(r)
        return (half_square(r), r) if n <= d else (d * (n - d / 2), [d * x / n for x in r])

    return oracle


def huber_coordinate(*deltas):
    """Eq. 13 and 14: the sum of H over coordinates."""

    def oracle(r):
        ds = [Decimal(d) for d in (deltas if len(deltas) > 1 else deltas * len(r))]
        pairs = list(zip(r, ds, strict=True))
        loss = sum(x * x / 2 if abs(x) <= d else d * (abs(x) - d / 2) for x, d in pairs)
        return loss, [x if abs(x) <= d else d * sgn(x) for x, d in pairs]

    return oracle


def huber_mixture(delta):
    """Eq. 16 and 26: l2 (half square) inside, delta times the smooth l1 outside."""

    def oracle(r):
        d = Decimal(delta)
        if norm(r) <= d:
            return half_square(r), r
        return d * sum(map(smooth, r)), [d * x / smooth(x) for x in r]

    return oracle


def robust_l2(radius):
    """Eq. 17 in its closed form, |r|_2 smooth."""

    def oracle(r):
        D, n = Decimal(radius), (2 * half_square(r) + EPS).sqrt()
        return half_square(r) + D * n + D * D / 2, [x + D * x / n for x in r]

    return oracle


def robust_linf(*radii):
    """The box: every coordinate's worst case by itself."""

    def oracle(r):
        Ds = [Decimal(D) for D in (radii if len(radii) > 1 else radii * len(r))]
        loss = half_square(r) + sum(D * smooth(x) + D * D / 2 for x, D in zip(r, Ds, strict=True))
        return loss, [x + D * x / smooth(x) for x, D in zip(r, Ds, strict=True)]

    return oracle


def robust_l1(radius, tau):
    """The l1 ball: all of the radius on the largest coordinate."""

    def oracle(r):
        D = Decimal(radius)
        largest, grad = smooth_max(r, Decimal(tau))
        return half_square(r) + D * largest + D * D / 2, [x + D * g for x, g in zip(r, grad, strict=True)]

    return oracle


GOLDEN = {
    "titans eq 12, halved": (L2(), {}, lambda r: (half_square(r), r)),
    "eq 12": (L1(), {}, power(1)),
    "eq 10-11, p=1": (Lp(1), {}, power(1)),
    "eq 10-11, p=1.5": (Lp(1.5), {}, power(1.5)),
    "eq 10-11, p=2": (Lp(2), {}, power(2)),
    "eq 10-11, p=3": (Lp(), {}, power(3)),
    "eq 10-11, p=3.2": (Lp(3.2), {}, power(3.2)),
    "eq 10-11 clipped, p=3": (Lp(3, clip=1.0), {}, clipped(3, 1)),
    "eq 10-11 clipped, p=1.5": (Lp(1.5, clip=0.125), {}, clipped(1.5, 0.125)),
    "l_inf": (LInf(), {}, linf(0.1)),
    "l_inf, tau=1": (LInf(tau=1.0), {}, linf(1)),
    "eq 15, inside": (Huber(delta=3.0), {}, huber_norm(3)),
    "eq 15, outside": (Huber(delta=1.25), {}, huber_norm(1.25)),
    "eq 15, gate": (Huber(), {"delta": 1.25}, huber_norm(1.25)),
    "eq 13-14": (Huber("coordinate", delta=1.25), {}, huber_coordinate(1.25)),
    "eq 13-14, gate": (Huber("coordinate"), {"delta": 1.25}, huber_coordinate(1.25)),
    "eq 13-14, gate per channel": (
        Huber("coordinate"),
        {"delta": (0.125, 1.0, 4.0, 0.0)},
        huber_coordinate(0.125, 1, 4, 0),
    ),
    "eq 16, inside": (Huber("mixture"), {"delta": 3.0}, huber_mixture(3)),
    "eq 16, outside": (Huber("mixture"), {"delta": 1.25}, huber_mixture(1.25)),
    "eq 16, fixed": (Huber("mixture", delta=1.25), {}, huber_mixture(1.25)),
    "eq 17": (Robust(), {"radius": 0.75}, robust_l2(0.75)),
    "eq 17, fixed": (Robust(radius=0.75), {}, robust_l2(0.75)),
    "box": (Robust("linf"), {"radius": 0.75}, robust_linf(0.75)),
    "box, gate per channel": (
        Robust("linf"),
        {"radius": (0.5, 0.0, 1.5, 3.0)},
        robust_linf(0.5, 0, 1.5, 3),
    ),
    "l1 ball": (Robust("l1"), {"radius": 0.75}, robust_l1(0.75, 0.1)),
}


def tensors(r, gates, dtype=torch.float64, target=TARGET):
    """pred, target (2, 3, d_value) and gates (2, 3) or (2, 3, d_value), all the same token."""
    spread = lambda x: torch.tensor(x, dtype=dtype).expand(2, 3, *torch.tensor(x).shape).clone()  # noqa: E731
    target = spread(tuple(target[: len(r)]))
    pred, gates = spread(tuple(r)) + target, {name: spread(gate) for name, gate in gates.items()}
    return tuple(x.requires_grad_() for x in (pred, target)), {
        n: g.requires_grad_() for n, g in gates.items()
    }


@pytest.mark.parametrize("name", GOLDEN)
def test_equation(name):
    bias, gates, oracle = GOLDEN[name]
    (pred, target), gates = tensors(R, gates)
    loss = bias.loss(pred, target, gates)
    assert loss.shape == pred.shape[:-1]
    by_pred, by_target = torch.autograd.grad(loss.sum(), (pred, target))
    with localcontext() as context:
        context.prec = 50
        expected, grad = oracle([Decimal(x) for x in R])
        expected, grad = float(expected), [float(x) for x in grad]
    assert loss.flatten().tolist() == pytest.approx([expected] * 6, rel=4e-15)
    for row in by_pred.reshape(6, -1).tolist():
        assert row == pytest.approx(grad, rel=4e-15)
    assert torch.equal(by_target, -by_pred)


def test_dot():
    # MIRAS 4.5: -<(1.25, .5, 1.5, 3.9375), (1, 2, -.5, 4)> = -(1.25 + 1 - .75 + 15.75), gradient -target.
    (pred, target), _ = tensors(R, {})
    loss = Dot().loss(pred, target, {})
    assert loss.flatten().tolist() == [-17.25] * 6
    (grad,) = torch.autograd.grad(loss.sum(), pred)
    assert torch.equal(grad, -target)


@pytest.mark.parametrize(("p", "a"), [(3.0, 20.0), (1.0, 20.0), (1.5, 5.0), (3.2, 100.0)])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_tanh_product(p, a, clip):
    # Remark 5: the derivative is p tanh(a r) |r|_eps^(p-1); the loss is its integral, here by Simpson's rule.
    slope = lambda s: p * math.tanh(a * s) * (s * s + 1e-6) ** ((p - 1) / 2)  # noqa: E731
    r = [0.0, 1e-3, -0.01, 0.1, -0.4, 1.0, -6.0]
    values, grads = [], []
    for x in r:
        top = abs(x) if clip is None else min(abs(x), clip)
        n = 20_000
        inner = sum((4 if i % 2 else 2) * slope(i * top / n) for i in range(1, n))
        values.append((inner + slope(top)) * top / (3 * n) + slope(top) * (abs(x) - top))
        grads.append(math.copysign(slope(top), x))
    pred = torch.tensor(r, dtype=torch.float64)[:, None].requires_grad_()
    loss = Lp(p, tanh=a, clip=clip).loss(pred, torch.zeros_like(pred), {})
    assert loss.tolist() == pytest.approx(values, rel=1e-6, abs=1e-13)
    (grad,) = torch.autograd.grad(loss.sum(), pred)
    assert grad.flatten().tolist() == pytest.approx(grads, rel=1e-14)


def test_the_tanh_product_has_exact_second_derivatives():
    r = torch.randn(5, dtype=torch.float64, requires_grad=True)
    first = lambda r: torch.autograd.grad(  # noqa: E731
        Lp(3, tanh=20).loss(r, torch.zeros_like(r), {}), r, create_graph=True
    )[0]
    assert torch.autograd.gradcheck(first, r)
    assert torch.autograd.gradgradcheck(first, r)


INSTANCES = [
    L2(),
    Dot(),
    L1(),
    Lp(1),
    Lp(1.5),
    Lp(2),
    Lp(3),
    Lp(3, clip=1.0),
    Lp(3, tanh=20.0),
    Lp(1, tanh=20.0, clip=1.0),
    LInf(),
    Huber(),
    Huber("coordinate"),
    Huber("mixture"),
    Huber(delta=1.0),
    Huber("coordinate", delta=1.0),
    Huber("mixture", delta=1.0),
    Robust(),
    Robust("l1"),
    Robust("linf"),
    Robust(radius=1.0),
]
each = pytest.mark.parametrize("bias", INSTANCES, ids=repr)


def test_every_bias_is_among_the_instances():
    assert {type(b) for b in INSTANCES} == set(BIASES)


def derivatives(bias, pred, target, gates, order=2):
    """The loss and all derivatives up to an order, those of one order summed before the next is taken."""
    inputs = [pred, target, *gates.values()]
    found = [bias.loss(pred, target, gates)]
    for _ in range(order):
        total = sum(x.sum() for x in found[-len(inputs) :])
        if not total.requires_grad:
            break
        found += torch.autograd.grad(
            total, inputs, create_graph=True, allow_unused=True, materialize_grads=True
        )
    return found


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gate", [0.0, 1e-25, 1e-6, 1.0, 1e6])
def test_finite_at_every_kink(bias, gate, dtype):
    points = [
        (0.0, 0.0, 0.0),
        (1.0, 0.0, 0.0),  # |r| is the threshold, the radius and the clip
        (-1.0, 1.0, -1.0),
        (1e-30, 0.0, 0.0),
        (1e-21, 1e-22, 0.0),  # the square is a denormal number of fp32
        (1e-13, -1e-13, 0.0),
        (1e-6, 0.0, 0.0),
        (1e3, -1e3, 0.5),
    ]
    for r in points:
        (pred, target), gates = tensors(r, dict.fromkeys(bias.gates, gate), dtype, (0.0, 0.0, 0.0))
        for x in derivatives(bias, pred, target, gates):
            assert x.isfinite().all(), (r, x)
    (pred, target), gates = tensors((0.0, 0.0), dict.fromkeys(bias.gates, gate), dtype, (0.0, 0.0))
    for x in derivatives(bias, pred, target, gates, order=4):
        assert x.isfinite().all(), x


@pytest.mark.parametrize("bias", [b for b in INSTANCES if b.channelwise], ids=repr)
def test_finite_where_a_channel_has_threshold_0(bias):
    (pred, target), gates = tensors((0.0, 1.0, -1.0, 0.0), {n: (0.0, 0.0, 1.0, 1.0) for n in bias.gates})
    assert all(x.isfinite().all() for x in derivatives(bias, pred, target, gates))


@pytest.mark.parametrize("kind", ["norm", "coordinate", "mixture"])
@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_huber_is_l2_around_0_up_to_its_curvature(kind, delta):
    zero = torch.zeros(4, dtype=torch.float64)
    gates = {"delta": torch.tensor(delta, dtype=torch.float64)}
    loss = lambda r: Huber(kind).loss(r, zero, gates)  # noqa: E731
    assert torch.equal(torch.autograd.functional.hessian(loss, zero), torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["norm", "coordinate"])
def test_huber_is_smooth_across_its_threshold(kind):
    # Eq. 13 to 15: value and gradient by r and by delta meet at |r| = delta.
    def at(r):
        (pred, target), gates = tensors((r, 0.0), {"delta": 1.0}, target=(0.0, 0.0))
        return derivatives(Huber(kind), pred, target, gates, order=1)

    for inside, outside in zip(at(1 - 1e-9), at(1 + 1e-9), strict=True):
        torch.testing.assert_close(inside, outside, rtol=0, atol=4e-9)


def test_the_mixture_jumps_by_the_root_of_the_width():
    # Yaad as printed: gradient norm delta inside, delta sqrt(d) outside (the eps moves it by 1e-6 of that).
    def size(scale):
        r = torch.full((16,), scale / 4, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(Huber("mixture", delta=1.0).loss(r, torch.zeros_like(r), {}), r)
        return grad.norm().item()

    assert size(1.0) == 1.0
    assert size(1 + 1e-12) == pytest.approx(4.0, rel=1e-4)


def same(one, other, factor=1.0, constant=0.0, gates_one=None, gates_other=None):
    """Loss, first and second derivatives of random tokens agree."""
    generator = torch.Generator().manual_seed(0)
    pred, target = torch.randn(2, 7, 5, dtype=torch.float64, generator=generator)
    pred.requires_grad_()
    losses = [
        one.loss(pred, target, gates_one or {}),
        factor * other.loss(pred, target, gates_other or {}) + constant,
    ]
    firsts = [torch.autograd.grad(x.sum(), pred, create_graph=True)[0] for x in losses]
    seconds = [torch.autograd.grad(x.square().sum(), pred)[0] for x in firsts]
    for pair in (losses, firsts, seconds):
        torch.testing.assert_close(*pair, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["norm", "coordinate", "mixture"])
@pytest.mark.parametrize("shape", [(7,), (7, 5)])
def test_huber_above_every_residual_is_l2(kind, shape):
    if shape == (7,) or kind == "coordinate":
        same(Huber(kind), L2(), gates_one={"delta": torch.full(shape, 50.0, dtype=torch.float64)})
    same(Huber(kind, delta=50.0), L2())


def test_lp_2_is_twice_l2():
    # Decision 10.5: sum (r^2 + eps) over 5 channels.
    same(Lp(2), L2(), factor=2, constant=5e-6)


def test_l1_is_lp_1():
    same(L1(), Lp(1))


def test_a_clip_above_every_residual_is_none():
    same(Lp(3, clip=50.0), Lp(3))
    same(Lp(1.5, clip=50.0, tanh=20.0), Lp(1.5, tanh=20.0))


@pytest.mark.parametrize("ball", ["l2", "l1", "linf"])
def test_robust_with_radius_0_is_l2(ball):
    same(Robust(ball, radius=0), L2())
    same(Robust(ball), L2(), gates_one={"radius": torch.zeros(7, dtype=torch.float64)})


def test_linf_at_small_tau_is_the_largest_error():
    (pred, target), _ = tensors(R, {})
    loss = LInf(tau=1e-3).loss(pred, target, {})
    assert loss.flatten().tolist() == pytest.approx([2.0] * 6, rel=1e-6)
    (grad,) = torch.autograd.grad(loss.sum(), pred)
    assert grad[0, 0].tolist() == pytest.approx([0, 0, 1, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("ball", "order"), [("l2", 2.0), ("l1", 1.0), ("linf", math.inf)], ids=["eq 17", "l1 ball", "box"]
)
def test_robust_is_the_maximum_over_its_ball(ball, order):
    # Eq. 17 as it is written: max over |d| <= radius of |r - d|^2 / 2, with almost no smoothing.
    bias, r, radius = (
        Robust(ball, radius=0.75, eps=1e-24, tau=1e-3),
        torch.tensor(R, dtype=torch.float64),
        0.75,
    )
    loss = bias.loss(r, torch.zeros_like(r), {}).item()
    best = {
        "l2": -radius * r / r.norm(),
        "l1": torch.tensor([0.0, 0.0, -radius, 0.0], dtype=torch.float64),
        "linf": -radius * r.sign(),
    }[ball]
    assert torch.linalg.vector_norm(best, order).item() == pytest.approx(radius)
    assert loss == pytest.approx(0.5 * (r - best).square().sum().item(), rel=1e-12)
    others = torch.randn(1000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    others = radius * others / torch.linalg.vector_norm(others, order, dim=-1, keepdim=True)
    assert (0.5 * (r - others).square().sum(-1)).max().item() < loss


def test_a_gate_per_token_is_the_same_number_in_every_channel():
    generator = torch.Generator().manual_seed(0)
    delta = torch.rand(7, dtype=torch.float64, generator=generator)
    wide = delta[:, None].expand(7, 5)
    for bias in (Huber("coordinate"), Robust("linf")):
        (name,) = bias.gates
        same(bias, bias, gates_one={name: delta}, gates_other={name: wide})


def test_gates_stay_with_their_own_token():
    # Widths equal to numbers of tokens do not confuse a gate per token with one per channel.
    pred = 4 * torch.ones(3, 3, dtype=torch.float64)
    delta = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    loss = Huber("coordinate").loss(pred, torch.zeros_like(pred), {"delta": delta})
    assert loss.tolist() == [3 * 1 * 3.5, 3 * 2 * 3.0, 3 * 3 * 2.5]
    loss = Robust("linf").loss(pred, torch.zeros_like(pred), {"radius": delta})
    expected = [3 * (8 + d * math.sqrt(16 + 1e-6) + d * d / 2) for d in (1, 2, 3)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-14)


@each
def test_gradients_by_finite_differences(bias):
    generator = torch.Generator().manual_seed(3)
    pred, target = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)
    # Away from r = 0 and from thresholds and clips, all at 1.
    r = pred - target
    r = r + 0.1 * r.sign()
    r = torch.where((r.abs() - 1).abs() < 0.1, 1.2 * r, r)
    pred = target + r
    assert ((r.norm(dim=-1) - 1).abs() > 1e-2).all()
    pred, target = pred.requires_grad_(), target.requires_grad_()
    gates = {n: torch.ones(4, dtype=torch.float64, requires_grad=True) for n in bias.gates}

    def loss(pred, target, *gate):
        return bias.loss(pred, target, dict(zip(gates, gate, strict=True)))

    # The value of the tanh product is a quadrature; its derivatives are tested above.
    atol = 1e-4 if isinstance(bias, Lp) and bias.tanh else 1e-5
    assert torch.autograd.gradcheck(loss, (pred, target, *gates.values()), atol=atol)
    assert torch.autograd.gradgradcheck(loss, (pred, target, *gates.values()))


def test_clip_bounds_the_gradient():
    for bias in (Lp(3, clip=0.5), Lp(3, clip=0.5, tanh=20.0)):
        r = torch.tensor([[-1e6, -0.5, 0.5, 0.6, 1e6]], dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(bias.loss(r, torch.zeros_like(r), {}).sum(), r)
        assert grad.abs().flatten().tolist() == pytest.approx([3 * 0.25] * 5, rel=1e-5)


def test_names_of_gates():
    assert [b.gates for b in (L2(), Dot(), L1(), Lp(), LInf())] == [()] * 5
    assert Huber().gates == ("delta",) and Huber(delta=1.0).gates == ()
    assert Robust().gates == ("radius",) and Robust(radius=1.0).gates == ()
    assert Huber("coordinate").channelwise == ("delta",) and Huber("coordinate", delta=1.0).channelwise == ()
    assert Robust("linf").channelwise == ("radius",)
    assert [b.channelwise for b in (L2(), Huber(), Huber("mixture"), Robust(), Robust("l1"))] == [()] * 5


@each
def test_no_bias_refuses_by_itself(bias):
    assert bias.refusal(None) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lp(0.5), "Lp: p must be a number of at least 1; got 0.5"),
        (lambda: Lp(math.nan), "p must be"),
        (lambda: Lp(math.inf), "p must be"),
        (lambda: Lp(True), "p must be"),
        (lambda: Lp("3"), "p must be"),  # pyright: ignore
        (lambda: Lp(eps=0), "eps must be a number above 0; got 0"),
        (lambda: Lp(clip=0.0), "clip must be a number above 0, or None"),
        (lambda: Lp(clip=-1.0), "clip must be"),
        (lambda: Lp(tanh=0.0), "tanh must be"),
        (lambda: L1(eps=-1e-6), "L1: eps must be"),
        (lambda: LInf(tau=0), "LInf: tau must be"),
        (lambda: LInf(eps=0), "eps must be"),
        (lambda: Huber("vector"), "Huber: kind must be one of norm, coordinate, mixture; got 'vector'"),
        (lambda: Huber(delta=0), "delta must be a number above 0, or None for the gate 'delta'; got 0"),
        (lambda: Huber(delta=math.inf), "delta must be"),
        (lambda: Huber(eps=0), "eps must be"),
        (lambda: Robust("l3"), "Robust: ball must be one of l2, l1, linf; got 'l3'"),
        (lambda: Robust(radius=-0.1), "radius must be a number of at least 0, or None"),
        (lambda: Robust(radius=math.nan), "radius must be"),
        (lambda: Robust(eps=0), "eps must be"),
        (lambda: Robust(tau=0), "tau must be"),
    ],
)
def test_wrong_fields_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
