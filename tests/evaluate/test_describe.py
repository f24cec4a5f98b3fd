"""What `miras info` says is what the model does."""

import json

import pytest

from miras.core.algorithm import GradientDescent
from miras.core.retention import Decay
from miras.core.rule import Rule
from miras.core.schedule import Schedule
from miras.evaluate.describe import describe, equations
from miras.nn.gates import Gate
from miras.nn.lm import LM
from miras.zoo import preset, presets

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_heads": 2}


@pytest.mark.parametrize("name", presets())
def test_numbers_are_those_of_the_model(name: str):
    config = preset(name, **SIZES)
    model, found = LM(config), describe(config)
    json.dumps(found, allow_nan=False)
    assert found["parameters"] == model.num_parameters()
    assert found["state_bytes"] == model.state_bytes()
    assert found["flops_per_token"] == model.flops_per_token()
    assert found["layers"] == [config.mixer(layer).name for layer in range(3)]
    assert found["state_grows"] == (name == "transformer")
    remembering = [each for each in found["mixers"] if each["memories"]]
    assert (not remembering) == (name in ("transformer", "swa"))
    assert [each["name"] for each in found["mixers"]] == [each.name for each in config.pattern]


def test_equations_follow_the_schedule():
    gathered = equations(Rule(chunk_size=7, schedule=Schedule("chunk", "start")))
    assert "S_t = S_{t-1} - lr_t grad_t" in gathered and "y_t = M(q_t; W_anchor)" in gathered
    assert any("(prod_j (1 - forget_j)) A_{t-1} + S_t after every 7 tokens" in line for line in gathered)
    assert "y_t = M(q_t; W_{t-1})" in equations(Rule(schedule=Schedule(read="before")))


def test_no_preset_is_updated_or_read_in_another_way():
    rules = [memory.rule for name in presets() for memory in preset(name).memories()]
    assert rules and all(rule.schedule == Schedule() for rule in rules)


def test_equations_follow_the_choices():
    plain = equations(Rule())
    assert "S_t = - lr_t grad_t" in plain and "A_t = (1 - forget_t) A_{t-1} + S_t" in plain
    titans = equations(Rule(algorithm=GradientDescent(momentum=True, step_bound=1.0), chunk_size=7))
    assert "S_t = momentum_t S_{t-1} - b_t lr_t grad_t" in titans
    assert titans[0].endswith("chunk of 7") and titans[1].startswith("b_t = prod_j")
    assert "(prod_j (1 - forget_j)) W_anchor" in equations(Rule(retention=Decay(decayed=True)))[0]


def test_gates_say_how_they_are_made():
    config = preset("titans-lmm", **SIZES, gates={"lr": Gate(link="softplus", scale=2.0, bias=-1.0)})
    gates = describe(config)["mixers"][0]["memories"][0]["gates"]
    assert gates["lr"] == {
        "formula": "0.2 softplus(x W + b)",
        "initial_bias": -1.0,
        "largest": None,
        "per": "token and head",
    }
    assert gates["momentum"]["largest"] == 0.9 and gates["momentum"]["per"] == "token, head and weight"


def test_a_large_model_costs_nothing_to_describe():
    found = describe(preset("titans-lmm", hidden_size=8192, num_hidden_layers=64, num_heads=64))
    assert found["parameters"] > 2e10
