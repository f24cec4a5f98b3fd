"""Decoding as one compiled graph, for tokens inside chunks and segments."""

import weakref
from typing import Any

import torch
from torch import Tensor

from miras.core.observe import observing
from miras.engine.plan import Plan
from miras.nn.lm import LM, LMState, instead_of


class Compiled:
    """A model whose call, (tokens, state) -> (logits, state), runs single tokens as one graph of
    `torch.compile`.

    The graph reads one token of each row under `torch.no_grad()`. Other calls, tokens that begin a
    segment or end a chunk, and memories whose step needs autograd run uncompiled; results are the
    same except for rounding. The first token waits for compilation. `options` are those of
    `torch.compile`. Change the model (adapters, dtype, device) before. Raises ValueError like the
    model, and OSError if torch cannot compile.
    """

    def __init__(self, model: LM, **options: Any) -> None:
        if not isinstance(model, LM):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"Compiled: a miras.LM is needed, got a {type(model).__name__}{instead_of(model)}"
            )
        self.model = model
        from torch._dynamo import (
            exc,  # here, because the import takes seconds that other commands do not need
        )

        self._exc = exc
        self._step = torch.compile(model.one_token, fullgraph=True, **options)
        # One position represents all at which no segment begins and no chunk ends; otherwise each
        # would get its own graph.
        self._place = next((at for at in range(LARGEST) if self._one_graph([at])), None)
        self._made: weakref.ref[Any] | None = None  # saves checking a hundred tensors per token

    def __call__(self, tokens: Tensor, state: LMState | None = None) -> tuple[Tensor, LMState]:
        place = None if state is None else self._fitting(tokens, state)
        if state is None or place is None or self._place is None:
            return self.model(tokens, state)
        layers = (
            state.layers if self._is_own(state) else LMState(state.layers, state.tokens).map(_plain).layers
        )
        try:
            logits, layers = self._step(tokens, layers, self._place)
        # because so many other models and sizes were compiled before
        except self._exc.FailOnRecompileLimitHit:
            return self.model(tokens, state)
        except self._exc.TorchDynamoException as error:
            reason = " ".join(str(error).split("\n")[:2])
            wanted = "; set CXX to a C++ compiler, or use the model uncompiled" if "Cxx" in reason else ""
            raise OSError(f"torch.compile failed: {reason}{wanted}") from error
        self._made = weakref.ref(layers[0])
        moved = torch.tensor(place, dtype=torch.long, device="cpu") + 1
        return logits, LMState(layers, state.tokens + 1, place=moved)

    def _is_own(self, state: LMState) -> bool:
        """Whether the graph made this state and can take it; with chunk_size 1 some tensors are in
        it twice."""
        own = self._made is not None and self._made() is state.layers[0]
        return own and all(memory.stride() > 1 for memory in self.model.config.memories())

    def _fitting(self, tokens: Tensor, state: LMState) -> list[int] | None:
        """The positions of the rows, if this call can use the graph."""
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or observing() is not None:
            return None
        self.model.model.check(tokens, state)
        place = self.model.model.place(state)
        fits = tokens.shape == (len(state.tokens), 1) and self._one_graph(place)
        return place if fits else None

    def _one_graph(self, place: list[int]) -> bool:
        rows = len(place)
        return self.model.model.one_graph(Plan(CPU, 1, tuple(place), (1,) * rows, ((),) * rows))


CPU = torch.device("cpu")
LARGEST = 1 << 16
"""Positions tried to find one at which a token is a single graph."""


def _plain(x: Tensor) -> Tensor:
    """A copy with the strides of a new tensor: a graph is specialised on the strides it was
    compiled for."""
    return x.detach().reshape(-1).view(x.shape)
