"""Attention as a layer, over a sliding window or over everything, with persistent tokens."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from miras.engine.plan import Plan
from miras.layers.attention import Window, attention, init_window
from miras.nn.mixer import Mixer
from miras.nn.part import MixerConfig, Sizes, check_sizes


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Multi-head causal attention with rotary positions: an `AttentionLayer`.

    window_size: tokens of a sliding window, None for full attention; num_persistent: learned keys
    and values per head that every token sees.
    """

    name: ClassVar[str] = "attention"

    window_size: int | None = None
    num_persistent: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, window_size=1, num_persistent=0)

    def build(self, sizes: Sizes) -> "AttentionLayer":
        head_dim, theta = sizes.head_dim, sizes.rope_theta
        return AttentionLayer(
            sizes.hidden_size, sizes.num_heads, head_dim=head_dim, rope_theta=theta, **vars(self)
        )

    def reading_flops(self, sizes: Sizes) -> int:
        """FLOPs of an `AttentionReader`: a window of w tokens costs 4 w D per head.

        The cached keys of full attention are not counted.
        """
        inside = sizes.num_heads * sizes.width()
        keys = 2 * (self.window_size or 0) + self.num_persistent
        return 3 * 2 * sizes.hidden_size * inside + 4 * inside * keys

    def flops(self, sizes: Sizes) -> int:
        return self.reading_flops(sizes) + 2 * sizes.num_heads * sizes.width() * sizes.hidden_size

    def grows(self) -> bool:
        return self.window_size is None

    def refusal(self, sizes: Sizes) -> str | None:
        return rotary_refusal(sizes.width())

    def words(self) -> list[str]:
        window = "everything" if self.window_size is None else f"{self.window_size:,} tokens"
        return [f"attention over {window}, {self.num_persistent} persistent tokens"]

    def sees(self) -> dict[str, Any]:
        return dict(vars(self))


def rotary_refusal(width: int) -> str | None:
    """Why queries and keys of this width cannot be rotated, or None."""
    return f"rotary positions need an even head width, got {width}" if width % 2 else None


class AttentionReader(Mixer):
    """From x (B, T, hidden) to the attention's output (B, T, H * D), before an output projection.

    `window_size` None is full attention. `num_persistent` learned keys and values per head are seen
    by every token and have no position (Titans 4, eq. 19). With `keys_per_token` 2 every token adds
    one more key to its context.
    """

    def __init__(self, sizes: Sizes, config: AttentionConfig, keys_per_token: int = 1) -> None:
        super().__init__()
        self.hidden_size = hidden_size = sizes.hidden_size
        self.num_heads, self.head_dim, self.keys_per_token = sizes.num_heads, sizes.width(), keys_per_token
        self.window_size, self.rope_theta = config.window_size, sizes.rope_theta
        self.q, self.k, self.v = (
            nn.Linear(hidden_size, self.num_heads * self.head_dim, bias=False) for _ in range(3)
        )
        for linear in (self.q, self.k, self.v):
            nn.init.normal_(linear.weight, std=hidden_size**-0.5)
        self.persistent: nn.Parameter | None = None
        if n := config.num_persistent:
            self.persistent = nn.Parameter(torch.randn(2, self.num_heads, n, self.head_dim))

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
        """Queries from x (B, T, hidden), keys and values from context (B, m T, hidden), m of them
        for each token.

        `there` (B, m T) bool masks out parts of the context.
        """
        places = (self.window_size or 0) * self.keys_per_token
        if self.window_size is not None and state.k.shape[2] not in (
            0,
            places,
        ):  # 0: emptied for a new segment
            raise ValueError(
                f"the state belongs to another layer: its window holds {state.k.shape[2]} keys, this layer's {places}"
            )
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for y in (self.q(x), self.k(context), self.v(context))
        )
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
        return y.transpose(1, 2).flatten(2), state


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
        sizes = Sizes(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim, rope_theta=rope_theta)
        config = AttentionConfig(window_size=window_size, num_persistent=num_persistent)
        self.hidden_size = hidden_size
        self.reader = AttentionReader(sizes, config)
        self.out = nn.Linear(num_heads * sizes.width(), hidden_size, bias=False)
        nn.init.normal_(self.out.weight, std=self.out.in_features**-0.5)

    def initial(self, rows: int, like: Tensor) -> Window:
        return self.reader.initial(rows, like)

    def one_graph(self, plan: Plan) -> bool:
        return True

    def mix(self, x: Tensor, state: Window, plan: Plan) -> tuple[Tensor, Window]:
        y, state = self.reader.mix(x, state, plan)
        return self.out(y), state
