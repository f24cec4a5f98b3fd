"""Choices from outside, each with a twist that no fast way knows: the numbers are those of the recurrence."""

import warnings
from dataclasses import dataclass

import pytest
import torch

from cases import Problem, fastest, same
from miras.core.algorithm import Algorithm, GradientDescent
from miras.core.bias import L2, Bias
from miras.core.memory import MLP, Matrix, Memory
from miras.core.recurrence import recurrence
from miras.core.retention import Decay, ElasticNet, Retention
from miras.core.rule import Rule, init_state
from miras.core.schedule import Schedule
from miras.engine import scan


@dataclass(frozen=True)
class SmoothSign(Algorithm):
    """S_t = momentum_t S_{t-1} + tanh(step_t)."""

    momentum: bool = True

    def surprise(self, before, momentum, step):
        return momentum * before + torch.tanh(step)


@dataclass(frozen=True)
class Halved(GradientDescent):
    """Steps of half the size."""

    def step_size(self, lr, k):
        return lr / 2


@dataclass(frozen=True)
class Squeezed(Retention):
    """A_t = tanh(keep A_{t-1} + step): not linear in itself."""

    def advance(self, A, keep, step):
        return torch.tanh(keep * A + step)


@dataclass(frozen=True)
class SqueezedDecay(Decay):
    """The same, as one of the library's."""

    def advance(self, A, keep, step):
        return torch.tanh(keep * A + step)


@dataclass(frozen=True)
class Mapped(ElasticNet):
    """A map where its base has none, at gamma = 0."""

    def link(self, A):
        return A / (1 + A.square())


@dataclass(frozen=True)
class TiedTwice(Memory):
    """M(x) = tanh(x W) W: one weight, used twice."""

    def shapes(self, d_key, d_value):
        if d_key != d_value:
            raise ValueError("TiedTwice needs equal widths")
        return {"w": (d_key, d_key)}

    def apply(self, x, w):
        return w.linear("w", torch.tanh(w.linear("w", x)))


@dataclass(frozen=True)
class ScaledMatrix(Memory):
    """M(x) = (x * s) W: a weight that scales, and one that does not."""

    def shapes(self, d_key, d_value):
        return {"s": (d_key, 1), "w": (d_key, d_value)}

    def widths(self, shapes):
        return shapes["w"]

    def apply(self, x, w):
        return w.linear("w", w.scale("s", x))


@dataclass(frozen=True)
class Doubled(Matrix):
    """M(x) = 2 x W."""

    def apply(self, x, w):
        return 2 * w.linear("w", x)


@dataclass(frozen=True)
class Bent(MLP):
    """An MLP whose output is bent."""

    def apply(self, x, w):
        return torch.sin(super().apply(x, w))


@dataclass(frozen=True)
class Uneven(L2):
    """|r|^2 / 2 with the channels weighed."""

    def loss(self, pred, target, gates):
        weight = torch.arange(1, pred.shape[-1] + 1, dtype=pred.dtype, device=pred.device)
        return (weight * (pred - target).square()).sum(-1) / 2


@dataclass(frozen=True)
class Cosh(Bias):
    """sum_j log cosh r_j, with a gate of its own."""

    gates = ("width",)

    def loss(self, pred, target, gates):
        width = gates["width"][..., None]
        r = (pred - target) / width
        return (width.square() * (r + torch.nn.functional.softplus(-2 * r))).sum(-1)


@dataclass(frozen=True)
class EveryOther(Schedule):
    """What was gathered is taken behind every second token of a chunk, at the anchor of its start."""

    update: str = "chunk"

    def due(self, place, size):
        return place % 2 == 1


RULES = {
    "surprise": Rule(MLP(expansion=1), algorithm=SmoothSign(), chunk_size=3),
    "surprise, exact": Rule(algorithm=SmoothSign(), chunk_size=1),
    "step size": Rule(MLP(expansion=1), algorithm=Halved(momentum=True), chunk_size=3),
    "step size, exact": Rule(algorithm=Halved(), chunk_size=1),
    "advance": Rule(MLP(expansion=1), retention=Squeezed(), chunk_size=3),
    "advance of a subclass": Rule(retention=SqueezedDecay(), chunk_size=1),
    "link of a subclass": Rule(MLP(expansion=1), retention=Mapped(0.0), chunk_size=3),
    "a weight twice": Rule(TiedTwice(), chunk_size=3),
    "both kinds of weight": Rule(ScaledMatrix(), chunk_size=3),
    "apply, exact": Rule(Doubled(), chunk_size=1),
    "apply of an MLP": Rule(Bent(expansion=1), algorithm=GradientDescent(momentum=True), chunk_size=3),
    "loss of L2": Rule(MLP(expansion=1), Uneven(), chunk_size=3),
    "loss of L2, exact": Rule(bias=Uneven(), chunk_size=1),
    "loss with a gate": Rule(
        MLP(expansion=1), Cosh(), algorithm=GradientDescent(momentum=True), chunk_size=3
    ),
    "schedule": Rule(MLP(expansion=1), chunk_size=4, schedule=EveryOther()),
}
TOKEN_BY_TOKEN = {
    name for name in RULES if name.startswith(("surprise", "advance", "a weight", "both", "schedule"))
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", [0, 1])
def test_scan_is_the_recurrence(name, seed):
    problem = Problem(RULES[name], seed=seed, T=14)
    y, state = problem.run(recurrence, [slice(0, problem.T)])
    fast_y, fast_state = problem.run(scan, problem.cuts())
    same({"y": fast_y} | fast_state.tensors(), {"y": y} | state.tensors())
    same(problem.gradients(fast_y, fast_state), problem.gradients(y, state))
    with torch.no_grad():  # token by token, as in decoding
        alone_y, alone = problem.run(scan, [slice(t, t + 1) for t in range(problem.T)])
    same({"y": alone_y} | alone.tensors(), {"y": y} | state.tensors())
    assert (fastest(problem) == "recurrence") == (name in TOKEN_BY_TOKEN)


@pytest.mark.parametrize("name", ["surprise", "a weight twice"])
def test_a_long_call_says_why_it_is_slow(name):
    problem = Problem(RULES[name], seed=0, T=256, B=1, H=1)
    start = init_state(problem.rule, problem.start())
    given = (problem.rule, start, problem.q, problem.k, problem.v, problem.gates)
    why = {"surprise": "surprise", "a weight twice": "weight used again"}[name]
    with torch.no_grad(), pytest.warns(UserWarning, match=f"token by token.*no faster way serves {why}"):
        scan(*given, initial=problem.start())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        short = {n: g[:, :, :9] for n, g in problem.gates.items()}
        scan(*given[:2], *(x[:, :, :9] for x in given[2:5]), short, initial=problem.start())
