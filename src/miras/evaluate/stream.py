"""Bits per byte of a long text read as one stream, as a curve over position."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from miras.data.tokens import ByteTokenizer, Tokenizer
from miras.nn.lm import LM, LMState
from miras.nn.reading import Block, Mask, Piece, Spelling, StreamState, as_rows, read_pieces

CONDITIONS = ("learning", "frozen", "frozen-warmed", "reset")
"""Conditions under which a stream is read; see `stream_curve`."""


@dataclass(frozen=True)
class Curve:
    """Bits per byte along a stream.

    positions, bits_per_byte: (bins,), the middle of each bin in tokens and its mean; mean: over the
    whole stream; num_tokens, num_bytes: scored, which is all but the first token; seconds:
    duration.
    """

    condition: str
    positions: tuple[float, ...]
    bits_per_byte: tuple[float, ...]
    mean: float
    num_tokens: int
    num_bytes: int
    seconds: float


def stream_curve(
    model: LM,
    tokens: Block,
    condition: str = "learning",
    *,
    segment: int = 2048,
    warm: int | None = None,
    bins: int = 100,
    piece: int = 2048,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[int], None] | None = None,
) -> Curve:
    """Score tokens (T,), of which a memory-mapped array is read piece by piece, under one
    condition.

    learning: memories write throughout. frozen: they never write, and stay at A_0. frozen-warmed:
    they write for the first `warm` tokens (None: the first half) only. reset: the `reset` mask is
    true at the first token of every `segment` tokens: memories, convolutions and attention windows
    restart there. That token is still predicted from what was read before it, so that all
    conditions score the same tokens: all but the stream's first. A model whose state grows with
    every token (`ModelConfig.grows`) restarts every `segment` tokens under each condition.

    Bytes are those of the text that `tokenizer` decodes (None: tokens are bytes), spread evenly
    over the tokens of a piece. `progress` is called with the number of tokens read. Raises
    ValueError for invalid values.
    """
    ids = as_rows(tokens)
    num_tokens = ids.shape[1]
    if len(ids) != 1 or num_tokens < 2:
        raise ValueError(f"a stream of at least 2 tokens (T,) is needed, got {tuple(np.shape(tokens))}")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    write, reset = _masks(condition, segment, num_tokens // 2 if warm is None else warm)
    spelling = (
        None if tokenizer is None or isinstance(tokenizer, ByteTokenizer) else Spelling(tokenizer.decode)
    )

    # At least 2, so that the first bin has more than the first token, which is not scored.
    width = max(2, -(-num_tokens // bins))
    bins = -(-num_tokens // width)
    nats, sizes = np.zeros(bins), np.zeros(bins)
    began = time.perf_counter()
    if model.config.grows():
        parts = _segments(model, ids, segment, piece, write)
    else:
        parts = read_pieces(model, ids, piece=piece, write=write, reset=reset)
    for part in parts:
        count = part.tokens.shape[1]
        size = float(count)
        if spelling is not None:
            text = spelling.push(part.tokens[0])
            text += spelling.rest() if part.start + count == num_tokens else ""
            size = float(len(text.encode("utf-8")))
        scored = ~np.isnan(part.losses[0])
        at = (np.arange(part.start, part.start + count) // width)[scored]
        nats += np.bincount(at, part.losses[0][scored], minlength=bins)
        sizes += np.bincount(at, np.full(len(at), size / count), minlength=bins)
        if progress is not None:
            progress(part.start + count)
    seconds = time.perf_counter() - began

    edges = np.minimum(np.arange(bins + 1) * width, num_tokens)
    return Curve(
        condition=condition,
        positions=tuple(((edges[:-1] + edges[1:]) / 2).tolist()),
        bits_per_byte=tuple((nats / math.log(2) / sizes).tolist()),
        mean=float(nats.sum() / math.log(2) / sizes.sum()),
        num_tokens=num_tokens - 1,
        num_bytes=round(sizes.sum()),
        seconds=seconds,
    )


def _segments(model: LM, ids: NDArray[Any], segment: int, piece: int, write: Mask | None) -> Iterator[Piece]:
    """Read every `segment` tokens from a new state; a reset would mask the old keys but keep
    them."""
    logits: Tensor | None = None
    for start in range(0, ids.shape[1], segment):
        state: LMState = model.initial(len(ids))
        if logits is not None:
            state = StreamState(state.layers, state.tokens, logits, place=state.place)
        mask: Mask | None = None if write is None else lambda places, at=start: write(places + at)
        for part in read_pieces(model, ids[:, start : start + segment], state, piece=piece, write=mask):
            yield replace(part, start=start + part.start)
            logits = part.state.logits


def _masks(condition: str, segment: int, warm: int) -> tuple[Mask | None, Mask | None]:
    """The masks `write` and `reset` of a condition."""
    if segment < 1:
        raise ValueError(f"segment must be at least 1 token, got {segment}")
    if warm < 0:
        raise ValueError(f"warm must not be negative, got {warm}")
    masks: dict[str, tuple[Mask | None, Mask | None]] = {
        "learning": (None, None),
        "frozen": (lambda places: places < 0, None),
        "frozen-warmed": (lambda places: places < warm, None),
        "reset": (None, lambda places: places % segment == 0),
    }
    if condition not in masks:
        raise ValueError(f"unknown condition {condition!r}; known are {', '.join(masks)}")
    return masks[condition]
