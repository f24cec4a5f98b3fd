"""Configs on disk: old ones, choices from elsewhere, functions; and the overrides that are ablations."""

import json
import re
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import miras
import miras.evaluate.describe
from miras.core.algorithm import GradientAscent, GradientDescent
from miras.core.bias import Bias
from miras.core.memory import MLP, GatedMLP, Matrix
from miras.core.retention import Bregman, FDivergence, Keep, Simplex
from miras.core.rule import Rule, weights
from miras.core.state import Record
from miras.nn.attention import AttentionConfig
from miras.nn.config import ModelConfig
from miras.nn.folder import load_model, save_model
from miras.nn.gates import Gate
from miras.nn.lm import LM
from miras.nn.memory import Features
from miras.nn.mixer import Mixer
from miras.nn.part import MixerConfig
from miras.nn.sum import SumConfig
from miras.nn.titans import MAGConfig
from miras.session.compare import memories
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
    written = config.to_dict()["pattern"][0]["rule"]["bias"]
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
    gone["pattern"][0]["rule"]["bias"] = {"name": "no_such_package.biases:Cosh"}
    with refused("no_such_package.biases:Cosh cannot be imported"):
        ModelConfig.from_dict(gone, trust_remote_code=True)

    gone["pattern"][0]["rule"]["bias"] = {"name": "__main__:Cosh"}
    with refused("it was defined in a script or a notebook: move it to a module"):
        ModelConfig.from_dict(gone, trust_remote_code=True)

    class Local(Cosh):
        pass

    with refused("define it by name at the top level of a module"):
        preset("titans-linear", bias=Local(), **SMALL).to_dict()


def test_functions():
    config = preset("titans-linear", retention=Bregman(torch.tanh), **SMALL)
    assert config.to_dict()["pattern"][0]["rule"]["retention"]["inverse"] == {"function": "torch:tanh"}
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
        evil["pattern"][0]["rule"]["retention"]["inverse"] = {"function": path}
        with refused("names code to import and run"):
            ModelConfig.from_dict(evil)


@pytest.mark.parametrize("axis", ["memory", "bias", "retention", "algorithm"])
def test_a_choice_names_nothing_that_is_called_with_a_files_values(axis, tmp_path):
    """`torch.from_file` with the values of a file would make, grow and damage any file of the user's."""
    victim = tmp_path / "victim"
    evil = preset("titans-linear", **SMALL).to_dict()
    evil["pattern"][0]["rule"][axis] = {
        "name": "torch:from_file",
        "filename": str(victim),
        "shared": True,
        "size": 1000,
    }
    with refused("names code to import and run, torch:from_file"):
        ModelConfig.from_dict(evil)
    with refused(f"{axis} 'torch:from_file' is not a subclass of {axis.title()}"):
        ModelConfig.from_dict(evil, trust_remote_code=True)
    assert not victim.exists()


def test_a_file_says_everything_that_a_model_is():
    """So that a default may change, and old files still mean what they meant."""
    written = preset("titans-mag", **SMALL).to_dict()
    (mag,) = written["pattern"]
    assert mag["name"] == "mag" and mag["attention"] == {
        "name": "attention",
        "window_size": 2048,
        "num_persistent": 128,
    }
    memory = mag["memory"]
    assert set(memory) == {
        "name",
        "rule",
        "gates",
        "conv_size",
        "initial_scale",
        "features",
        "key_dim",
        "value_dim",
        "feature_map",
    }
    assert set(memory["rule"]["algorithm"]) == {
        "name",
        "momentum",
        "step_bound",
        "steps",
        "first_order",
        "window",
    }
    assert memory["gates"]["lr"]["rank"] == 32 and memory["features"]["keys"] == "projected"
    assert written["mlp"] == {"name": "swiglu"} and written["intermediate_size"] is None


def test_layers_may_have_rules_of_their_own():
    """Each is built, described, written and read as it is; a setting changes it wherever it stands."""
    yaad, linear = (preset(name).memories()[0] for name in ("yaad", "titans-linear"))
    wired = MAGConfig(memory=linear, attention=AttentionConfig(window_size=4))
    config = ModelConfig(
        **SMALL | {"num_hidden_layers": 3}, pattern=(wired, yaad, AttentionConfig(window_size=2))
    )
    assert through(config) == config and config.memories() == [linear, yaad]
    found = miras.evaluate.describe.describe(config)
    assert found["layers"] == ["mag", "memory", "attention"]
    said = [[m["choices"]["bias"]["choice"] for m in each["memories"]] for each in found["mixers"]]
    assert said == [["L2()"], [repr(yaad.rule.bias)], []]
    model = LM(config)
    logits, state = model(torch.zeros(1, 5, dtype=torch.long))
    assert logits.isfinite().all() and [type(each).__name__ for each in state.layers] == [
        "WiredState",
        "MemoryState",
        "Window",
    ]
    changed = miras.zoo.override(config, chunk_size=8, window_size=3)
    assert [m.rule.chunk_size for m in changed.memories()] == [8, 8]
    assert changed.pattern[0].attention.window_size == changed.pattern[2].window_size == 3
    assert changed.memories()[1].rule.bias == yaad.rule.bias and changed.stride() == 8


def test_layers_with_chunks_of_their_own_stream_at_any_cut():
    parts = [preset("titans-lmm", chunk_size=size).memories()[0] for size in (2, 6)]
    wired = MAGConfig(memory=parts[1], attention=AttentionConfig(window_size=4))
    model = LM(ModelConfig(**SMALL | {"num_hidden_layers": 3}, pattern=(*parts, wired))).double()
    assert model.config.stride() == 6
    tokens = torch.randint(256, (2, 29), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, _ = model(tokens)
        state, rest = None, []
        for piece in tokens.split([1, 4, 8, 1, 1, 1, 13], 1):
            logits, state = model(piece, state)
            rest.append(logits)
    torch.testing.assert_close(torch.cat(rest, 1), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        (
            "titans-mac",
            {"window_size": 8},
            "window_size is only used by layers of attention, mag, mal, and this",
        ),
        (
            "transformer",
            {"chunk_size": 4},
            "chunk_size is only used by layers of memory, mac, mag, mal, and this",
        ),
        (
            "titans-mag",
            {"segment_size": 8},
            "segment_size is only used by layers of mac, and this model has mag",
        ),
        ("titans-mag", {"windw_size": 8}, "unknown field 'windw_size', perhaps you meant 'window_size'"),
    ],
)
def test_a_setting_that_no_layer_reads_is_refused(name, changed, message):
    with refused(message):
        preset(name, **changed)
    with refused(message):
        miras.zoo.override(preset(name), **changed)


def test_a_named_mixer_is_made_of_what_the_model_has():
    hybrid = preset("titans-mac", pattern=("attention", "mac", "memory"), window_size=64, segment_size=32)
    attention, mac, memory = hybrid.pattern
    assert attention == AttentionConfig(window_size=64, num_persistent=128)
    assert (mac.segment_size, mac.num_persistent, mac.memory) == (32, 128, memory)
    assert memory == preset("titans-lmm").memories()[0]


def test_memories_side_by_side_are_added_up():
    """Each as alone in its layer, with a rule, a state and a name of its own."""
    slow, fast = (
        preset(name, chunk_size=size).memories()[0] for name, size in (("yaad", 6), ("titans-lmm", 2))
    )
    layer = SumConfig(mixers=(slow, AttentionConfig(window_size=4), fast))
    config = ModelConfig(**SMALL | {"num_hidden_layers": 2}, pattern=(layer,))
    assert through(config) == config and config.memories() == [slow, fast] and config.stride() == 6
    assert config.flops_per_token() == 2 * 16 * 256 + 2 * (
        6 * 16 * 48 + sum(part.flops(config) for part in layer.mixers)
    )
    torch.manual_seed(0)
    model, tokens = LM(config).double(), torch.randint(256, (2, 23))
    with torch.no_grad(), miras.observe() as seen:
        whole, _ = model(tokens)
    assert seen.layers() == ("layers.0", "layers.0.1", "layers.1", "layers.1.1")
    with torch.no_grad():
        rest, state = [], None
        for piece in tokens.split([1, 4, 8, 1, 9], 1):
            logits, state = model(piece, state)
            rest.append(logits)
    torch.testing.assert_close(torch.cat(rest, 1), whole, rtol=0, atol=1e-9)
    assert list(memories(model, state)) == list(seen.layers())
    mixer, x = model.model.layers[0].mixer, torch.randn(2, 11, 16).double()
    alone = sum(part(x)[0] for part in mixer.mixers)
    torch.testing.assert_close(mixer(x)[0], alone, rtol=0, atol=1e-12)
    scale = (2 * config.num_hidden_layers) ** 0.5  # each is a branch of the residual stream
    assert 0.5 < float(mixer.mixers[2].out.weight.detach().std()) * scale * 16**0.5 < 2
    changed = miras.zoo.override(config, window_size=8, chunk_size=3)
    assert [part.window_size for part in changed.pattern[0].mixers[1:2]] == [8] and changed.stride() == 3
    with refused("a sum needs mixers, such as SumConfig(mixers=("):
        preset("titans-lmm", pattern=("sum",))


def test_a_model_without_mlps():
    config = preset("titans-lmm", mlp=None, **SMALL)
    assert config.to_dict()["mlp"] is None and through(config) == config
    model = LM(config)
    assert model(torch.zeros(1, 3, dtype=torch.long))[0].isfinite().all()
    assert not [name for name, _ in model.named_parameters() if "mlp" in name]
    full = preset("titans-lmm", **SMALL)
    assert config.flops_per_token() == full.flops_per_token() - 6 * 16 * 48


@dataclass(frozen=True, kw_only=True)
class MeanConfig(MixerConfig):
    """The mean of all tokens so far: a mixer that the library does not have, in one class and its module."""

    name: ClassVar[str] = "mean"

    gain: float = 1.0

    def build(self, sizes):
        return Mean(sizes, self)

    def flops(self, sizes):
        return 2 * sizes.hidden_size**2


@dataclass(frozen=True)
class MeanState(Record):
    total: torch.Tensor
    count: torch.Tensor


class Mean(Mixer):
    def __init__(self, sizes, config):
        super().__init__()
        self.hidden_size, self.gain = sizes.hidden_size, config.gain
        self.out = torch.nn.Linear(sizes.hidden_size, sizes.hidden_size, bias=False)

    def initial(self, rows, like):
        return MeanState(like.new_zeros(rows, self.hidden_size), like.new_zeros(rows))

    def mix(self, x, state, rows):
        total = state.total[:, None] + x.cumsum(1)
        count = state.count[:, None] + torch.arange(1, x.shape[1] + 1)
        y = self.out(self.gain * total / count[..., None])
        return y, MeanState(total[:, -1], count[:, -1])


def test_a_mixer_of_ones_own_is_one_class_and_its_module(tmp_path):
    """In a model, described, sized, streamed, written by its import path and read back."""
    config = ModelConfig(**SMALL, vocab_size=32, pattern=(MeanConfig(gain=2.0),))
    model = LM(config)
    tokens = torch.randint(32, (2, 9))
    whole, _ = model(tokens)
    first, state = model(tokens[:, :4])
    rest, _ = model(tokens[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole)
    assert model.state_bytes() == 4 * (16 + 1) + 16 and not config.grows() and config.stride() == 1
    assert miras.evaluate.describe.describe(config)["mixers"] == [
        {"name": "mean", "words": [], "memories": []}
    ]
    save_model(model, tmp_path / "m")
    with refused(f"names code to import and run, {__name__}:MeanConfig"):
        load_model(tmp_path / "m")
    assert load_model(tmp_path / "m", trust_remote_code=True).config == config
    assert miras.zoo.override(config, gain=3.0).pattern == (MeanConfig(gain=3.0),)


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
    "last": {"gates": last_layer(preset("titans-mag").memories()[0].rule)},
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
    model = LM(miras.zoo.override(base, gates=last_layer(base.memories()[0].rule)))
    _, state = model(torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(0)))
    mixer = model.model.layers[0].mixer
    A, A0 = mixer.reader.weights(state.layers[0].memory), mixer.reader.A0(1)
    moved = {n for n in A if not torch.equal(A[n], A0[n])}
    depth = 3 if name == "ttt-mlp" else 2
    assert moved == {n for n in A if n.endswith(str(depth))}


def test_a_memory_of_one_layer_has_no_last_one():
    for name in ("deltanet", "ttt-linear", "titans-linear"):
        with refused("has one layer, so there is none to leave as it begins"):
            last_layer(preset(name).memories()[0].rule)


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
    for name, w in weights(config.memories()[0].rule, A0, {}).items():
        rms = w.square().mean((-2, -1)).sqrt()
        torch.testing.assert_close(
            rms, torch.full_like(rms, config.memories()[0].initial_scale * A0[name].shape[-2] ** -0.5)
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
        preset("titans-mac", pattern=("mac", "mag"), **{name: 1 << 70})
