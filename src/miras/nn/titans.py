"""Titans' combinations of memory and attention: as context, as gate, as layer (Titans 4, eq. 21 to
31)."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.core.rule import init_state
from miras.core.state import Record, Tree, choose, known
from miras.engine.plan import Part, Plan, joined
from miras.layers.attention import Window
from miras.layers.conv import conv
from miras.nn.attention import AttentionConfig, AttentionReader, rotary_refusal
from miras.nn.memory import MemoryConfig, MemoryReader, MemoryState
from miras.nn.mixer import Mixer
from miras.nn.norm import RMSNorm
from miras.nn.part import MixerConfig, Sizes, check_sizes


@dataclass(frozen=True)
class WiredState(Record):
    """The states of an attention and a memory, side by side or in sequence."""

    attention: Window
    memory: MemoryState


MAG_GATES = {"silu": F.silu, "sigmoid": torch.sigmoid}
"""Functions that memory as gate may apply to its normalised read."""


@dataclass(frozen=True, kw_only=True)
class MAGConfig(MixerConfig):
    """Memory as gate: a `MemoryAsGate`. mag_gate: "silu" or "sigmoid", which Titans 4.2 leaves
    open."""

    name: ClassVar[str] = "mag"

    attention: AttentionConfig = AttentionConfig()
    memory: MemoryConfig = MemoryConfig()
    mag_gate: str = "silu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mag_gate not in MAG_GATES:
            raise ValueError(
                f"MAGConfig: mag_gate must be one of {', '.join(MAG_GATES)}, got {self.mag_gate!r}"
            )

    def build(self, sizes: Sizes) -> "MemoryAsGate":
        return MemoryAsGate(sizes, self)

    def refusal(self, sizes: Sizes) -> str | None:
        value_dim = self.memory.widths(sizes)[1]
        if value_dim != sizes.width():
            return (
                f"memory as gate multiplies the memory's read with the attention's, whose heads are {sizes.width()} "
                f"wide; leave out value_dim, got {value_dim}"
            )
        return super().refusal(sizes)

    def flops(self, sizes: Sizes) -> int:
        out = 2 * sizes.num_heads * sizes.width() * sizes.hidden_size
        return self.attention.reading_flops(sizes) + self.memory.reading_flops(sizes) + out


class MemoryAsGate(Mixer):
    """MAG: sliding-window attention and a memory side by side,
    o = out(norm_a(y) * gate(norm_b(m))).

    y = attention(x), m = memory(x) (Titans eq. 26 to 28), `gate` the config's `mag_gate`. Both read
    the same x; only attention sees persistent tokens.
    """

    def __init__(self, sizes: Sizes, config: MAGConfig) -> None:
        super().__init__()
        self.hidden_size = hidden_size = sizes.hidden_size
        width, eps = sizes.num_heads * sizes.width(), sizes.norm_eps
        self.attention = AttentionReader(sizes, config.attention)
        self.memory = MemoryReader(sizes, config.memory)
        self.norm_a, self.norm_b = RMSNorm(width, eps=eps), RMSNorm(width, eps=eps)
        self.activation = MAG_GATES[config.mag_gate]
        self.out = nn.Linear(width, hidden_size, bias=False)
        nn.init.normal_(self.out.weight, std=self.out.in_features**-0.5)

    def initial(self, rows: int, like: Tensor) -> WiredState:
        return WiredState(self.attention.initial(rows, like), self.memory.initial(rows, like))

    def place(self, state: WiredState) -> list[int]:
        return self.memory.place(state.memory)

    def fits(self, state: WiredState, rows: int) -> None:
        self.memory.fits(state.memory, rows)

    def prepare(self, plan: Plan) -> None:
        self.memory.prepare(plan)

    def one_graph(self, plan: Plan) -> bool:
        return self.memory.one_graph(plan)

    def mix(self, x: Tensor, state: WiredState, plan: Plan) -> tuple[Tensor, WiredState]:
        y, window = self.attention.mix(x, state.attention, plan)
        m, memory = self.memory.mix(x, state.memory, plan)
        return self.out(self.norm_a(y) * self.activation(self.norm_b(m))), WiredState(window, memory)


@dataclass(frozen=True, kw_only=True)
class MALConfig(MixerConfig):
    """Memory as layer, before attention: a `MemoryAsLayer`."""

    name: ClassVar[str] = "mal"

    attention: AttentionConfig = AttentionConfig()
    memory: MemoryConfig = MemoryConfig()

    def build(self, sizes: Sizes) -> "MemoryAsLayer":
        return MemoryAsLayer(sizes, self)

    def flops(self, sizes: Sizes) -> int:
        return self.memory.flops(sizes) + self.attention.flops(sizes)


class MemoryAsLayer(Mixer):
    """MAL: a memory layer, then sliding-window attention on its output,
    o = attention(norm(memory(x))).

    Titans eq. 29 to 31, with an added norm between the two. Only attention sees persistent tokens.
    """

    def __init__(self, sizes: Sizes, config: MALConfig) -> None:
        super().__init__()
        self.hidden_size = sizes.hidden_size
        self.memory = config.memory.build(sizes)
        self.norm = RMSNorm(sizes.hidden_size, eps=sizes.norm_eps)
        self.attention = config.attention.build(sizes)

    def outputs(self) -> list[Tensor]:
        return self.attention.outputs()

    def initial(self, rows: int, like: Tensor) -> WiredState:
        return WiredState(self.attention.initial(rows, like), self.memory.initial(rows, like))

    def place(self, state: WiredState) -> list[int]:
        return self.memory.place(state.memory)

    def fits(self, state: WiredState, rows: int) -> None:
        self.memory.fits(state.memory, rows)

    def prepare(self, plan: Plan) -> None:
        self.memory.prepare(plan)

    def one_graph(self, plan: Plan) -> bool:
        return self.memory.one_graph(plan)

    def mix(self, x: Tensor, state: WiredState, plan: Plan) -> tuple[Tensor, WiredState]:
        m, memory = self.memory.mix(x, state.memory, plan)
        y, window = self.attention.mix(self.norm(m), state.attention, plan)
        return y, WiredState(window, memory)


@dataclass(frozen=True)
class ContextState(Record):
    """The state of memory as context, including the open segment.

    attention: the segment's keys and values so far, two per token; memory: the memory's own state,
    with the convolution tails of the written path; frozen {weight: (B, H, d_in, d_out)}: the
    memory's anchor at the end of the previous segment; tails: of the queries computed from x, and
    of those pooled into one memory token.
    """

    attention: Window
    memory: MemoryState
    frozen: Tree
    tails: Tree


@dataclass(frozen=True, kw_only=True)
class MACConfig(MixerConfig):
    """Memory as context: a `MemoryAsContext`.

    segment_size: tokens of a segment, a multiple of the memory's chunk_size; pool: tokens of a
    segment that share one memory token; num_persistent: learned keys and values per head that every
    token sees. Raises ValueError unless chunks and pools divide the segment.
    """

    name: ClassVar[str] = "mac"

    memory: MemoryConfig = MemoryConfig()
    segment_size: int = 512
    pool: int = 1
    num_persistent: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        chunk_size = self.memory.rule.chunk_size
        if self.segment_size < 1 or self.segment_size % chunk_size:
            raise ValueError(
                f"MACConfig: segment_size must be a multiple of chunk_size {chunk_size}, got {self.segment_size}; a "
                f"segment reads the memory as it stands where a chunk ends"
            )
        if self.pool < 1 or self.segment_size % self.pool:
            raise ValueError(f"MACConfig: pool must divide segment_size {self.segment_size}, got {self.pool}")
        check_sizes(self, num_persistent=0, segment_size=1)

    def build(self, sizes: Sizes) -> "MemoryAsContext":
        return MemoryAsContext(sizes, self)

    def attention(self) -> AttentionConfig:
        """The attention inside a segment."""
        return AttentionConfig(window_size=self.segment_size, num_persistent=self.num_persistent)

    def stride(self) -> int:
        return self.segment_size

    def refusal(self, sizes: Sizes) -> str | None:
        return rotary_refusal(sizes.width()) or super().refusal(sizes)

    def words(self) -> list[str]:
        return [
            f"attention inside segments of {self.segment_size:,} tokens and their memory tokens, "
            f"{self.num_persistent} persistent tokens"
        ]

    def sees(self) -> dict[str, Any]:
        return self.attention().sees()

    def flops(self, sizes: Sizes) -> int:
        """A complete segment has two keys per token."""
        D, H, width = sizes.hidden_size, sizes.num_heads, sizes.width()
        d_key, d_value = self.memory.widths(sizes)
        out, read = 2 * H * width * D, 2 * H * d_value * D
        # Query and read of the memory tokens, and keys and values computed from them.
        shapes = self.memory.rule.memory.shapes(*self.memory.held(sizes))
        recall = 2 * H * (D * d_key + sum(d_in * d_out for d_in, d_out in shapes.values())) + 2 * out
        inner = self.attention().reading_flops(sizes) + self.memory.reading_flops(sizes)
        return inner + recall + out + 2 * read + 2 * D * D


class MemoryAsContext(Mixer):
    """MAC: attention inside a segment that also sees what the memory held before it (Titans eq. 21
    to 25).

    For token j of a segment; M is the memory with its output projection, M_0 at the end of the
    previous segment, M_j after token j; P are the persistent tokens:

        h_i = norm(M_0(q(x_i)))                          i <= j
        y_j = W_O attention(q = x_j; P, h_1, x_1, ... h_j, x_j)
        M_j = M_{j-1} updated with keys, values and gates computed from y_j
        o_j = out(y_j * sigmoid(norm(M_j(q(y_j)))))

    h_i has the rotary position of x_i. Both reads use the same W_Q; each has its own convolution
    tail. With `pool` p > 1 there is one memory token for p tokens. Its query is the mean of theirs,
    and it is visible from the last of them on.
    """

    def __init__(self, sizes: Sizes, config: MACConfig) -> None:
        super().__init__()
        self.hidden_size = hidden_size = sizes.hidden_size
        width, eps = sizes.num_heads * sizes.width(), sizes.norm_eps
        self.segment_size, self.pool = config.segment_size, config.pool
        self.attention = AttentionReader(sizes, config.attention(), keys_per_token=2)
        self.memory = MemoryReader(sizes, config.memory)
        self.read = nn.Linear(sizes.num_heads * config.memory.widths(sizes)[1], hidden_size, bias=False)
        self.attended = nn.Linear(width, hidden_size, bias=False)
        self.norm_context, self.norm_gate = RMSNorm(hidden_size, eps=eps), RMSNorm(hidden_size, eps=eps)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        for linear in (self.read, self.attended, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def initial(self, rows: int, like: Tensor) -> ContextState:
        memory = self.memory.initial(rows, like)
        tails = {"q": like.new_zeros(rows, *self.memory.q.tail)}
        if self.pool > 1:
            tails["pooled"] = like.new_zeros(rows, self.pool - 1, self.memory.q.proj.out_features)
        return ContextState(self.attention.initial(rows, like), memory, memory.memory.anchor, tails)

    def place(self, state: ContextState) -> list[int]:
        return known(self._phase(state))

    def fits(self, state: ContextState, rows: int) -> None:
        self.memory.fits(state.memory, rows)

    def prepare(self, plan: Plan) -> None:
        for part in plan.segments(self.segment_size):
            self.memory.prepare(part.plan)

    def one_graph(self, plan: Plan) -> bool:
        begins = any(at % self.segment_size == 0 for at in plan.place)
        return not begins and self.memory.one_graph(plan)

    def mix(self, x: Tensor, state: ContextState, plan: Plan) -> tuple[Tensor, ContextState]:
        parts = plan.segments(self.segment_size)
        if not parts:
            return x, state
        outputs: list[Tensor] = []
        for part in parts:
            y, state = self._within(part.take(x), state, part)
            outputs.append(y)
        return joined(parts, outputs, x.shape[1]), state

    def _phase(self, state: ContextState) -> Tensor:
        """The number of tokens read of the open segment, (B,): its attention began with the
        segment."""
        return (state.attention.next - state.attention.start) % self.segment_size

    def _within(self, x: Tensor, state: ContextState, part: Part) -> tuple[Tensor, ContextState]:
        """The tokens of one segment, or part of it."""
        plan, window = part.plan, state.attention
        if part.starts is not None:
            state = replace(state, frozen=self._frozen(state, part))
            window = _emptied(window, part)
        h, there, tails = self._context(x, state, plan)
        seen = torch.stack([h, x], 2).flatten(1, 2)
        y, window = self.attention.attend(x, seen, window, plan.length, part.begins, there)
        y = self.attended(y)
        m, memory = self.memory.mix(y, state.memory, plan)
        o = self.out(y * torch.sigmoid(self.norm_gate(self.read(m))))
        return o, ContextState(window, memory, state.frozen, tails)

    def _frozen(self, state: ContextState, part: Part) -> Tree:
        """The anchor that a segment reads: that at the end of the previous segment, or of a new
        document."""
        memory = state.memory.memory
        now = memory.anchor  # a segment ends with a chunk, where the anchor represents the weights
        if part.plan.reset is not None:
            fresh = init_state(self.memory.rule, self.memory.A0(len(memory.phase))).anchor
            now = choose(part.plan.reset[:, 0], fresh, now)
        return now if part.everyone or part.starts is None else choose(part.starts, now, state.frozen)

    def _context(self, x: Tensor, state: ContextState, plan: Plan) -> tuple[Tensor, Tensor | None, Tree]:
        """The memory tokens h (B, n, hidden) of x, a mask of the (B, 2 n) keys that exist, and the
        new tails."""
        pooled = state.tails.get("pooled", x[:, :0])
        if pooled.shape[1] + 1 != self.pool:
            raise ValueError(
                f"the state belongs to another layer: its memory tokens pool {pooled.shape[1] + 1} tokens, these "
                f"{self.pool}"
            )
        asked, tail = self.memory.q(x, state.tails["q"], plan)
        tails, there = {"q": tail}, None
        if self.pool > 1:
            mean = asked.new_full((asked.shape[-1], self.pool), 1 / self.pool)
            asked, tails["pooled"] = conv(
                asked, pooled.to(asked.dtype), mean, length=plan.length, reset=plan.reset
            )
            there = self._last_of_pool(state, plan, x.shape[1])
        read = self.memory.recall(asked, state.frozen, state.memory.position, plan)
        return self.norm_context(self.read(read)), there, tails

    def _last_of_pool(self, state: ContextState, plan: Plan, n: int) -> Tensor:
        """(B, 2 n): every token's own key, and the memory token's key at the last token of its
        pool."""
        phase = self._phase(state)[:, None]
        if plan.reset is not None:
            phase = torch.where(plan.reset[:, :1], 0, phase)
        last = (phase + torch.arange(n, device=phase.device)) % self.pool == self.pool - 1
        return torch.stack([last, torch.ones_like(last)], 2).flatten(1)


def _emptied(window: Window, part: Part) -> Window:
    """The window without the keys of the previous segment, in rows where a new one begins."""
    if part.everyone:
        return replace(window, k=window.k[:, :, :0], v=window.v[:, :, :0], position=window.position[:, :0])
    assert part.starts is not None
    old = part.starts[:, None]
    k, v = (x.masked_fill(old[..., None, None], 0) for x in (window.k, window.v))
    return replace(window, k=k, v=v, position=window.position.masked_fill(old, -1))
