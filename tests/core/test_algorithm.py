"""Golden values of the memory algorithms, worked out by hand from their equations."""

from fractions import Fraction

import pytest
import torch

from miras.core.algorithm import GradientAscent, GradientDescent, Implicit, Muon
from miras.core.memory import MLP, Vector
from miras.core.recurrence import recurrence
from miras.core.retention import Decay, Keep, Sigmoid
from miras.core.rule import Rule, init_state
from miras.core.schedule import Schedule
from miras.engine import scan


def number(*values: float) -> torch.Tensor:
    """One row and head, a token each (or several steps of one token), of width 1."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1, 1)


def one(function, rule, k, v, **gates):
    """The weight after the tokens, from 1, and what a query of 3 reads."""
    state = init_state(rule, {"w": torch.ones(1, 1, 1, 1, dtype=torch.float64)})
    q = torch.full((1, 1, k.shape[2], 1), 3.0, dtype=torch.float64)
    values = {n: torch.tensor(g, dtype=torch.float64).view(1, 1, *k.shape[2:-1]) for n, g in gates.items()}
    values = {n: g[..., 0] if n != "lr" and k.dim() == 5 else g for n, g in values.items()}
    y, state = function(rule, state, q, k, v, values)
    return state.A["w"].item(), y[0, 0, -1, 0].item()


@pytest.mark.parametrize("function", [recurrence, scan])
def test_the_implicit_step_of_longhorn(function):
    # argmin |W - 1|^2 + lr |3 W - 2|^2 = (1 + lr 6) / (1 + lr 9) at lr = 1/2 (Titans app. C)
    rule = Rule(retention=Keep(), algorithm=Implicit(), chunk_size=1)
    weight, read = one(function, rule, number(3.0), number(2.0), lr=0.5)
    assert weight == pytest.approx(float(Fraction(4, 1) / Fraction(11, 2)), abs=1e-15)
    assert read == pytest.approx(24 / 11, abs=1e-14)


@pytest.mark.parametrize("function", [recurrence, scan])
@pytest.mark.parametrize(("chunk_size", "expected"), [(1, 0.5), (2, 0.1)])
def test_two_steps_of_a_token(function, chunk_size, expected):
    # W = 0.8 after forgetting. Steps one after the other (DeltaProduct): 0.8 - 0.5 * 0.8 = 0.4, then
    # 0.4 - 0.25 * 2 (0.8 - 1) = 0.5. Both at the chunk's start: 0.8 - 0.4 - 0.25 * 2 (1.6 - 1) = 0.1.
    rule = Rule(retention=Decay(decayed=True), algorithm=GradientDescent(steps=2), chunk_size=chunk_size)
    k, v = (number(*pair).view(1, 1, 1, 2, 1) for pair in ((1.0, 2.0), (0.0, 1.0)))
    weight, read = one(function, rule, k, v, lr=[0.5, 0.25], forget=[0.2, 0.2])
    assert weight == pytest.approx(expected, abs=1e-15) and read == pytest.approx(3 * expected, abs=1e-14)


@pytest.mark.parametrize("function", [recurrence, scan])
def test_ascent_goes_the_other_way(function):
    rule = Rule(retention=Keep(), algorithm=GradientAscent(), chunk_size=1)
    weight, _ = one(function, rule, number(2.0), number(1.0), lr=0.1)
    assert weight == pytest.approx(1 + 0.1 * 2 * (2 - 1), abs=1e-15)


@pytest.mark.parametrize("shape", [(2, 2), (2, 5), (5, 2)])
def test_newton_schulz_acts_on_singular_values(shape):
    sizes = [3.0, 4.0]
    expected = [x / 5 for x in sizes]
    for _ in range(5):
        expected = [3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5 for x in expected]
    torch.manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(shape[0], 2, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(shape[1], 2, dtype=torch.float64))
    join = lambda s: U @ torch.diag(torch.tensor(s, dtype=torch.float64)) @ V.mT  # noqa: E731
    for size in (1.0, 1e-30, 1e30):
        step = Muon(scale=0.5).direction(size * join(sizes))
        assert torch.allclose(step, 0.5 * join(expected), atol=1e-12)


def test_newton_schulz_of_nothing_is_nothing():
    S = torch.zeros(2, 3, 4, requires_grad=True)
    step = Muon().direction(S)
    step.sum().backward()
    assert not step.any() and S.grad is not None and S.grad.isfinite().all()


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"memory": MLP(), "algorithm": Implicit()}, "closed form only for a Matrix"),
        ({"algorithm": Implicit()}, "after forgetting"),
        ({"retention": Sigmoid(), "algorithm": Implicit()}, "but this retention maps"),
        ({"memory": Vector(), "algorithm": Muon()}, "nothing to orthogonalise"),
    ],
)
def test_combinations_without_meaning(choices, reason):
    with pytest.raises(ValueError, match=f"^Rule: .* is not supported: .*{reason}"):
        Rule(**choices)


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"algorithm": GradientDescent(window=3, steps=2)}, "several steps per token"),
        ({"algorithm": GradientDescent(window=3, step_bound=1.0)}, "a step bound"),
        (
            {"algorithm": GradientDescent(window=3), "schedule": Schedule("chunk"), "chunk_size": 4},
            "update='chunk'",
        ),
        ({"algorithm": Muon(window=3), "retention": Decay(decayed=True)}, "a gradient at the decayed memory"),
    ],
)
def test_what_a_window_does_not_go_with(choices, reason):
    with pytest.raises(ValueError, match=f"a window of 3 pairs does not go with {reason}"):
        Rule(**choices)


@pytest.mark.parametrize("made", [lambda: GradientDescent(window=0), lambda: Muon(window=-1)])
def test_a_window_has_a_pair(made):
    with pytest.raises(ValueError, match="window must be an integer of at least 1, got"):
        made()


def test_a_state_of_another_window():
    rule = lambda c: Rule(algorithm=GradientDescent(window=c), chunk_size=1)  # noqa: E731
    x = torch.ones(1, 1, 2, 2)
    gates = {n: torch.ones(1, 1, 2) for n in rule(2).gates()}
    state = init_state(rule(3), {"w": torch.zeros(1, 1, 2, 2)})
    with pytest.raises(ValueError, match="a window of 3 pairs, this one has 2"):
        scan(rule(2), state, x, x, x, gates)
    with pytest.raises(ValueError, match="a window"):
        scan(rule(1), state, x, x, x, {n: gates[n] for n in rule(1).gates()})


def test_momentum_between_steps():
    with pytest.raises(ValueError, match="no published definition"):
        GradientDescent(momentum=True, steps=2)
