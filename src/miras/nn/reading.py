"""Read a stream of any length in constant memory: from tokens to losses and a state that continues.

B streams side by side, n tokens of a piece, V ids of the vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from miras.nn.lm import LM, LMState

Block = NDArray[Any] | Tensor
"""Token ids, (n,) or (B, n), of any integer type."""

Tokens = Block | Iterable[Block]
"""A stream: one array (a memory-mapped one is read piece by piece), or an iterator over arrays of
any length."""

Mask = Callable[[NDArray[np.int64]], NDArray[np.bool_]]
"""From positions (n,) in a reading, counted from 0, to the mask's values."""

LOGITS = 1 << 24
"""Limit of logits held at once: a large vocabulary is scored in parts."""


@dataclass(frozen=True)
class StreamState(LMState):
    """A model's state and its logits (B, V) for the next token, so that a cut loses nothing."""

    logits: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Piece:
    """The result of reading n tokens of each of B streams.

    start: the position of the first token in this reading; tokens (B, n); losses (B, n) in nats;
    predicted (B, n), the most likely token at each position; state: after the last token. The first
    token of a new stream, which nothing predicts, has loss NaN and prediction -1.
    """

    start: int
    tokens: NDArray[np.int64]
    losses: NDArray[np.float32]
    predicted: NDArray[np.int64]
    state: StreamState

    def __repr__(self) -> str:
        B, n = self.tokens.shape
        return f"Piece({B} x {n:,} tokens from {self.start:,}, {self.state!r})"


def read_pieces(
    model: LM,
    tokens: Tokens,
    state: LMState | None = None,
    *,
    piece: int = 2048,
    write: Mask | None = None,
    reset: Mask | None = None,
) -> Iterator[Piece]:
    """Read one stream or B streams without gradients, and yield the result of each piece.

    Except for rounding, the losses do not depend on `piece`, the largest number of tokens read per
    call; pieces end at chunk and segment boundaries. `state` continues an earlier reading; with a
    StreamState the first token is scored too. `write` and `reset` are the model's masks, by
    position. Raises ValueError for ids outside the vocabulary and arrays that are not ids.
    """
    if piece < 1:
        raise ValueError(f"piece must be at least 1 token, got {piece}")
    return _read(model, _Feed(tokens), state, piece, {"write": (write, True), "reset": (reset, False)})


def _read(
    model: LM, feed: "_Feed", state: LMState | None, piece: int, masks: dict[str, tuple[Mask | None, bool]]
) -> Iterator[Piece]:
    device = model.model.embed_tokens.weight.device
    start = 0
    while (ids := feed.take(_length(model, state, piece))) is not None:
        check_ids(ids, model.config.vocab_size)
        places = np.arange(start, start + ids.shape[1])
        given: dict[str, Tensor] = {}
        for name, (mask, usual) in masks.items():
            values = None if mask is None else np.asarray(mask(places), dtype=np.bool_)
            # A mask without effect is dropped, because the scan is faster without masks.
            if values is not None and (values != usual).any():
                given[name] = torch.from_numpy(values).to(device).expand(ids.shape)
        losses, predicted, state = _step(model, torch.from_numpy(ids).to(device), state, given)
        yield Piece(start, ids, losses.cpu().numpy(), predicted.cpu().numpy(), state)
        start += ids.shape[1]


def check_ids(ids: NDArray[np.int64], vocab_size: int) -> None:
    """Raise ValueError if an id is outside the vocabulary."""
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(
            f"token id {wrong} is outside the model's vocabulary, 0 to {vocab_size - 1}; were these tokens "
            f"made with the model's own tokenizer?"
        )


def _length(model: LM, state: LMState | None, piece: int) -> int:
    """The length of the next piece: up to the end of a chunk or segment, if no document began
    inside one."""
    stride = model.config.stride()
    if piece <= stride:
        return piece
    return piece // stride * stride - (0 if state is None else int(state.tokens[0]) % stride)


# A generator must not hold no_grad across a yield: gradients would stay off for the caller. And it
# is no_grad, not inference_mode, because the inner loop of a memory takes gradients.
@torch.no_grad()
def _step(
    model: LM, ids: Tensor, state: LMState | None, masks: dict[str, Tensor]
) -> tuple[Tensor, Tensor, StreamState]:
    """Losses (B, n), predictions (B, n) and the state after ids (B, n)."""
    hidden, after = model.hidden(ids, state, **masks)
    losses = torch.full(ids.shape, torch.nan, device=ids.device)
    predicted = torch.full(ids.shape, -1, device=ids.device)

    def score(logits: Tensor, at: int) -> None:
        target = ids[:, at : at + logits.shape[1]]
        logits = logits[:, : target.shape[1]]
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        losses[:, at : at + target.shape[1]] = loss.view(target.shape)
        predicted[:, at : at + target.shape[1]] = logits.argmax(-1)

    if isinstance(state, StreamState):
        score(state.logits[:, None], 0)
    width = max(1, LOGITS // (ids.shape[0] * model.config.vocab_size))
    for at in range(0, ids.shape[1], width):
        score(model.lm_head(hidden[:, at : at + width]).float(), at + 1)
    # Copied, because a view would keep the logits of the whole piece alive.
    last = model.lm_head(hidden[:, -1]).float()
    return losses, predicted, StreamState(after.layers, after.tokens, last, place=after.place)


class _Feed:
    """An iterator over arrays of any length, taken in pieces of a given length."""

    def __init__(self, tokens: Tokens) -> None:
        self.blocks = iter((tokens,) if isinstance(tokens, np.ndarray | Tensor) else tokens)
        self.rest: NDArray[Any] | None = None

    def take(self, wanted: int) -> NDArray[np.int64] | None:
        """(B, n) with n = `wanted`, or fewer at the end of the stream; None after the end."""
        parts: list[NDArray[Any]] = []
        while wanted:
            if self.rest is None or not self.rest.shape[1]:
                block = next(self.blocks, None)
                if block is None:
                    break
                self.rest = as_rows(block)
            part, self.rest = self.rest[:, :wanted], self.rest[:, wanted:]
            if parts and len(parts[0]) != len(part):
                raise ValueError(
                    f"blocks of a stream must have equally many rows: {len(parts[0])}, then {len(part)}"
                )
            wanted -= part.shape[1]
            if part.shape[1]:
                parts.append(part)
        return np.concatenate(parts, 1).astype(np.int64, copy=False) if parts else None


def as_rows(block: Block) -> NDArray[Any]:
    """Token ids (n,) or (B, n) as (B, n), not copied. Raises ValueError for anything else."""
    ids = block.detach().cpu().numpy() if isinstance(block, Tensor) else np.asarray(block)
    if ids.dtype.kind in "US":
        raise ValueError(
            "tokens must be integers, got a text; encode it first: miras.ByteTokenizer().encode(text)"
        )
    if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu" or (ids.ndim == 2 and not len(ids)):
        raise ValueError(
            f"tokens must be arrays of integers, (T,) for one stream or (B, T) for several; got "
            f"{ids.dtype} {ids.shape}"
        )
    return ids[None] if ids.ndim == 1 else ids


class Spelling:
    """Incremental detokenisation: an incomplete character waits for the ids that complete it.

    `decode` is a tokenizer's: it gives the text of ids, with U+FFFD for invalid UTF-8.
    """

    LONGEST = 4  # bytes of a UTF-8 character, and so the most ids that one may be spread over

    def __init__(self, decode: Callable[[NDArray[np.int64]], str]) -> None:
        self.decode = decode
        none = np.zeros(0, dtype=np.int64)
        self._before, self._waiting = none, none

    def push(self, ids: NDArray[np.int64]) -> str:
        """The text that these ids complete."""
        ids = np.concatenate([self._waiting, ids])
        for held in range(self.LONGEST):
            done = ids[: max(0, len(ids) - held)]
            # Tokenizers treat the first token of a text differently, so the previous tokens are
            # decoded too.
            text = self.decode(np.concatenate([self._before, done]))
            if not text.endswith("\ufffd"):
                break
        else:
            # Not an incomplete character: these bytes are invalid.
            self._before = self._waiting = ids[:0]
            return self.decode(ids)
        spoken = len(self.decode(self._before))
        if len(done):
            self._before = done[-self.LONGEST :]
        self._waiting = ids[len(done) :]
        return text[spoken:]

    def rest(self) -> str:
        """The text of the remaining ids, at the end of the stream."""
        waiting, self._waiting = self._waiting, self._waiting[:0]
        return self.decode(waiting)
