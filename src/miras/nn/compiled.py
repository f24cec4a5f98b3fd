"""Decoding as one compiled graph, where nothing but arithmetic happens: inside chunks and segments."""

import weakref
from typing import Any

import torch
from torch import Tensor

from miras.core.observe import observing
from miras.nn.lm import LM, LMState, instead_of


class Compiled:
    """A model's call, (tokens, state) -> (logits, state), that runs single tokens as one graph of `torch.compile`.

    The graph reads one token of each row under `torch.no_grad()`. Calls of another kind, a token that begins a
    segment or ends a chunk, and memories whose step needs an inner derivative go to the model as it is; the numbers
    are the same but for rounding. The first token takes as long as compiling does. `options` are those of
    `torch.compile`. Change the model (adapters, its type, its device) before. Raises ValueError as the model does,
    and OSError where torch cannot compile.
    """

    def __init__(self, model: LM, **options: Any) -> None:
        if not isinstance(model, LM):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"Compiled: a miras.LM is needed, got a {type(model).__name__}{instead_of(model)}"
            )
        self.model = model
        from torch._dynamo import (
            exc,  # here, because it takes seconds, which commands that compile nothing need not
        )

        self._exc = exc
        self._step = torch.compile(model.step, fullgraph=True, **options)
        self._made: weakref.ref[Any] | None = None  # saves looking at a hundred tensors for each token

    def __call__(self, tokens: Tensor, state: LMState | None = None) -> tuple[Tensor, LMState]:
        if state is None or not self._fits(tokens, state):
            return self.model(tokens, state)
        plain = LMState(state.layers, state.tokens)
        if not self._is_own(state):
            plain = plain.map(_plain)
        try:
            logits, after = self._step(tokens, plain)
        except self._exc.FailOnRecompileLimitHit:  # so many other models and sizes were compiled before
            return self.model(tokens, state)
        except self._exc.TorchDynamoException as error:
            reason = " ".join(str(error).split("\n")[:2])
            wanted = "; name a C++ compiler in CXX, or use the model as it is" if "Cxx" in reason else ""
            raise OSError(f"torch.compile failed: {reason}{wanted}") from error
        self._made = weakref.ref(after.layers[0])
        return logits, after

    def _is_own(self, state: LMState) -> bool:
        """Whether the graph made this state and can take it; at chunks of one some tensors are in it twice."""
        own = self._made is not None and self._made() is state.layers[0]
        return own and self.model.config.rule.chunk_size > 1

    def _fits(self, tokens: Tensor, state: LMState) -> bool:
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or observing() is not None:
            return False
        self.model.model.check(tokens, state)
        return tokens.shape == (len(state.tokens), 1) and self.model.model.inside(state)


def _plain(x: Tensor) -> Tensor:
    """The same numbers as another tensor of the strides that a new one has: a graph is made for those that it met."""
    return x.detach().reshape(-1).view(x.shape)
