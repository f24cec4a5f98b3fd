"""The MLP after a mixer: position by position, without a state."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from miras.nn.part import MLPConfig, Sizes


@dataclass(frozen=True, kw_only=True)
class SwiGLUConfig(MLPConfig):
    """down(silu(gate(x)) * up(x)), `intermediate_size` wide."""

    name: ClassVar[str] = "swiglu"

    def build(self, sizes: Sizes) -> "SwiGLU":
        return SwiGLU(sizes.hidden_size, self.width(sizes))

    def width(self, sizes: Sizes) -> int:
        if sizes.intermediate_size is not None:
            return sizes.intermediate_size
        return -(-(8 * sizes.hidden_size // 3) // 16) * 16

    def flops(self, sizes: Sizes) -> int:
        return 6 * sizes.hidden_size * self.width(sizes)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)
        for linear in (self.gate, self.up, self.down):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
