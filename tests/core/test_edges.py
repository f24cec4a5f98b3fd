"""Edges: no tokens, gates given twice, states of another rule, padding that is not a number."""

from dataclasses import dataclass

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.functional import normalize

import miras
from miras.core.algorithm import GradientAscent, GradientDescent
from miras.core.memory import MLP, Matrix
from miras.core.observe import observe
from miras.core.recurrence import norm, recurrence
from miras.core.retention import Decay, Keep
from miras.core.rule import Rule, init_state
from miras.engine import scan
from miras.layers.attention import attention, init_window
from miras.layers.conv import conv

RULE = Rule(MLP(), algorithm=GradientDescent(True, 10.0), chunk_size=4)
A0 = {n: torch.randn(1, 1, *s) for n, s in RULE.memory.shapes(4, 4).items()}


def draw(T):
    return torch.randn(1, 1, T, 4)


def gates(rule, T):
    return {n: torch.full((1, 1, T), 0.3) for n in rule.gates()}


def long_run(C, k, v):
    """|W| after k, v (1, 1, T, D) at the default gates' ends: lr 0.025, momentum 0.9, nothing forgotten."""
    rule = Rule(Matrix(), algorithm=GradientDescent(momentum=True, step_bound=10.0), chunk_size=C)
    shape = k.shape[:3]
    g = {"lr": torch.full(shape, 0.025), "momentum": torch.full(shape, 0.9), "forget": torch.zeros(shape)}
    _, state = scan(rule, init_state(rule, {"w": torch.zeros(1, 1, k.shape[-1], v.shape[-1])}), k, k, v, g)
    return norm(state.A).item()


@pytest.mark.parametrize("C", [1, 2, 3, 4, 16, 64])
def test_one_pair_for_ever_stays_bounded(C):
    k, v = normalize(torch.randn(1, 1, 1, 16), dim=-1), torch.randn(1, 1, 1, 16)
    assert long_run(C, k.expand(1, 1, 2048, 16), v.expand(1, 1, 2048, 16)) < 20


@pytest.mark.parametrize("C", [1, 2, 3, 4, 16, 64])
def test_two_keys_in_stretches_stay_bounded(C):
    # Momentum coasts on while the other key is shown, and overshoots where steps are too long.
    turn = (torch.arange(2048) % 32 >= 8).long()
    assert long_run(C, torch.eye(2)[turn][None, None], torch.randn(2, 2)[turn][None, None]) < 20


@pytest.mark.parametrize("function", [scan, recurrence])
def test_no_tokens_change_nothing(function):
    state = init_state(RULE, A0)
    y, after = function(RULE, state, draw(0), draw(0), draw(0), gates(RULE, 0))
    assert y.shape == (1, 1, 0, 4) and after is state


@pytest.mark.parametrize("function", [scan, recurrence, miras.scan])
@pytest.mark.parametrize("C", [1, 3])
def test_documents_of_tokens_with_several_steps_are_each_alone(function, C):
    rule = Rule(Matrix(), algorithm=GradientDescent(steps=3), chunk_size=C)
    begin = {"w": torch.randn(1, 1, 4, 4, dtype=torch.float64)}
    q, k, v = (torch.randn(1, 1, 7, *n, 4, dtype=torch.float64) / 2 for n in ((), (3,), (3,)))
    g = {
        "lr": torch.rand(1, 1, 7, 3, dtype=torch.float64),
        "forget": torch.rand(1, 1, 7, dtype=torch.float64),
    }

    def read(cut, **masks):
        inputs = (x[:, :, cut] for x in (q, k, v))
        gates = {n: x[:, :, cut] for n, x in g.items()}
        return function(rule, init_state(rule, begin), *inputs, gates, initial=begin, **masks)[0]

    reset = torch.tensor([[False, False, True, False, False, False, True]])
    alone = torch.cat([read(slice(0, 2)), read(slice(2, 6)), read(slice(6, 7))], 2)
    torch.testing.assert_close(read(slice(0, 7), reset=reset), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [scan, recurrence, miras.scan])
def test_steps_uphill_are_bounded_as_those_downhill(function):
    # By the keys and the size of the steps, whatever their direction; the keys of an open chunk counted too.
    q, v, g = draw(6), draw(6), {"lr": torch.rand(1, 1, 6) / 2}
    k = normalize(torch.rand(1, 1, 6, 4), dim=-1)
    met, lr = (k @ k.mT).abs()[0, 0], g["lr"][0, 0]
    begin = lambda t: t // 4 * 4  # noqa: E731
    expected = [lr[t] * (1 - lr[begin(t) : t] * met[t, begin(t) : t]).prod() for t in range(6)]
    for algorithm, sign in ((GradientDescent(step_bound=1.0), 1), (GradientAscent(step_bound=1.0), -1)):
        rule = Rule(Matrix(), retention=Keep(), algorithm=algorithm, chunk_size=4)
        begun = {"w": torch.randn(1, 1, 4, 4)}
        state = init_state(rule, begun)
        with observe() as seen:
            for cut in (slice(0, 2), slice(2, 6)):
                given = {"lr": g["lr"][:, :, cut]}
                _, state = function(rule, state, *(x[:, :, cut] for x in (q, k, v)), given)
        torch.testing.assert_close(seen["memory"]["lr"][0, 0], sign * torch.stack(expected))
        again = init_state(rule, begun)
        with torch.no_grad():
            for t in range(6):  # decoding has a bound of its own
                *inputs, size = (x[:, :, t : t + 1] for x in (q, k, v, g["lr"]))
                _, again = function(rule, again, *inputs, {"lr": size})
        torch.testing.assert_close(again.A["w"], state.A["w"])


@pytest.mark.parametrize("function", [scan, recurrence, miras.scan])
def test_transforms_that_inner_gradients_do_not_pass_on_are_refused(function, monkeypatch):
    monkeypatch.setenv("PYTORCH_JIT", "0")  # else making a dual tensor compiles for seconds
    rule = Rule(chunk_size=2)  # of a matrix: nothing else in its recurrence would raise
    begin = init_state(rule, {"w": torch.randn(1, 1, 4, 4)})
    q, k, v = draw(3), draw(3), draw(3)

    def run(v):
        return function(rule, begin, q, k, v, gates(rule, 3))[0]

    refused = pytest.raises(ValueError, match="forward-mode derivatives and the transforms")
    with forward_ad.dual_level():
        run(v)  # nothing here has a forward-mode derivative
        dual = forward_ad.make_dual(v, v)
        with refused:
            run(dual)
        with torch.no_grad(), refused:
            run(dual)
    for transform in (torch.func.vmap, torch.func.jacrev):
        with refused:
            transform(run)(v[None])


@pytest.mark.parametrize("size", [None, 3])
def test_no_tokens_in_attention_and_convolution(size):
    window = init_window(1, 1, 4, size, draw(0))
    y, after = attention(draw(0), draw(0), draw(0), window, size=size, theta=1e4)
    assert y.shape == (1, 1, 0, 4) and after is window
    nothing = torch.zeros(1, 0, 3)
    y, tail = conv(nothing, nothing, torch.zeros(3, 1), reset=torch.zeros(1, 0, dtype=torch.bool))
    assert y.shape == nothing.shape and tail is nothing


@pytest.mark.parametrize("function", [scan, recurrence])
def test_a_gate_given_both_shared_and_for_every_weight(function):
    own = {f"lr.{n}": torch.full((1, 1, 3), 0.1) for n in A0}
    q, k, v = draw(3), draw(3), draw(3)
    with observe() as seen:
        y, _ = function(RULE, init_state(RULE, A0), q, k, v, gates(RULE, 3) | own)
    shared = {n: g for n, g in gates(RULE, 3).items() if n != "lr"}
    expected, _ = function(RULE, init_state(RULE, A0), q, k, v, shared | own)
    assert torch.equal(y, expected) and seen["memory"]["lr.w1"][0, 0, 0] == pytest.approx(0.1)


@dataclass(frozen=True)
class Squashed(Decay):
    """A retention whose weights are not its accumulator."""

    def link(self, A):
        return A.tanh()


@dataclass(frozen=True)
class Rounded(Decay):
    """A retention that no chunkwise form can follow."""

    def advance(self, A, keep, step):
        return (keep * A + step).round(decimals=2)


@pytest.mark.parametrize("retention", [Squashed(), Rounded()])
def test_a_retention_from_elsewhere(retention):
    rule = Rule(MLP(), retention=retention, chunk_size=4)
    q, k, v = draw(9), draw(9), draw(9)
    y, state = scan(rule, init_state(rule, A0), q, k, v, gates(rule, 9))
    expected, end = recurrence(rule, init_state(rule, A0), q, k, v, gates(rule, 9))
    assert torch.allclose(y, expected, atol=1e-5) and torch.allclose(state.A["w1"], end.A["w1"], atol=1e-5)


def test_an_empty_memory_is_refused():
    with pytest.raises(ValueError, match="no weights"):
        init_state(RULE, {})


@pytest.mark.parametrize("algorithm", [GradientDescent(), GradientDescent(True), GradientDescent(False, 1.0)])
def test_a_state_of_another_algorithm_is_refused(algorithm):
    other = Rule(MLP(), algorithm=algorithm, chunk_size=4)
    with pytest.raises(ValueError, match="another rule"):
        scan(RULE, init_state(other, A0), draw(3), draw(3), draw(3), gates(RULE, 3))


@pytest.mark.parametrize("bound", [0.0, 10.0])
def test_a_state_of_another_chunk_size_is_refused(bound):
    large, small = (Rule(MLP(), algorithm=GradientDescent(True, bound), chunk_size=C) for C in (4, 2))
    _, state = scan(large, init_state(large, A0), draw(3), draw(3), draw(3), gates(large, 3))
    with pytest.raises(ValueError, match="chunk"):
        scan(small, state, draw(3), draw(3), draw(3), gates(small, 3))


@pytest.mark.parametrize("size", [None, 3, 8])
def test_padding_of_attention_may_be_anything(size):
    q, k, v = (torch.randn(2, 1, 7, 4) for _ in range(3))
    window, length = init_window(2, 1, 4, size, q), torch.tensor([7, 4])
    y, _ = attention(q, k, v, window, size=size, theta=1e4, length=length)
    for x in (q, k, v):
        x[1, :, 4:] = torch.nan
    again, _ = attention(q, k, v, window, size=size, theta=1e4, length=length)
    assert torch.equal(y[1, :, :4], again[1, :, :4])
