"""A block's training pass is one graph of `torch.compile`, with the numbers and gradients that it has without.

On the plain path: whole chunks, no masks, a stream's first call.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import miras
from miras.core.state import Record
from miras.nn.lm import LM, Block
from miras.zoo import preset, presets

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_heads": 2,
    "window_size": 8,
    "segment_size": 8,
    "num_persistent": 2,
}


CONFIGS = {name: preset(name) for name in presets()} | {
    "gated-deltanet-mapped": preset("gated-deltanet", key_dim=3, feature_map=miras.Polynomial())
}


def met(name: str) -> list[tuple[Block, tuple[Any, ...], dict[str, Any]]]:
    """A model's blocks, one of each kind, and what each is given for two chunks of two rows."""
    torch.manual_seed(0)
    config = CONFIGS[name]
    sizes = SIZES | {
        "num_hidden_layers": len(config.pattern),
        "chunk_size": min(4, config.stride()),
    }
    model = LM(config.changed(sizes)).double()
    calls: list[tuple[Block, tuple[Any, ...], dict[str, Any]]] = []
    for block in model.model.layers:
        assert isinstance(block, Block)
        block.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
    model(torch.arange(16).view(2, 8))
    for block in model.model.layers:
        block._forward_pre_hooks.clear()
    return calls


def passed(run: Any, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Numbers and gradients of a forward and backward pass of everything that a block gives."""
    x = args[0].detach().requires_grad_()
    block.zero_grad()
    y, state = run(x, *args[1:], **kwargs)
    found = {"y": y} | {
        n: s
        for n, s in (state.tensors() if isinstance(state, Record) else {}).items()
        if s.is_floating_point()
    }
    torch.manual_seed(1)
    sum((s * torch.randn_like(s)).sum() for s in found.values()).backward()
    grads = {f"gradient of {n}": p.grad for n, p in block.named_parameters()} | {"gradient of x": x.grad}
    return {n: s.detach().clone() for n, s in (found | grads).items() if s is not None}


def same(name: str, backend: str, tolerance: float) -> None:
    for block, args, kwargs in met(name):
        torch._dynamo.reset()
        expected = passed(block, block, args, kwargs)
        block.compile(fullgraph=True, backend=backend)
        found = passed(block, block, args, kwargs)
        assert found.keys() == expected.keys()
        for n, number in found.items():
            if not number.numel():
                continue
            gap, size = (number - expected[n]).abs().max(), expected[n].abs().max()
            assert gap <= tolerance * (1 + size), f"{n}: off by {gap:.3g}, largest entry {size:.3g}"


SOON = (
    "titans-mac",
    "yaad",
    "memora",
    "ttt-mlp",
    "gla",
    "deltanet",
    "deltaproduct",
    "gated-deltanet-mapped",
)
"""Every path of the engine once, and the wiring that has most in it."""


@pytest.mark.parametrize(
    "name", [name if name in SOON else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_a_block_is_one_graph(name: str) -> None:
    same(name, "aot_eager", 1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("name", ["titans-mag", "transformer"])
def test_a_block_compiled(name: str) -> None:
    same(name, "inductor", 1e-9)
