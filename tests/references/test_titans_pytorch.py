"""Titans' memory against the weight updates of titans-pytorch (0.5.1), in fp64.

Its `store_memories` is the chunked rule of Titans eq. 13, 14 and 18 where `chunk_size=1` gives every token gates of
its own and one call is one chunk, linearised at the weights it is given. What differs and is not compared: reads,
which it takes from before a chunk; its default loss, a mean over the width; a norm whose gain is learned while
reading; its default of linearising a whole stream at the initial weights.
"""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from miras.core.algorithm import GradientDescent, Muon
from miras.core.bias import L2, Huber
from miras.core.retention import Decay
from miras.core.rule import Rule, init_state
from miras.engine import scan
from miras.zoo import preset

D, T, C = 8, 44, 16


@pytest.fixture(scope="module")
def titans():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "titans_pytorch.neural_memory", reason="pip install 'miras-torch[references]'"
        )


class Map(nn.Module):
    """A memory of theirs: x w at depth 0, else x + LN(gelu(x w1 + b1) w2 + b2), the norm with gain and shift."""

    def __init__(self, depth: int, bias: bool = False, affine: bool = False) -> None:
        super().__init__()
        self.depth = depth
        self.gain, self.shift = (torch.randn(2, D).double() if affine else torch.tensor([1.0, 0.0])).unbind()
        widths = [D, *[4 * D] * (depth - 1), D]
        for i in range(depth or 1):
            name = f"{i + 1}" if depth else ""
            d_in, d_out = (D, D) if depth == 0 else widths[i : i + 2]
            self.register_parameter(f"w{name}", nn.Parameter(torch.randn(d_in, d_out) * d_in**-0.5))
            if bias:
                self.register_parameter(f"b{name}", nn.Parameter(torch.randn(1, d_out)))

    def forward(self, x: Tensor) -> Tensor:
        p = dict(self.named_parameters())
        if self.depth == 0:
            return x @ p["w"]
        y = x
        for i in range(1, self.depth + 1):
            y = (F.gelu(y) if i > 1 else y) @ p[f"w{i}"] + p.get(f"b{i}", 0)
        return x + F.layer_norm(y, (D,)) * self.gain + self.shift


def half_square(pred: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (pred - target).square().sum(-1)


def huber(pred: Tensor, target: Tensor) -> Tensor:
    """Of the norm, with the threshold 2."""
    r = (pred - target).norm(dim=-1)
    return torch.where(r <= 2, r.square() / 2, 2 * (r - 1))


CASES = {
    "titans-linear": (partial(Map, 0), half_square, L2(), True, True),
    "titans-lmm": (partial(Map, 2), half_square, L2(), True, True),
    "ttt-linear": (partial(Map, 1, True, True), half_square, L2(), False, False),
    "ttt-mlp": (partial(Map, 2, True, True), half_square, L2(), False, False),
    "yaad": (partial(Map, 2), huber, Huber(delta=2.0), False, True),
}
"""By preset: the map, its loss, the bias that this is here, whether with momentum, whether with forgetting."""


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, C])
def test_the_chunked_rule(titans, agree, name: str, size: int):
    """Reads of every token from their weights after it, last weights and surprise; the last of three chunks is open.

    Gates are per head and the step bound is off, neither of which they have; Yaad's threshold is fixed.
    """
    model, loss, bias, momentum, forgets = CASES[name]
    torch.manual_seed(0)
    theirs = titans.NeuralMemory(
        D,
        chunk_size=1,
        model=model(),
        mem_model_norm_add_residual=False,
        momentum=momentum,
        pre_rmsnorm=False,
        default_step_transform_max_lr=0.3,
        store_memory_loss_fn=loss,
    ).double()
    # A memory that forgets half of itself with every token is small, and behind a norm that costs digits.
    nn.init.constant_(theirs.to_decay_factor[0].bias, -3.0 if forgets else -1e4)
    x = torch.randn(2, T, D).double()
    with torch.no_grad():
        gates = {
            "lr": theirs.adaptive_step_transform(theirs.to_adaptive_step(x)),
            "forget": theirs.to_decay_factor(x).sigmoid()[..., 0],
        }
        if momentum:
            gates["momentum"] = theirs.to_momentum(x).sigmoid()[0, ..., 0]
        q, k, v = torch.randn(2, T, D).double(), theirs.to_keys(x), theirs.to_values(x)

    memory = preset(name).memories()[0].rule.memory
    made = theirs.memory_model
    A = {n: p.detach().expand(2, 1, *p.shape) for n, p in made.named_parameters()}
    outer = {n: getattr(made, n)[None] for n in memory.outer(D, D)}
    rule = Rule(memory, bias, Decay(), GradientDescent(momentum), chunk_size=size)
    q_, k_, v_ = (z[:, None] for z in (q, k, v))
    by_head = {n: g[:, None] for n, g in gates.items()}
    y, state = scan(rule, init_state(rule, A), q_, k_, v_, by_head, outer=outer)

    weights, past, reads = None, None, []
    for at in range(0, T, size):
        with torch.no_grad():
            updates, after, _ = theirs.store_memories(x[:, at : at + size], weights, past)
        past = after.states
        weights = dict(past[0].items())
        each = {n: w[:, 1:].flatten(0, 1) for n, w in updates.items()}  # (rows * tokens, ...)
        read = vmap(lambda w, one: functional_call(made, w, one[None])[0])
        reads.append(read(each, q[:, at : at + size].flatten(0, 1)).unflatten(0, (2, -1)))

    ours = {"y": y[:, 0]} | {f"A.{n}": a[:, 0] for n, a in state.A.items()}
    found = {"y": torch.cat(reads, 1)} | {f"A.{n}": w for n, w in weights.items()}
    if momentum:
        ours |= {f"S.{n}": s[:, 0] for n, s in state.S.items()}
        found |= {f"S.{n}": s[0] for n, s in past[1].items()}
    agree(f"{name}, chunk of {size}", "NeuralMemory.store_memories", ours, found, 1e-9)


def test_muon(titans, agree):
    """The orthogonalised direction, tall and wide; theirs divides by at least 1e-7."""
    S = torch.randn(2, 3, 4, 12, 5, generator=torch.Generator().manual_seed(0)).double()
    for x in (S, S.mT):
        agree(
            "Muon", "newtonschulz5", {"step": Muon().direction(x)}, {"step": titans.newtonschulz5(x)}, 1e-10
        )
