"""Axis 4, memory algorithm: how the gradient of a token becomes a step of the memory."""

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


class Algorithm(ABC):
    """S_t = momentum_t S_{t-1} - lr_t grad_t;  step_t = S_t."""

    gates: ClassVar[tuple[str, ...]] = ("lr",)
    momentum: bool = False
    """Whether past surprise is carried; without it S_t = -lr_t grad_t and the state holds no S."""
    step_bound: float = 0.0
    """How strongly `lr` is bounded by the keys already met in the chunk; 0 for not at all."""

    def all_gates(self) -> tuple[str, ...]:
        """Names of the gates that this choice reads."""
        return (*self.gates, "momentum") if self.momentum else self.gates


@dataclass(frozen=True)
class GradientDescent(Algorithm):
    """One gradient step per token, with Titans' momentum or without (Titans eq. 8 to 10 and 14).

    `step_bound` c > 0 multiplies a token's `lr` by prod_j max(0, 1 - c lr_j |k_j . k|) over the earlier tokens j
    of its chunk. All gradients of a chunk are taken at one point, so equal keys would otherwise add up to a step
    of chunk_size times lr and diverge; bounded, they add up to at most 1 / c. A step whose momentum is at most m
    moves the memory by lr / (1 - m) in the end: c = 1 / (1 - m), with lr <= 1 - m and keys of norm at most 1,
    keeps that at one full step (docs/stability.md). With c = 1 and no momentum, the chunked rule of a repeated
    pair of key and value is the unchunked one. Raises ValueError for a c that is negative or no number.
    """

    momentum: bool = False
    step_bound: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.step_bound, bool) or not 0 <= self.step_bound < float("inf"):
            raise ValueError(
                f"GradientDescent: step_bound must be a number, 0 for none, 1 without momentum, 1 / (1 - m) with "
                f"momentum of at most m; got {self.step_bound}"
            )
        object.__setattr__(self, "step_bound", float(self.step_bound))


def bound_factors(overlap: Tensor, lr: Tensor, strength: float) -> Tensor:
    """prod_j max(0, 1 - strength lr_j overlap_tj): overlap (..., T, J), lr (..., J) -> (..., T)."""
    return (1 - strength * lr[..., None, :] * overlap).clamp_min(0).prod(-1)


ALGORITHMS = (GradientDescent,)
