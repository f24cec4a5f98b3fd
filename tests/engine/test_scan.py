"""`recurrence` and every way of `scan` are one function: every rule, mask, phase and cut, values and gradients."""

import pytest
import torch

from cases import RULES, Problem, by_way, each, name, number_of_ways, same, second_derivatives
from miras.core.bias import Huber
from miras.core.memory import MLP
from miras.core.observe import observe
from miras.core.recurrence import recurrence
from miras.core.retention import LqNorm
from miras.core.rule import Rule
from miras.engine import chunks, scan

SMALL = [rule for rule in RULES if rule.chunk_size in (3, 16)]


@pytest.mark.parametrize("rule", each(RULES))
def test_every_way_is_the_recurrence(rule):
    problem = Problem(rule, seed=RULES.index(rule))
    y, state = problem.run(recurrence, [slice(0, problem.T)])
    wanted = problem.gradients(y, state)
    for number in range(number_of_ways(problem)):
        fast_y, fast_state = problem.run(by_way(number), problem.cuts())
        same({"y": fast_y} | fast_state.tensors(), {"y": y} | state.tensors())
        same(problem.gradients(fast_y, fast_state), wanted)


@pytest.mark.parametrize("rule", each(SMALL))
def test_recomputing_groups_changes_nothing(rule, monkeypatch):
    problem = Problem(rule, seed=RULES.index(rule) + 1000)
    y, state = problem.run(scan, [slice(0, problem.T)])
    expected = problem.gradients(y, state)
    monkeypatch.setattr(chunks, "ACTIVATION_BYTES", 0)
    y2, state2 = problem.run(scan, [slice(0, problem.T)])
    same({"y": y2} | state2.tensors(), {"y": y} | state.tensors(), 1e-12)
    same(problem.gradients(y2, state2), expected)


@pytest.mark.parametrize("rule", each(SMALL))
def test_values_and_gradients_with_gates_at_exactly_0_and_1(rule):
    problem = Problem(rule, seed=RULES.index(rule) + 2000)
    # Where a norm divides, everything forgotten is 0 / 0 in the paper's formula: stay away from it.
    away = isinstance(rule.retention, LqNorm)
    for n, gate in problem.gates.items():
        with torch.no_grad():
            draw = torch.rand(gate.shape, generator=torch.Generator().manual_seed(gate.numel()))
            gate[draw < 0.25] = 0.0
            gate[draw > 0.75] = 0.5 if away and n.startswith("forget") else 1.0
    y, state = problem.run(recurrence, [slice(0, problem.T)])
    fast_y, fast_state = problem.run(scan, problem.cuts())
    same({"y": fast_y} | fast_state.tensors(), {"y": y} | state.tensors())
    same(problem.gradients(fast_y, fast_state), problem.gradients(y, state))


@pytest.mark.parametrize("function", [scan, recurrence])
@pytest.mark.parametrize("rule", each(SMALL))
def test_no_token_sees_a_later_one(rule, function):
    problem = Problem(rule, seed=RULES.index(rule) + 3000, T=13)
    problem.masks["valid"] = problem.masks["write"] = None
    at = rule.chunk_size // 2 + (rule.chunk_size if rule.chunk_size < 8 else 0)
    g = torch.Generator().manual_seed(1)
    changed = {}
    for n, x in problem.leaves().items():
        if not n.startswith(("A0", "outer")):
            noise = torch.rand(x[:, :, at].shape, generator=g, dtype=torch.float64)
            changed[n] = x.detach().clone()
            changed[n][:, :, at] = noise * (0.2 if n in problem.gates else 1)
    with torch.no_grad():
        before, _ = problem.run(function, [slice(0, problem.T)])
        after, _ = problem.run(function, [slice(0, problem.T)], **changed)
    assert torch.equal(before[:, :, :at], after[:, :, :at])
    assert not torch.equal(before[:, :, at:], after[:, :, at:])


@pytest.mark.parametrize("rule", SMALL[::3], ids=name)
def test_rows_do_not_see_each_other(rule):
    problem = Problem(rule, seed=RULES.index(rule) + 4000)
    cuts = problem.cuts()
    other = problem.v.detach().clone()
    other[1:] = torch.randn(other[1:].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        before, _ = problem.run(scan, cuts)
        after, _ = problem.run(scan, cuts, v=other)
    assert torch.equal(before[0], after[0])


@pytest.mark.parametrize("rule", SMALL[::3], ids=name)
def test_padding_changes_nothing_even_when_it_is_not_a_number(rule):
    problem = Problem(rule, seed=RULES.index(rule) + 5000)
    valid = torch.rand(problem.B, problem.T, generator=torch.Generator().manual_seed(5)) < 0.6
    problem.masks["valid"] = valid
    poisoned = {}
    for n in ("q", "k", "v"):
        x = getattr(problem, n).detach()
        hole = ~valid[:, None].unflatten(-1, (-1, *[1] * (x.dim() - 3)))
        poisoned[n] = x.masked_fill(hole, torch.nan)
    with torch.no_grad():
        for cuts in ([slice(0, problem.T)], [slice(t, t + 1) for t in range(problem.T)]):
            y, state = problem.run(scan, cuts)
            y2, state2 = problem.run(scan, cuts, **poisoned)
            same({"y": y2} | state2.tensors(), {"y": y} | state.tensors(), 0.0)


@pytest.mark.parametrize("rule", SMALL[::5], ids=name)
def test_observation_is_the_same_on_both_paths(rule):
    problem = Problem(rule, seed=RULES.index(rule) + 6000)
    with torch.no_grad(), observe() as slow:
        problem.run(recurrence, [slice(0, problem.T)])
    with observe() as fast:
        y, _ = problem.run(scan, problem.cuts())
        y.sum().backward()
    for n, x in slow["memory"].items():
        assert x.shape == (problem.B, problem.H, problem.T), n
    same(fast["memory"], slow["memory"])


SECOND = [rule for rule in RULES if rule.chunk_size == 3][:: len(RULES) // 12]


@pytest.mark.parametrize("rule", SECOND, ids=name)
def test_second_outer_derivatives(rule, monkeypatch):
    monkeypatch.setattr(chunks, "ACTIVATION_BYTES", 0)
    problem = Problem(rule, seed=RULES.index(rule) + 7000, T=7, B=1, H=1)
    same(*(second_derivatives(problem, function) for function in (scan, recurrence)), tolerance=1e-7)


@pytest.mark.filterwarnings("ignore")  # torch's compiler has many, about itself
@pytest.mark.parametrize("function", [scan, recurrence])
def test_compiling_loses_no_gradient(function):
    problem = Problem(Rule(MLP(depth=1), Huber(delta=0.5), chunk_size=2), seed=8000, T=5, B=1, H=1)
    expected = problem.run(function, [slice(0, 5)])
    torch.compiler.reset()
    found = problem.run(torch.compile(function, backend="eager"), [slice(0, 5)])
    same({"y": found[0]} | found[1].tensors(), {"y": expected[0]} | expected[1].tensors(), 1e-12)
    same(problem.gradients(*found), problem.gradients(*expected))
