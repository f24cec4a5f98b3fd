"""A whole stream through a model, with the loss of every token."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miras.core.observe import Observation
from miras.core.observe import observe as observation
from miras.nn.lm import LM, LMState
from miras.nn.reading import Mask, Tokens, read_pieces


@dataclass(frozen=True, eq=False, repr=False)
class Reading:
    """The result of reading T tokens of each of B streams.

    losses: (B, T) in nats; NaN for the first token of a new stream, which nothing predicts. state:
    a StreamState, from which the next reading continues. seen: what the memories did, if observed.
    """

    losses: NDArray[np.float32]
    state: LMState
    seen: Observation | None

    def __repr__(self) -> str:
        B, T = self.losses.shape
        loss = (
            "nothing predicted" if np.isnan(self.losses).all() else f"mean loss {np.nanmean(self.losses):.3f}"
        )
        return f"Reading({B} x {T:,} tokens, {loss}, {self.state!r}, seen={self.seen!r})"


def never(places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The mask that is false everywhere."""
    return np.zeros(len(places), dtype=np.bool_)


def read(
    model: LM,
    tokens: Tokens,
    state: LMState | None = None,
    *,
    piece: int = 2048,
    write: bool = True,
    progress: Callable[[int], None] | None = None,
    observe: bool = False,
) -> Reading:
    """Read tokens (T,), or (B, T) for B streams, or an iterator over arrays of them, like
    `read_pieces`.

    `write=False` reads without learning; `progress` is called with the number of tokens read.
    Memory: one piece, and 4 bytes per token for its loss; with `observe`, also the whole
    observation.
    """
    mask: Mask | None = None if write else never
    losses: list[NDArray[np.float32]] = []
    with observation() if observe else nullcontext() as seen:
        for part in read_pieces(model, tokens, state, piece=piece, write=mask):
            losses.append(part.losses)
            state = part.state
            if progress is not None:
                progress(part.start + part.losses.shape[1])
    state = model.initial(1) if state is None else state
    if not losses:
        losses = [np.zeros((state.tokens.shape[0], 0), dtype=np.float32)]
    return Reading(np.concatenate(losses, 1), state, seen)
