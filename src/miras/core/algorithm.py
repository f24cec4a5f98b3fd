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
    step_bound: bool = False
    """Whether `lr` is bounded by the keys already met in the chunk (see `GradientDescent`)."""

    def all_gates(self) -> tuple[str, ...]:
        """Names of the gates that this choice reads."""
        return (*self.gates, "momentum") if self.momentum else self.gates


@dataclass(frozen=True)
class GradientDescent(Algorithm):
    """One gradient step per token, with Titans' momentum or without (Titans eq. 8 to 10 and 14).

    `step_bound=True` multiplies a token's `lr` by prod_j (1 - lr_j |k_j . k|) over the earlier tokens j of its
    chunk. All gradients of a chunk are taken at one point, so equal keys would otherwise add up to a step of
    chunk_size times lr and diverge; bounded, they add up to at most one full step. It needs lr <= 1 and keys of
    norm at most 1, and makes the chunked rule of a repeated key equal to the unchunked one.
    """

    momentum: bool = False
    step_bound: bool = False


def step_bound(lr: Tensor, key: Tensor, seen_lr: Tensor, seen_key: Tensor) -> Tensor:
    """prod_j (1 - lr_j |k_j . k_t|) over a set of earlier tokens.

    key (..., T, d_key), seen_key (..., J, d_key), seen_lr (..., J) or (..., T, J) -> (..., T).
    """
    overlap = (key @ seen_key.mT).abs()
    weight = seen_lr if seen_lr.dim() == overlap.dim() else seen_lr[..., None, :]
    return (1 - weight * overlap).prod(-1)


ALGORITHMS = (GradientDescent,)
