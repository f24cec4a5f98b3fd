"""A way to observe running memories without changing any signature."""

import html
import math
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(eq=False, repr=False)
class Observation(Mapping[str, dict[str, Tensor]]):
    """What memories did while it was open: `seen[layer][name]` is (B, H, T).

    Names: `momentary` |grad_t|, `accumulated` |S_t|, `loss` (the inner loss), `weight` |W_t|, and
    each gate the rule reads (`lr` is the step that was taken, after the step bound; `lr.w1` where
    weights have their own). A token that did not write has 0 in `lr` and `forget`; a padding token
    has 0 everywhere.
    """

    calls: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict[str, list[dict[str, Tensor]]])

    def record(self, layer: str, values: dict[str, Tensor]) -> None:
        """Append the values (B, H, T) of one call of a layer."""
        self.calls.setdefault(layer, []).append(values)

    def __getitem__(self, layer: str) -> dict[str, Tensor]:
        calls = self.calls[layer]
        return {name: torch.cat([c[name] for c in calls], -1) for name in calls[0]}

    def __iter__(self) -> Iterator[str]:
        return iter(self.calls)

    def __len__(self) -> int:
        return len(self.calls)

    def __bool__(self) -> bool:
        return True  # an open observation that is still empty is one

    def layers(self) -> tuple[str, ...]:
        """Names of the observed layers, in the order of their first call."""
        return tuple(self.calls)

    def __repr__(self) -> str:
        if not self.calls:
            return "Observation(nothing was seen)"
        layer, calls = next(iter(self.calls.items()))
        B, H, _ = next(iter(calls[0].values())).shape
        T = sum(next(iter(call.values())).shape[-1] for call in calls)
        size = f"{len(self.calls)} layer{'s' * (len(self.calls) != 1)}, {B} x {H} heads x {T:,} tokens"
        return f"Observation({size}; seen[{layer!r}] has {', '.join(calls[0])})"

    def _repr_html_(self) -> str:
        """For notebooks: each layer's momentary surprise along the tokens, its mean over rows and
        heads."""
        rows = [
            f"<tr><th>{name}</th><td>{_sketch(self[name]['momentary'].double().mean((0, 1)).tolist())}</td></tr>"
            for name in self.calls
        ]
        said = html.escape(repr(self))
        return f"<p>{said}</p><p>Momentary surprise by token:</p><table>{''.join(rows)}</table>"


def _sketch(values: list[float], width: int = 600, height: int = 60) -> str:
    """A line chart of values, from 0 to the largest; each point is the mean of several values."""
    values = [x if math.isfinite(x) else 0.0 for x in values]
    step = -(-len(values) // width)
    means = [fmean(values[i : i + step]) for i in range(0, len(values), step)]
    top = max(means) or 1.0
    points = " ".join(
        f"{i * width / len(means):.1f},{height * (1 - y / top):.1f}" for i, y in enumerate(means)
    )
    line = f'<polyline points="{points}" fill="none" stroke="currentColor"/>'
    return f'<svg width="{width}" height="{height}" role="img">{line}</svg> up to {top:.3g}'


_open: ContextVar[Observation | None] = ContextVar("observation", default=None)


def observing() -> Observation | None:
    """The currently open observation, if any."""
    return _open.get()


@contextmanager
def observe(active: bool = True) -> Generator[Observation, None, None]:
    """Record what every memory does inside the `with` block; `active=False` suspends an outer
    observation."""
    seen = Observation()
    token = _open.set(seen if active else None)
    try:
        yield seen
    finally:
        _open.reset(token)


class Watch(NamedTuple):
    """Records what one layer does; an argument of its run."""

    seen: Observation
    layer: str

    def record(self, values: dict[str, Tensor], steps: int = 1) -> None:
        """The values (B, H, steps T) of a call; for tokens with several steps, those of the last
        step."""
        self.seen.record(self.layer, {n: x[..., steps - 1 :: steps] for n, x in values.items()})


def watching(layer: str) -> Watch | None:
    """The open observation, for a layer of that name; compiled calls are not observed."""
    seen = None if torch.compiler.is_compiling() else observing()
    return None if seen is None else Watch(seen, layer)
