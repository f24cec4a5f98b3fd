"""Sampling a continuation, one token per call, at constant cost per token."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from miras.nn.compiled import Compiled
from miras.nn.lm import LM, LMState
from miras.nn.reading import Block, StreamState, as_rows, check_ids, read_pieces
from miras.nn.threads import check_seed


class Generation(Iterator[int]):
    """The tokens of a continuation as they are generated; `state` has read all that were
    returned."""

    def __init__(
        self,
        model: LM | Compiled,
        state: StreamState,
        num_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> None:
        self.state = state
        self._model, self._left = model, num_tokens
        self._temperature, self._top_p = temperature, top_p
        # A generator of its own, on the CPU, so that a seed gives the same result everywhere.
        self._random = torch.Generator().manual_seed(seed)

    def __next__(self) -> int:
        if not self._left:
            raise StopIteration
        self._left -= 1
        token = sample(self.state.logits[0], self._temperature, self._top_p, self._random)
        ids = torch.tensor([[token]], device=self.state.logits.device)
        with torch.no_grad():
            logits, state = self._model(ids, self.state)
        self.state = StreamState(state.layers, state.tokens, logits[:, -1].float(), place=state.place)
        return token


def generate(
    model: LM,
    prompt: Block,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    state: LMState | None = None,
    compiled: bool = False,
) -> Generation:
    """Read a prompt (T,) after `state`, then sample `num_tokens` tokens; the memory learns
    throughout.

    `temperature` 0 always takes the most likely token; `top_p` samples from the smallest set of
    tokens with at least this total probability. The prompt may be empty if `state` is a
    StreamState, which has logits for the next token. `compiled`: run single tokens as one compiled
    graph (`miras.Compiled`). Raises ValueError for invalid values and ids outside the vocabulary.
    """
    check_sampling(num_tokens, temperature, top_p, seed)
    ids = as_rows(prompt)
    if len(ids) != 1:
        raise ValueError(f"a prompt must be one row of tokens, got {len(ids)} rows")
    if not ids.size and not isinstance(state, StreamState):
        raise ValueError("the prompt is empty: give at least one token to continue from")
    check_ids(ids, model.config.vocab_size)
    for part in read_pieces(model, ids, state):
        state = part.state
    assert isinstance(state, StreamState)
    return Generation(Compiled(model) if compiled else model, state, num_tokens, temperature, top_p, seed)


def check_sampling(num_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Raise ValueError for invalid values."""
    if num_tokens < 0:
        raise ValueError(f"num_tokens must not be negative, got {num_tokens}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be 0 (the most likely token) or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    check_seed(seed)


def sample(logits: Tensor, temperature: float, top_p: float, random: torch.Generator) -> int:
    """One token from logits (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    share = (logits.cpu().double() / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = share.sort(descending=True, stable=True)
        # A token is excluded if those before it already have the mass; the first never is.
        share[order[ranked.cumsum(0) - ranked >= top_p]] = 0
    return int(torch.multinomial(share, 1, generator=random))
