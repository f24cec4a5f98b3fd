"""Axis 1, memory structure: where the linear maps are. A memory never holds or sees a weight."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from miras.core.activation import gelu, layer_norm

Linear = Callable[[str, Tensor], Tensor]
"""`linear(name, x)` is x @ W[name], however the weight is held: x (..., d_in) -> (..., d_out)."""


class Memory(ABC):
    """A map from keys (..., d_key) to values (..., d_value) whose weights are learned while reading.

    Weights are named matrices (d_in, d_out), input side first. The first one's input is the key and the last
    one's output the value, so widths can be read off the shapes.
    """

    @abstractmethod
    def shapes(self, d_key: int, d_value: int) -> dict[str, tuple[int, int]]:
        """Name and shape (d_in, d_out) of every weight."""

    @abstractmethod
    def apply(self, x: Tensor, linear: Linear) -> Tensor:
        """The memory's output at x (..., d_key), as (..., d_value)."""


@dataclass(frozen=True)
class Matrix(Memory):
    """A linear memory, M(x) = x W. Titans' L_M = 1; the fast weights of linear attention and DeltaNet."""

    def shapes(self, d_key: int, d_value: int) -> dict[str, tuple[int, int]]:
        return {"w": (d_key, d_value)}

    def apply(self, x: Tensor, linear: Linear) -> Tensor:
        return linear("w", x)


@dataclass(frozen=True)
class MLP(Memory):
    """A deep memory, M(x) = x + LN(gelu(... gelu(x W_1) ...) W_depth) (Titans, NeurIPS version; MIRAS 5.3).

    `depth` counts weight matrices; the hidden width is `expansion` times the key width. The layer norm has no
    affine part. `residual` needs equal key and value widths. Without `norm` nothing bounds the inner gradient: such a
    memory of depth 2 or more diverges on random input unless its steps are small.
    """

    depth: int = 2
    expansion: int = 4
    residual: bool = True
    norm: bool = True

    def __post_init__(self) -> None:
        if self.depth < 1 or self.expansion < 1:
            raise ValueError(
                f"MLP: depth and expansion must be at least 1, got depth={self.depth}, expansion={self.expansion}"
            )

    def shapes(self, d_key: int, d_value: int) -> dict[str, tuple[int, int]]:
        if self.residual and d_key != d_value:
            raise ValueError(
                f"MLP: a residual memory adds its input to its output, so key and value widths must be equal; "
                f"got {d_key} and {d_value}. Use MLP(residual=False) or equal widths"
            )
        widths = [d_key, *[self.expansion * d_key] * (self.depth - 1), d_value]
        return {f"w{i + 1}": (widths[i], widths[i + 1]) for i in range(self.depth)}

    def apply(self, x: Tensor, linear: Linear) -> Tensor:
        y = x
        for i in range(1, self.depth + 1):
            y = linear(f"w{i}", gelu(y) if i > 1 else y)
        if self.norm:
            y = layer_norm(y)
        return x + y if self.residual else y


MEMORIES = (Matrix, MLP)
