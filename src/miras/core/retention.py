"""Axis 3, retention gate: how much of the accumulator stays, and how the weights follow from it."""

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


class Retention(ABC):
    """A_t = (1 - forget_t) A_{t-1} + step_t;  W_t = link(A_t)."""

    gates: ClassVar[tuple[str, ...]] = ("forget",)
    decayed: bool = False
    """Whether a token's gradient is taken at the memory after its own forgetting."""

    def link(self, A: Tensor) -> Tensor:
        """The weights (..., d_in, d_out) that belong to an accumulator of the same shape."""
        return A


@dataclass(frozen=True)
class Decay(Retention):
    """Weight decay, W_t = (1 - forget_t) W_{t-1} + step_t (Titans eq. 13; MIRAS 4.5 "L2").

    `decayed=False` takes the gradient at the undecayed memory, as Titans does. `decayed=True` takes it at the
    anchor times the product of 1 - forget from the start of the chunk through the token itself, as Gated
    DeltaNet does.
    """

    decayed: bool = False


RETENTIONS = (Decay,)
