"""Decoding as one compiled graph, where nothing but arithmetic happens: inside chunks and segments."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from miras.core.observe import observing
from miras.nn.lm import LM, LMState


class Compiled:
    """A model's call, (tokens, state) -> (logits, state), that runs single tokens as one graph of `torch.compile`.

    The graph reads one token of each row without a gradient. Calls of another kind, a token that begins a segment
    or ends a chunk, and memories whose step needs an inner derivative go to the model as it is; the numbers are the
    same but for rounding. The first token takes as long as compiling does. `options` are those of `torch.compile`.
    Change the model (adapters, its type, its device) before. Raises OSError where torch cannot compile, such as
    without a C++ compiler on the CPU.
    """

    def __init__(self, model: LM, **options: Any) -> None:
        self.model = model
        self._step = torch.compile(model.step, fullgraph=True, **options)
        self._made: weakref.ref[Any] | None = None

    def __call__(self, tokens: Tensor, state: LMState | None = None) -> tuple[Tensor, LMState]:
        if state is None or not self._fits(tokens, state):
            return self.model(tokens, state)
        if self._made is None or self._made() is not state.layers[0]:
            state = LMState(state.layers, state.tokens).map(_plain)
        try:
            logits, state = self._step(tokens, state)
        except TorchDynamoException as error:
            reason = " ".join(str(error).split("\n")[:2])
            raise OSError(
                f"torch.compile failed: {reason}; on the CPU it needs a C++ compiler, which CXX may name. "
                f"The model runs without being compiled too"
            ) from error
        self._made = weakref.ref(state.layers[0])
        return logits, state

    def _fits(self, tokens: Tensor, state: LMState) -> bool:
        calm = not (torch.is_grad_enabled() or torch.is_inference_mode_enabled() or observing())
        return calm and tokens.shape == (len(state.tokens), 1) and self.model.model.inside(state)


def _plain(x: Tensor) -> Tensor:
    """x as a tensor of its own, of the strides that a new one has: a graph is made for those that it was given."""
    return x.detach().reshape(-1).view(x.shape)
