"""Configs on disk: old ones, choices from elsewhere, functions; and the overrides that are ablations."""

import json
import re
from dataclasses import dataclass, replace

import pytest
import torch

import miras
from miras.core.algorithm import GradientAscent, GradientDescent
from miras.core.bias import Bias
from miras.core.memory import MLP, GatedMLP, Matrix
from miras.core.retention import Bregman, FDivergence, Keep, Simplex
from miras.core.rule import Rule, weights
from miras.nn.config import ModelConfig
from miras.nn.folder import load_model, save_model
from miras.nn.gates import Gate
from miras.nn.lm import LM
from miras.nn.memory import Features
from miras.zoo import SOURCES, last_layer, preset, presets

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2}


@dataclass(frozen=True)
class Cosh(Bias):
    """log cosh of the residual: a choice that the library does not have."""

    width: float = 1.0

    def loss(self, pred, target, gates):
        return ((pred - target) / self.width).cosh().log().sum(-1)


def softsign(x):
    return x / (1 + x.abs())


def through(config, **options):
    return ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())), **options)


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))


def test_a_choice_from_elsewhere(tmp_path):
    config = preset("titans-linear", bias=Cosh(2.0), **SMALL)
    written = config.to_dict()["rule"]["bias"]
    assert written == {"name": f"{__name__}:Cosh", "width": 2.0}
    with refused(f"names code to import and run, {__name__}:Cosh"):
        through(config)
    assert through(config, trust_remote_code=True) == config
    torch.manual_seed(0)
    save_model(LM(config), tmp_path / "m")
    with refused("trust_remote_code=True"):
        load_model(tmp_path / "m")
    assert load_model(tmp_path / "m", trust_remote_code=True).config == config
    gone = config.to_dict()
    gone["rule"]["bias"] = {"name": "no_such_package.biases:Cosh"}
    with refused("no_such_package.biases:Cosh cannot be imported"):
        ModelConfig.from_dict(gone, trust_remote_code=True)

    gone["rule"]["bias"] = {"name": "__main__:Cosh"}
    with refused("it was defined in a script or a notebook: move it to a module"):
        ModelConfig.from_dict(gone, trust_remote_code=True)

    class Local(Cosh):
        pass

    with refused("define it by name at the top level of a module"):
        preset("titans-linear", bias=Local(), **SMALL).to_dict()


def test_functions():
    config = preset("titans-linear", retention=Bregman(torch.tanh), **SMALL)
    assert config.to_dict()["rule"]["retention"]["inverse"] == {"function": "torch:tanh"}
    assert through(config) == config
    softplus = preset("titans-linear", retention=FDivergence(torch.nn.functional.softplus), **SMALL)
    assert through(softplus) == softplus
    own = preset("titans-linear", retention=Bregman(softsign), **SMALL)
    with refused(f"{__name__}:softsign"):
        through(own)
    assert through(own, trust_remote_code=True) == own
    with refused("define it by name at the top level of a module"):
        preset("titans-linear", retention=Bregman(lambda x: x), **SMALL).to_dict()
    evil = own.to_dict()
    paths = ("torch:load", "torch.hub:load", "os:system", "torch:serialization.load", "torch:")
    for path in (*paths, "torch:from_file", "torch:set_num_threads", "torch.nn.functional:dropout"):
        evil["rule"]["retention"]["inverse"] = {"function": path}
        with refused("names code to import and run"):
            ModelConfig.from_dict(evil)


@pytest.mark.parametrize("axis", ["memory", "bias", "retention", "algorithm"])
def test_a_choice_names_nothing_that_is_called_with_a_files_values(axis, tmp_path):
    """`torch.from_file` with the values of a file would make, grow and damage any file of the user's."""
    victim = tmp_path / "victim"
    evil = preset("titans-linear", **SMALL).to_dict()
    evil["rule"][axis] = {"name": "torch:from_file", "filename": str(victim), "shared": True, "size": 1000}
    with refused("names code to import and run, torch:from_file"):
        ModelConfig.from_dict(evil)
    with refused(f"{axis} 'torch:from_file' is not a subclass of {axis.title()}"):
        ModelConfig.from_dict(evil, trust_remote_code=True)
    assert not victim.exists()


def test_only_what_is_new_and_used_is_written():
    old = preset("titans-lmm", **SMALL).to_dict()
    assert "features" not in old and set(old["gates"]["lr"]) == {"link", "scale", "bias", "per_weight"}
    assert set(old["rule"]["algorithm"]) == {"name", "momentum", "step_bound"}
    assert set(old["rule"]["memory"]) == {"name", "depth", "expansion", "residual", "norm"}
    new = preset("mlstm", **SMALL).to_dict()
    assert new["features"] == {"values": "identity", "normalize": False, "scaled": True, "normalizer": True}
    assert new["gates"]["forget"]["spread"] == 3.0


def test_every_preset_has_a_source():
    assert set(SOURCES) == set(presets())


ABLATIONS = {
    "momentum": {"algorithm": GradientDescent(step_bound=1.0)},
    "forgetting": {"retention": Keep()},
    "convolution": {"conv_size": 0},
    "persistent": {"num_persistent": 0},
    "linear": {"memory": Matrix()},
    "constant": {"gates": {"lr": Gate(scale=0.25, source="constant")}},
    "first-order": {"algorithm": GradientDescent(momentum=True, step_bound=10.0, first_order=True)},
    "ascent": {"algorithm": GradientAscent(momentum=True, step_bound=10.0)},
    "query": {"features": Features(keys="query")},
    "last": {"gates": last_layer(preset("titans-mag").rule)},
}


def test_a_simplex_along_a_channel_wise_gate_is_refused_with_the_config():
    """Memora's forget gate is by output channel: its simplex can only be along the inputs."""
    for axis in ("output", "all"):
        with refused(f"gate forget has channels='output', along which Simplex(axis={axis!r}"):
            preset("memora", retention=Simplex(axis))
    gates = {"forget": Gate(bias=-5.0, per_weight=True, channels="input")}
    turned = preset("memora", retention=Simplex("output"), gates=gates, **SMALL)
    assert LM(turned)(torch.zeros(1, 3, dtype=torch.long))[0].isfinite().all()


@pytest.mark.parametrize(
    ("name", "memory"),
    [("yaad", MLP()), ("ttt-mlp", MLP(depth=3, bias=True, affine=True)), ("titans-lmm", GatedMLP())],
)
def test_only_the_last_layer_learns(name, memory):
    """Of any memory, with momentum or without, biases included."""
    base = preset(name, memory=memory, **SMALL)
    model = LM(miras.zoo.override(base, gates=last_layer(base.rule)))
    _, state = model(torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(0)))
    mixer = model.model.layers[0].mixer
    A, A0 = mixer.reader.weights(state.layers[0].memory), mixer.reader.A0(1)
    moved = {n for n in A if not torch.equal(A[n], A0[n])}
    depth = 3 if name == "ttt-mlp" else 2
    assert moved == {n for n in A if n.endswith(str(depth))}


def test_a_memory_of_one_layer_has_no_last_one():
    for name in ("deltanet", "ttt-linear", "titans-linear"):
        with refused("has one layer, so there is none to leave as it begins"):
            last_layer(preset(name).rule)


@pytest.mark.parametrize("kind", ABLATIONS)
def test_an_ablation_is_one_override(kind):
    base = preset("titans-mag", window_size=4, num_persistent=2, **SMALL)
    config = miras.zoo.override(base, **ABLATIONS[kind])
    assert config != base and through(config) == config
    made = []
    for each in (base, config):
        torch.manual_seed(0)
        made.append(LM(each))
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    (before, _), (after, state) = (model(tokens) for model in made)
    after.square().mean().backward()
    assert after.isfinite().all()
    if kind == "first-order":
        assert torch.equal(before, after)
    else:
        assert (before - after).abs().max() > 1e-4
    memory = state.layers[0].memory.memory
    if kind == "last":
        reader = made[1].model.layers[0].mixer.memory
        now, start = reader.weights(memory), reader.A0(2)
        assert torch.equal(now["w1"], start["w1"]) and not torch.equal(now["w2"], start["w2"])
    if kind == "query":
        assert not [n for n, _ in made[1].named_parameters() if "memory.k." in n]


def test_moneta_begins_with_weights_of_the_size_that_is_asked():
    torch.manual_seed(0)
    config = preset("moneta", **SMALL)
    A0 = LM(config).model.layers[0].mixer.reader.A0(1)
    for name, w in weights(config.rule, A0, {}).items():
        rms = w.square().mean((-2, -1)).sqrt()
        torch.testing.assert_close(
            rms, torch.full_like(rms, config.initial_scale * A0[name].shape[-2] ** -0.5)
        )


@torch.no_grad()
def test_hgrn2_writes_what_it_forgets():
    torch.manual_seed(0)
    reader = LM(preset("hgrn2", **SMALL)).model.layers[0].mixer.reader
    x = torch.randn(1, 5, 16)
    assert reader.paths == ("q", "v")
    gates = reader.gates(x)
    _, k, _ = reader._inputs({n: torch.randn(1, 2, 5, 8) for n in "qv"}, gates)
    assert torch.equal(k, gates["forget"][..., 0])


@pytest.mark.parametrize("name", ["retnet", "mlstm"])
@torch.no_grad()
def test_features_of_a_head_by_hand(name):
    # Token by token, with sums over the past written out; A_0 is 0.
    torch.manual_seed(0)
    reader = LM(preset(name, conv_size=0, **SMALL)).double().model.layers[0].mixer.reader
    T, x = 9, torch.randn(1, 9, 16, dtype=torch.float64)
    q, k, v = (getattr(reader, n).proj(x).view(T, 2, 8) for n in "qkv")
    if name == "mlstm":
        q, k = (torch.nn.functional.silu(z) for z in (q, k))
    gates = {n: g[0] for n, g in reader.gates(x).items()}  # (H, T)
    y = torch.zeros(T, 2, 8, dtype=torch.float64)
    rate = 10_000 ** (-torch.arange(4, dtype=torch.float64) / 4)
    for h in range(2):
        for t in range(T):
            total, n = torch.zeros(8, dtype=torch.float64), 0.0
            for s in range(t + 1):
                keep = (1 - gates["forget"][h, s + 1 : t + 1]).prod()
                if name == "retnet":  # a rotation by the distance, as complex numbers
                    turn = torch.polar(torch.ones(4, dtype=torch.float64), (t - s) * rate)
                    a, b = (torch.complex(z[:4], z[4:]) for z in (q[t, h], k[s, h]))
                    score = (a * turn * b.conj()).real.sum()
                else:
                    score = q[t, h] @ k[s, h]
                share = keep * gates["lr"][h, s] * score / 8**0.5
                total, n = total + share * v[s, h], n + share
            y[t, h] = total / max(1.0, abs(n)) if name == "mlstm" else total
    torch.testing.assert_close(reader(x)[0].view(T, 2, 8), y, rtol=0, atol=1e-12)


def test_features_that_have_no_meaning():
    for changed, message in (
        (
            {"features": Features(rotary=True), "head_dim": 7},
            "rotary positions need an even head width, got 7",
        ),
        ({"features": Features(keys="forget")}, "a retention that has one, with channels='input'"),
        (
            {"features": Features(keys="query"), "rule": Rule(Matrix(), algorithm=GradientDescent(steps=2))},
            "with several steps per token each has a key of its own",
        ),
        ({"features": Features(normalizer=True), "memory": MLP()}, "needs equal key and value widths"),
    ):
        with refused(message):
            LM(preset("titans-linear", **SMALL | changed))
    with refused("Features: unknown activation 'gelu'; choose one of silu, identity, elu1"):
        Features(activation="gelu")
    assert replace(Features(), keys="query").keys == "query"


@pytest.mark.parametrize("name", ["window_size", "vocab_size", "segment_size"])
def test_sizes_that_no_tensor_has_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name} must be at most 2147483647, got {1 << 70}"):
        ModelConfig(**{name: 1 << 70})
