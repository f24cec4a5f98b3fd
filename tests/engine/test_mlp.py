"""The written-out factors of an MLP are the recurrence: values, states, gradients to the second, masks, cuts."""

import itertools

import pytest
import torch

from cases import Problem, by_way, fastest, name, same, second_derivatives
from miras.core.algorithm import GradientDescent
from miras.core.bias import Huber
from miras.core.memory import MLP
from miras.core.observe import observe
from miras.core.recurrence import recurrence
from miras.core.retention import Decay, Keep, LqNorm
from miras.core.rule import Rule
from miras.engine import chunks, scan

RULES = tuple(
    Rule(MLP(depth, 2, residual, norm), retention=retention, algorithm=algorithm, chunk_size=size)
    for depth, residual, norm in itertools.product((1, 2, 3), (True, False), (True, False))
    for retention, algorithm, size in (
        (Decay(), GradientDescent(momentum=True, step_bound=2.0), 5),
        (Decay(towards="initial"), GradientDescent(momentum=True, first_order=True, step_bound=2.0), 5),
        (Keep(), GradientDescent(first_order=True), 3),
        (Keep(), GradientDescent(steps=2), 4),
    )
)


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_it_is_the_recurrence(rule, monkeypatch):
    problem = Problem(rule, seed=RULES.index(rule), T=19)
    assert fastest(problem) == "mlp"
    y, state = problem.run(recurrence, [slice(0, problem.T)])
    wanted = problem.gradients(y, state)
    for group in (chunks.ACTIVATION_BYTES, 0):  # and with its chunks recomputed in groups
        monkeypatch.setattr(chunks, "ACTIVATION_BYTES", group)
        fast_y, fast_state = problem.run(scan, problem.cuts())
        same({"y": fast_y} | fast_state.tensors(), {"y": y} | state.tensors())
        same(problem.gradients(fast_y, fast_state), wanted)
    with torch.no_grad():
        y2, state2 = problem.run(scan, problem.cuts())
    same({"y": y2} | state2.tensors(), {"y": y} | state.tensors())


@pytest.mark.parametrize("rule", RULES[::5], ids=name)
def test_second_outer_derivatives(rule):
    problem = Problem(rule, seed=RULES.index(rule), T=8, B=1, H=1)
    same(*(second_derivatives(problem, function) for function in (by_way(0), by_way(1))), tolerance=1e-7)


def test_what_is_watched_is_the_recurrence():
    problem = Problem(RULES[0], seed=1, T=11)
    seen = []
    for function in (recurrence, scan):
        with torch.no_grad(), observe() as watched:
            problem.run(function, [slice(0, problem.T)])
        seen.append(watched["memory"])
    same(seen[1], seen[0])


@pytest.mark.parametrize(
    "rule",
    [
        Rule(MLP(bias=True)),
        Rule(MLP(affine=True)),
        Rule(MLP(), retention=Decay(decayed=True)),
        Rule(MLP(), bias=Huber()),
        Rule(MLP(), retention=LqNorm()),
    ],
    ids=name,
)
def test_other_rules_have_another_way(rule):
    assert fastest(Problem(rule, seed=2, T=5, channels=False)) != "mlp"
