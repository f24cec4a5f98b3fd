"""The exact blockwise forms are the recurrence: values, states, gradients, masks, cuts; any momentum and decay."""

import itertools

import pytest
import torch

from cases import Problem, is_the_recurrence, same
from miras.core.algorithm import GradientDescent, Implicit
from miras.core.bias import L2, Dot
from miras.core.observe import observe
from miras.core.recurrence import recurrence
from miras.core.retention import Decay, Keep
from miras.core.rule import Rule
from miras.engine import exact as module
from miras.engine import scan

RULES = tuple(
    Rule(bias=bias, retention=retention, algorithm=algorithm, chunk_size=1)
    for bias, retention, algorithm in itertools.product(
        (L2(), Dot()),
        (
            Decay(),
            Decay(decayed=True),
            Decay(towards="initial"),
            Decay(decayed=True, towards="initial"),
            Keep(),
        ),
        (
            GradientDescent(),
            GradientDescent(momentum=True),
            GradientDescent(step_bound=2.0),
            GradientDescent(steps=2),
        ),
    )
) + tuple(Rule(retention=r, algorithm=Implicit(), chunk_size=1) for r in (Keep(), Decay(decayed=True)))


def name(rule: Rule) -> str:
    return f"{rule.bias}-{rule.retention}-{rule.algorithm}".replace(" ", "")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 8)


def problem_of(rule: Rule, seed: int, channels: bool = False) -> Problem:
    problem = Problem(rule, seed=seed, T=29, channels=False)
    if channels and "forget" in problem.gates:
        B, H, T = problem.B, problem.H, problem.T
        g = torch.Generator().manual_seed(seed)
        value = torch.rand(B, H, T, 4, 1, generator=g, dtype=torch.float64) * 0.3
        problem.gates["forget"] = value.requires_grad_()
    return problem


@pytest.mark.parametrize("rule", RULES, ids=name)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_blockwise_is_the_recurrence(rule, seed):
    is_the_recurrence(problem_of(rule, seed + 10 * RULES.index(rule)), "blocks", "hebbian blocks")


@pytest.mark.parametrize("rule", [r for r in RULES if r.bias == Dot() and not r.algorithm.momentum], ids=name)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_decay_by_key_channel(rule, seed):
    is_the_recurrence(
        problem_of(rule, seed + 10 * RULES.index(rule) + 1000, channels=True), "blocks", "hebbian blocks"
    )


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_gates_at_exactly_0_and_1(rule):
    problem = problem_of(rule, 2000 + RULES.index(rule))
    for gate in problem.gates.values():
        with torch.no_grad():
            draw = torch.rand(gate.shape, generator=torch.Generator().manual_seed(gate.numel()))
            gate[draw < 0.25] = 0.0
            gate[draw > 0.75] = 1.0
    is_the_recurrence(problem, "blocks", "hebbian blocks")


@pytest.mark.parametrize("momentum", [0.0, 0.002, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("forget", [0.0, 0.5, 1.0])
def test_single_precision_at_any_momentum_and_decay(momentum, forget, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 64)
    rule = Rule(algorithm=GradientDescent(momentum=True), chunk_size=1)
    problem = Problem(rule, seed=7, T=96)
    problem.masks = {"valid": None, "write": None, "reset": None}
    problem.gates = {n: g for n, g in problem.gates.items() if "." not in n}
    size = 0.02 if momentum < 1 else 1e-4
    B, H, T = problem.B, problem.H, problem.T
    for n, value in {"lr": size, "momentum": momentum, "forget": forget}.items():
        problem.gates[n] = torch.full((B, H, T), value, dtype=torch.float64)
    with torch.no_grad():
        y, state = problem.run(recurrence, [slice(0, T)])
        for n in ("q", "k", "v"):
            setattr(problem, n, getattr(problem, n).float())
        problem.gates = {n: g.float() for n, g in problem.gates.items()}
        problem.A0 = {n: a.float() for n, a in problem.A0.items()}
        fast_y, fast = problem.run(scan, [slice(0, T)])
    same({"y": fast_y.double(), "A": fast.A["w"].double()}, {"y": y, "A": state.A["w"]}, 2e-5)


@pytest.mark.parametrize("rule", RULES[::5], ids=name)
def test_observation(rule):
    problem = problem_of(rule, 3000)
    with torch.no_grad(), observe() as slow:
        problem.run(recurrence, [slice(0, problem.T)])
    with torch.no_grad(), observe() as fast:
        problem.run(scan, problem.cuts())
    same(fast["memory"], slow["memory"])


def test_no_token_sees_a_later_one():
    for rule in RULES:
        problem = problem_of(rule, 4000)
        problem.masks = {"valid": None, "write": None, "reset": None}
        changed = problem.v.detach().clone()
        changed[:, :, 13] = 5.0
        with torch.no_grad():
            before, _ = problem.run(scan, [slice(0, problem.T)])
            after, _ = problem.run(scan, [slice(0, problem.T)], v=changed)
        # The blocks of a solve see each other's rounding, no more.
        assert torch.allclose(before[:, :, :13], after[:, :, :13], atol=1e-13)
        assert not torch.allclose(before[:, :, 13:], after[:, :, 13:])
