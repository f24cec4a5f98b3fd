"""What was given in place of what is needed is named, with the way out."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import miras
from miras.hf import MirasForCausalLM, byte_tokenizer
from miras.store.words import nearest
from miras.zoo import PRESETS

SIZES = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 2, "chunk_size": 4, "window_size": 8}
IDS = torch.arange(9)[None]
X = torch.randn(1, 9, 16)
RULE = miras.Rule(miras.MLP(), chunk_size=4)
MEMORY, ATTENTION = miras.MemoryConfig(rule=RULE), miras.AttentionConfig(window_size=8)
TWO = miras.Sizes(hidden_size=16, num_heads=2)
LAYERS: dict[str, Callable[..., Any]] = {
    "MemoryLayer": lambda: miras.MemoryLayer(16, 2, RULE),
    "AttentionLayer": lambda: miras.AttentionLayer(16, 2),
    "MemoryAsContext": lambda: miras.MACConfig(memory=MEMORY, segment_size=8).build(TWO),
    "MemoryAsGate": lambda: miras.MAGConfig(memory=MEMORY, attention=ATTENTION).build(TWO),
    "MemoryAsLayer": lambda: miras.MALConfig(memory=MEMORY, attention=ATTENTION).build(TWO),
}


def lm(name: str = "titans-mag", **sizes: Any) -> Any:
    torch.manual_seed(0)
    return miras.LM(miras.preset(name).changed(SIZES | sizes))


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(message))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("Titans-MAC", "titans-mac"),
        ("titans_mac", "titans-mac"),
        ("Titans MAG", "titans-mag"),
        ("TitansMAL", "titans-mal"),
        ("mac", "titans-mac"),
        ("Gated_DeltaNet", "gated-deltanet"),
        ("RetNet", "retnet"),
        ("titan-mag", "titans-mag"),
    ],
)
def test_the_preset_that_was_meant_is_suggested_whatever_its_case(given: str, meant: str):
    with refused(f"unknown preset {given!r}, perhaps you meant {meant!r}; known are"):
        miras.preset(given)


def test_nothing_is_suggested_where_nothing_is_near():
    assert nearest("gpt2", PRESETS) == nearest("h", PRESETS) == ""
    with refused("unknown preset 3; known are"):
        miras.preset(3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("titans-mac", "config must be a ModelConfig, as miras.preset('titans-mac') gives it, got a str"),
        ({"hidden_size": 16}, "config must be a ModelConfig, as miras.preset(NAME) gives it, got a dict"),
    ],
)
def test_a_model_needs_a_config(given: Any, message: str):
    with refused(message):
        miras.LM(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 2], "a tensor (B, T) int64, got a list; for one stream of ids write torch.tensor([ids])"),
        ("text", "a tensor (B, T) int64, got a str; for one stream"),
        (np.arange(3), "a tensor (B, T) int64, got a ndarray"),
        (IDS[0], "(B, T) int64, got torch.int64 (9,); for one stream write tokens[None]"),
        (IDS.float(), "got torch.float32 (1, 9); ids are whole numbers: tokens.long()"),
        (torch.randn(1, 9, 7), "embeddings must be (B, T, 16), got (1, 9, 7)"),
    ],
)
def test_a_model_reads_tensors_of_ids(given: Any, message: str):
    with refused(message):
        lm()(given)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: lm("titans-mac", segment_size=8)(IDS)[1], "another model: layers.0: it is a ContextState"),
        (
            lambda: lm("swa-lmm")(IDS)[1],
            "another model: layers.0: it is a Window, and a WiredState is needed",
        ),
        (
            lambda: lm(hidden_size=32)(IDS)[1],
            "layers.0.attention.k: it is (1, 2, 8, 16), and one like (1, 2, 8, 8)",
        ),
        (
            lambda: lm(memory=miras.Matrix())(IDS)[1],
            "layers.0.memory.memory.A: it holds w, and w1, w2 is needed",
        ),
        (lambda: lm(num_hidden_layers=3)(IDS)[1], "another model: it has 3 layers, this one 2"),
        (
            lambda: lm()(IDS.expand(3, 9))[1],
            "the state has 3 rows and the tokens 1; a state continues the rows",
        ),
        (
            lambda: lm()(IDS),
            "must be an LMState, got a tuple; a call returns (logits, state): pass the second",
        ),
        (dict, "must be an LMState, got a dict"),
    ],
)
def test_the_state_of_another_model_is_named(state: Callable[[], Any], message: str):
    with refused(message):
        lm()(IDS, state())


def test_a_state_goes_to_no_file_of_another_model(tmp_path):
    with refused("is not written: the state belongs to another model: layers.0: it is a ContextState"):
        miras.save_state(tmp_path / "x", lm("titans-mac", segment_size=8)(IDS)[1], lm())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_says_what_it_reads(name: str):
    layer = LAYERS[name]()
    _, state = layer(X)
    assert layer(X, state)[0].shape == X.shape
    for given, message in (
        (
            X[0],
            "must be floating point (B, T, 16), got torch.float32 (9, 16); for one stream (T, hidden) write x[None]",
        ),
        (X[None], "must be floating point (B, T, 16), got torch.float32 (1, 1, 9, 16)"),
        (X[..., :15], "must be floating point (B, T, 16), got torch.float32 (1, 9, 15)"),
        (IDS, "must be floating point (B, T, 16), got torch.int64 (1, 9)"),
        ([1.0], "must be a tensor (B, T, 16), got a list"),
    ):
        with refused(f"{name}: x {message}"):
            layer(given)
    with refused(f"{name}: the state is not one of this layer: it is a LMState"):
        layer(X, lm()(IDS)[1])
    with refused("valid must be a bool mask (B, T) = (1, 9), a tensor, got a list"):
        layer(X, valid=[True] * 9)


def test_texts_and_tokenizers_of_others_are_named(tmp_path):
    model = lm()
    for call in (miras.read, lambda m, text: miras.generate(m, text, 3)):
        with refused(
            "tokens must be integers, got a text; encode it first: miras.ByteTokenizer().encode(text)"
        ):
            call(model, "text")
    other = byte_tokenizer()
    for call in (miras.Session, lambda m, t: miras.surprise_page(m, "text", t)):
        with refused("a tokenizer of miras is needed, got a "):
            call(model, other)
    other.save_pretrained(tmp_path)  # the way that it says
    assert miras.Session(model, miras.load_tokenizer(tmp_path)).feed("text").loss is not None


@pytest.mark.parametrize("call", [miras.Compiled, lambda m: miras.Session(m, miras.ByteTokenizer())])
def test_a_model_is_an_lm(call: Callable[[Any], Any]):
    with refused("a miras.LM is needed, got a str; load the folder first: miras.load_model('run/model')"):
        call("run/model")
    with refused("a miras.LM is needed, got a MirasForCausalLM; model.lm() is that of a transformers model"):
        call(MirasForCausalLM.of(lm()))
