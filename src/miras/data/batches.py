"""Tokens -> batches whose rows continue where they stopped, so that states can be carried from step
to step.

B rows of a batch, T tokens of a row, G = B * world_size lanes in all.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from miras.data.tokens import TokenFile


class Batch(NamedTuple):
    """One step's tokens, all (B, T)."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]  # the next token of the same document, 0 where there is none
    valid: NDArray[np.bool_]  # False: padding
    reset: NDArray[np.bool_]  # True: a document, or a lane's epoch, starts here
    weight: NDArray[np.float32]  # weight of the loss at this position


class Lanes:
    """Documents divided into lanes that are read side by side; `batch` depends only on (seed, step,
    rank, lane).

    An epoch concatenates the documents, in an order drawn from (seed, epoch), each starting at a
    multiple of `align` (the chunk size), and divides them into batch_size * world_size lanes whose
    lengths differ by at most one `align`. Row i of a batch reads the next seq_len positions of lane
    rank * batch_size + i. Positions between two documents and after a lane's end are padding. A
    lane starts with a reset in each epoch. `tokens` (num_tokens,) of any integer type; `offsets`
    (num_documents + 1,) as in TokenFile, needed for a plain array only: without them it is one
    document. ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        tokens: TokenFile | NDArray[Any],
        offsets: ArrayLike | None = None,
        *,
        batch_size: int,
        seq_len: int,
        align: int = 1,
        seed: int = 0,
    ) -> None:
        if isinstance(tokens, TokenFile):
            if offsets is not None:
                raise ValueError("A TokenFile has its own document offsets: omit `offsets`.")
            tokens, offsets = tokens.tokens, tokens.documents
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not len(tokens):
            raise ValueError(
                f"`tokens` must be one non-empty row of integers, got {tokens.shape} of {tokens.dtype}."
            )
        ends = np.asarray([0, len(tokens)] if offsets is None else offsets, dtype=np.int64)
        if (
            ends.ndim != 1
            or len(ends) < 2
            or ends[0] != 0
            or ends[-1] != len(tokens)
            or (np.diff(ends) < 0).any()
        ):
            raise ValueError(
                f"`offsets` must rise from 0 to the number of tokens ({len(tokens)}), one entry more than "
                f"there are documents; got {ends}."
            )
        for name, value in {"batch_size": batch_size, "seq_len": seq_len, "align": align}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if seed < 0:
            raise ValueError(f"`seed` must not be negative, got {seed}.")
        if seq_len % align:
            near = max(seq_len // align, 1) * align
            raise ValueError(
                f"`seq_len` must be a multiple of `align` (the chunk size), {align}; got {seq_len}. "
                f"Take {near} or {near + align}."
            )
        self.batch_size, self.seq_len, self.align, self.seed = batch_size, seq_len, align, seed
        self._tokens = tokens
        self._first = ends[:-1]
        self._length = np.diff(ends)
        self._chunks = -(-self._length // align)
        self._num_chunks = int(self._chunks.sum())
        self._memo: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of one epoch, over all lanes."""
        return len(self._tokens)

    def steps_per_epoch(self, world_size: int = 1) -> int:
        """Steps until every lane is read to its end."""
        longest = -(-self._num_chunks // self._num_lanes(world_size))
        return -(-longest // (self.seq_len // self.align))

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The rows of `rank` at `step`; steps continue through any number of epochs."""
        lanes = self._num_lanes(world_size)
        if step < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"Needed: step >= 0 and 0 <= rank < world_size; got {step=}, {rank=}, {world_size=}."
            )
        epoch, step = divmod(step, self.steps_per_epoch(world_size))
        order, line = self._line(epoch)

        lane = np.arange(rank * self.batch_size, (rank + 1) * self.batch_size)
        lane_start, lane_end = ((lane + end) * self._num_chunks // lanes for end in (0, 1))
        per_step = self.seq_len // self.align
        chunk = (lane_start + step * per_step)[:, None] + np.arange(per_step)
        inside = chunk < lane_end[:, None]
        chunk = np.minimum(chunk, self._num_chunks - 1)
        # Of the documents that start here the last: the others are empty.
        place = np.searchsorted(line, chunk, side="right") - 1
        document = order[place]

        # (B, chunks of a step, align) -> (B, T)
        within = ((chunk - line[place]) * self.align)[:, :, None] + np.arange(self.align)
        left = self._length[document][:, :, None] - within
        valid = inside[:, :, None] & (left > 0)
        has_next = valid & (left > 1)
        index = np.where(valid, self._first[document][:, :, None] + within, 0)
        tokens = np.where(valid, self._tokens[index], 0)
        targets = np.where(has_next, self._tokens[index + has_next], 0)
        reset = valid & (within == 0)
        reset[:, 0, 0] |= step == 0

        shape = (self.batch_size, self.seq_len)
        return Batch(
            tokens=tokens.reshape(shape).astype(np.int64),
            targets=targets.reshape(shape).astype(np.int64),
            valid=valid.reshape(shape),
            reset=reset.reshape(shape),
            weight=has_next.reshape(shape).astype(np.float32),
        )

    def _num_lanes(self, world_size: int) -> int:
        lanes = self.batch_size * world_size
        if world_size < 1:
            raise ValueError(f"`world_size` must be at least 1, got {world_size}.")
        if lanes > self._num_chunks:
            raise ValueError(
                f"{lanes} lanes, {self.batch_size} of a batch times {world_size}, need at least {lanes} chunks of "
                f"{self.align} tokens, and the text ({len(self._tokens)} tokens) has {self._num_chunks}. "
                "Take a smaller batch or more text."
            )
        return lanes

    def _line(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The documents in the epoch's order, and the chunk at which each starts."""
        if self._memo is None or self._memo[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self._length))
            start = np.zeros(len(order), dtype=np.int64)
            np.cumsum(self._chunks[order][:-1], out=start[1:])
            self._memo = epoch, order, start
        return self._memo[1], self._memo[2]
