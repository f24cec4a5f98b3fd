"""Axis 4, memory algorithm: how the gradient of a token becomes a step of the memory."""

from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from miras.core.bias import L2
from miras.core.memory import Matrix
from miras.core.typed import Typed, overridden


class Algorithm(Typed, ABC):
    """S_t = momentum_t S_{t-1} - lr_t grad_t;  step_t = direction(S_t)."""

    momentum: bool = False
    """Whether past surprise is carried on; otherwise S_t = -lr_t grad_t, and the state has no S."""
    step_bound: float = 0.0
    """How strongly earlier keys of the chunk bound `lr`; 0 for not at all."""
    steps: int = 1
    """Pairs of key and value per token, and so steps per token."""
    first_order: bool = False
    """Whether the outer gradient ignores that inner gradients depend on the weights they are taken
    at."""
    window: int = 1
    """The loss window: pairs whose losses one gradient sums, the token's own and those before
    it."""

    channelwise: ClassVar[bool] = True
    """Whether `lr` may differ by channel."""

    @property
    def gates(self) -> tuple[str, ...]:
        """Names of the gates that this choice reads."""
        return ("lr", *["momentum"] * self.momentum, *["share"] * (self.window > 1))

    @property
    def direct(self) -> bool:
        """Whether the step is S itself, so that the accumulator stays linear in the gradients."""
        return type(self).direction is Algorithm.direction

    @property
    def form(self) -> frozenset[str]:
        """What a path that runs it must support: the methods below that it overrides, and
        options."""
        options = {
            "momentum": self.momentum,
            "step_bound": self.step_bound > 0,
            "steps": self.steps > 1,
            "first_order": self.first_order,
            "window": self.window > 1,
        }
        own = overridden(self, Algorithm, ("step_size", "surprise", "direction"))
        return own | {name for name, there in options.items() if there}

    def step_size(self, lr: Tensor, k: Tensor) -> Tensor:
        """The step from its gate (..., T) or channel-wise (..., T, 1 or d_in, 1 or d_out), keys
        (..., T, Dk)."""
        return lr

    def surprise(self, before: Tensor | None, momentum: Tensor | None, step: Tensor) -> Tensor:
        """S_t (..., d_in, d_out) from S_{t-1} and step = -lr_t grad_t; both None without
        momentum."""
        return step if before is None or momentum is None else momentum * before + step

    def direction(self, S: Tensor) -> Tensor:
        """The step for a surprise; both (..., d_in, d_out)."""
        return S

    def refusal(self, rule: Any) -> str | None:
        """Why this algorithm is not supported in a rule, or None."""
        if self.window == 1:
            return None
        others = {
            "several steps per token": self.steps > 1,
            "a step bound, which needs single keys": self.step_bound > 0,
            "update='chunk'": rule.schedule.gathers,
            "a gradient at the decayed memory": rule.retention.decayed,
        }
        found = [name for name, there in others.items() if there]
        return f"a window of {self.window} pairs does not go with {found[0]}" if found else None


@dataclass(frozen=True)
class GradientDescent(Algorithm):
    """Gradient steps, with Titans' momentum or without (Titans eq. 8 to 10 and 14), `steps` of them
    per token.

    `step_bound` c > 0 multiplies a token's `lr` by prod_j max(0, 1 - c lr_j |k_j . k|) over the
    earlier tokens j of its chunk. All gradients of a chunk are taken at the same weights, so the
    steps of equal keys would otherwise add up to chunk_size times lr and diverge; bounded, they add
    up to at most 1 / c. With momentum up to m a step moves the memory by lr / (1 - m) in the end:
    c = 1 / (1 - m), with lr <= 1 - m and keys of norm at most 1, limits that to one full step
    (docs/stability.md). With c = 1 and no momentum, a repeated pair of key and value has the same
    effect as in the unchunked rule.

    `steps` n > 1 (DeltaProduct): a token has n pairs, k (B, H, T, n, Dk), v (B, H, T, n, Dv), lr
    (B, H, T, n); it forgets before the first step and is read after the last. With chunk_size 1
    each step is taken at the weights after the previous step, otherwise all steps of the chunk at
    its anchor. Raises ValueError for values out of range, and for momentum with several steps,
    which has no published definition.

    `window` c > 1 (the Omega rule of ATLAS): the gradient of a token is that of sum_i share_i
    loss_i over the last c tokens of its document, including itself, all at the anchor of its own
    chunk; `share` is a gate. Tokens that do not write are left out.

    `first_order` is a control: values are unchanged, but the outer gradient treats the weights at
    which inner gradients are taken as constants.
    """

    momentum: bool = False
    step_bound: float = 0.0
    steps: int = 1
    first_order: bool = False
    window: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bound("GradientDescent", self)
        if self.steps < 1:
            raise ValueError(f"GradientDescent: steps must be an integer of at least 1, got {self.steps!r}")
        _check_window("GradientDescent", self)
        if self.steps > 1 and self.momentum:
            raise ValueError(
                f"GradientDescent: momentum between the {self.steps} steps of one token has no published "
                f"definition; use steps=1 or momentum=False"
            )


@dataclass(frozen=True)
class GradientAscent(GradientDescent):
    """Steps that increase the inner loss: a control, for a memory that should not work but may
    (arXiv 2602.21204)."""

    def step_size(self, lr: Tensor, k: Tensor) -> Tensor:
        return -lr


@dataclass(frozen=True)
class Implicit(Algorithm):
    """The step of an implicit (proximal) update, lr / (1 + lr |k|^2) (Longhorn; Titans app. C;
    MIRAS 4.5).

    For a matrix memory and L2 this solves min_W |W - W_{t-1}|^2 + lr |k W - v|^2 exactly, for any
    lr. With chunk_size > 1 the steps of a chunk are taken at its anchor; `step_bound` as in
    GradientDescent.
    """

    step_bound: float = 0.0
    channelwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bound("Implicit", self)

    def step_size(self, lr: Tensor, k: Tensor) -> Tensor:
        return lr / (1 + lr * k.square().sum(-1))

    def refusal(self, rule: Any) -> str | None:
        if type(rule.memory) is not Matrix or type(rule.bias) is not L2:
            return "an implicit step has a closed form only for a Matrix memory with the L2 bias"
        if not rule.retention.direct or not rule.retention.linear:
            return "an implicit step solves for the weights themselves, but this retention maps them"
        if rule.retention.gates and not rule.retention.decayed:
            return (
                "an implicit step starts from the weights after forgetting: use Decay(decayed=True), or Keep() "
                "for none"
            )
        return None


@dataclass(frozen=True)
class Muon(Algorithm):
    """Steps along the orthogonalised surprise, step_t = scale * NewtonSchulz(S_t) (ATLAS; LaCT;
    Muon).

    X = S / |S|_F, then `iterations` times X <- a X + (b X X^T + c (X X^T)^2) X with (a, b,
    c) = (3.4445, -4.7750, 2.0315). The length of the step does not depend on |S|: `lr` only weights
    tokens relative to each other. It therefore needs momentum, or one update per chunk (Schedule).
    The step at S = 0 is 0. Every S_t is formed.
    """

    iterations: int = 5
    scale: float = 1.0
    momentum: bool = True
    window: int = 1
    COEFFICIENTS: ClassVar[tuple[float, float, float]] = (3.4445, -4.7750, 2.0315)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1 or not self.scale > 0:
            raise ValueError(
                f"Muon: iterations must be at least 1 and scale positive, got {self.iterations} and {self.scale}"
            )
        _check_window("Muon", self)

    def direction(self, S: Tensor) -> Tensor:
        a, b, c = self.COEFFICIENTS
        # Scaled by the largest entry first, because squares of small entries would underflow. Any
        # factor gives the same X.
        top = S.detach().abs().amax((-2, -1), keepdim=True)
        X = S / torch.where(top > 0, top, 1)
        X = X / torch.where(top > 0, X.square().sum((-2, -1), keepdim=True), 1).sqrt()
        wide = S.shape[-2] > S.shape[-1]
        X = X.mT if wide else X
        for _ in range(self.iterations):
            gram = X @ X.mT
            X = a * X + (b * gram + c * gram @ gram) @ X
        return self.scale * (X.mT if wide else X)

    def refusal(self, rule: Any) -> str | None:
        if rule.memory.elementwise:
            return "a vector has nothing to orthogonalise"
        if not self.momentum and not (rule.schedule.gathers and rule.chunk_size > 1):
            return (
                "the step for a single token would not depend on its lr: use momentum=True, or sum the "
                "steps of a chunk of several tokens with Schedule(update='chunk')"
            )
        return super().refusal(rule)


def bound_factors(overlap: Tensor, size: Tensor, strength: float) -> Tensor:
    """prod_j max(0, 1 - strength |lr_j| overlap_tj): overlap (..., T, J), size |lr| (...,
    J) -> (..., T)."""
    return product((1 - strength * size[..., None, :] * overlap).clamp_min(0))


def product(x: Tensor) -> Tensor:
    """The product x_1 ... x_n, (..., n) to (...,), by halves: the derivative of torch.prod
    synchronises with the device."""
    n = x.shape[-1]
    while n > 1:
        odd = x[..., n - 1 :] if n % 2 else x[..., :0]
        x = torch.cat([x[..., : n // 2] * x[..., n // 2 : n - n % 2], odd], -1)
        n = x.shape[-1]
    return x[..., 0]


def _check_window(name: str, algorithm: Algorithm) -> None:
    if algorithm.window < 1:
        raise ValueError(f"{name}: window must be an integer of at least 1, got {algorithm.window!r}")


def _check_bound(name: str, algorithm: Algorithm) -> None:
    bound = algorithm.step_bound
    if bound < 0:
        raise ValueError(
            f"{name}: step_bound must be a number, 0 for none, 1 without momentum, 1 / (1 - m) with momentum of at "
            f"most m; got {bound}"
        )
    object.__setattr__(algorithm, "step_bound", float(bound))


ALGORITHMS = (GradientDescent, GradientAscent, Implicit, Muon)
