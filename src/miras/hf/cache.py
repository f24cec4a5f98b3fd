"""What `generate` keeps between calls: the state of a model, and what of a prompt it has read."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from miras.nn.lm import LMState


@dataclass(frozen=True)
class Turn:
    """How `generate` was called: sequences per prompt row, whether beam search, and end-of-sequence
    ids."""

    copies: int = 1
    beams: bool = False
    ends: Tensor | None = None


class MirasCache(Cache):
    """What a batch has read: the state of a model, of constant size for any length of stream.

    state: an `LMState` of B rows, None before the first token; its `tokens` (B,) counts all that
    was ever read. `get_seq_length()` counts tokens since the cache was made or `begin_turn` was
    called: those that `generate` may be given again. pending (B, 1): the last token from
    `generate`, which has not been read; set it to None to omit it. `copy.copy` forks a cache; the
    copy and the original are independent.
    """

    def __init__(self, state: LMState | None = None) -> None:
        super().__init__(layers=[])
        self.state = state
        self.pending: Tensor | None = None
        self._length = 0
        # a hash of the ids of that length, (B,) int64; None if not known
        self._print: Tensor | None = None
        self._closed: str | None = None  # why it cannot be continued
        self._turn = Turn()
        self._home: torch.device | None = None

    def begin_turn(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """The inputs for `generate`, or the model, to continue with new tokens (B, T) only.

        The last generated token, which has not been read, comes first. Constant memory: no history
        is needed.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.pending is not None:
            pending = self.pending.to(input_ids)
            if len(pending) != len(input_ids):
                raise ValueError(f"the cache holds {len(pending)} rows, got {len(input_ids)}")
            input_ids = torch.cat([pending, input_ids], 1)
            mask = torch.cat([torch.ones_like(pending, dtype=mask.dtype), mask], 1)
        self._length, self._print = 0, None
        return {"input_ids": input_ids, "attention_mask": mask}

    def open(self, input_ids: Tensor | None) -> LMState | None:
        """The state to continue from with these ids. Raises ValueError if tokens would be
        omitted."""
        if self._closed is not None:
            raise ValueError(self._closed)
        if self.pending is not None:
            first = None if input_ids is None else input_ids[:, : self.pending.shape[1]]
            if first is None or not torch.equal(first.cpu(), self.pending.cpu()):
                raise ValueError(
                    "the last token from generate has not been read yet, and these inputs omit it; pass "
                    "cache.begin_turn(input_ids), or set cache.pending = None to omit it on purpose"
                )
        return self.state

    def advance(self, state: LMState, input_ids: Tensor | None, length: int) -> None:
        """Store the detached state after `length` more tokens of each row."""
        known = self._length == 0 or self._print is not None
        self._print = _fingerprint(input_ids, self._print) if known and input_ids is not None else None
        self.state, self.pending = state.detach(), None
        self._length += length

    def check_prompt(self, input_ids: Tensor | None) -> None:
        """Raise ValueError unless a prompt begins with everything read so far, or `begin_turn` was
        called."""
        if self._closed is not None:
            raise ValueError(self._closed)
        n = self._length
        if n == 0:
            return
        if input_ids is None or self._print is None or len(input_ids) != len(self._print):
            fits = False
        else:
            begun = _fingerprint(input_ids[:, :n], None)
            fits = input_ids.shape[1] > n and torch.equal(begun.cpu(), self._print.cpu())
        if not fits:
            raise ValueError(
                f"the cache has read {n} tokens, but this prompt does not start with them and add more; for new "
                f"tokens only, use generate(**cache.begin_turn(input_ids), past_key_values=cache)"
            )

    def prepare(self, turn: "Turn", rows: int) -> None:
        """Before `generate` reads a prompt of `rows` rows: repeat the state for each of its
        sequences."""
        self._turn = turn
        if turn.copies > 1 and self.batch_size == rows:
            self.batch_repeat_interleave(turn.copies)

    def end_turn(self, made: Tensor) -> None:
        """After `generate` has returned (B, n) tokens: the last one has not been read yet."""
        self.pending = made[:, -1:] if made.shape[1] else None
        ends = self._turn.ends
        if self._turn.beams:
            self._closed = (
                "this cache was used by a beam search: it holds the beams, not the returned sequences"
            )
        elif ends is not None and len(made) > 1:
            early = torch.isin(made[:, :-1], ends.to(made.device)).any(1)
            if bool(early.any()):
                self._closed = (
                    f"row {int(early.nonzero()[0])} of this batch ended before the others and has read padding "
                    f"since; generate rows one by one to continue each"
                )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of each row since the cache was made or `begin_turn` was called, padding
        included."""
        return self._length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is none."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The width of a mask over everything read plus `query_length` tokens, and 0."""
        return self._length + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a memory cannot undo what it has learned."""
        raise ValueError(
            f"a memory cannot undo its last {abs(tokens_to_remove)} tokens; keep a fork of the cache, made with "
            f"copy.copy, where going back is needed"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, side by side."""
        if self.state is not None:
            rows = torch.arange(self.batch_size, device=self.state.tokens.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows, in that order."""

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[indices.to(x.device)]

        if self.state is not None:
            self.state = self.state.map(lambda x: x[indices.to(x.device)])
        self.pending, self._print = pick(self.pending), pick(self._print)

    def offload(self, layer_idx: int = 0, only_non_sliding: bool = True) -> None:
        """Move the state to the CPU; the model takes it back when it is called."""
        if self.state is not None and self.state.tokens.device.type != "cpu":
            self._home, self.state = self.state.tokens.device, self.state.to("cpu")

    def prefetch(self, layer_idx: int = 0, only_non_sliding: bool = True) -> None:
        """Move the state back to where `offload` took it from."""
        if self.state is not None and self._home is not None:
            self.state = self.state.to(self._home)

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first token."""
        return -1 if self.state is None else self.state.tokens.shape[0]

    @property
    def is_initialized(self) -> bool:
        """Whether a token was read."""
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        """False: see `crop`."""
        return False

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def __repr__(self) -> str:
        return f"MirasCache(rows={self.batch_size}, length={self._length})"


def _fingerprint(ids: Tensor, before: Tensor | None) -> Tensor:
    """An incremental hash of each row of ids (B, T), continuing `before`, (B,) int64."""
    T = ids.shape[1]
    power = torch.full((T + 1,), 6364136223846793005, device=ids.device)
    power[0] = 1
    power = power.cumprod(0)
    here = ((ids + 1) * power[:T].flip(0)).sum(1)
    return here if before is None else before.to(ids.device) * power[T] + here
