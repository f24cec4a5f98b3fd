"""Axis 3, retention gate: how much of the accumulator is kept, and how it determines the weights.

Every map acts on the last two axes (d_in, d_out): one weight of one head.
"""

import math
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from miras.core.typed import Typed

Axis = Literal["input", "output", "all"]
"""Which entries of a weight share one simplex: one output channel's, one input channel's, or all of
them."""

_DIMS: dict[str, tuple[int, ...]] = {"input": (-2,), "output": (-1,), "all": (-2, -1)}

Towards = Literal["zero", "initial"]
"""What forgetting decays towards: 0, as in the papers, or the learned initial accumulator A_0."""


class Retention(Typed, ABC):
    """A_t = advance(A_{t-1}, keep_t, step_t);  W_t = link(A_t).

    A retention that decays towards the initial accumulator advances the difference from it,
    A_t - A_0 = advance(A_{t-1} - A_0, keep_t, step_t), which is what a state then holds.
    """

    decayed: bool = False
    """Whether a token's gradient is taken after its own forgetting."""
    towards: Towards = "zero"
    """What forgetting decays towards."""

    @property
    def gates(self) -> tuple[str, ...]:
        """Names of the gates it reads: `forget` or none."""
        return ("forget",)

    @property
    def along(self) -> str | None:
        """The axis of a weight along which `forget` has to be constant: "input", "output", "all" or
        None."""
        return None

    @property
    def linear(self) -> bool:
        """Whether the accumulator is linear in itself and the step: `advance` is the default."""
        return type(self).advance is Retention.advance

    @property
    def returns(self) -> bool:
        """Whether it forgets towards the initial accumulator."""
        return self.towards == "initial"

    @property
    def direct(self) -> bool:
        """Whether the accumulator is the weights: `link` is the identity."""
        return type(self).link is Retention.link

    @property
    def form(self) -> frozenset[str]:
        """What a path that runs it must support: the methods below that it overrides, and
        options."""
        options = {
            "link": not self.direct,
            "advance": not self.linear,
            "decayed": self.decayed,
            "returns": self.returns,
        }
        return frozenset(name for name, there in options.items() if there)

    def link(self, A: Tensor) -> Tensor:
        """The weights (..., d_in, d_out) for an accumulator of the same shape."""
        return A

    def begin(self, A: Tensor, size: float) -> Tensor:
        """An initial accumulator (..., d_in, d_out) whose weights have about that deviation, from
        standard normal noise."""
        return A * size

    def advance(self, A: Tensor, keep: Tensor | float, step: Tensor) -> Tensor:
        """The accumulator after a step, (..., d_in, d_out) like both; keep = 1 - forget, 1 without
        that gate."""
        return keep * A + step

    def refusal(self, rule: Any) -> str | None:
        """Why this retention is not supported in a rule, or None."""
        return None


@dataclass(frozen=True)
class Keep(Retention):
    """Nothing is forgotten, W_t = W_{t-1} + step_t (MIRAS table 1: linear attention, DeltaNet,
    TTT)."""

    @property
    def gates(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class Decay(Retention):
    """Weight decay, W_t = (1 - forget_t) W_{t-1} + step_t (Titans eq. 13; MIRAS 4.5 "L2").

    `decayed=False` takes the gradient at the undecayed memory, as Titans does. `decayed=True` takes
    it at the anchor times the product of 1 - forget from the start of the chunk through the token
    itself, as Gated DeltaNet does.

    `towards="initial"` returns to the learned initial memory in place of 0,
    W_t = W_0 + (1 - forget_t) (W_{t-1} - W_0) + step_t: a deep memory learns with it, and does not
    where all that was learned before reading is forgotten too (docs/trainability.md). Raises
    ValueError for any other value.
    """

    decayed: bool = False
    towards: Towards = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_towards(self)


@dataclass(frozen=True)
class ElasticNet(Retention):
    """Small entries of the accumulator become zero: W_t = S_gamma(A_t), S_gamma(z) = sign(z) max(0,
    |z| - gamma).

    The closed form of min_W -<A, W> + |W|^2 / 2 + gamma |W|_1, follow-the-regularised-leader with
    the elastic net (MIRAS eq. 23; its eta / alpha is our gamma). `smooth` uses |z|
    arctan(z / gamma) / (pi / 2) instead (remark at eq. 22): it is never flat, but shrinks large
    entries by only 2 gamma / pi. gamma = 0 is the identity. `towards` as in `Decay`, applied to A.
    Raises ValueError for a gamma that is negative or not a number.
    """

    gamma: float
    smooth: bool = False
    towards: Towards = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_towards(self)
        _set_number(self, "gamma", self.gamma >= 0, "a number of at least 0")

    @property
    def direct(self) -> bool:
        return self.gamma == 0 and type(self).link is ElasticNet.link

    def link(self, A: Tensor) -> Tensor:
        if self.gamma == 0:  # a kink of S at 0 would lose the gradient there
            return A
        if self.smooth:
            return A.abs() * torch.atan(A / self.gamma) / (math.pi / 2)
        return soft_threshold(A, self.gamma)


@dataclass(frozen=True)
class ProximalElasticNet(Retention):
    """Soft and hard forgetting in the recursion, W_t = S_gamma((1 - forget_t) W_{t-1} + step_t)
    (MIRAS eq. 22).

    S_gamma as in `ElasticNet`. With keep = 1 - forget it is the closed form of
    min_W -<step, W> + keep |W - W_{t-1}|^2 / 2 + forget |W|^2 / 2 + gamma |W|_1. Unlike the printed
    equation the step is not multiplied by the retention: `lr` absorbs that. Raises ValueError for a
    gamma that is negative or not a number.
    """

    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _set_number(self, "gamma", self.gamma >= 0, "a number of at least 0")

    @property
    def linear(self) -> bool:
        return self.gamma == 0 and type(self).advance is ProximalElasticNet.advance

    def advance(self, A: Tensor, keep: Tensor | float, step: Tensor) -> Tensor:
        A = keep * A + step
        return A if self.gamma == 0 else soft_threshold(A, self.gamma)


def soft_threshold(z: Tensor, gamma: float) -> Tensor:
    """sign(z) max(0, |z| - gamma)."""
    return z - z.clamp(-gamma, gamma)


@dataclass(frozen=True)
class LqNorm(Retention):
    """L_q stability, W = A |A|^(q-2) / ||A||_q^(q-2) per weight and head (MIRAS eq. 24, Moneta).

    q > 1 is the DUAL exponent: this is the closed form of min_W -<A, W> + ||W||_r^2 / 2 with
    r = q / (q - 1), and q = 2 is the identity. Moneta's q = 4 bounds the weights in the norm with
    r = 4/3.

    `literal` is eq. 24 as printed, W = A / ||A||_q^(q-2), without the factor |A|^(q-2). It has
    degree 3 - q, which is -1 at q = 4: forgetting then makes the weights grow by 1 / (1 - forget),
    and they would diverge as A -> 0.

    Near 0: |A| stands for sqrt(A^2 + e^2) with e = 1e-6 (or 1e-7 of the largest entry, if that is
    more), so W has bounded derivatives of every order; below e the mirror map is A times
    n^-(1 - 2/q) for n entries. The literal one divides by (||A||_q^2 + 1e-6)^((q-2)/2): at q = 4 no
    weight exceeds 500, and the slope at A = 0 is 1e6. `towards` as in `Decay`, applied to A. Raises
    ValueError for a q that is not above 1.
    """

    q: float = 4.0
    literal: bool = False
    towards: Towards = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_towards(self)
        _set_number(self, "q", self.q > 1, "a number above 1")

    @property
    def direct(self) -> bool:
        return self.q == 2 and type(self).link is LqNorm.link

    def begin(self, A: Tensor, size: float) -> Tensor:
        A = A * size
        # The mirror map has degree 1: with this scale the weights have the given deviation.
        return A if self.literal else A * (size / self.link(A).square().mean((-2, -1), keepdim=True).sqrt())

    def link(self, A: Tensor) -> Tensor:
        if self.q == 2:  # exactly the identity, without rounding from powers
            return A
        # Both maps are homogeneous in (A, e): scaling by the largest entry as a constant keeps all
        # powers in range and changes no derivative.
        top = A.detach().abs().amax((-2, -1), keepdim=True).clamp_min(1e-6)
        square = (A / top).square() + (1e-6 / top).clamp_min(1e-7).square()
        power = square.pow(self.q / 2).sum((-2, -1), keepdim=True)
        if self.literal:
            return A * ((top * power.pow(1 / self.q)).square() + 1e-6).pow(1 - self.q / 2)
        return A * square.pow(self.q / 2 - 1) * power.pow(2 / self.q - 1)


@dataclass(frozen=True)
class Simplex(Retention):
    """Weights are scaled distributions, W_t = c softmax(A_t) along `axis` (MIRAS eq. 21 and 27,
    Memora).

    A is log W up to a constant per slice, which softmax ignores, so A_t = (1 - forget_t)
    A_{t-1} + step_t is the closed form of KL local retention and an entropy term for forgetting,
    exactly. That needs `forget` constant along `axis`. "input": the weights of one output channel
    share a simplex; "output": those of one input channel; "all": the whole matrix. `scale` is c;
    None for the square root of the number of entries that share a simplex. `towards` as in `Decay`:
    towards the uniform or the initial distribution. Raises ValueError for another axis or a scale
    that is not positive.
    """

    axis: Axis = "input"
    scale: float | None = None
    towards: Towards = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_simplex(self, self.axis, self.scale)
        _check_towards(self)

    @property
    def along(self) -> str | None:
        return self.axis

    def begin(self, A: Tensor, size: float) -> Tensor:
        # Logits with standard deviation size sqrt(d_in): with a smaller one all units have nearly
        # the same distribution, which the norm cannot separate.
        return A * (size * A.shape[-2] ** 0.5)

    def link(self, A: Tensor) -> Tensor:
        return _on_simplex(A, self.axis, self.scale)

    def refusal(self, rule: Any) -> str | None:
        return _no_simplex(rule, self.axis)


@dataclass(frozen=True)
class FDivergence(Retention):
    """W_t = W_{t-1} g(step_t - zeta_t), each slice along `axis` summing to c by its own zeta_t
    (MIRAS eq. 18).

    The closed form of min_W -<step, W> + sum W_{t-1} f(W / W_{t-1}) on the scaled simplex, with
    g = (f')^{-1} given as `inverse`: elementwise, differentiable, defined on the whole line,
    positive, increasing, below 1 on the left and above 1 on the right. Only g is needed; g = exp is
    KL, `Simplex` without forgetting. There is no forget gate. `axis` and `scale` as in `Simplex`.

    A_t = log(W_t / c) after a step, any constant per slice before. zeta is found by `iterations`
    steps of bisection; its gradient is that of the implicit function. Factors g are limited to
    between 1e-12 and 1e12 in fp32. Raises ValueError for an unsuitable g, axis or scale, and for
    iterations below 1.
    """

    inverse: Callable[[Tensor], Tensor] = torch.exp
    axis: Axis = "input"
    scale: float | None = None
    iterations: int = 60

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_simplex(self, self.axis, self.scale)
        _check_callable(self, self.inverse)
        if self.iterations < 1:
            raise ValueError(
                f"FDivergence: iterations must be an integer of at least 1, got {self.iterations!r}"
            )
        _check_increasing(self.inverse)

    @property
    def gates(self) -> tuple[str, ...]:
        return ()

    def begin(self, A: Tensor, size: float) -> Tensor:
        # Logits with standard deviation size sqrt(d_in): with a smaller one all units have nearly
        # the same distribution, which the norm cannot separate.
        return A * (size * A.shape[-2] ** 0.5)

    def link(self, A: Tensor) -> Tensor:
        return _on_simplex(A, self.axis, self.scale)

    def advance(self, A: Tensor, keep: Tensor | float, step: Tensor) -> Tensor:
        log_w = _along(A, self.axis, torch.log_softmax)
        # zeta absorbs any constant: subtracting the largest entry from the step keeps zeta small
        # and exact.
        step = step - step.detach().amax(_DIMS[self.axis], keepdim=True)
        return log_w + self._log_g(step - self._zeta(log_w, step))

    def refusal(self, rule: Any) -> str | None:
        return _no_simplex(rule, self.axis)

    def _log_g(self, x: Tensor) -> Tensor:
        # Limits are cube roots of the type's range: the third derivative of the logarithm, which
        # occurs in the second derivative of zeta, then stays finite. x is clamped first, because an
        # overflow of g would otherwise reach the gradient.
        low, high = torch.finfo(x.dtype).tiny ** (1 / 3), torch.finfo(x.dtype).max ** (1 / 3)
        x = x.clamp(_point(self.inverse, low), _point(self.inverse, high))
        return self.inverse(x).clamp(low, high).log()

    def _zeta(self, log_w: Tensor, step: Tensor) -> Tensor:
        """The zeta of every slice, sum exp(log_w) g(step - zeta) = 1, for steps of at most 0."""
        dims = _DIMS[self.axis]
        with torch.no_grad():
            # All factors are at least 1 at the lower end and at most 1 at the upper end.
            low = step.amin(dims, keepdim=True) - _point(self.inverse, 1.0)
            high = torch.full_like(low, -_point(self.inverse, 1.0))
            for _ in range(self.iterations):
                zeta = (low + high) / 2
                above = (log_w + self._log_g(step - zeta)).logsumexp(dims, keepdim=True) > 0
                low, high = torch.where(above, zeta, low), torch.where(above, high, zeta)
            zeta = (low + high) / 2
        if not (log_w.requires_grad or step.requires_grad):
            return zeta
        # One Newton step has the derivative of the root; a second one has its second derivative.
        # Neither changes the bisected value.
        for _ in range(2):
            x = step - zeta
            terms = log_w + self._log_g(x)
            total = terms.logsumexp(dims, keepdim=True)
            slope = ((terms - total).exp() * self._slope(x)).sum(dims, keepdim=True).clamp_min(1e-12)
            zeta = zeta + (total - total.detach()) / slope
        return zeta

    def _slope(self, x: Tensor) -> Tensor:
        """d log g(x) / d x, elementwise."""
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(self._log_g(x).sum(), x, create_graph=True)[0]


@dataclass(frozen=True)
class Bregman(Retention):
    """W_t = g(A_t), elementwise (MIRAS, Bregman divergence): A_t = F'(W_t) and g = (F')^{-1}, given
    as `inverse`.

    The closed form of min_W -<step, W> + the Bregman divergence of sum F from W_{t-1}, with
    forgetting towards g(0), or with `towards="initial"` towards W_0. g is differentiable and
    increasing; the identity is `Decay`. Raises ValueError unless it can be called.
    """

    inverse: Callable[[Tensor], Tensor]
    towards: Towards = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_towards(self)
        _check_callable(self, self.inverse)

    def link(self, A: Tensor) -> Tensor:
        return self.inverse(A)


@dataclass(frozen=True)
class Sigmoid(Retention):
    """Weights between 0 and 1, W_t = sigmoid((1 - forget_t) logit(W_{t-1}) + step_t): `Bregman`
    with F' = logit.

    `towards` as there.
    """

    towards: Towards = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_towards(self)

    def link(self, A: Tensor) -> Tensor:
        return A.sigmoid()


def _along(A: Tensor, axis: str, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Apply a function of (tensor, dimension) over the entries that share one simplex."""
    if axis == "all":
        return function(A.flatten(-2), -1).unflatten(-1, A.shape[-2:])
    return function(A, _DIMS[axis][0])


def _on_simplex(A: Tensor, axis: str, scale: float | None) -> Tensor:
    total = math.prod([A.shape[d] for d in _DIMS[axis]]) ** 0.5 if scale is None else scale
    return total * _along(A, axis, torch.softmax)


def _no_simplex(rule: Any, axis: str) -> str | None:
    if axis == "all":
        return None
    if rule.memory.elementwise:
        return f'a vector has no {axis} channels to share a simplex; use axis="all"'
    # Equal widths are valid for every memory, and which weights are vectors does not depend on
    # them.
    for name, shape in rule.memory.shapes(2, 2).items():
        if shape[_DIMS[axis][0]] == 1:
            return f'weight {name!r} is a vector: along "{axis}" each entry would be constant; use axis="all"'
    return None


def _check_simplex(retention: Retention, axis: str, scale: float | None) -> None:
    if axis not in _DIMS:
        raise ValueError(
            f"{type(retention).__name__}: axis must be one of {', '.join(map(repr, _DIMS))}, got {axis!r}"
        )
    if scale is not None:
        _set_number(retention, "scale", scale > 0, "a positive number or None")


def _check_towards(retention: Retention) -> None:
    if retention.towards not in get_args(Towards):
        raise ValueError(
            f"{type(retention).__name__}: towards must be one of {', '.join(map(repr, get_args(Towards)))}, got "
            f"{retention.towards!r}"
        )


def _check_callable(retention: Retention, inverse: object) -> None:
    if not callable(inverse):
        raise ValueError(
            f"{type(retention).__name__}: inverse must be a function of a tensor, for instance torch.exp; "
            f"got {inverse!r}"
        )


def _set_number(retention: Retention, name: str, allowed: bool, what: str) -> None:
    value = getattr(retention, name)
    if not allowed:
        raise ValueError(f"{type(retention).__name__}: {name} must be {what}, got {value!r}")
    object.__setattr__(retention, name, float(value))


def _samples(inverse: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Points from -1024 to 1024 and g there."""
    powers = torch.arange(-4, 11, dtype=torch.float64, device="cpu").exp2()
    x = torch.cat([-powers.flip(0), powers.new_zeros(1), powers])
    with torch.no_grad():
        return x, inverse(x)


def _check_increasing(inverse: Callable[[Tensor], Tensor]) -> None:
    g = _samples(inverse)[1]
    # An exponential underflows to 0 far to the left.
    if not bool((g >= 0).all() & (g[1:] >= g[:-1]).all() & (g[0] < 1) & (g[-1] > 1)):
        raise ValueError(
            f"FDivergence: inverse must be positive and increasing on the whole line, from below 1 to above 1; "
            f"got {inverse!r}, {g[0]:.3g} at -1024, {g[len(g) // 2]:.3g} at 0, {g[-1]:.3g} at 1024"
        )


@lru_cache(maxsize=256)
def _point(inverse: Callable[[Tensor], Tensor], value: float) -> float:
    """The x with g(x) = value; infinite if there is none between -1024 and 1024."""
    x, g = _samples(inverse)
    if g[0] >= value or g[-1] < value:
        return -math.inf if g[0] >= value else math.inf
    low, high = x[g < value][-1], x[g >= value][0]
    with torch.no_grad():
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if bool(inverse(middle) < value) else (low, middle)
    return float(high)


RETENTIONS = (
    Keep,
    Decay,
    ElasticNet,
    ProximalElasticNet,
    LqNorm,
    Simplex,
    FDivergence,
    Bregman,
    Sigmoid,
)
