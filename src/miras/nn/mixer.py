"""The token mixer interface: (x, state) -> (y, state), whole, in pieces, ragged or token by
token."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from miras.core.observe import watching
from miras.core.state import misfit
from miras.engine.plan import Plan, plan
from miras.layers.conv import conv


class Mixer(nn.Module, ABC):
    """Mixes x (B, T, hidden) along T, carrying a state that is a value.

    A subclass defines `initial` and `mix`, and may define `hidden_size`; `forward` is the same for
    all. `out` is the linear map that writes to the residual stream; otherwise override `outputs`.
    """

    hidden_size: int | None = None
    out: nn.Linear

    @abstractmethod
    def initial(self, rows: int, like: Tensor) -> Any:
        """The state before the first token of `rows` streams."""

    @abstractmethod
    def mix(self, x: Tensor, state: Any, plan: Plan) -> tuple[Tensor, Any]:
        """x (B, T, hidden), with padding at the end of rows -> (y, state)."""

    def outputs(self) -> list[Tensor]:
        """The weights of the linear maps that write to the residual stream."""
        return [self.out.weight]

    def place(self, state: Any) -> list[int]:
        """The number of tokens that the state has read of each row's open chunk or segment.

        A subclass with chunks or segments defines it.
        """
        return []

    def fits(self, state: Any, rows: int) -> None:
        """Raise ValueError where a state is not one of this layer, for as many rows.

        A subclass whose state could be mistaken for another's defines it.
        """

    def prepare(self, plan: Plan) -> None:
        """Ask the plan for everything that `mix` will need, so that nothing is decided later.

        A subclass with chunks or segments defines it.
        """

    def one_graph(self, plan: Plan) -> bool:
        """Whether a call for one token is plain tensor operations: it begins no segment and ends no
        chunk.

        A subclass may override it; by default no token of the mixer is compiled.
        """
        return False

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        *,
        valid: Tensor | None = None,
        write: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """(B, T, hidden) -> (B, T, hidden) and the state afterwards; `state=None` starts a new
        stream.

        valid, write, reset (B, T) bool: a token outside `valid` changes nothing and gives 0; one
        outside `write` reads the memory without writing; `reset` marks the first token of a
        document.
        """
        self._check(x)
        B, T, _ = x.shape
        try:
            place = [0] * B if state is None else self.place(state) or [0] * B
            if state is not None:
                self.fits(state, B)
            rows = plan((B, T), place, x.device, valid, write, reset, watching("memory"))
            x = rows.gather(x)
            self.prepare(rows)
            y, after = self.mix(x, self.initial(B, x) if state is None else state, rows)
        except (AttributeError, RuntimeError, ValueError) as error:
            if state is not None and (reason := misfit(state, self.initial(x.shape[0], x))):
                raise ValueError(
                    f"{type(self).__name__}: the state is not one of this layer: {reason}; pass a state that "
                    f"the layer itself returned"
                ) from error
            raise
        return rows.scatter(y), after

    def _check(self, x: Any) -> None:
        """Raise ValueError unless x is (B, T, hidden)."""
        hidden = "hidden" if self.hidden_size is None else self.hidden_size
        name = type(self).__name__
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: x must be a tensor (B, T, {hidden}), got a {type(x).__name__}")
        if x.dim() != 3 or not x.is_floating_point() or hidden not in ("hidden", x.shape[-1]):
            way = (
                "; for one stream (T, hidden) write x[None]" if x.dim() == 2 and x.is_floating_point() else ""
            )
            raise ValueError(
                f"{name}: x must be floating point (B, T, {hidden}), got {x.dtype} {tuple(x.shape)}{way}"
            )


class Projection(nn.Module):
    """A linear map, then (unless conv_size is 0) a causal depthwise convolution and an activation:
    x -> (y, tail).

    The order is Gated DeltaNet's, which Titans follows (papers: Titans 4.4, SiLU and kernel size
    4).
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        conv_size: int,
        activation: Callable[[Tensor], Tensor] = torch.nn.functional.silu,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.proj = nn.Linear(hidden_size, width, bias=False)
        self.conv = nn.Parameter(torch.empty(width, conv_size)) if conv_size else None
        self.tail = max(conv_size, 1) - 1, width
        """Shape of the convolution's tail, (conv_size - 1, width), zeros at a stream's start."""

    def reset_parameters(self) -> None:
        """Fan-in scaled weights; a convolution that favours the current token."""
        nn.init.normal_(self.proj.weight, std=self.proj.in_features**-0.5)
        if self.conv is not None:
            nn.init.normal_(self.conv, std=0.3)
            with torch.no_grad():
                self.conv[:, -1] += 0.3

    def forward(self, x: Tensor, tail: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        y, taps = self.proj(x), self.conv
        back = self.tail[0]
        if tail.shape[1] != back:
            raise ValueError(
                f"the state belongs to another layer: its convolutions look back {tail.shape[1]} tokens, "
                f"this layer's {back}"
            )
        if taps is not None:
            tail, taps = tail.to(y.dtype), taps.to(y.dtype)
            return conv(y, tail, taps, activation=self.activation, length=plan.length, reset=plan.reset)
        return self.activation(y), tail
