"""Titans' ways to wire a memory to attention: as context, as gate, as layer (Titans 4, eq. 21 to 31)."""

from dataclasses import dataclass, replace
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.core.rule import Rule, init_state
from miras.core.state import Record, Tree, choose, known
from miras.engine.plan import Part, Plan, joined
from miras.layers.attention import Window
from miras.layers.conv import conv
from miras.nn.attention import AttentionLayer, AttentionReader
from miras.nn.config import segment_refusal
from miras.nn.memory import MemoryLayer, MemoryOptions, MemoryReader, MemoryState
from miras.nn.mixer import Mixer, head_width
from miras.nn.norm import RMSNorm


@dataclass(frozen=True)
class WiredState(Record):
    """The states of an attention and of a memory that are wired side by side, or one behind the other."""

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
        head_dim: int | None = None,
        window_size: int | None = None,
        num_persistent: int = 0,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-6,
        gate: str = "silu",
        **memory: Unpack[MemoryOptions],
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        head_dim = head_width(self, hidden_size, num_heads, head_dim)
        width = num_heads * head_dim
        self.attention = AttentionReader(
            hidden_size, num_heads, head_dim, window_size, num_persistent, rope_theta
        )
        self.memory = MemoryReader(
            hidden_size,
            num_heads,
            rule,
            head_dim=head_dim,
            value_dim=head_dim,
            rope_theta=rope_theta,
            **memory,
        )
        self.norm_a = RMSNorm(width, eps=norm_eps)
        self.norm_b = RMSNorm(width, eps=norm_eps)
        self.activation = {"silu": F.silu, "sigmoid": torch.sigmoid}[gate]
        self.out = nn.Linear(width, hidden_size, bias=False)
        nn.init.normal_(self.out.weight, std=self.out.in_features**-0.5)

    def initial(self, rows: int, like: Tensor) -> WiredState:
        return WiredState(self.attention.initial(rows, like), self.memory.initial(rows, like))

    def place(self, state: WiredState) -> list[int]:
        return self.memory.place(state.memory)

    def prepare(self, plan: Plan) -> None:
        self.memory.prepare(plan)

    def one_graph(self, plan: Plan) -> bool:
        return self.memory.one_graph(plan)

    def mix(self, x: Tensor, state: WiredState, plan: Plan) -> tuple[Tensor, WiredState]:
        y, window = self.attention.mix(x, state.attention, plan)
        m, memory = self.memory.mix(x, state.memory, plan)
        return self.out(self.norm_a(y) * self.activation(self.norm_b(m))), WiredState(window, memory)


class MemoryAsLayer(Mixer):
    """MAL: a memory layer, and sliding-window attention over what it gives, o = attention(norm(memory(x))).

    Titans eq. 29 to 31; the norm between the two is ours. Persistent tokens are seen by the attention only.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        rule: Rule,
        *,
        head_dim: int | None = None,
        window_size: int | None = None,
        num_persistent: int = 0,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-6,
        **memory: Unpack[MemoryOptions],
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.memory = MemoryLayer(
            hidden_size,
            num_heads,
            rule,
            head_dim=head_dim,
            rope_theta=rope_theta,
            norm_eps=norm_eps,
            **memory,
        )
        self.norm = RMSNorm(hidden_size, eps=norm_eps)
        self.attention = AttentionLayer(
            hidden_size,
            num_heads,
            head_dim=head_dim,
            window_size=window_size,
            num_persistent=num_persistent,
            rope_theta=rope_theta,
        )

    def initial(self, rows: int, like: Tensor) -> WiredState:
        return WiredState(self.attention.initial(rows, like), self.memory.initial(rows, like))

    def place(self, state: WiredState) -> list[int]:
        return self.memory.place(state.memory)

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
    """What memory as context carries, the segment in progress included.

    attention: the segment's keys and values so far, two for each token; memory: the memory's own state, with the
    convolutions' tails of what was written; frozen {weight: (B, H, d_in, d_out)}: the memory's anchor at the end of
    the segment before; tails: of the queries made from x, and of those that one memory token pools.
    """

    attention: Window
    memory: MemoryState
    frozen: Tree
    tails: Tree


class MemoryAsContext(Mixer):
    """MAC: attention inside a segment that also sees what the memory knew before it (Titans eq. 21 to 25).

    For token j of a segment, M the memory with its output projection, M_0 as it stood at the end of the segment
    before, M_j as it stands after token j, P the persistent tokens:

        h_i = norm(M_0(q(x_i)))                          i <= j
        y_j = W_O attention(q = x_j; P, h_1, x_1, ... h_j, x_j)
        M_j = M_{j-1} updated with keys, values and gates made from y_j
        o_j = out(y_j * sigmoid(norm(M_j(q(y_j)))))

    h_i has the rotary position of x_i. One W_Q serves both reads; each has its own convolution tail. With
    `pool` p > 1 there is one memory token for p tokens, its query the mean of theirs, seen from the last of them on.
    Raises ValueError unless chunks and pools divide the segment.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        rule: Rule,
        *,
        segment_size: int,
        head_dim: int | None = None,
        num_persistent: int = 0,
        pool: int = 1,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-6,
        **memory: Unpack[MemoryOptions],
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        if reason := segment_refusal(segment_size, rule.chunk_size, pool):
            raise ValueError(f"MemoryAsContext: {reason}")
        head_dim = head_width(self, hidden_size, num_heads, head_dim)
        width = num_heads * head_dim
        self.segment_size, self.pool = segment_size, pool
        self.attention = AttentionReader(
            hidden_size, num_heads, head_dim, segment_size, num_persistent, rope_theta, keys_per_token=2
        )
        self.memory = MemoryReader(
            hidden_size,
            num_heads,
            rule,
            head_dim=head_dim,
            value_dim=head_dim,
            rope_theta=rope_theta,
            **memory,
        )
        self.read = nn.Linear(width, hidden_size, bias=False)
        self.attended = nn.Linear(width, hidden_size, bias=False)
        self.norm_context = RMSNorm(hidden_size, eps=norm_eps)
        self.norm_gate = RMSNorm(hidden_size, eps=norm_eps)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        for linear in (self.read, self.attended, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def initial(self, rows: int, like: Tensor) -> ContextState:
        memory = self.memory.initial(rows, like)
        tails = {"q": self.memory.q.initial(rows, like)}
        if self.pool > 1:
            tails["pooled"] = like.new_zeros(rows, self.pool - 1, self.memory.q.proj.out_features)
        return ContextState(self.attention.initial(rows, like), memory, memory.memory.anchor, tails)

    def place(self, state: ContextState) -> list[int]:
        return known(self._phase(state))

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
        """How many tokens of the open segment are read, (B,): its attention began where the segment did."""
        return (state.attention.next - state.attention.start) % self.segment_size

    def _within(self, x: Tensor, state: ContextState, part: Part) -> tuple[Tensor, ContextState]:
        """Tokens of one segment, its rest or a piece of it."""
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
        """The anchor that a segment reads: that at the end of the one before, or of a new document."""
        memory = state.memory.memory
        now = memory.anchor  # a segment ends where a chunk does, where the anchor stands for the weights
        if part.plan.reset is not None:
            fresh = init_state(self.memory.rule, self.memory.A0(len(memory.phase))).anchor
            now = choose(part.plan.reset[:, 0], fresh, now)
        return now if part.everyone or part.starts is None else choose(part.starts, now, state.frozen)

    def _context(self, x: Tensor, state: ContextState, plan: Plan) -> tuple[Tensor, Tensor | None, Tree]:
        """The memory tokens h (B, n, hidden) of x, which of the (B, 2 n) tokens are there, and the new tails."""
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
        """(B, 2 n): every token's own key, and a memory token's at the last one of its pool."""
        phase = self._phase(state)[:, None]
        if plan.reset is not None:
            phase = torch.where(plan.reset[:, :1], 0, phase)
        last = (phase + torch.arange(n, device=phase.device)) % self.pool == self.pool - 1
        return torch.stack([last, torch.ones_like(last)], 2).flatten(1)


def _emptied(window: Window, part: Part) -> Window:
    """The window without the keys of the segment before, in the rows where one begins."""
    if part.everyone:
        return replace(window, k=window.k[:, :, :0], v=window.v[:, :, :0], position=window.position[:, :0])
    assert part.starts is not None
    old = part.starts[:, None]
    k, v = (x.masked_fill(old[..., None, None], 0) for x in (window.k, window.v))
    return replace(window, k=k, v=v, position=window.position.masked_fill(old, -1))
