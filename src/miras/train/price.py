"""A penalty on writing: memories that do not write on filler keep their contents longer."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from miras.nn.gates import Gates


class Openness:
    """How far the gates of a model open in one forward pass, as fractions of their largest
    value."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def add(self, gates: Gates, values: dict[str, Tensor]) -> None:
        """One memory's `lr` and `forget`, averaged over rows, heads and tokens."""
        for name, gate in gates.outputs:
            kind = name.split(".")[0]
            if kind in ("lr", "forget"):
                largest = gate.scale * (gates.lr_factor if kind == "lr" else 1.0)
                self.parts.append(values[name].mean() / largest)

    def mean(self) -> Tensor:
        """Their sum over `lr` and `forget`, averaged over memories and weights; 0 for a model
        without memory."""
        return 2 * torch.stack(self.parts).mean() if self.parts else torch.zeros(())


@contextmanager
def openness(model: nn.Module) -> Iterator[Openness]:
    """Record how far the gates open inside the `with` block; gradients flow through it."""
    seen = Openness()

    def note(module: nn.Module, _: object, values: dict[str, Tensor]) -> None:
        assert isinstance(module, Gates)
        seen.add(module, values)

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, Gates)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
