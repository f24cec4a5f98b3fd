"""Keys of one width, values of another: every preset's memory in a layer is the recurrence, streams, and is sized.

Some also with a feature map, which widens the keys that the memory has.
"""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import miras
import miras.nn.memory
from miras.core.memory import MLP, Matrix
from miras.core.recurrence import token_by_token
from miras.core.rule import Call, Rule, State
from miras.data.tokens import ByteTokenizer
from miras.engine.plan import Plan
from miras.evaluate.describe import describe
from miras.nn.feature_map import Polynomial
from miras.nn.gates import Gates
from miras.nn.lm import LM
from miras.nn.memory import MemoryLayer
from miras.nn.part import Sizes
from miras.stream.files import load_state, save_state
from miras.zoo import MEMORIES, preset

KEY, VALUE, T = 6, 10, 23
SIZES = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": 32}
MAPPED = {f"{name}-mapped": name for name in ("retnet", "mlstm", "deltaproduct", "titans-lmm", "yaad")}
CASES = {name: name for name in MEMORIES} | MAPPED
every = pytest.mark.parametrize("name", CASES)


def config(name: str, **changed) -> miras.ModelConfig:
    if name in MAPPED:
        name, changed = MAPPED[name], {"key_dim": 4, "feature_map": Polynomial()} | changed
    memory = MEMORIES[name].rule.memory
    if isinstance(memory, MLP):  # one that adds its input to its output needs equal widths
        changed = {"memory": MLP(memory.depth, 2, residual=False, bias=memory.bias)} | changed
    chunk = min(4, MEMORIES[name].rule.chunk_size)
    return preset(name, **SIZES | {"key_dim": KEY, "value_dim": VALUE, "chunk_size": chunk} | changed)


def build(name: str, **changed) -> LM:
    torch.manual_seed(0)
    model = LM(config(name, **changed)).double()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, Gates):
                part.reset_parameters(0.3)
    return model


def text(T: int = T) -> Tensor:
    return torch.randint(32, (3, T), generator=torch.Generator().manual_seed(0))


def slow(rule: Rule, state: State, call: Call, plan: Plan) -> tuple[Tensor, State]:
    return token_by_token(rule, state, call, plan.watch)


def close(found: Tensor, expected: Tensor, what: str = "") -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9, msg=lambda m: f"{what}: {m}")


@every
def test_the_layer_is_the_recurrence(name: str, monkeypatch: pytest.MonkeyPatch):
    model, weight = build(name), torch.randn(3, T, 32, dtype=torch.float64)
    found: list[dict[str, Tensor]] = []
    for run in (miras.nn.memory.run, slow):
        monkeypatch.setattr(miras.nn.memory, "run", run)
        logits, state = model(text())
        model.zero_grad()
        (logits * weight).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert len(grads) == len(list(model.parameters()))
        found.append({"logits": logits.detach()} | state.tensors() | grads)
    for n, x in found[0].items():
        close(x, found[1][n], n)


@every
@torch.no_grad()
def test_it_streams_at_any_cut_under_any_mask(name: str):
    model, tokens = build(name), text()
    g = torch.Generator().manual_seed(1)
    masks = {n: torch.rand(3, T, generator=g) < share for n, share in (("write", 0.8), ("reset", 0.1))}
    whole, last = model(tokens, **masks)
    state, read = None, []
    for a, b in itertools.pairwise([0, 1, 5, 12, 13, T]):
        logits, state = model(tokens[:, a:b], state, **{n: m[:, a:b] for n, m in masks.items()})
        read.append(logits)
    close(torch.cat(read, 1), whole)
    for n, x in last.tensors().items():
        close(state.tensors()[n], x, n)
    whole, state, read = model(tokens)[0], None, []
    for t in range(T):  # without a mask or a gradient a token has a way of its own
        logits, state = model(tokens[:, t : t + 1], state)
        read.append(logits)
    close(torch.cat(read, 1), whole)


@every
@torch.no_grad()
def test_sizes_that_are_told_are_the_real_ones(name: str):
    model = build(name).float()
    told = describe(model.config)
    _, state = model(text()[:1])
    assert told["state_bytes"] == sum(x.nbytes for x in state.tensors().values())
    assert told["parameters"] == sum(p.numel() for p in model.parameters())
    key, value = 15 if name in MAPPED else KEY, VALUE + name.startswith("mlstm")
    shapes = model.config.memories()[0].rule.memory.shapes(key, value)
    assert {n: tuple(a.shape[2:]) for n, a in state.layers[0].memory.A.items()} == shapes
    with torch.device("meta"):
        empty = LM(model.config)
    y, on_meta = empty(text().to("meta")[:1])
    assert y.is_meta and {n: x.shape for n, x in on_meta.tensors().items()} == {
        n: x.shape for n, x in state.tensors().items()
    }


@every
@torch.no_grad()
def test_flops_per_token(name: str):
    T = 256  # 16 chunks
    key = 4 if name in MAPPED else 16
    model = build(name, hidden_size=64, key_dim=key, value_dim=48, chunk_size=16).requires_grad_(False)
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * a.numel() * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(text(T)[:1])
    assert model.flops_per_token() == pytest.approx(counter.get_total_flops() / T, rel=0.1)


def test_a_session_goes_on_from_its_file(tmp_path: Path):
    tokens = ByteTokenizer()
    model = build("titans-lmm-mapped", vocab_size=256).float()
    session, text = miras.Session(model, tokens), b"a state of its own width " * 3
    session.feed(text)
    session.save(tmp_path / "s")
    again = miras.Session.load(tmp_path / "s", model, tokens)
    assert torch.equal(torch.tensor(again.feed(text).losses), torch.tensor(session.feed(text).losses))


@pytest.mark.parametrize("name", ["gated-deltanet", "retnet-mapped"])
@torch.no_grad()
def test_a_state_goes_through_a_file(name: str, tmp_path: Path):
    model = build(name).float()
    _, state = model(text()[:, :9])
    save_state(tmp_path / "s", state, model)
    again, _ = load_state(tmp_path / "s", model)
    assert torch.equal(model(text()[:, 9:], again)[0], model(text()[:, 9:], state)[0])
    miras.save_model(model, tmp_path / "m")
    loaded = miras.load_model(tmp_path / "m")
    assert loaded.config == model.config and torch.equal(loaded(text())[0], model(text())[0])
    with pytest.raises(ValueError, match="belongs to another model"):
        load_state(tmp_path / "s", build(name, value_dim=8))


def test_a_width_that_is_not_given_is_that_of_the_head():
    for widths in ({}, {"key_dim": 5}, {"value_dim": 3}, {"key_dim": 5, "value_dim": 3}):
        torch.manual_seed(0)
        layer = MemoryLayer(16, 2, Rule(Matrix()), **widths)
        assert layer.reader.A0.w.shape == (2, widths.get("key_dim", 8), widths.get("value_dim", 8))
    torch.manual_seed(0)
    same = MemoryLayer(16, 2, Rule(Matrix()), head_dim=5, value_dim=3)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), same.parameters(), strict=True))
    older = preset("deltanet", **SIZES).to_dict()
    for n in ("key_dim", "value_dim"):
        assert older["pattern"][0].pop(n) is None
    assert miras.ModelConfig.from_dict(older) == preset("deltanet", **SIZES)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("deltanet", {"key_dim": 0}, "MemoryConfig: key_dim must be at least 1, got 0"),
        ("deltanet", {"value_dim": 1.5}, "MemoryConfig: value_dim must be a whole number or None, got 1.5"),
        ("titans-lmm", {"value_dim": 12}, "needs equal key and value widths, got 8 and 12"),
        ("retnet", {"key_dim": 7}, "rotary positions need an even head width, got 7"),
        (
            "titans-mag",
            {"key_dim": 12, "value_dim": 12},
            "whose heads are 8 wide; leave out value_dim, got 12",
        ),
        ("transformer", {"key_dim": 4}, "key_dim is only used by layers of memory, mac, mag, mal"),
    ],
)
def test_widths_that_cannot_be(name: str, changed: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        preset(name, **SIZES | changed)
    if name == "titans-lmm":
        with pytest.raises(ValueError, match=message):
            MemoryLayer(16, 2, **changed)


def test_widths_are_told_in_words():
    (memory,) = describe(config("deltanet"))["mixers"][0]["memories"]
    assert memory["features"] == (
        "q, k: linear, convolution, silu, length 1, 6 wide; v: linear, convolution, silu, 10 wide"
    )


def test_the_read_is_as_wide_as_the_value():
    layer = miras.MACConfig().changed(
        {"rule": Rule(Matrix(), chunk_size=4), "segment_size": 8, "value_dim": 3}
    )
    made = layer.build(Sizes(hidden_size=16, num_heads=2))
    assert made.read.weight.shape == (16, 6) and made(torch.randn(1, 9, 16))[0].shape == (1, 9, 16)
