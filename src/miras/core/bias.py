"""Axis 2, attentional bias: the inner loss, one number per token. Gradients are derived from it, never typed in."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from miras.core.state import Tree


class Bias(ABC):
    """What the memory is asked to do with a pair: a loss of its prediction (..., d_value) against the value."""

    gates: ClassVar[tuple[str, ...]] = ()
    """Names of the data-dependent gates that `loss` reads, each (...,) like the loss."""

    @abstractmethod
    def loss(self, pred: Tensor, target: Tensor, gates: Tree) -> Tensor:
        """The loss of every token: (..., d_value) and (..., d_value) to (...,)."""


@dataclass(frozen=True)
class L2(Bias):
    """Half the squared error, |pred - target|^2 / 2; its gradient is the residual (Titans eq. 12, halved)."""

    def loss(self, pred: Tensor, target: Tensor, gates: Tree) -> Tensor:
        return 0.5 * (pred - target).square().sum(-1)


@dataclass(frozen=True)
class Dot(Bias):
    """Similarity, -<pred, target>: Hebbian writing, as in linear attention and RetNet (MIRAS 4.5)."""

    def loss(self, pred: Tensor, target: Tensor, gates: Tree) -> Tensor:
        return -(pred * target).sum(-1)


BIASES = (L2, Dot)
