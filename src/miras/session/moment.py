"""A session at one moment, as values: its state, its history, and what was learned."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from miras.core.state import Tree
from miras.nn.lm import LMState

Ids = NDArray[np.uint8 | np.int32]
"""Token ids (T,) as stored: one byte each if the vocabulary allows it."""

KEEP = 4096
"""Default number of tokens kept of each episode, to test later what is left of it."""


def compact(ids: NDArray[np.int64], vocab_size: int) -> Ids:
    """Token ids in the smallest stored dtype."""
    return ids.astype(np.uint8 if vocab_size <= 256 else np.int32)


@dataclass(frozen=True, eq=False, repr=False)
class Episode:
    """One text that was read, and how well it was predicted.

    time: when it began (UTC, ISO 8601); start: tokens read by the session before; tokens: read in
    it, including generated ones; nats, scored: sum and number of the losses of what was fed; kept:
    its first tokens; after: mean loss of these in nats, read again without writing at the end of
    the episode (None: too few were kept); learned: number of steps of the outer weights.
    """

    name: str
    time: str
    start: int
    kept: Ids
    tokens: int = 0
    nats: float = 0.0
    scored: int = 0
    after: float | None = None
    learned: int = 0

    def __repr__(self) -> str:
        loss = "" if self.loss is None else f", loss {self.loss:.3f} nats"
        return f"Episode({self.name!r}, {self.time}, {self.tokens:,} tokens{loss}, {len(self.kept):,} kept)"

    @property
    def loss(self) -> float | None:
        """Mean loss while it was read, in nats per token; None if nothing in it was predicted."""
        return self.nats / self.scored if self.scored else None

    def grown(self, ids: NDArray[np.int64], losses: NDArray[np.float32], keep: int) -> "Episode":
        """The episode with tokens (T,) appended; losses (T,) are NaN where they do not count."""
        room = max(0, keep - len(self.kept))
        return replace(
            self,
            kept=np.concatenate([self.kept, ids[:room].astype(self.kept.dtype)]),
            tokens=self.tokens + len(ids),
            nats=self.nats + float(np.nansum(losses, dtype=np.float64)),
            scored=self.scored + int((~np.isnan(losses)).sum()),
        )


@dataclass(frozen=True, eq=False, repr=False)
class Reservoir:
    """A uniform sample of bounded size of the token sequences seen so far."""

    segments: tuple[Ids, ...] = ()
    seen: int = 0

    def __repr__(self) -> str:
        return f"Reservoir({len(self.segments)} of {self.seen:,} segments)"

    def with_segment(self, segment: Ids, size: int) -> "Reservoir":
        """The sample after one more sequence; it holds at most `size`."""
        held = list(self.segments[:size])
        if len(held) < size:
            held.append(segment)
        elif (place := int(self._random().integers(self.seen + 1))) < size:
            held[place] = segment
        return Reservoir(tuple(held), self.seen + 1)

    def draw(self) -> Ids | None:
        """One of the sequences, the same one until another is added; None if there is none."""
        return self.segments[int(self._random().integers(len(self.segments)))] if self.segments else None

    def _random(self) -> np.random.Generator:
        return np.random.default_rng(self.seen)


@dataclass(frozen=True, eq=False, repr=False)
class Moment:
    """Everything a session is at one moment: what a mark stores and a rewind restores.

    delta: what was learned, {weight of the model: difference from the base model's}, empty for
    nothing.
    """

    state: LMState
    episodes: tuple[Episode, ...] = ()
    delta: Tree = field(default_factory=dict)
    past: Reservoir = field(default_factory=Reservoir)

    def __repr__(self) -> str:
        learned = f", {len(self.delta)} weights learned" if self.delta else ""
        return f"Moment({self.tokens:,} tokens, {len(self.episodes)} episodes{learned})"

    @property
    def tokens(self) -> int:
        """Tokens read so far."""
        return int(self.state.tokens[0])

    @property
    def days(self) -> int:
        """Days (UTC) on which something was read."""
        return len({episode.time[:10] for episode in self.episodes})


T = TypeVar("T")


def distinct(values: Iterable[T]) -> list[T]:
    """Each object once: what several moments share is stored once."""
    return list({id(value): value for value in values}.values())


def mean(losses: NDArray[np.float32]) -> float | None:
    """The mean of the losses that are not NaN, or None without any."""
    value = math.nan if np.isnan(losses).all() else float(np.nanmean(losses, dtype=np.float64))
    return None if math.isnan(value) else value
