"""Gates by channel, constant, fixed, per head and following another; and what they refuse."""

import math
import re

import pytest
import torch

from miras.core.algorithm import GradientDescent
from miras.core.bias import Huber
from miras.core.memory import MLP, Matrix, Vector
from miras.core.retention import Decay, LqNorm, Simplex
from miras.core.rule import Rule
from miras.nn.gates import ALWAYS, NEVER, Gate, Gates
from miras.nn.memory import DEFAULT_GATES

HIDDEN, HEADS, KEY, VALUE = 12, 3, 4, 5
MATRIX = Rule(Matrix(), chunk_size=1)
DEEP = Rule(MLP(expansion=2, residual=False), chunk_size=4)


def make(rule=MATRIX, std=0.3, **gates):
    torch.manual_seed(0)
    part = Gates(HIDDEN, HEADS, rule, DEFAULT_GATES | gates, KEY, VALUE)
    part.reset_parameters(std)
    return part


def values(part, rows=2, tokens=7):
    return part(torch.randn(rows, tokens, HIDDEN, generator=torch.Generator().manual_seed(1)))


def test_shapes_of_channels():
    found = values(make(lr=Gate(channels="output"), forget=Gate(channels="input", rank=2)))
    assert found["lr"].shape == (2, HEADS, 7, 1, VALUE) and found["forget"].shape == (2, HEADS, 7, KEY, 1)
    deep = {
        "lr": Gate(channels="output", per_weight=True),
        "forget": Gate(channels="input", per_weight=True, rank=0),
    }
    found = values(make(DEEP, **deep))
    assert {n: tuple(v.shape[3:]) for n, v in found.items()} == {
        "lr.w1": (1, 2 * KEY),
        "lr.w2": (1, VALUE),
        "forget.w1": (KEY, 1),
        "forget.w2": (2 * KEY, 1),
    }
    rule = Rule(Matrix(), Huber("coordinate"))
    assert values(make(rule, delta=Gate("softplus", channels="output")))["delta"].shape == (
        2,
        HEADS,
        7,
        1,
        VALUE,
    )


def test_every_weight_takes_its_own_part_of_the_projection():
    rule = Rule(MLP(residual=False), algorithm=GradientDescent(momentum=True))
    part = make(
        rule,
        lr=Gate(scale=0.5, per_weight=True),
        momentum=Gate(scale=0.9, per_weight=True),
        forget=Gate("hard", per_weight=True),
    )
    x = torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(1))
    z = dict(zip([o.name for o in part.by_head], part.proj(x).split(HEADS, -1), strict=True))
    found = part(x)
    assert list(found) == ["lr.w1", "lr.w2", "momentum.w1", "momentum.w2", "forget.w1", "forget.w2"]
    for n in ("w1", "w2"):
        for name, expected in {
            "lr": 0.1 * 0.5 * torch.sigmoid(z[f"lr.{n}"]),  # times 1 - (the largest momentum)
            "momentum": 0.9 * torch.sigmoid(z[f"momentum.{n}"]),
            "forget": (1.1 * torch.sigmoid(z[f"forget.{n}"]) - 0.05).clamp(0, 1),
        }.items():
            assert torch.allclose(found[f"{name}.{n}"], expected.mT, atol=1e-7), (name, n)


def test_low_rank_is_low_rank_and_as_large():
    part = make(std=0.1, forget=Gate(channels="input", rank=2), lr=Gate(channels="input", rank=0))
    x = torch.randn(400, 1, HIDDEN, generator=torch.Generator().manual_seed(2))
    raw = part._inputs(x)
    flat = {n: (r - r.mean((0, 2), keepdim=True)).transpose(1, 2).reshape(400, -1) for n, r in raw.items()}
    assert [int(torch.linalg.matrix_rank(flat[n], rtol=1e-4)) for n in ("forget", "lr")] == [2, HIDDEN]
    for r in flat.values():
        assert 0.5 < r.std() / (0.1 * HIDDEN**0.5) < 2


def test_constant_and_fixed():
    retnet = Gate("exp2", bias=-5.0, step=-1.0, source="fixed")
    part = make(lr=Gate(source="constant", bias=-1.0), forget=retnet)
    found = values(part)
    assert found["forget"].shape == (2, HEADS, 7) and found["forget"][1, :, 3].tolist() == [
        2**-5,
        2**-6,
        2**-7,
    ]
    torch.testing.assert_close(found["lr"], torch.full((2, HEADS, 7), 1 / (1 + math.e)))
    assert [n for n, _ in part.named_parameters()] == ["constants.0"] and part.proj is None
    ends = values(make(lr=ALWAYS, forget=NEVER))
    assert (ends["lr"] == 1).all() and (ends["forget"] == 0).all()
    assert not make(lr=ALWAYS, forget=NEVER).state_dict()
    half = make(lr=ALWAYS, forget=retnet).to(torch.bfloat16)
    assert values(half)["forget"].dtype == torch.float32


def test_mamba2_forgets_by_the_step_it_takes():
    part = make(lr=Gate("softplus", bias=-6.9, spread=4.65), forget=Gate("decay", follows="lr"))
    found, rate = values(part), part.log_rates[0].exp()
    assert ((rate >= 1) & (rate <= 16)).all() and rate.std() > 0
    torch.testing.assert_close(found["forget"], 1 - (-rate[:, None] * found["lr"]).exp())
    steps = values(make(std=0.0, lr=Gate("softplus", bias=-6.9, spread=4.65)))["lr"]
    assert 0.0009 < steps.min() < steps.max() < 0.1 and steps.std() > 0
    assert part.proj.out_features == HEADS


def test_one_weight_may_have_its_own():
    part = make(DEEP, **{"lr.w1": NEVER})
    found = values(part)
    assert (
        list(found) == ["lr", "lr.w1", "forget"] and (found["lr.w1"] == 0).all() and (found["lr"] > 0).all()
    )
    found = values(make(DEEP, lr=Gate(per_weight=True), **{"lr.w2": Gate(channels="output")}))
    assert list(found) == ["lr.w1", "lr.w2", "forget"] and found["lr.w2"].shape[3:] == (1, VALUE)


def test_a_step_of_each():
    rule = Rule(Matrix(), algorithm=GradientDescent(steps=2), chunk_size=1)
    found = values(make(rule))
    assert found["lr"].shape == (2, HEADS, 7, 2) and found["forget"].shape == (2, HEADS, 7)
    assert not torch.equal(found["lr"][..., 0], found["lr"][..., 1])


MOMENTUM = Rule(Matrix(), algorithm=GradientDescent(momentum=True, step_bound=10.0))
BOUND = Rule(Matrix(), retention=Decay(), algorithm=GradientDescent(step_bound=1.0))


@pytest.mark.parametrize(
    ("rule", "gates", "message"),
    [
        (DEEP, {"lr": Gate(channels="output")}, "output channels differ, [5, 8]: give lr per_weight=True"),
        (Rule(bias=Huber("coordinate")), {"delta": Gate(channels="input")}, "its channels are 'output'"),
        (
            MATRIX,
            {"forget": Gate("decay", follows="momentum")},
            "forget follows 'momentum', which must be a gate",
        ),
        (MATRIX, {"forget": Gate("softplus")}, "forget must be at most 1, but this gate can be inf"),
        (MATRIX, {"forget": Gate("exp2", step=1.0, source="fixed")}, "this gate can be 4"),
        (MOMENTUM, {"momentum": Gate("softplus")}, "momentum must stay below 1"),
        (
            BOUND,
            {"lr": Gate(scale=2.0, channels="output")},
            "step_bound times the largest lr must be at most 1",
        ),
        (BOUND, {"lr": Gate(), "lr.w": Gate(scale=2.0)}, "got 1.0 * 2"),
        (
            Rule(Matrix(), algorithm=GradientDescent(steps=2), chunk_size=1),
            {"lr": Gate(channels="output")},
            "with 2 steps per token",
        ),
        (
            Rule(Matrix(), retention=Simplex("output")),
            {"forget": Gate(channels="output")},
            "gate forget has channels='output', along which Simplex(axis='output', scale=None, towards='zero')",
        ),
        (
            Rule(MLP(expansion=2, residual=False), retention=Simplex("all")),
            {"forget.w2": Gate(channels="input")},
            "gate forget.w2 has channels='input', along which Simplex(axis='all'",
        ),
        (
            Rule(MLP(bias=True, residual=False), retention=Simplex("output")),
            {"forget": Gate(channels="output", per_weight=True)},
            "give it channels=None or channels='input', or turn the axis",
        ),
    ],
)
def test_refusals(rule, gates, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(rule, **gates)


@pytest.mark.parametrize(
    ("rule", "channels"),
    [
        (Rule(Matrix(), retention=Simplex("output")), "input"),
        (Rule(Matrix(), retention=Simplex("input")), "output"),
        (Rule(Vector(), retention=Simplex("all")), "output"),  # one channel: nothing to differ
        (Rule(Matrix(), retention=LqNorm()), "output"),
    ],
)
def test_forgetting_across_a_simplex_is_allowed(rule, channels):
    part = Gates(HIDDEN, HEADS, rule, DEFAULT_GATES | {"forget": Gate(channels=channels)}, KEY, KEY)
    assert part.made[-1].channels == channels


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": "both"}, "unknown channels 'both'; choose one of None, input, output"),
        ({"source": "text"}, "unknown source 'text'; choose one of token, constant, fixed"),
        ({"rank": -1}, "rank must be at least 1, or 0"),
        ({"spread": 1.0, "source": "fixed"}, "spread draws first values to be learned"),
        (
            {"follows": "lr", "bias": 1.0},
            "one that follows 'lr' has its source, bias and channels from there",
        ),
    ],
)
def test_a_gate_refuses(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Gate(**fields)
