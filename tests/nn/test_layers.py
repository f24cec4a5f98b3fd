"""Layers on their own: any mask, any width, any gate, and what can be watched of them."""

import itertools
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from miras.core.algorithm import GradientDescent
from miras.core.memory import MLP, Matrix
from miras.core.observe import observe
from miras.core.retention import Decay
from miras.core.rule import Rule
from miras.nn.attention import AttentionConfig, AttentionLayer
from miras.nn.config import ModelConfig
from miras.nn.feature_map import Polynomial
from miras.nn.gates import BOUNDED, LINKS, Gate, Gates, hard
from miras.nn.lm import LM
from miras.nn.memory import Features, MemoryConfig, MemoryLayer, MemoryReader
from miras.nn.part import MixerConfig, Sizes
from miras.nn.titans import MACConfig, MAGConfig, MALConfig
from miras.zoo import preset

HIDDEN, HEADS, B, T = 12, 2, 4, 26
RULE = Rule(MLP(expansion=2), algorithm=GradientDescent(momentum=True, step_bound=10.0), chunk_size=4)
PLAIN = Rule(Matrix(), retention=Decay(decayed=True), chunk_size=3)
DEEP = Rule(MLP(depth=3, expansion=1, residual=False), chunk_size=5)

TURNED = Features(scaled=True, rotary=True)


def made(kind: MixerConfig, rule: Rule = RULE, head_dim: int | None = None, **changed):
    """A wiring of attention and a memory."""
    return kind.changed({"rule": rule} | changed).build(
        Sizes(hidden_size=HIDDEN, num_heads=HEADS, head_dim=head_dim)
    )


LAYERS = {
    "titans": lambda: MemoryLayer(HIDDEN, HEADS, RULE),
    "matrix": lambda: MemoryLayer(HIDDEN, HEADS, PLAIN, key_dim=5, value_dim=3),
    "turned": lambda: MemoryLayer(HIDDEN, HEADS, RULE, features=TURNED),
    "no-conv": lambda: MemoryLayer(HIDDEN, HEADS, PLAIN, conv_size=0, initial_scale=0.0),
    "deep": lambda: MemoryLayer(HIDDEN, HEADS, DEEP, head_dim=4, value_dim=7, conv_size=2),
    "window": lambda: AttentionLayer(HIDDEN, HEADS, window_size=5, num_persistent=2),
    "full": lambda: AttentionLayer(HIDDEN, HEADS, head_dim=4),
    "mac-wide": lambda: made(MACConfig(), DEEP, segment_size=10, pool=2, key_dim=4, value_dim=7),
    "mac-mapped": lambda: made(
        MACConfig(), DEEP, segment_size=10, key_dim=2, value_dim=7, feature_map=Polynomial(3), features=TURNED
    ),
    "mal-wide": lambda: made(MALConfig(), PLAIN, window_size=5, key_dim=7, value_dim=2),
    "mag-narrow": lambda: made(MAGConfig(), PLAIN, window_size=5, key_dim=3),
    "mag": lambda: made(MAGConfig(), window_size=5, num_persistent=2),
    "mac": lambda: made(MACConfig(), segment_size=8, num_persistent=2),
    "mac-pooled": lambda: made(MACConfig(), segment_size=8, pool=4),
    "mac-bare": lambda: made(MACConfig(), PLAIN, 4, segment_size=3, conv_size=0),
    "mal": lambda: made(MALConfig(), window_size=5, num_persistent=2),
    "mag-bare": lambda: made(MAGConfig(), PLAIN, 4, window_size=2, conv_size=0),
}
every = pytest.mark.parametrize("kind", LAYERS)


def build(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]().double()
    with torch.no_grad():
        for part in layer.modules():
            if isinstance(part, Gates):
                part.proj.weight.normal_(std=0.5)
    return layer


def inputs(rows=B, tokens=T, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, HIDDEN, generator=g, dtype=torch.float64)


def mask(share, seed=0, tokens=T):
    return torch.rand(B, tokens, generator=torch.Generator().manual_seed(seed)) < share


def same(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@every
@torch.no_grad()
def test_widths_and_state(kind):
    layer, x = build(kind), inputs()
    y, state = layer(x)
    assert y.shape == x.shape and y.dtype == torch.float64 and y.isfinite().all()
    more, _ = layer(inputs(seed=1), state)
    fresh, _ = layer(inputs(seed=1))
    assert (more - fresh).abs().max() > 1e-3


@every
@torch.no_grad()
def test_a_row_with_holes_documents_and_reads_is_the_row_alone(kind):
    layer = build(kind)
    for seed in range(4):
        x = inputs(seed=seed)
        masks = {"valid": mask(0.7, seed), "write": mask(0.8, seed + 10), "reset": mask(0.1, seed + 20)}
        masks["valid"][3] = False
        cuts = [0, *sorted(torch.randperm(T - 1, generator=torch.Generator().manual_seed(seed))[:3] + 1), T]
        state, reads = None, []
        for a, b in itertools.pairwise(cuts):
            y, state = layer(x[:, a:b], state, **{n: m[:, a:b] for n, m in masks.items()})
            reads.append(y)
        y = torch.cat(reads, 1)
        assert not y[~masks["valid"]].any()
        for b in range(3):
            # Alone: nothing but the tokens that are there, each document by itself.
            there = masks["valid"][b]
            row, write, reset = x[b, there], masks["write"][b, there], masks["reset"][b, there]
            starts = [0, *(t for t in range(1, len(row)) if reset[t]), len(row)]
            alone = [layer(row[None, i:j], write=write[None, i:j])[0] for i, j in itertools.pairwise(starts)]
            same(y[b, there], torch.cat(alone, 1)[0])
        # The row without a token has not begun.
        later, _ = layer(inputs(seed=9), state)
        same(later[3:], layer(inputs(seed=9)[3:])[0])


@every
def test_gradients_reach_every_parameter_and_no_padding(kind):
    layer, x = build(kind), inputs().requires_grad_()
    valid, reset = mask(0.8), mask(0.1, 3)
    y, _ = layer(x, valid=valid, reset=reset)
    (y * inputs(seed=4)).sum().backward()
    assert not x.grad[~valid].any() and x.grad[valid].abs().amax(-1).gt(0).all()
    for name, p in layer.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_gradients_are_those_of_the_function():
    # By finite differences, over two chunks, a document's start and a padding token.
    layer, x = build("titans"), inputs(2, 7)
    reset, valid = torch.zeros(2, 7, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    reset[0, 3], valid[1, 2] = True, False
    weights = dict(layer.reader.A0.named_parameters()) | dict(layer.reader.gates.proj.named_parameters())
    names = {"w1": "reader.A0.w1", "w2": "reader.A0.w2"}
    names |= {n: f"reader.gates.proj.{n}" for n in ("weight", "bias")}

    def read(x, *values):
        given = {names[n]: value for n, value in zip(weights, values, strict=True)}
        return torch.func.functional_call(layer, given, (x,), {"reset": reset, "valid": valid})[0]

    leaves = [x, *(p.detach().clone() for p in weights.values())]
    assert torch.autograd.gradcheck(read, [leaf.requires_grad_() for leaf in leaves], fast_mode=True)


@every
@pytest.mark.parametrize("tokens", [1, T])
def test_no_rows(kind, tokens):
    layer, x, none = build(kind), inputs(0, tokens), torch.zeros(0, tokens, dtype=torch.bool)
    y, state = layer(x)
    more, state = layer(x, state, valid=none, write=none, reset=none)
    assert y.shape == more.shape == x.shape and all(len(part) == 0 for part in state.tensors().values())
    with torch.no_grad():
        assert layer(x, state)[0].shape == x.shape


@every
def test_the_meta_device_gives_shapes(kind):
    layer, x = build(kind), inputs()
    expected = shapes(*layer(x))
    assert shapes(*layer.to("meta")(x.to("meta"))) == expected
    with torch.no_grad():
        _, state = layer(x.to("meta"))
        assert layer(x[:, :1].to("meta"), state)[0].shape == (B, 1, HIDDEN)


def shapes(y, state):
    return {n: (x.shape, x.dtype) for n, x in ({"y": y} | state.tensors()).items()}


@pytest.mark.parametrize("name", ["ttt-linear", "yaad", "gla", "deltanet"])
def test_a_short_default_type_leaves_gates_and_initial_memories_in_fp32(name):
    def made(kind):
        before = torch.get_default_dtype()
        torch.set_default_dtype(kind)
        try:
            torch.manual_seed(0)
            config = preset(name, hidden_size=16, num_heads=2, num_hidden_layers=1)
            return LM(config), LM(config)(torch.zeros(1, 3, dtype=torch.long))
        finally:
            torch.set_default_dtype(before)

    (short, (logits, state)), (usual, _) = made(torch.bfloat16), made(torch.float32)
    assert logits.dtype == torch.bfloat16 and state.layers[0].memory.A.popitem()[1].dtype == torch.float32
    kept = 0
    for (n, x), (_, y) in zip(short.named_parameters(), usual.named_parameters(), strict=True):
        precise = any(part in n for part in (".A0.", ".gates.", ".outer."))
        assert x.dtype == (torch.float32 if precise else torch.bfloat16), n
        if n.endswith("bias"):  # of gates: what they say, not rounded
            assert torch.equal(x, y), n
        kept += precise
    assert kept


@every
def test_second_derivatives_are_those_of_the_function(kind):
    # The second derivative along d, against how the first one changes along d.
    layer, x, d = build(kind), inputs(1, 9), inputs(1, 9, seed=1)

    def slope(x):
        x = x.requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # torch's fused kernels have no second derivative
            y = layer(x)[0]
        return torch.autograd.grad(y.sin().sum(), x, create_graph=True)[0], x

    along, leaf = slope(x.clone())
    (found,) = torch.autograd.grad((along * d).sum(), leaf)
    expected = (slope(x + 1e-5 * d)[0] - slope(x - 1e-5 * d)[0]) / 2e-5
    same(found, expected.detach(), 1e-6 * expected.abs().max().item())


def test_key_and_value_widths():
    layer = MemoryLayer(HIDDEN, HEADS, PLAIN, head_dim=5, value_dim=3)
    assert layer.reader.A0.w.shape == (HEADS, 5, 3)
    assert layer.norm.weight.shape == (3,) and layer.out.weight.shape == (HIDDEN, 6)
    _, state = layer(torch.randn(2, 4, HIDDEN))
    assert state.memory.A["w"].shape == (2, HEADS, 5, 3)
    assert {n: tuple(x.shape) for n, x in state.tails.items()} == {
        "q": (2, 3, 10),
        "k": (2, 3, 10),
        "v": (2, 3, 6),
    }
    with pytest.raises(ValueError, match="needs equal key and value widths, got 5 and 3"):
        MemoryLayer(HIDDEN, HEADS, RULE, head_dim=5, value_dim=3)


def test_without_a_convolution_a_read_of_a_single_token_is_a_map_of_that_token():
    layer = build("no-conv")
    assert layer.reader.q.conv is None
    _, state = layer(inputs())
    assert all(tail.shape[1] == 0 for tail in state.tails.values())
    x = inputs(1, 3)
    write = torch.zeros(1, 3, dtype=torch.bool)
    apart = [layer(x[:, t : t + 1], state.select([0]), write=write[:, :1])[0] for t in range(3)]
    same(layer(x, state.select([0]), write=write)[0], torch.cat(apart, 1))


def test_the_convolution_reaches_back_its_taps():
    layer, x = build("titans"), inputs(1, 12)
    write = torch.zeros(1, 12, dtype=torch.bool)
    other = x.clone()
    other[:, 4] += 1
    moved = (layer(x, write=write)[0] - layer(other, write=write)[0]).abs().amax(-1)[0]
    assert (moved > 0).tolist() == [4 <= t < 8 for t in range(12)]


@pytest.mark.parametrize("link", LINKS)
def test_links_reach_their_ends_with_finite_gradients(link):
    far = 100.0 if link == "exp2" else 200.0
    x = torch.tensor([-far, -30.0, -3.1, 0.0, 3.1, 30.0, far], requires_grad=True)
    y = LINKS[link](x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all() and slope.isfinite().all() and (slope >= 0).all()
    assert y.diff().min() >= 0 and 0 <= y[0] < 1e-6
    if link in BOUNDED:
        assert y[0] == 0 and 0.99999 < y[-1] <= 1
    if link == "softplus":
        assert y[-1] == 200 and slope[-1] == 1
    if link == "exp":
        torch.testing.assert_close(y[3:5], torch.tensor([1.0, 21.255]), rtol=1e-4, atol=0)
        assert y[-1] < 3.3e6
    if link == "hard":
        assert y.tolist() == [0, 0, 0, 0.5, 1, 1, 1] and slope.tolist()[:3] == [0, 0, 0]
        ends = torch.tensor([-3.04, 3.04])
        assert 0 < hard(ends)[0] < 0.001 and 0.999 < hard(ends)[1] < 1


@pytest.mark.parametrize("memory", [Matrix(), MLP(expansion=2)], ids=repr)
@pytest.mark.parametrize("end", [-200.0, 200.0])
def test_a_layer_whose_gates_are_at_their_ends(memory, end):
    # Hard gates and a softplus step: exactly 0 and exactly 1, and training goes on.
    rule = Rule(memory, algorithm=GradientDescent(momentum=True), chunk_size=4)
    gates = {"lr": Gate("hard", 0.5), "forget": Gate("hard"), "momentum": Gate("hard", 0.9)}
    torch.manual_seed(0)
    layer = MemoryLayer(HIDDEN, HEADS, rule, gates=gates).double()
    with torch.no_grad():
        layer.reader.gates.proj.bias.fill_(end)
    values = layer.reader.gates(inputs())
    tops = {"lr": 0.5 * (1 - 0.9), "forget": 1.0, "momentum": 0.9}
    for name, value in values.items():
        assert (value == (0.0 if end < 0 else tops[name])).all()
    x = inputs().requires_grad_()
    y, state = layer(x)
    (y.square().sum() + sum(a.square().sum() for a in state.memory.A.values())).backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    for name, p in layer.named_parameters():
        assert p.grad.isfinite().all(), name
    start = layer.reader.A0(B)
    for name, a in state.memory.A.items():
        assert torch.equal(a, start[name]) == (end < 0)
    if end > 0:  # forget 1 leaves the last surprise alone
        for name, a in state.memory.A.items():
            same(a, state.memory.S[name])


def test_a_softplus_step_is_not_bounded_above():
    layer = MemoryLayer(HIDDEN, HEADS, PLAIN, gates={"lr": Gate("softplus", bias=3.0)})
    lr = layer.reader.gates(torch.zeros(1, 2, HIDDEN))["lr"]
    torch.testing.assert_close(lr, torch.full_like(lr, 3.0485873222))


def test_a_gate_for_each_weight():
    gates = {"lr": Gate(per_weight=True, scale=0.5), "momentum": Gate(per_weight=True, scale=0.9)}
    torch.manual_seed(0)
    layer = MemoryLayer(HIDDEN, HEADS, RULE, gates=gates)
    values = layer.reader.gates(torch.randn(3, 5, HIDDEN))
    assert list(values) == ["lr.w1", "lr.w2", "momentum.w1", "momentum.w2", "forget"]
    assert all(v.shape == (3, HEADS, 5) for v in values.values())
    assert not torch.equal(values["lr.w1"], values["lr.w2"])
    assert layer.reader.gates.proj.out_features == 5 * HEADS


def refused(kind, message):
    return pytest.raises(kind, match=re.escape(message))


def test_errors():
    with refused(
        ValueError, "Gate: unknown link 'tanh'; choose one of sigmoid, softplus, hard, root_sigmoid"
    ):
        Gate("tanh")
    for scale in (0.0, -1.0):
        with refused(ValueError, f"Gate: scale must be positive, got {scale}"):
            Gate(scale=scale)
    with refused(ValueError, "Gates: the rule reads momentum; give a Gate(...) for each"):
        Gates(HIDDEN, HEADS, RULE, {"lr": Gate(), "forget": Gate()}, 6, 6)
    for scale in (1.0, 1.5):
        with refused(
            ValueError, f"Gates: momentum must stay below 1 to be stable, so its scale must; got {scale}"
        ):
            MemoryLayer(HIDDEN, HEADS, RULE, gates={"momentum": Gate(scale=scale)})
    # The bound needs steps that it cannot turn round.
    with refused(
        ValueError, "Gates: step_bound times the largest lr must be at most 1, got 10.0 * 0.15; lower"
    ):
        MemoryLayer(HIDDEN, HEADS, RULE, gates={"lr": Gate(scale=1.5)})
    for kind in LAYERS:
        for name in ("valid", "write", "reset"):
            with refused(
                ValueError, f"{name} must be a bool mask (B, T) = (4, 26), got torch.float64 (4, 26)"
            ):
                build(kind)(inputs(), **{name: torch.ones(B, T, dtype=torch.float64)})


def test_a_configs_errors():
    for changed, message in (
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"hidden_size": 30, "num_heads": 4}, "hidden_size 30 is not a multiple of num_heads 4"),
        ({"pattern": ()}, "pattern must name one or more of"),
        ({"pattern": (MemoryConfig(), "mamba")}, "miras.preset(NAME, pattern=(...)) also takes their names"),
        ({"head_dim": 7, "pattern": (AttentionConfig(),)}, "rotary positions need an even head width, got 7"),
        ({"mlp": None, "intermediate_size": 8}, "and this model has mlp=None; omit intermediate_size=8"),
    ):
        with refused(ValueError, message):
            ModelConfig(**changed)
    assert ModelConfig(head_dim=7).width() == 7
    for part, changed, message in (
        (AttentionConfig, {"window_size": 0}, "window_size must be at least 1, got 0"),
        (AttentionConfig, {"num_persistent": -1}, "num_persistent must be at least 0, got -1"),
        (MACConfig, {"num_persistent": -1}, "num_persistent must be at least 0, got -1"),
        (MemoryConfig, {"rule": PLAIN, "gates": {"momentum": Gate()}}, "gates momentum are not read by"),
    ):
        with refused(ValueError, message):
            part(**changed)


def test_a_model_refuses_what_does_not_fit():
    config = ModelConfig(
        hidden_size=HIDDEN, num_hidden_layers=2, num_heads=HEADS, pattern=(MemoryConfig(rule=RULE),)
    )
    model = LM(config)
    with refused(ValueError, "LM: tokens must be (B, T) int64, got torch.float32 (2, 3)"):
        model(torch.zeros(2, 3))
    with refused(ValueError, "LM: tokens must be (B, T) int64, got torch.int64 (3,)"):
        model(torch.zeros(3, dtype=torch.long))
    with refused(ValueError, "LM: the state has 3 rows and the tokens 2"):
        model(torch.zeros(2, 3, dtype=torch.long), model.initial(3))
    tokens = torch.tensor([[1, 255, 256], [0, -1, 2]])
    with refused(ValueError, "LM: token id 256 is outside the model's vocabulary, 0 to 255"):
        model(tokens)
    with refused(ValueError, "LM: token id -1 is outside the model's vocabulary, 0 to 255"):
        model(tokens[1:])
    model(tokens, valid=(tokens >= 0) & (tokens < 256))  # padding may be anything


@pytest.mark.parametrize(
    "layer",
    [
        MemoryLayer,
        AttentionLayer,
        *(
            lambda D, H, head_dim=None, kind=kind: kind().build(
                Sizes(hidden_size=D, num_heads=H, head_dim=head_dim)
            )
            for kind in (MAGConfig, MALConfig, MACConfig)
        ),
    ],
)
def test_heads_share_a_width_evenly_or_are_given_one(layer):
    with pytest.raises(ValueError, match="hidden_size 100 is not a multiple of num_heads 3; change one of"):
        layer(100, 3)
    y, _ = layer(10, 3, head_dim=4)(torch.randn(1, 2, 10))
    assert y.shape == (1, 2, 10)


SEEN = {"loss", "momentary", "accumulated", "weight"}


def watched(pattern=("attention", "memory", "mag"), **changed):
    torch.manual_seed(0)
    gates = {"lr": Gate(scale=0.5, per_weight=True)}
    sizes = {"hidden_size": HIDDEN, "num_heads": HEADS, "num_hidden_layers": len(pattern), "window_size": 5}
    more = {"pattern": pattern, "rule": RULE, "gates": gates}
    return LM(ModelConfig().changed(sizes | more | changed)).double()


@torch.no_grad()
def test_observation_through_a_model():
    model, tokens = watched(), torch.randint(256, (B, T))
    with observe() as seen:
        whole, _ = model(tokens)
    assert seen.layers() == ("layers.1", "layers.2")
    for layer in seen.layers():
        assert set(seen[layer]) == SEEN | {"lr.w1", "lr.w2", "momentum", "forget"}
        for name, x in seen[layer].items():
            assert x.shape == (B, HEADS, T) and x.isfinite().all() and (x >= 0).all(), name
            assert x.std() > 0
    # Watching changes nothing but roundings, where it takes another way, and nothing is seen outside.
    assert torch.allclose(whole, model(tokens)[0], rtol=0, atol=1e-12)
    assert seen["layers.1"]["loss"].shape == (B, HEADS, T)


@torch.no_grad()
def test_an_observation_of_pieces_and_of_ragged_rows():
    model, tokens = watched(("memory",)), torch.randint(256, (B, T))
    with observe() as whole:
        model(tokens)
    with observe() as pieces:
        _, state = model(tokens[:, :7])
        for t in range(7, T):
            _, state = model(tokens[:, t : t + 1], state)
    valid = torch.arange(T) < torch.tensor([T, 15, 6, 0])[:, None]
    with observe() as ragged:
        model(tokens, valid=valid)
    for name, x in whole["layers.0"].items():
        same(pieces["layers.0"][name], x)
        same(ragged["layers.0"][name], x * valid[:, None])


@torch.no_grad()
def test_a_token_that_does_not_write_takes_no_step():
    model, tokens = watched(("memory",)), torch.randint(256, (B, T))
    write = mask(0.5)
    with observe() as seen:
        model(tokens, write=write)
    for name in ("lr.w1", "lr.w2"):
        assert torch.equal(seen["layers.0"][name] > 0, write[:, None].expand(B, HEADS, T))


def test_an_observation_keeps_no_graph(monkeypatch):
    monkeypatch.setattr("miras.engine.chunks.ACTIVATION_BYTES", 0)
    model, tokens = watched(("memory",)), torch.randint(256, (B, T))
    with observe() as seen:
        logits, _ = model(tokens)
        logits.sum().backward()
    assert not any(x.requires_grad for x in seen["layers.0"].values())
    assert seen["layers.0"]["loss"].shape == (B, HEADS, T)  # nor what the backward pass computes again
    with observe() as outer, observe(active=False):
        model(tokens)
    assert outer.layers() == ()


def test_a_reader_scans_in_the_type_of_its_gates():
    layer = MemoryLayer(HIDDEN, HEADS, RULE).to(torch.bfloat16)
    assert isinstance(layer.reader, MemoryReader)
    y, state = layer(inputs().to(torch.bfloat16))
    assert y.dtype == torch.bfloat16 and state.memory.A["w1"].dtype == torch.float32


@pytest.mark.parametrize("make", [lambda: MemoryLayer(16, 2), lambda: AttentionLayer(16, 2, window_size=3)])
def test_padding_that_is_not_a_number_reaches_neither_outputs_nor_gradients(make):
    layer, x = make(), torch.randn(1, 6, 16)
    x[0, 4:] = torch.nan
    y, _ = layer(x, valid=torch.tensor([[True] * 4 + [False] * 2]))
    y.sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


def test_a_deep_memory_cannot_start_at_zero():
    with pytest.raises(ValueError, match="initial_scale"):
        MemoryLayer(16, 2, initial_scale=0.0)


def test_a_model_reads_nothing():
    model = LM(preset("swa-lmm", hidden_size=16, num_heads=2, num_hidden_layers=2, window_size=4))
    logits, state = model(torch.zeros(1, 0, dtype=torch.long))
    assert logits.shape == (1, 0, 256) and int(state.tokens) == 0


TAPS = {"conv_size": 2}
OTHERS = {
    "convolution": (
        LAYERS["titans"],
        lambda: MemoryLayer(HIDDEN, HEADS, RULE, **TAPS),
        "look back 3 tokens, this layer's 1",
    ),
    "no convolution": (
        LAYERS["titans"],
        lambda: MemoryLayer(HIDDEN, HEADS, RULE, conv_size=0),
        "look back 3 tokens, this layer's 0",
    ),
    "positions": (LAYERS["turned"], LAYERS["titans"], "the state is not one of this layer: position"),
    "no positions": (LAYERS["titans"], LAYERS["turned"], "the state is not one of this layer: position"),
    "keys": (
        LAYERS["no-conv"],
        lambda: MemoryLayer(HIDDEN, HEADS, PLAIN, conv_size=0, features=Features(keys="query")),
        "the state is not one of this layer: tails",
    ),
    "window": (
        LAYERS["window"],
        lambda: AttentionLayer(HIDDEN, HEADS, window_size=6),
        "5 keys, this layer's 6",
    ),
    "shorter window": (LAYERS["window"], lambda: AttentionLayer(HIDDEN, HEADS, window_size=4), "5 keys"),
    "all": (LAYERS["full"], lambda: AttentionLayer(HIDDEN, HEADS, head_dim=4, window_size=4), "26 keys"),
    "segment": (LAYERS["mac"], lambda: made(MACConfig(), segment_size=16), "16 keys"),
    "pool": (LAYERS["mac-pooled"], LAYERS["mac"], "the state is not one of this layer: tails"),
    "no pool": (LAYERS["mac"], LAYERS["mac-pooled"], "the state is not one of this layer: tails"),
}


@pytest.mark.parametrize("kind", OTHERS)
@torch.no_grad()
def test_a_state_of_another_layer_is_refused_whose_numbers_would_fit(kind):
    one, other, message = OTHERS[kind]
    x = torch.randn(1, T, HIDDEN)
    _, state = one()(x)
    for tokens in (1, T):
        with refused(ValueError, message):
            other()(x[:, :tokens], state)
