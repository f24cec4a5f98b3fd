"""Random problems for the tests of core: every rule, random gates, masks, phases and stream cuts."""

import itertools
import random
import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from miras.core.algorithm import Algorithm, GradientAscent, GradientDescent, Implicit, Muon
from miras.core.bias import L1, L2, Dot, Huber, LInf, Lp, Robust
from miras.core.memory import MLP, GatedMLP, Matrix, Vector
from miras.core.recurrence import recurrence
from miras.core.retention import (
    Decay,
    ElasticNet,
    FDivergence,
    Keep,
    LqNorm,
    ProximalElasticNet,
    Sigmoid,
    Simplex,
)
from miras.core.rule import Call, Rule, init_state, pair_gates
from miras.core.schedule import Schedule
from miras.engine import scan
from miras.engine.scan import RECURRENCE, planned, way_of, ways

CLASSIC = tuple(
    Rule(*axes, chunk_size=size)
    for *axes, size in itertools.product(
        (
            Matrix(),
            MLP(depth=1),
            MLP(depth=2, expansion=2),
            MLP(depth=3, expansion=1, residual=False, norm=False),
        ),
        (L2(), Dot()),
        (Decay(), Decay(decayed=True)),
        tuple(GradientDescent(*choice) for choice in itertools.product((False, True), (0.0, 2.0))),
        (1, 3, 16, 64),
    )
)
"""The full product over the linear rules, which have a dual form."""

RETURNING = tuple(
    Rule(*axes, chunk_size=size)
    for *axes, size in itertools.product(
        (Matrix(), MLP(depth=2, expansion=2)),
        (L2(), Dot()),
        (Decay(towards="initial"), Decay(decayed=True, towards="initial")),
        (GradientDescent(), GradientDescent(momentum=True, step_bound=2.0)),
        (1, 3, 16),
    )
)
"""The same where forgetting leads back to the initial memory."""

AXES = (
    (
        Matrix(),
        Vector(),
        MLP(depth=2, expansion=2),
        MLP(depth=1, bias=True, affine=True),
        MLP(depth=2, expansion=1, bias=True, residual=False, bias_input="key"),
        GatedMLP(expansion=2),
        GatedMLP(expansion=1, residual=False, norm=False),
    ),
    (
        L2(),
        Dot(),
        L1(eps=1e-2),
        Lp(3.0, clip=1.0),
        Lp(1.5, eps=1e-2),
        LInf(tau=0.5, eps=1e-2),
        Huber(),
        Huber("coordinate", delta=0.7),
        Huber("mixture"),
        Robust(),
        Robust("linf", radius=0.3),
        Robust("l1"),
    ),
    (
        Decay(),
        Decay(decayed=True),
        Decay(towards="initial"),
        Decay(decayed=True, towards="initial"),
        Keep(),
        ElasticNet(0.05),
        ElasticNet(0.05, smooth=True),
        ProximalElasticNet(0.02),
        LqNorm(4.0),
        LqNorm(4.0, literal=True),
        LqNorm(3.0),
        LqNorm(4.0, towards="initial"),
        Simplex(),
        Simplex(towards="initial"),
        Simplex("output"),
        Simplex("all", scale=2.0),
        FDivergence(),
        Sigmoid(),
    ),
    (
        GradientDescent(),
        GradientDescent(momentum=True),
        GradientDescent(momentum=True, step_bound=2.0),
        GradientDescent(step_bound=1.0),
        GradientDescent(steps=2),
        GradientDescent(momentum=True, first_order=True),
        GradientAscent(step_bound=1.0),
        Implicit(),
        Muon(scale=0.1),
        Muon(iterations=2, scale=0.1),
    ),
    (1, 3, 16),
)


def covering(seed: int) -> tuple[Rule, ...]:
    """A random set of allowed rules in which every allowed pair of choices occurs, by greedy choice."""
    draw = random.Random(seed)
    made: dict[tuple[int, ...], Rule] = {}
    for numbers in itertools.product(*(range(len(axis)) for axis in AXES)):
        try:
            made[numbers] = Rule(*(axis[n] for axis, n in zip(AXES, numbers, strict=True)))
        except ValueError:
            continue
    pairs = {key: {(i, key[i], j, key[j]) for i, j in itertools.combinations(range(5), 2)} for key in made}
    missing = set().union(*pairs.values())
    chosen: list[Rule] = []
    while missing:
        some = draw.sample(list(made), 400)
        best = max(some, key=lambda key: len(pairs[key] & missing))
        if gained := pairs[best] & missing:
            missing -= gained
            chosen.append(made[best])
    return tuple(chosen)


SCHEDULES = (
    Schedule(read="before"),
    Schedule(read="start"),
    Schedule("chunk"),
    Schedule("chunk", "before"),
    Schedule("chunk", "start"),
)


GATHERING = (*AXES[3], Muon(iterations=2, scale=0.1, momentum=False))
WINDOWS = (
    GradientDescent(window=2),
    GradientDescent(momentum=True, window=4),
    GradientDescent(first_order=True, window=7),
    Muon(iterations=2, scale=0.1, window=3),
)


def drawn(
    seed: int, count: int, schedules: tuple[Schedule, ...], algorithms: tuple[Algorithm, ...]
) -> tuple[Rule, ...]:
    """Allowed rules with each of the schedules, of random choices on the other axes."""
    draw, made = random.Random(seed), list[Rule]()
    for schedule in schedules:
        while sum(rule.schedule == schedule for rule in made) < count:
            memory, bias, retention, algorithm, size = map(draw.choice, (*AXES[:3], algorithms, AXES[4]))
            try:
                made.append(Rule(memory, bias, retention, algorithm, size, schedule))
            except ValueError:
                continue
    return tuple(dict.fromkeys(made))


LINEAR = (Decay(), Decay(towards="initial"), Keep())
WINDOWED = drawn(0, 12, (Schedule(),), WINDOWS) + tuple(
    Rule(memory, bias, retention, algorithm, size, schedule)
    for (memory, size, schedule), bias, retention, algorithm in zip(
        itertools.product((Matrix(), MLP(depth=2, expansion=2)), (1, 3, 16), (Schedule(), *SCHEDULES[:2])),
        itertools.cycle((L2(), Dot(), Huber(), Huber("coordinate"), Robust())),
        itertools.cycle(LINEAR),
        itertools.cycle(WINDOWS[:3]),
    )
)
"""Gradients of several pairs: some of every kind, and those that the dual form has in every size and schedule."""
WIDE = covering(seed=0) + drawn(0, 16, SCHEDULES, GATHERING) + WINDOWED
"""Every pair of choices over four axes and the chunk size, in some rule; every schedule and window with some."""
RULES = CLASSIC + RETURNING + WIDE
SPARED = frozenset(CLASSIC) - frozenset(CLASSIC[::3])
"""Slow tests alone take these; the others have every choice of three axes together."""
LENGTHS = {1: 5, 3: 11, 16: 53, 64: 141}


def name(rule: Rule) -> str:
    parts = [rule.memory, rule.bias, rule.retention, rule.algorithm, rule.chunk_size]
    text = "-".join(map(str, parts + [rule.schedule] * (rule.schedule != Schedule()))).replace(" ", "")
    return re.sub(r"<[^>]*>", "f", text)  # a function's address differs from process to process


def each(rules: Iterable[Rule]) -> list[Any]:
    """Parameters of a test that every rule takes."""
    return [pytest.param(r, id=name(r), marks=[pytest.mark.slow] * (r in SPARED)) for r in rules]


class Problem:
    """A rule, its tensors (fp64, requiring gradients) and random masks, all from one seed."""

    def __init__(
        self, rule: Rule, seed: int, T: int | None = None, B: int = 3, H: int = 2, channels: bool = True
    ) -> None:
        self.rule, self.random = rule, random.Random(seed)
        g = torch.Generator().manual_seed(seed)
        wide = rule in WIDE
        T = (min(LENGTHS[rule.chunk_size], 23) if wide else LENGTHS[rule.chunk_size]) if T is None else T
        if wide:
            B, H = 2, 1
        self.B, self.H, self.T = B, H, T
        try:
            Dk, Dv = 4, 3
            shapes = rule.memory.shapes(Dk, Dv)
        except ValueError:  # residual and elementwise memories need equal widths
            Dk, Dv = 4, 4
            shapes = rule.memory.shapes(Dk, Dv)
        steps = (rule.algorithm.steps,) if rule.algorithm.steps > 1 else ()

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.A0 = {n: randn(H, *shape).div(shape[0] ** 0.5) for n, shape in shapes.items()}
        self.q, self.k = randn(B, H, T, Dk), torch.nn.functional.normalize(randn(B, H, T, *steps, Dk), dim=-1)
        self.v = randn(B, H, T, *steps, Dv)
        self.outer = {
            n: value + 0.3 * randn(H, width) for n, (width, value) in rule.memory.outer(Dk, Dv).items()
        }
        self.gates: dict[str, Tensor] = {}
        for gate in rule.gates():
            bias = gate in rule.bias.gates
            own = gate not in pair_gates(rule) and self.random.random() < 0.3
            for tail in [f".{n}" for n in self.A0] if own else [""]:
                shape: tuple[int, ...] = (B, H, T)
                if gate == "lr" and steps:
                    shape = (*shape, *steps)
                elif wide and channels and self.random.random() < 0.4:
                    shape = self.random.choice([shape, *self.channels(gate, tail, shapes, Dv)])
                value = torch.rand(*shape, generator=g, dtype=torch.float64)
                largest = {"lr": 0.2, "forget": 0.2, "momentum": 0.8}.get(gate, 1.0)
                self.gates[gate + tail] = value * largest + (0.2 if bias else 0.0)

        def mask(share: float) -> Tensor | None:
            return None if self.random.random() < 0.4 else torch.rand(B, T, generator=g) < share

        self.masks = {"valid": mask(0.8), "write": mask(0.8), "reset": mask(3 / (T + 3))}
        for x in self.leaves().values():
            x.requires_grad_()

    def channels(
        self, gate: str, tail: str, shapes: dict[str, tuple[int, int]], Dv: int
    ) -> list[tuple[int, ...]]:
        """The channel-wise shapes in which a gate may be given for one weight, or for all of equal width."""
        rule, tokens = self.rule, (self.B, self.H, self.T)
        if gate in rule.bias.gates:
            return [(*tokens, 1, Dv)] if gate in rule.bias.channelwise else []
        if gate == "share" or (isinstance(rule.algorithm, Implicit) and gate == "lr"):
            return []
        mine = [shapes[tail[1:]]] if tail else list(shapes.values())
        found = []
        if len({m[0] for m in mine}) == 1 and not (
            gate == "forget" and rule.retention.along in ("input", "all")
        ):
            found.append((*tokens, mine[0][0], 1))
        if len({m[1] for m in mine}) == 1 and not (
            gate == "forget" and rule.retention.along in ("output", "all")
        ):
            found.append((*tokens, 1, mine[0][1]))
        return found

    def leaves(self) -> dict[str, Tensor]:
        return (
            {"q": self.q, "k": self.k, "v": self.v}
            | self.gates
            | {f"A0.{n}": a for n, a in self.A0.items()}
            | {f"outer.{n}": p for n, p in self.outer.items()}
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
                outer=self.outer,
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


def by_way(number: int) -> Callable:
    """`scan` on the way of that number among all that serve a call, the last one where there are fewer."""

    def scan(rule, state, q, k, v, gates, *, initial=None, outer=None, valid=None, write=None, reset=None):
        call = Call.of(q, k, v, gates, valid, write, reset, initial, outer)
        plan = planned(rule, state, call)
        served = [*ways(rule, call, plan), RECURRENCE]
        return served[min(number, max(len(served) - 2, 0))].run(rule, state, call, plan)

    return scan


def number_of_ways(problem: "Problem") -> int:
    """How many ways, the recurrence apart, serve a whole problem."""
    call = Call.of(
        problem.q, problem.k, problem.v, problem.gates, None, None, None, problem.start(), problem.outer
    )
    state = init_state(problem.rule, problem.start())
    return len(ways(problem.rule, call, planned(problem.rule, state, call)))


def fastest(problem: "Problem") -> str:
    """The name of the way that a whole problem takes."""
    call = Call.of(
        problem.q, problem.k, problem.v, problem.gates, None, None, None, problem.start(), problem.outer
    )
    state = init_state(problem.rule, problem.start())
    return way_of(problem.rule, call, planned(problem.rule, state, call)).name


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Every tensor of `a` equals that of `b` to `tolerance` of its largest entry."""
    assert a.keys() == b.keys()
    for n in a:
        x, y = a[n].detach(), b[n].detach()
        assert x.shape == y.shape and x.isfinite().all(), n
        gap, size = (x - y).abs().max().item(), y.abs().max().item()
        assert gap <= tolerance * max(size, 1e-12), f"{n}: off by {gap:.3g}, largest entry {size:.3g}"


def second_derivatives(problem: Problem, function: Callable) -> dict[str, Tensor]:
    """Gradients, by every leaf, of the squared size of the gradients of what is read; 0 where there is none."""
    leaves = problem.leaves()
    y, _ = problem.run(function, [slice(0, problem.T)])
    first = torch.autograd.grad(y.square().sum(), list(leaves.values()), create_graph=True, allow_unused=True)
    total = sum(g.square().sum() for g in first if g is not None and g.requires_grad)
    second = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), second, strict=True)
    }


def is_the_recurrence(problem: Problem, *ways: str) -> None:
    """`scan` takes one of these ways, at any cut, and gives the recurrence's values and gradients."""
    assert fastest(problem) in ways
    y, state = problem.run(recurrence, [slice(0, problem.T)])
    fast_y, fast_state = problem.run(scan, problem.cuts())
    same({"y": fast_y} | fast_state.tensors(), {"y": y} | state.tensors())
    same(problem.gradients(fast_y, fast_state), problem.gradients(y, state))
