"""What a rule refuses and how it says so, and which gate reaches which weight."""

import json
import re
import sys
import types

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import miras
from miras.core.algorithm import GradientDescent
from miras.core.bias import L2, Dot
from miras.core.memory import MLP, Matrix
from miras.core.recurrence import recurrence
from miras.core.retention import Decay
from miras.core.rule import Rule, init_state
from miras.engine import scan

B, H, T, D = 2, 3, 5, 4
RULE = Rule(memory=MLP(expansion=2), algorithm=GradientDescent(momentum=True), chunk_size=3)
both = pytest.mark.parametrize("function", [scan, recurrence])


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start(rule, width=D, heads=H):
    shapes = rule.memory.shapes(width, width)
    return {n: randn(i, B, heads, *shape).div(2) for i, (n, shape) in enumerate(shapes.items())}


def arguments(rule, T=T):
    q, k, v = (randn(10 + i, B, H, T, D) for i in range(3))
    g = torch.Generator().manual_seed(1)
    gates = {n: torch.rand(B, H, T, generator=g, dtype=torch.float64) * 0.5 for n in rule.gates()}
    return [rule, init_state(rule, start(rule)), q, normalize(k, dim=-1), v, gates]


def refused(function, message, args, **masks):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        function(*args, **masks)


@pytest.mark.parametrize(
    ("field", "value", "kind", "example"),
    [
        ("memory", "matrix", "Memory", "Matrix()"),
        ("memory", Matrix, "Memory", "Matrix()"),
        ("bias", Decay(), "Bias", "L2()"),
        ("retention", None, "Retention", "Decay()"),
        ("algorithm", 0.1, "Algorithm", "GradientDescent()"),
    ],
)
def test_an_axis_takes_its_own_kind(field, value, kind, example):
    message = f"Rule: {field} must be a {kind}, got {value!r}; write for instance Rule({field}={example})"
    with pytest.raises(TypeError, match="^" + re.escape(message) + "$"):
        Rule(**{field: value})


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "16", None])
def test_a_chunk_is_a_whole_number_of_tokens(size):
    wanted = "at least 1" if type(size) is int else "a whole number"
    message = f"Rule: chunk_size must be {wanted}, got {size!r}"
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        Rule(chunk_size=size)


@pytest.mark.parametrize("sizes", [{"depth": 0}, {"expansion": 0}, {"depth": -1, "expansion": 2}])
def test_a_deep_memory_has_a_layer(sizes):
    depth, expansion = sizes.get("depth", 2), sizes.get("expansion", 4)
    message = f"MLP: depth and expansion must be at least 1, got depth={depth}, expansion={expansion}"
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        MLP(**sizes)


def test_a_step_bound_is_not_negative():
    message = (
        "GradientDescent: step_bound must be a number, 0 for none, 1 without momentum, 1 / (1 - m) with "
        "momentum of at most m; got -1.0"
    )
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        GradientDescent(step_bound=-1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientDescent(step_bound=float("inf")), "step_bound must be a finite number, got inf"),
        (lambda: GradientDescent(step_bound=True), "step_bound must be a finite number, got True"),
        (lambda: GradientDescent(momentum="no"), "momentum must be True or False, got 'no'"),
        (lambda: GradientDescent(steps=2.0), "steps must be a whole number, got 2.0"),
        (lambda: MLP(depth=1.5), "depth must be a whole number, got 1.5"),
        (lambda: Decay(decayed=1), "decayed must be True or False, got 1"),
        (lambda: miras.Lp("3"), "p must be a finite number, got '3'"),
        (lambda: miras.Huber(delta="x"), "delta must be a finite number or None, got 'x'"),
        (lambda: miras.Gate(bias=float("nan")), "bias must be a finite number, got nan"),
        (lambda: miras.Gate(per_weight="yes"), "per_weight must be True or False, got 'yes'"),
        (lambda: miras.Features(normalize=0), "normalize must be True or False, got 0"),
        (lambda: miras.ModelConfig(vocab_size=True), "vocab_size must be a whole number, got True"),
        (
            lambda: miras.AttentionConfig(window_size=16.5),
            "window_size must be a whole number or None, got 16.5",
        ),
        (lambda: miras.ModelConfig(norm_eps="x"), "norm_eps must be a finite number, got 'x'"),
        (lambda: miras.ModelConfig(norm_eps=-10), "norm_eps must be at least 0, got -10"),
        (lambda: miras.MemoryConfig(conv_size=-1), "conv_size must be at least 0, got -1"),
        (lambda: miras.ModelConfig(rope_theta=0), "rope_theta must be above 0, got 0"),
        (lambda: miras.ModelConfig(pattern="mag"), "pattern must be a tuple of mixers"),
    ],
)
def test_a_choice_holds_what_its_fields_say(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_numbers_of_numpy_are_numbers():
    memory = miras.MemoryConfig(rule=Rule(chunk_size=np.int64(4)))
    config = miras.ModelConfig(hidden_size=np.int64(64), norm_eps=np.float32(0.5), pattern=(memory,))
    assert '"hidden_size": 64' in json.dumps(config.to_dict()) and config.stride() == 4
    assert type(config.norm_eps) is float
    assert miras.ModelConfig(rope_theta=10_000).rope_theta == 10_000  # a whole number is one too


def test_annotations_that_are_texts_are_read_where_they_can_be():
    code = """
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional
import miras
if TYPE_CHECKING:
    from somewhere import Function
@dataclass(frozen=True)
class Mine(miras.L2):
    size: float = 1.0
    other: Optional[int] = None
    function: Function = None
"""
    module = types.ModuleType("mine")
    sys.modules["mine"] = module
    exec(code, vars(module))
    assert module.Mine(2, 3, print).function is print
    for wrong in ({"size": "x"}, {"other": 1.5}):
        with pytest.raises(ValueError, match="Mine: "):
            module.Mine(**wrong)
    del sys.modules["mine"]


def test_a_residual_memory_needs_equal_widths():
    with pytest.raises(ValueError, match=r"got 4 and 3\. Use equal widths or MLP\(residual=False\)"):
        MLP().shapes(4, 3)
    assert MLP(depth=3, expansion=2, residual=False).shapes(4, 3) == {
        "w1": (4, 8),
        "w2": (8, 8),
        "w3": (8, 3),
    }


def test_gates_that_a_rule_reads():
    assert Rule().gates() == ("lr", "forget")
    assert RULE.gates() == ("lr", "momentum", "forget")


def test_init_state_names_what_does_not_fit():
    A0 = start(RULE)
    message = "init_state: every weight must be (B, H, d_in, d_out); got w1 (3, 4, 8), w2 (3, 8, 4)"
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        init_state(RULE, {n: a[0] for n, a in A0.items()})
    for wrong in (
        {"w1": A0["w1"], "w2": A0["w2"][:, :, :-1]},  # a hidden width
        {"w1": A0["w1"], "w2": A0["w2"][:, :2]},  # heads
        {"w1": A0["w1"], "w2": A0["w2"][:1]},  # rows
        {"w1": A0["w1"], "two": A0["w2"]},  # a name
        {"w2": A0["w2"], "w1": A0["w1"]} | {"w3": A0["w1"]},  # one too many
    ):
        with pytest.raises(ValueError, match=r"MLP at widths \d, \d needs weights .*; got|must be equal"):
            init_state(RULE, wrong)
    shapes = {"w": (B, H, 4, 4), "u": (B, H, 4, 4)}
    message = (
        "init_state: Matrix at widths 4, 4 needs weights {'w': (4, 4)} behind (B, H); "
        "got {'w': (2, 3, 4, 4), 'u': (2, 3, 4, 4)}"
    )
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        init_state(Rule(), {n: torch.zeros(shape) for n, shape in shapes.items()})


@both
@pytest.mark.parametrize(
    ("place", "shape"),
    [(2, (B, H, T)), (3, (B, H, T + 1, D)), (3, (B, H, T, D + 1)), (4, (B, H, T + 1, D)), (4, (B, H, T))],
)
def test_queries_keys_and_values_fit_together(function, place, shape):
    args = arguments(RULE)
    args[place] = torch.zeros(shape, dtype=torch.float64)
    q, k, v = (tuple(x.shape) for x in args[2:5])
    message = f"scan: q and k must be (B, H, T, Dk) and v (B, H, T, Dv); got q {q}, k {k}, v {v}"
    refused(function, message, args)


@both
def test_the_state_belongs_to_the_memory(function):
    args = arguments(RULE)
    args[1] = init_state(Rule(), {"w": randn(0, B, H, D, D)})
    message = (
        f"scan: the state belongs to another memory: for {B} rows, {H} heads and widths 4, 4 the weights are "
        f"{{'w1': (4, 8), 'w2': (8, 4)}}, the state holds {{'w': (2, 3, 4, 4)}}"
    )
    refused(function, message, args)
    args[1] = init_state(RULE, start(RULE)).select([0])
    refused(function, "scan: the state belongs to another memory: for 2 rows, 3 heads and widths 4, 4", args)
    args[1] = init_state(RULE, start(RULE, heads=2))
    refused(function, "scan: the state belongs to another memory: for 2 rows, 3 heads and widths 4, 4", args)


@both
@pytest.mark.parametrize("name", ["delta", "lr.w", "lr.w3", "lr.", "w1.lr", "LR"])
def test_unknown_gates(function, name):
    args = arguments(RULE)
    args[5][name] = args[5]["lr"]
    refused(function, f"scan: unknown gate {name!r}; this rule reads lr, momentum, forget", args)


@both
@pytest.mark.parametrize("name", ["lr", "momentum", "forget"])
def test_missing_gates(function, name):
    args = arguments(RULE)
    gate = args[5].pop(name)
    message = f"scan: gate {name!r} is missing; this rule reads lr, momentum, forget"
    refused(function, message, args)
    args[5][f"{name}.w2"] = gate  # one weight of two
    refused(function, message, args)
    args[5][f"{name}.w1"] = gate
    function(*args)


@both
def test_momentum_without_momentum(function):
    args = arguments(Rule(memory=MLP(expansion=2)))
    args[5]["momentum"] = args[5]["lr"]
    refused(function, "scan: unknown gate 'momentum'; this rule reads lr, forget", args)


@both
@pytest.mark.parametrize("name", ["lr", "momentum.w2"])
@pytest.mark.parametrize("shape", [(B, T), (B, H, T, 1), (B, 1, T), (B, H, T - 1), (1, H, T)])
def test_gates_of_another_shape(function, name, shape):
    args = arguments(RULE)
    args[5][name] = torch.zeros(shape)
    with pytest.raises(
        ValueError, match=re.escape(f"gate {name!r} must be (B, H, T)") + ".*" + re.escape(f"got {shape}")
    ):
        function(*args)


@both
@pytest.mark.parametrize("name", ["valid", "write", "reset"])
@pytest.mark.parametrize(
    "mask", [torch.ones(B, T), torch.ones(T, dtype=torch.bool), torch.ones(B, H, T, dtype=torch.bool)]
)
def test_masks_of_another_kind(function, name, mask):
    message = f"scan: {name} must be a bool mask (B, T) = (2, 5), got {mask.dtype} {tuple(mask.shape)}"
    refused(function, message, arguments(RULE), **{name: mask}, initial=start(RULE))


@both
def test_reset_needs_where_to_go_back_to(function):
    reset = torch.zeros(B, T, dtype=torch.bool)
    message = "scan: reset needs the initial accumulators; pass initial=A0"
    refused(function, message, arguments(RULE), reset=reset)


@pytest.mark.parametrize("memory", [Matrix(), MLP(expansion=2)])
def test_no_tokens_change_nothing(memory):
    rule = Rule(memory=memory, algorithm=GradientDescent(True, 1.0), chunk_size=3)
    _, state = scan(*arguments(rule, 4))
    y, after = scan(rule, state, *arguments(rule, 0)[2:])
    assert y.shape == (B, H, 0, D)
    for name, x in after.tensors().items():
        assert torch.equal(x, state.tensors()[name]), name


@both
@pytest.mark.parametrize("gate", ["lr", "momentum", "forget"])
def test_a_weights_own_gate_reaches_that_weight_only(function, gate):
    # Three weights in a chunk that stays open: gradients are taken at A_0, so what one weight's gate does to
    # another weight can only be a mistake.
    rule = Rule(memory=MLP(depth=3, expansion=1), algorithm=GradientDescent(True), chunk_size=8)
    args = arguments(rule)
    _, before = function(*args)
    args[5][f"{gate}.w2"] = 0.5 * args[5][gate]
    _, after = function(*args)
    for name in ("w1", "w3"):
        assert torch.equal(after.A[name], before.A[name])
    assert (after.A["w2"] - before.A["w2"]).abs().max() > 1e-3


@both
def test_own_gates_equal_to_the_shared_one_change_nothing(function):
    args = arguments(RULE)
    y, state = function(*args)
    shared = dict(args[5])
    args[5] = {f"{n}.{w}": g for n, g in shared.items() if n != "forget" for w in ("w1", "w2")}
    args[5]["forget"] = shared["forget"]
    own_y, own_state = function(*args)
    assert torch.equal(own_y, y)
    for name, x in own_state.tensors().items():
        assert torch.equal(x, state.tensors()[name]), name


@pytest.mark.parametrize(
    "rule", [Rule(), Rule(bias=Dot(), retention=Decay(decayed=True)), RULE, Rule(bias=L2())]
)
def test_rules_are_values(rule):
    twin = Rule(rule.memory, rule.bias, rule.retention, rule.algorithm, rule.chunk_size)
    assert twin == rule and hash(twin) == hash(rule)
    assert rule != Rule(chunk_size=5)


@both
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("memory", [Matrix(), MLP(expansion=1)])
@pytest.mark.parametrize("first_order", [False, True])
def test_keys_and_values_may_be_made_of_the_memory_itself(function, memory, size, first_order):
    # An inner gradient takes keys and values as given, also where they come from the very tensor of the weights.
    rule = Rule(memory, algorithm=GradientDescent(first_order=first_order), chunk_size=size)
    _, _, q, *_, gates = arguments(rule, T=9)
    A0, twin = ({n: a.requires_grad_() for n, a in start(rule).items()} for _ in range(2))
    name = next(iter(A0))

    def run(source):
        state, reads = init_state(rule, A0), []
        for cut in (slice(0, 5), slice(5, 9)):
            x, now = q[:, :, cut] @ source(state), {n: g[:, :, cut] for n, g in gates.items()}
            y, state = function(rule, state, q[:, :, cut], x.sin(), x.cos(), now)
            reads.append(y)
        return torch.cat(reads, 2)

    for source in (lambda state: state.anchor[name], lambda state: A0[name]):
        with torch.no_grad():
            expected = run(source)
        assert torch.allclose(run(source), expected, rtol=0, atol=1e-12)
    (found,) = torch.autograd.grad(run(lambda state: A0[name]).sum(), A0[name])
    apart = torch.autograd.grad(run(lambda state: twin[name]).sum(), (A0[name], twin[name]))
    assert torch.allclose(found, sum(apart), rtol=0, atol=1e-12)


class Scalar(miras.L2):
    def loss(self, pred, target, gates):
        return torch.nn.functional.mse_loss(pred, target)


class PerChannel(miras.L2):
    def loss(self, pred, target, gates):
        return (pred - target).square()


class Narrow(miras.Matrix):
    def apply(self, x, w):
        return super().apply(x, w)[..., :1]


class OneNumber(miras.GradientDescent):
    def direction(self, S):
        return S.mean()


class OneRow(miras.Keep):
    def link(self, A):
        return A.mean(-1, keepdim=True)


@pytest.mark.parametrize("function", [scan, recurrence, miras.scan])
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"bias": Scalar()}, "Scalar.loss must give one number per token, ({tokens}) for predictions"),
        ({"bias": PerChannel()}, "PerChannel.loss must give one number per token, ({tokens}) for"),
        ({"memory": Narrow()}, "Narrow.apply must give the shape ({tokens}, 4); got ({tokens}, 1)"),
        ({"algorithm": OneNumber()}, "OneNumber.direction must give the shape ("),
        ({"retention": OneRow()}, "OneRow.link must give the shape ("),
    ],
)
@torch.no_grad()
def test_a_choice_of_ones_own_gives_the_right_shape(function, T, choice, message):
    rule = Rule(**choice, chunk_size=3)
    pattern = re.escape(message).replace(re.escape("{tokens}"), "[0-9, ]*")
    with pytest.raises(ValueError, match="^" + pattern):
        function(*arguments(rule, T))
