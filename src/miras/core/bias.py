"""Axis 2, attentional bias: the inner loss, one number per token. Its gradients are derived by
autograd; only Lp's `tanh` is defined by its gradient, and its loss is the integral.

r = pred - target is the residual of a token, |r|_eps = sqrt(r^2 + eps) the smooth absolute value
(MIRAS remark 5). First and second derivatives are finite everywhere, also for thresholds of 0; at
r = 0 those of every order are.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.core.state import Tree
from miras.core.typed import Typed

HUBER_KINDS = ("norm", "coordinate", "mixture")
BALLS = ("l2", "l1", "linf")
ABOVE_0 = "a number above 0"


class Bias(Typed, ABC):
    """The loss of a memory's prediction (..., d_value) for a key, compared with the value."""

    @property
    def gates(self) -> tuple[str, ...]:
        """Names of the data-dependent gates that `loss` reads, each (...,) like the loss."""
        return ()

    @property
    def channelwise(self) -> tuple[str, ...]:
        """The gates that may also be given per channel, (..., d_value) like the prediction."""
        return ()

    def refusal(self, rule: Any) -> str | None:
        """Why this bias is not supported in `rule`, or None."""
        return None

    @abstractmethod
    def loss(self, pred: Tensor, target: Tensor, gates: Tree) -> Tensor:
        """The loss of every token: (..., d_value) and (..., d_value) to (...,)."""


@dataclass(frozen=True)
class L2(Bias):
    """Half the squared error, |r|^2 / 2; its gradient is the residual (Titans eq. 12, halved)."""

    def loss(self, pred: Tensor, target: Tensor, gates: Tree) -> Tensor:
        return 0.5 * (pred - target).square().sum(-1)


@dataclass(frozen=True)
class Dot(Bias):
    """Similarity, -<pred, target>: Hebbian, as in linear attention and RetNet (MIRAS 4.5)."""

    def loss(self, pred: Tensor, target: Tensor, gates: Tree) -> Tensor:
        return -(pred * target).sum(-1)


@dataclass(frozen=True)
class L1(Bias):
    """Absolute error, sum_j |r_j|_eps: "value-less", keys are mapped to signs (MIRAS eq. 12). Is
    Lp(1).

    Raises ValueError for an eps that is not above 0.
    """

    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.eps > 0, self, "eps", ABOVE_0)

    def loss(self, pred: Tensor, target: Tensor, gates: Tree) -> Tensor:
        return _smooth_abs(pred - target, self.eps).sum(-1)


@dataclass(frozen=True)
class Lp(Bias):
    """The p-th power of the l_p error, sum_j |r_j|_eps^p for a real p >= 1 (MIRAS eq. 10 and 11).
    Lp(2) is twice L2.

    `clip` c continues every coordinate's term f linearly beyond |r_j| = c, as f(c) + f'(c)
    (|r_j| - c): its gradient is at most f'(c) = p c (c^2 + eps)^(p/2 - 1), about p c^(p-1). For
    p > 2 the curvature grows with the error: in a memory whose output is not normalised, one large
    residual makes all later ones larger. Use a clip there, with lr p (p-1) c^(p-2) |k|^2 below 2.

    `tanh` a uses MIRAS' smooth derivative, f' = p tanh(a r) |r|_eps^(p-1) (remark 5 gives no a; 20
    is reasonable). Its integral has no closed form: the value is computed by quadrature with a
    relative error of about 1e-6; the derivatives are exact.

    Raises ValueError for p below 1, or an eps, clip or tanh that is not above 0.
    """

    p: float = 3.0
    eps: float = 1e-6
    clip: float | None = None
    tanh: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.p >= 1, self, "p", "a number of at least 1")
        _require(self.eps > 0, self, "eps", ABOVE_0)
        _require(self.clip is None or self.clip > 0, self, "clip", f"{ABOVE_0}, or None for no clip")
        _require(self.tanh is None or self.tanh > 0, self, "tanh", f"{ABOVE_0}, or None for the plain power")

    def loss(self, pred: Tensor, target: Tensor, gates: Tree) -> Tensor:
        r = pred - target
        if self.clip is None:
            return self._term(r).sum(-1)
        # relu, not clamp: exactly at |r| = clip only the inner term has a derivative.
        beyond = F.relu(r.abs() - self.clip)
        return (self._term(r.clamp(-self.clip, self.clip)) + self._slope(self.clip) * beyond).sum(-1)

    def _term(self, r: Tensor) -> Tensor:
        """f(r) of every coordinate."""
        if self.tanh is None:
            return (r.square() + self.eps).pow(self.p / 2)
        return _Integral.apply(r, partial(_tanh_power, p=self.p, eps=self.eps, a=self.tanh), self.tanh)

    def _slope(self, r: float) -> float:
        """f'(r) of a number."""
        p, square = self.p, r * r + self.eps
        if self.tanh is None:
            return p * r * square ** (p / 2 - 1)
        return p * math.tanh(self.tanh * r) * square ** ((p - 1) / 2)


@dataclass(frozen=True)
class LInf(Bias):
    """Largest absolute error, smoothed: tau log sum_j exp(|r_j|_eps / tau), at most tau log d_value
    above it.

    Its gradient, softmax(|r|_eps / tau) r / |r|_eps, is at most 1. Not in the papers. Raises
    ValueError for a tau or eps that is not above 0.
    """

    tau: float = 0.1
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.tau > 0, self, "tau", ABOVE_0)
        _require(self.eps > 0, self, "eps", ABOVE_0)

    def loss(self, pred: Tensor, target: Tensor, gates: Tree) -> Tensor:
        return _smooth_max(_smooth_abs(pred - target, self.eps), self.tau)


@dataclass(frozen=True)
class Huber(Bias):
    """Squared near the value and linear far from it, beyond a threshold delta, so that outliers
    count less.

    With H(a) = a^2 / 2 for |a| <= delta, else delta (|a| - delta / 2) (MIRAS eq. 13):

    norm        H(|r|_2), gradient r or delta r / |r|_2 (eq. 15)
    coordinate  sum_j H(r_j) (eq. 14); delta may differ per channel
    mixture     |r|_2^2 / 2 for |r|_2 <= delta, else delta sum_j |r_j|_eps: Yaad as printed (eq. 16
                and 26). Loss and gradient jump at the threshold, the norm of the gradient from
                delta to delta sqrt(d_value).

    `delta` None is the data-dependent gate "delta" (not below 0), a number fixes it. `eps` belongs
    to the mixture. Raises ValueError for an unknown kind, or a delta or eps that is not above 0.
    """

    kind: Literal["norm", "coordinate", "mixture"] = "norm"
    delta: float | None = None
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.kind in HUBER_KINDS, self, "kind", f"one of {', '.join(HUBER_KINDS)}")
        _require(
            self.delta is None or self.delta > 0,
            self,
            "delta",
            f"{ABOVE_0}, or None for the gate 'delta'",
        )
        _require(self.eps > 0, self, "eps", ABOVE_0)

    @property
    def gates(self) -> tuple[str, ...]:
        return ("delta",) if self.delta is None else ()

    @property
    def channelwise(self) -> tuple[str, ...]:
        return self.gates if self.kind == "coordinate" else ()

    def loss(self, pred: Tensor, target: Tensor, gates: Tree) -> Tensor:
        r = pred - target
        delta = gates["delta"] if self.delta is None else self.delta
        if self.kind == "coordinate":
            delta = _per_channel(delta, r)
            a = r.abs()
            return torch.where(a <= delta, 0.5 * r.square(), delta * (a - 0.5 * delta)).sum(-1)
        square = r.square().sum(-1)
        inside = square.detach().sqrt() <= delta
        if self.kind == "mixture":
            return torch.where(inside, 0.5 * square, delta * _smooth_abs(r, self.eps).sum(-1))
        # The root of 1 inside the threshold: the branch that `where` does not take would give
        # 0 * inf = NaN at r = 0.
        size = torch.where(inside, 1, square).sqrt()
        return torch.where(inside, 0.5 * square, delta * (size - 0.5 * delta))


@dataclass(frozen=True)
class Robust(Bias):
    """The half squared error at the worst value in a ball of a radius D, max over |d| <= D of
    |r - d|_2^2 / 2.

    l2    |r|_2^2 / 2 + D |r|_2 + D^2 / 2              (MIRAS eq. 17)
    linf  |r|_2^2 / 2 + sum_j (D_j |r_j| + D_j^2 / 2)  (a box: the radius may differ per channel)
    l1    |r|_2^2 / 2 + D max_j |r_j| + D^2 / 2

    The last two are not in the papers. Their kinks are smoothed here: |r|_2 as sqrt(r^2 + eps),
    |r_j| as |r_j|_eps, the max as in LInf with `tau`. Radius 0 is L2. `radius` None is the
    data-dependent gate "radius" (not below 0), a number fixes it. Raises ValueError for an unknown
    ball, a radius below 0, or an eps or tau that is not above 0.
    """

    ball: Literal["l2", "l1", "linf"] = "l2"
    radius: float | None = None
    eps: float = 1e-6
    tau: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.ball in BALLS, self, "ball", f"one of {', '.join(BALLS)}")
        _require(
            self.radius is None or self.radius >= 0,
            self,
            "radius",
            "a number of at least 0, or None for the gate 'radius'",
        )
        _require(self.eps > 0, self, "eps", ABOVE_0)
        _require(self.tau > 0, self, "tau", ABOVE_0)

    @property
    def gates(self) -> tuple[str, ...]:
        return ("radius",) if self.radius is None else ()

    @property
    def channelwise(self) -> tuple[str, ...]:
        return self.gates if self.ball == "linf" else ()

    def loss(self, pred: Tensor, target: Tensor, gates: Tree) -> Tensor:
        r = pred - target
        D = gates["radius"] if self.radius is None else self.radius
        square = r.square().sum(-1)
        if self.ball == "linf":
            D = _per_channel(D, r)
            return 0.5 * square + (D * (_smooth_abs(r, self.eps) + 0.5 * D)).sum(-1)
        size = (
            (square + self.eps).sqrt()
            if self.ball == "l2"
            else _smooth_max(_smooth_abs(r, self.eps), self.tau)
        )
        return 0.5 * square + D * (size + 0.5 * D)


def _smooth_abs(r: Tensor, eps: float) -> Tensor:
    return (r.square() + eps).sqrt()


def _tanh_power(r: Tensor, p: float, eps: float, a: float) -> Tensor:
    return p * (a * r).tanh() * (r.square() + eps).pow((p - 1) / 2)


def _smooth_max(x: Tensor, tau: float) -> Tensor:
    return tau * (x / tau).logsumexp(-1)


def _per_channel(gate: Tensor | float, r: Tensor) -> Tensor | float:
    """A gate or number, (...,) or (..., d_value), broadcast to the residual (..., d_value)."""
    return gate[..., None] if isinstance(gate, Tensor) and gate.dim() < r.dim() else gate


class _Integral(torch.autograd.Function):
    """The integral from 0 to r of a function that changes fastest within 1 / a of 0; r any
    shape."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, fn: Callable[[Tensor], Tensor], a: float) -> Tensor:
        ctx.save_for_backward(r)
        ctx.fn = fn
        # s = sinh(t) / a stretches the steep part; the nodes are evenly spaced in t.
        end = (a * r).asinh()
        total = torch.zeros_like(r)
        for node, weight in _gauss_legendre(16):
            t = node * end
            total += weight * fn(t.sinh() / a) * t.cosh()
        return total * end / a

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (g,), (r,) = grads, ctx.saved_tensors
        return g * ctx.fn(r), None, None


@cache
def _gauss_legendre(n: int) -> list[tuple[float, float]]:
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1] (Golub and Welsch 1969)."""
    with torch.inference_mode(False):
        i = torch.arange(1, n, dtype=torch.float64, device="cpu")
        nodes, vectors = torch.linalg.eigh((i / (4 * i * i - 1).sqrt()).diag(-1))
    return list(zip(((nodes + 1) / 2).tolist(), vectors[0].square().tolist(), strict=True))


def _require(holds: bool, bias: Bias, name: str, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{type(bias).__name__}: {name} must be {allowed}; got {getattr(bias, name)!r}")


BIASES = (L2, Dot, L1, Lp, LInf, Huber, Robust)
"""Every choice on this axis."""
