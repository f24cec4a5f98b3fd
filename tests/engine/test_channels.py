"""Gates by channel, no weight per token, are the recurrence: values, states, gradients to the second, masks, cuts."""

import itertools

import pytest
import torch

from cases import Problem, by_way, fastest, is_the_recurrence, name, same, second_derivatives
from miras.core.algorithm import GradientDescent
from miras.core.bias import L2, Huber
from miras.core.memory import MLP, Matrix
from miras.core.recurrence import recurrence
from miras.core.retention import Decay, ElasticNet, Keep, LqNorm, Sigmoid, Simplex
from miras.core.rule import Rule
from miras.engine import chunks, scan, tiles

RULES = tuple(
    Rule(memory, bias, retention, algorithm, size)
    for memory, bias in ((Matrix(), L2()), (MLP(2, 2), Huber()), (MLP(1, bias=True, affine=True), L2()))
    for retention, algorithm, size in (
        (Decay(), GradientDescent(step_bound=1.0), 16),
        (Decay(towards="initial"), GradientDescent(step_bound=1.0), 5),
        (Decay(decayed=True), GradientDescent(), 7),
        (Decay(decayed=True, towards="initial"), GradientDescent(first_order=True), 3),
        (Decay(), GradientDescent(), 1),
        (Keep(), GradientDescent(), 4),
    )
)
MAPPED = tuple(
    Rule(memory, L2(), retention, GradientDescent(step_bound=bound), size)
    for memory, retention, bound, size in (
        (MLP(2, 2), LqNorm(4.0, towards="initial"), 1.0, 7),
        (Matrix(), LqNorm(4.0), 0.0, 5),
        (MLP(2, 2), LqNorm(3.0), 0.0, 5),
        (MLP(2, 1), LqNorm(4.0, literal=True, towards="initial"), 0.0, 4),
        (MLP(2, 2), Simplex(towards="initial"), 1.0, 7),
        (MLP(2, 2), Simplex(scale=2.0), 0.0, 5),
        (MLP(2, 1), Simplex("output"), 0.0, 4),
        (MLP(2, 1), Simplex("all", towards="initial"), 0.0, 3),
        (MLP(2, 1), Sigmoid(), 0.0, 3),
        (Matrix(), ElasticNet(0.05), 0.0, 1),
    )
)
"""Rules whose weights are a map of the accumulator: those are formed, whatever the gates."""
SIDES = tuple(itertools.product(("head", "input", "output"), repeat=2))
"""By which channels lr and forget differ."""


def problem_of(rule: Rule, seed: int, lr: str, forget: str, **sizes: int) -> Problem:
    """A problem whose gates are by channel, each weight with its own."""
    problem = Problem(rule, seed, **{"B": 2, "H": 1} | sizes)
    g = torch.Generator().manual_seed(seed)
    tokens = (problem.B, problem.H, problem.T)
    for gate, side in (("lr", lr), ("forget", forget)):
        if gate in rule.gates():
            problem.gates = {n: x for n, x in problem.gates.items() if n.split(".")[0] != gate}
            for n, a in problem.A0.items():
                tail = {"head": (), "input": (a.shape[1], 1), "output": (1, a.shape[2])}[side]
                value = 0.2 * torch.rand(*tokens, *tail, generator=g, dtype=torch.float64)
                problem.gates[f"{gate}.{n}"] = value.requires_grad_()
    return problem


def allowed(rule: Rule, lr: str, forget: str) -> bool:
    if rule.retention.direct:
        return (lr, forget) != ("head", "head") and (bool(rule.retention.gates) or forget == "head")
    return rule.retention.along not in (forget, "all") or forget == "head"


def cases(rules: tuple[Rule, ...]) -> list:
    """Every rule with every pair of sides that makes a difference to it."""
    return [
        pytest.param(rule, lr, forget, id=f"{name(rule)}-{lr}-{forget}")
        for rule, (lr, forget) in itertools.product(rules, SIDES)
        if allowed(rule, lr, forget)
    ]


@pytest.mark.parametrize(("rule", "lr", "forget"), cases(RULES)[::3])
def test_it_is_the_recurrence(rule, lr, forget):
    is_the_recurrence(problem_of(rule, RULES.index(rule), lr, forget, T=19), "by channel")


@pytest.mark.parametrize(("rule", "lr", "forget"), cases(MAPPED)[::3])
@pytest.mark.parametrize("tile", [1, 20_000])
def test_a_map_is_the_recurrence(rule, lr, forget, tile, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_BYTES", tile)
    is_the_recurrence(problem_of(rule, MAPPED.index(rule) + 300, lr, forget, T=19), "by channel")


@pytest.mark.parametrize(("rule", "lr", "forget"), cases(RULES[:3] + MAPPED[4:5])[::3])
def test_gates_at_exactly_0_and_1(rule, lr, forget):
    problem = problem_of(rule, (RULES + MAPPED).index(rule) + 100, lr, forget, T=19)
    for gate in problem.gates.values():
        with torch.no_grad():
            draw = torch.rand(gate.shape, generator=torch.Generator().manual_seed(gate.numel()))
            gate[draw < 0.25] = 0.0
            gate[draw > 0.75] = 1.0
    is_the_recurrence(problem, "by channel")


@pytest.mark.parametrize("rule", RULES[::2] + MAPPED[::4], ids=name)
def test_groups_that_are_recomputed_and_nothing_recorded(rule, monkeypatch):
    problem = problem_of(
        rule, (RULES + MAPPED).index(rule) + 200, "output", "output" if rule.retention.gates else "head", T=37
    )
    monkeypatch.setattr(chunks, "ACTIVATION_BYTES", 0)
    is_the_recurrence(problem, "by channel")
    y, state = problem.run(recurrence, [slice(0, problem.T)])
    with torch.no_grad():
        y2, state2 = problem.run(scan, problem.cuts())
    same({"y": y2} | state2.tensors(), {"y": y} | state.tensors())


@pytest.mark.parametrize(("rule", "lr", "forget"), cases(RULES[7:10])[::3] + cases(MAPPED[:5:2])[::4])
def test_second_outer_derivatives(rule, lr, forget):
    problem = problem_of(rule, (RULES + MAPPED).index(rule), lr, forget, T=7, B=1, H=1)
    same(*(second_derivatives(problem, function) for function in (by_way(0), by_way(1))), tolerance=1e-7)


def test_a_gate_by_channel_keeps_later_tokens_out():
    """To the last bit: also in the tables of a chunk and in the padding of its tokens."""
    problem = problem_of(RULES[6], 5, "output", "output", T=21)
    problem.masks = dict.fromkeys(problem.masks)
    changed = {
        n: x.detach().clone() for n, x in problem.leaves().items() if not n.startswith(("A0", "outer"))
    }
    for x in changed.values():
        x[:, :, 9] = 0.1
    with torch.no_grad():
        before, _ = problem.run(scan, [slice(0, 21)])
        after, _ = problem.run(scan, [slice(0, 21)], **changed)
    assert torch.equal(before[:, :, :9], after[:, :, :9])
    assert not torch.equal(before[:, :, 9:], after[:, :, 9:])


@pytest.mark.parametrize(
    ("rule", "side"),
    [(Rule(algorithm=GradientDescent(momentum=True)), "input"), (Rule(), "head")],
    ids=["momentum", "per head"],
)
def test_other_rules_have_another_way(rule, side):
    assert fastest(problem_of(rule, 1, side, side, T=5)) != "by channel"
