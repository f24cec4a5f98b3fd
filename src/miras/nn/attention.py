"""Attention as a layer, over a sliding window or over everything, with persistent tokens."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from miras.engine.plan import Plan
from miras.layers.attention import Window, attention, init_window
from miras.nn.mixer import Mixer, head_width, heads, merge


class AttentionReader(Mixer):
    """From x (B, T, hidden) to the attention's answer (B, T, H * D), before an output projection.

    `window_size` None is full attention. `num_persistent` learned keys and values per head are seen by every
    token and have no position (Titans 4, eq. 19). `keys_per_token` 2: every token brings one more into its context.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        window_size: int | None,
        num_persistent: int,
        rope_theta: float,
        keys_per_token: int = 1,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        if window_size is not None and window_size < 1:
            raise ValueError(
                f"AttentionReader: window_size must be at least 1, or None for all; got {window_size}"
            )
        self.num_heads, self.head_dim, self.keys_per_token = num_heads, head_dim, keys_per_token
        self.window_size, self.rope_theta = window_size, rope_theta
        self.q, self.k, self.v = (nn.Linear(hidden_size, num_heads * head_dim, bias=False) for _ in range(3))
        for linear in (self.q, self.k, self.v):
            nn.init.normal_(linear.weight, std=hidden_size**-0.5)
        self.persistent: nn.Parameter | None = None
        if num_persistent:
            self.persistent = nn.Parameter(torch.randn(2, num_heads, num_persistent, head_dim))

    def initial(self, rows: int, like: Tensor) -> Window:
        size = None if self.window_size is None else self.window_size * self.keys_per_token
        return init_window(rows, self.num_heads, self.head_dim, size, like)

    def one_graph(self, plan: Plan) -> bool:
        return True

    def mix(self, x: Tensor, state: Window, plan: Plan) -> tuple[Tensor, Window]:
        return self.attend(x, x, state, plan.length, plan.reset)

    def attend(
        self,
        x: Tensor,
        context: Tensor,
        state: Window,
        length: Tensor | None,
        reset: Tensor | None,
        there: Tensor | None = None,
    ) -> tuple[Tensor, Window]:
        """Queries from x (B, T, hidden), keys and values from context (B, m T, hidden), m of them for each token.

        `there` (B, m T) bool leaves some of the context out.
        """
        places = (self.window_size or 0) * self.keys_per_token
        if self.window_size is not None and state.k.shape[2] not in (
            0,
            places,
        ):  # 0: emptied for a new segment
            raise ValueError(
                f"the state belongs to another layer: its window holds {state.k.shape[2]} keys, this one's {places}"
            )
        q = heads(self.q(x), self.num_heads)
        k, v = (heads(linear(context), self.num_heads) for linear in (self.k, self.v))
        state = replace(state, k=state.k.to(k.dtype), v=state.v.to(v.dtype))
        kept, persistent = self.persistent, None
        if kept is not None:
            keys, values = kept.to(q.dtype).unbind()
            persistent = keys, values
        y, state = attention(
            q,
            k,
            v,
            state,
            size=self.window_size,
            theta=self.rope_theta,
            persistent=persistent,
            there=there,
            length=length,
            reset=reset,
        )
        return merge(y), state


class AttentionLayer(Mixer):
    """Multi-head causal attention with rotary positions: out(attention(x))."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        window_size: int | None = None,
        num_persistent: int = 0,
        rope_theta: float = 10_000.0,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        head_dim = head_width(self, hidden_size, num_heads, head_dim)
        self.reader = AttentionReader(
            hidden_size, num_heads, head_dim, window_size, num_persistent, rope_theta
        )
        self.out = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        nn.init.normal_(self.out.weight, std=self.out.in_features**-0.5)

    def initial(self, rows: int, like: Tensor) -> Window:
        return self.reader.initial(rows, like)

    def one_graph(self, plan: Plan) -> bool:
        return True

    def mix(self, x: Tensor, state: Window, plan: Plan) -> tuple[Tensor, Window]:
        y, state = self.reader.mix(x, state, plan)
        return self.out(y), state
