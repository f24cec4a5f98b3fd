"""A model's blocks run where their tensors are: all below the call is made in place.

On meta, which every machine has, a tensor of another device shows at once.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import miras
from miras.nn.config import ModelConfig
from miras.nn.lm import LM, Block
from miras.zoo import preset, presets

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_heads": 2,
    "window_size": 4,
    "segment_size": 4,
    "num_persistent": 2,
}


def small(name: str, **changed: Any) -> ModelConfig:
    """A preset with one layer of each of its kinds."""
    made = preset(name)
    more = {"num_hidden_layers": len(made.pattern), "chunk_size": min(2, made.stride())}
    return made.changed(SIZES | more | changed)


CASES = {name: small(name) for name in presets()} | {"titans-mac-pooled": small("titans-mac", pool=2)}
every = pytest.mark.parametrize("name", CASES)

SOURCE = Path(miras.__file__).parent


def text(rows: int, T: int, device: str = "cpu") -> Tensor:
    return (torch.arange(rows * T).view(rows, T) * 7 % 31).to(device)


def chosen(*rows: list[int], T: int) -> Tensor:
    """A mask (B, T) that is True at the places given for each row."""
    found = torch.zeros(len(rows), T, dtype=torch.bool)
    for row, places in enumerate(rows):
        found[row, places] = True
    return found


CALLS: dict[str, list[tuple[int, dict[str, Tensor]]]] = {
    "plain": [(8, {})],
    "in pieces": [(5, {}), (1, {}), (4, {"write": ~chosen([0, 1], [2], T=4)})],
    "packed": [(8, {"reset": chosen([3, 4], [0, 7], T=8)})],
    "ragged": [(8, {"valid": ~chosen([5, 6, 7], [0, 3], T=8)}), (4, {})],
}
"""Calls of one stream of two rows: how many tokens, and the masks."""


def our(frames: traceback.StackSummary) -> str:
    """The innermost two lines of miras' own, the inner one first."""
    lines = [
        f"{Path(f.filename).relative_to(SOURCE)}:{f.lineno}"
        for f in frames
        if Path(f.filename).is_relative_to(SOURCE)
    ]
    return " < ".join(reversed(lines[-2:]))


@contextmanager
def below(model: nn.Module, entered: Callable[[], Any], left: Callable[[], Any]) -> Iterator[None]:
    """`entered` and `left` are called around the forward pass of every block."""
    blocks = [part for part in model.modules() if isinstance(part, Block)]
    hooks = [block.register_forward_pre_hook(lambda *_: entered()) for block in blocks]
    hooks += [block.register_forward_hook(lambda *_: left(), always_call=True) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def stream(model: LM, calls: list[tuple[int, dict[str, Tensor]]]) -> Tensor:
    """The sum of all that calls of one stream give, logits and the last state."""
    device = str(model.lm_head.weight.device)
    state, total = None, torch.zeros((), device=device)
    for T, masks in calls:
        masks = {n: mask.to(device) for n, mask in masks.items()}
        logits, state = model(text(2, T, device), state, **masks)
        total = total + logits.sum()
    return total + sum(x.sum() for x in state.tensors().values() if x.is_floating_point())


class Watch(TorchDispatchMode):
    """Looks at every operation of the blocks and of the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.kind = False, ""
        self.found: Counter[str] = Counter()

    def seen(self, func: Any, args: Any, out: Any) -> str | None:
        """What is wrong with an operation, or None."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.inside and (wrong := self.seen(func, args, out)):
            self.note(wrong)
        return out

    def note(self, what: str) -> None:
        """Where something happened that should not, in our words or in autograd's."""
        if self.inside:
            node = torch._C._current_autograd_node()
            place = our(traceback.extract_stack()) or (node.name() if node else "backward")
            self.found[f"{self.kind}: {place}: {what}"] += 1

    def run(self, kind: str, model: LM) -> None:
        """Watch calls of one stream, and the backward pass of all that they give."""
        self.kind = kind
        with self, below(model, self.enter, self.leave):
            total = stream(model, CALLS[kind])
            self.enter()
            total.backward()
            self.leave()

    def enter(self) -> None:
        self.inside = True

    def leave(self) -> None:
        self.inside = False

    def told(self) -> str:
        return "\n".join(f"  {place} x {count}" for place, count in self.found.items())


class Elsewhere(Watch):
    """Finds tensors that are made on another device than meta."""

    def seen(self, func: Any, args: Any, out: Any) -> str | None:
        away = {x.device.type for x in tree_leaves(out) if isinstance(x, Tensor)} - {"meta"}
        return f"{func} gives a tensor on {', '.join(away)}" if away else None


@every
def test_all_is_made_where_the_inputs_are(name: str) -> None:
    with torch.device("meta"):
        model = LM(CASES[name])
    watch = Elsewhere()
    for kind in ("plain", "in pieces"):  # masks are numbers, which a call has to know
        watch.run(kind, model)
    assert not watch.found, f"not everything below the model's call is on meta:\n{watch.told()}"
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())
