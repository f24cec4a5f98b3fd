"""One channel through which a running memory can be watched, without touching any signature."""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Observation:
    """What memories did while it was open: `seen[layer][name]` is (B, H, T), by head and token.

    Names: `momentary` |grad_t|, `accumulated` |S_t|, `loss` (the inner loss), `weight` |W_t|, and each gate the
    rule reads (`lr` is the step that was taken, after the step bound; `lr.w1` where weights have their own).
    A token that wrote nothing has 0 in `lr` and `forget`; a padding token has 0 everywhere.
    """

    calls: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict[str, list[dict[str, Tensor]]])
    layer: str = "memory"
    steps: int = 1

    def record(self, values: dict[str, Tensor]) -> None:
        """Append the values (B, H, T) of one call; of tokens that take several steps, those of the last one."""
        values = {n: x[..., self.steps - 1 :: self.steps] for n, x in values.items()}
        self.calls.setdefault(self.layer, []).append(values)

    def __getitem__(self, layer: str) -> dict[str, Tensor]:
        calls = self.calls[layer]
        return {name: torch.cat([c[name] for c in calls], -1) for name in calls[0]}

    def layers(self) -> tuple[str, ...]:
        """Names of the layers that were seen, in the order of their first token."""
        return tuple(self.calls)


_open: ContextVar[Observation | None] = ContextVar("observation", default=None)


def observing() -> Observation | None:
    """The observation that is open here, if any."""
    return _open.get()


@contextmanager
def observe(active: bool = True) -> Generator[Observation, None, None]:
    """Collect what every memory does inside the block; `active=False` closes an outer observation instead."""
    seen = Observation()
    token = _open.set(seen if active else None)
    try:
        yield seen
    finally:
        _open.reset(token)


def layer(name: str) -> AbstractContextManager[None]:
    """Name the layer whose memory runs inside the block."""
    if torch.compiler.is_compiling():  # a compiled token is not watched
        return nullcontext()
    seen = _open.get()
    return nullcontext() if seen is None else _named(seen, name)


@contextmanager
def _named(seen: Observation, name: str) -> Generator[None, None, None]:
    before, seen.layer = seen.layer, name
    try:
        yield
    finally:
        seen.layer = before


@contextmanager
def per_token(steps: int) -> Generator[None, None, None]:
    """Inside the block every token is recorded as `steps` of them."""
    seen = _open.get()
    if seen is None:
        yield
        return
    before, seen.steps = seen.steps, steps
    try:
        yield
    finally:
        seen.steps = before
