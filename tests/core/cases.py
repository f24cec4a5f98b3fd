"""Random problems for the tests of core: every rule, random gates, masks, phases and stream cuts."""

import itertools
import random
import zlib

import torch
from torch import Tensor

from miras.core.algorithm import GradientDescent
from miras.core.bias import L2, Dot
from miras.core.memory import MLP, Matrix
from miras.core.retention import Decay
from miras.core.rule import Rule

MEMORIES = (
    Matrix(),
    MLP(depth=1),
    MLP(depth=2, expansion=2),
    MLP(depth=3, expansion=1, residual=False, norm=False),
)
BIASES = (L2(), Dot())
RETENTIONS = (Decay(), Decay(decayed=True))
ALGORITHMS = tuple(GradientDescent(*choice) for choice in itertools.product((False, True), (0.0, 2.0)))
RULES = tuple(
    Rule(*axes, chunk_size=size)
    for *axes, size in itertools.product(MEMORIES, BIASES, RETENTIONS, ALGORITHMS, (1, 3, 16, 64))
)
LENGTHS = {1: 5, 3: 11, 16: 53, 64: 141}


def name(rule: Rule) -> str:
    return (
        f"{rule.memory}-{rule.bias}-decayed={rule.retention.decayed}-momentum={rule.algorithm.momentum}"
        f"-bound={rule.algorithm.step_bound}-{rule.chunk_size}"
    ).replace(" ", "")


class Problem:
    """A rule, its tensors (fp64, requiring gradients) and random masks, all from one seed."""

    def __init__(self, rule: Rule, seed: int, T: int | None = None, B: int = 3, H: int = 2) -> None:
        self.rule, self.random = rule, random.Random(seed)
        g = torch.Generator().manual_seed(seed)
        T = LENGTHS[rule.chunk_size] if T is None else T
        self.B, self.H, self.T = B, H, T
        residual = isinstance(rule.memory, MLP) and rule.memory.residual
        Dk, Dv = 4, 4 if residual else 3

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.A0 = {
            n: randn(H, *shape).div(shape[0] ** 0.5) for n, shape in rule.memory.shapes(Dk, Dv).items()
        }
        self.q, self.k = randn(B, H, T, Dk), torch.nn.functional.normalize(randn(B, H, T, Dk), dim=-1)
        self.v = randn(B, H, T, Dv)
        self.gates: dict[str, Tensor] = {}
        for gate in rule.gates():
            own = self.random.random() < 0.3
            for tail in [f".{n}" for n in self.A0] if own else [""]:
                value = torch.rand(B, H, T, generator=g, dtype=torch.float64)
                self.gates[gate + tail] = value * {"lr": 0.2, "forget": 0.2, "momentum": 0.8}[gate]

        def mask(share: float) -> Tensor | None:
            return None if self.random.random() < 0.4 else torch.rand(B, T, generator=g) < share

        self.masks = {"valid": mask(0.8), "write": mask(0.8), "reset": mask(3 / (T + 3))}
        for x in self.leaves().values():
            x.requires_grad_()

    def leaves(self) -> dict[str, Tensor]:
        return (
            {"q": self.q, "k": self.k, "v": self.v} | self.gates | {f"A0.{n}": a for n, a in self.A0.items()}
        )

    @staticmethod
    def generator(name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def start(self) -> dict[str, Tensor]:
        return {n: a.expand(self.B, *a.shape) for n, a in self.A0.items()}

    def cuts(self) -> list[slice]:
        """A random way to cut the stream, sometimes into single tokens."""
        if self.random.random() < 0.2:
            return [slice(0, self.T)]
        inside = sorted(self.random.sample(range(1, self.T), self.random.randint(1, min(4, self.T - 1))))
        return [slice(a, b) for a, b in itertools.pairwise([0, *inside, self.T])]

    def run(self, function, cuts: list[slice], **changed: Tensor):
        """Feed the stream through `recurrence` or `scan` in pieces: reads and the last state."""
        from miras.core.rule import init_state

        q, k, v = (changed.get(n, getattr(self, n)) for n in ("q", "k", "v"))
        gates = {n: changed.get(n, g) for n, g in self.gates.items()}
        state, reads = init_state(self.rule, self.start()), []
        for cut in cuts:
            y, state = function(
                self.rule,
                state,
                *(x[:, :, cut] for x in (q, k, v)),
                {n: g[:, :, cut] for n, g in gates.items()},
                **{n: None if m is None else m[:, cut] for n, m in self.masks.items()},
                initial=self.start(),
            )
            reads.append(y)
        return torch.cat(reads, 2), state

    def gradients(self, y: Tensor, state) -> dict[str, Tensor]:
        """Outer gradients of a fixed random functional of the reads and of every tensor of the state."""
        outputs = {"y": y} | {n: x for n, x in state.tensors().items() if x.requires_grad}
        total = sum(
            (torch.randn(x.shape, generator=self.generator(n), dtype=torch.float64) * x).sum()
            for n, x in outputs.items()
        )
        leaves = self.leaves()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {
            n: torch.zeros_like(x) if d is None else d
            for (n, x), d in zip(leaves.items(), found, strict=True)
        }


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Every tensor of `a` equals that of `b` to `tolerance` of its largest entry."""
    assert a.keys() == b.keys()
    for n in a:
        x, y = a[n].detach(), b[n].detach()
        assert x.shape == y.shape and x.isfinite().all(), n
        gap, size = (x - y).abs().max().item(), y.abs().max().item()
        assert gap <= tolerance * max(size, 1e-12), f"{n}: off by {gap:.3g}, largest entry {size:.3g}"
