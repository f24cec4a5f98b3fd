"""The memory as a layer: project, gate, scan, normalise, gate, project."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.core.algorithm import GradientDescent
from miras.core.memory import MLP
from miras.core.rows import Rows
from miras.core.rule import Rule, State, init_state
from miras.core.state import Record
from miras.nn.gates import Gate, Gates, Precise
from miras.nn.mixer import Mixer, Projection, heads, merge
from miras.nn.norm import RMSNorm, unit
from miras.ops import scan


@dataclass(frozen=True)
class MemoryState(Record):
    """A memory layer's state: the memory's own, and the tail of each convolution (B, conv_size - 1, width)."""

    memory: State
    tails: dict[str, Tensor]


TITANS_RULE = Rule(memory=MLP(), algorithm=GradientDescent(momentum=True, step_bound=10.0))
"""Titans' memory (NeurIPS version): two layers, expansion 4, momentum, forgetting, chunks of 16."""

DEFAULT_GATES: dict[str, Gate] = {
    "lr": Gate(scale=0.25),
    "momentum": Gate(scale=0.9),
    "forget": Gate(bias=-5.0),
}
"""Stable (docs/stability.md): momentum below 0.9, `lr` times 0.1 of at most 0.25, little forgetting."""


class InitialMemory(Precise):
    """The learned initial accumulators A_0, {weight: (H, d_in, d_out)}, in fp32."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], num_heads: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(num_heads, *shape)))

    def reset_parameters(self) -> None:
        """Normal, with deviation scale / sqrt(d_in)."""
        for a in self.parameters():
            nn.init.normal_(a, std=self.scale * a.shape[1] ** -0.5) if self.scale else nn.init.zeros_(a)

    def forward(self, rows: int) -> dict[str, Tensor]:
        return {name: a.expand(rows, *a.shape) for name, a in self.named_parameters()}


class MemoryReader(Mixer):
    """From x (B, T, hidden) to what the memory answers, (B, T, H * Dv): papers 1.4 up to the read.

    q, k: linear, convolution, SiLU, l2 norm; v: linear, convolution, SiLU; gates: linear and link. The scan
    runs in fp32 whatever x is.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        rule: Rule,
        gates: Mapping[str, Gate],
        head_dim: int,
        value_dim: int,
        conv_size: int,
        initial_scale: float,
    ) -> None:
        super().__init__()
        shapes = rule.memory.shapes(head_dim, value_dim)
        if initial_scale == 0 and len(shapes) > 1:
            raise ValueError(
                f"MemoryReader: initial_scale=0 leaves a memory of {len(shapes)} weights where no gradient can move "
                f"it; give a positive initial_scale"
            )
        self.rule, self.num_heads = rule, num_heads
        self.q = Projection(hidden_size, num_heads * head_dim, conv_size)
        self.k = Projection(hidden_size, num_heads * head_dim, conv_size)
        self.v = Projection(hidden_size, num_heads * value_dim, conv_size)
        self.gates = Gates(hidden_size, num_heads, rule, gates)
        self.A0 = InitialMemory(shapes, num_heads, initial_scale)
        for part in (self.q, self.k, self.v, self.A0):
            part.reset_parameters()
        self.gates.reset_parameters(hidden_size**-0.5 / 4)

    def initial(self, rows: int, like: Tensor) -> MemoryState:
        tails = {name: getattr(self, name).initial(rows, like) for name in ("q", "k", "v")}
        return MemoryState(init_state(self.rule, self.A0(rows)), tails)

    def mix(self, x: Tensor, state: MemoryState, rows: Rows) -> tuple[Tensor, MemoryState]:
        parts, tails = {}, {}
        for name in ("q", "k", "v"):
            y, tails[name] = getattr(self, name)(x, state.tails[name], rows)
            parts[name] = heads(y, self.num_heads).to(self.gates.proj.weight.dtype)
        gates = self.gates(x)
        with torch.autocast(x.device.type, enabled=False):
            y, memory = scan(
                self.rule,
                state.memory,
                unit(parts["q"]),
                unit(parts["k"]),
                parts["v"],
                gates,
                valid=rows.valid(x.shape[1]),
                write=rows.write,
                reset=rows.reset,
                initial=None if rows.reset is None else self.A0(x.shape[0]),
            )
        return merge(y).to(x.dtype), MemoryState(memory, tails)


class MemoryLayer(Mixer):
    """A memory as a drop-in sequence layer (Titans' LMM): out(norm(read) * silu(gate(x))).

    hidden_size, num_heads; `rule` the four choices; `gates` how the gates that the rule reads are made;
    `head_dim` the key width (default hidden_size / num_heads), `value_dim` the value width (default head_dim);
    `conv_size` taps of the convolutions behind the projections, 0 for none; `initial_scale` the deviation of
    the initial memory times sqrt(d_in).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        rule: Rule = TITANS_RULE,
        *,
        gates: Mapping[str, Gate] | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        conv_size: int = 4,
        initial_scale: float = 1.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        value_dim = head_dim if value_dim is None else value_dim
        self.reader = MemoryReader(
            hidden_size,
            num_heads,
            rule,
            DEFAULT_GATES | dict(gates or {}),
            head_dim,
            value_dim,
            conv_size,
            initial_scale,
        )
        self.norm = RMSNorm(value_dim, eps=norm_eps)
        self.gate = nn.Linear(hidden_size, num_heads * value_dim, bias=False)
        self.out = nn.Linear(num_heads * value_dim, hidden_size, bias=False)
        for linear in (self.gate, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def initial(self, rows: int, like: Tensor) -> MemoryState:
        return self.reader.initial(rows, like)

    def mix(self, x: Tensor, state: MemoryState, rows: Rows) -> tuple[Tensor, MemoryState]:
        read, state = self.reader.mix(x, state, rows)
        read = self.norm(read.unflatten(-1, (self.reader.num_heads, -1))).flatten(-2)
        return self.out(read * F.silu(self.gate(x))), state
