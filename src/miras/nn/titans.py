"""Titans' ways to wire a memory to attention (papers 2; Titans eq. 21 to 31)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.core.attention import Window
from miras.core.rows import Rows
from miras.core.rule import Rule
from miras.core.state import Record
from miras.nn.attention import AttentionReader
from miras.nn.gates import Gate
from miras.nn.memory import DEFAULT_GATES, TITANS_FEATURES, Features, MemoryReader, MemoryState
from miras.nn.mixer import Mixer
from miras.nn.norm import RMSNorm


@dataclass(frozen=True)
class GatedState(Record):
    """The two branches' states."""

    attention: Window
    memory: MemoryState


class MemoryAsGate(Mixer):
    """MAG: sliding-window attention and a memory side by side, o = out(norm_a(y) * gate(norm_b(m))).

    y = attention(x), m = memory(x) (Titans eq. 26 to 28), `gate` "silu" or "sigmoid". Both read the same x;
    persistent tokens are seen by the attention only.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        rule: Rule,
        *,
        gates: Mapping[str, Gate] | None = None,
        head_dim: int | None = None,
        window_size: int | None = None,
        num_persistent: int = 0,
        conv_size: int = 4,
        initial_scale: float = 1.0,
        features: Features = TITANS_FEATURES,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-6,
        gate: str = "silu",
    ) -> None:
        super().__init__()
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        width = num_heads * head_dim
        self.attention = AttentionReader(
            hidden_size, num_heads, head_dim, window_size, num_persistent, rope_theta
        )
        self.memory = MemoryReader(
            hidden_size,
            num_heads,
            rule,
            DEFAULT_GATES | dict(gates or {}),
            head_dim,
            head_dim,
            conv_size,
            initial_scale,
            features,
            rope_theta,
        )
        self.norm_a = RMSNorm(width, eps=norm_eps)
        self.norm_b = RMSNorm(width, eps=norm_eps)
        self.activation = {"silu": F.silu, "sigmoid": torch.sigmoid}[gate]
        self.out = nn.Linear(width, hidden_size, bias=False)
        nn.init.normal_(self.out.weight, std=self.out.in_features**-0.5)

    def initial(self, rows: int, like: Tensor) -> GatedState:
        return GatedState(self.attention.initial(rows, like), self.memory.initial(rows, like))

    def mix(self, x: Tensor, state: GatedState, rows: Rows) -> tuple[Tensor, GatedState]:
        y, window = self.attention.mix(x, state.attention, rows)
        m, memory = self.memory.mix(x, state.memory, rows)
        return self.out(self.norm_a(y) * self.activation(self.norm_b(m))), GatedState(window, memory)
