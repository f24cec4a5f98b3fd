"""A compiled model gives the model's numbers: at chunk and segment ends, with rows at places of their own."""

import pytest
import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

import miras
from miras.nn.lm import LMState
from miras.nn.reading import StreamState

SIZES = {"vocab_size": 11, "hidden_size": 8, "num_heads": 2, "chunk_size": 3}
MODELS = {
    "titans-mac": {"segment_size": 6, "num_persistent": 2, "num_hidden_layers": 1},
    "titans-mag": {"window_size": 5, "num_hidden_layers": 2},
    "titans-mal": {"window_size": 5, "num_hidden_layers": 1},
    "titans-lmm": {"num_hidden_layers": 1},
    "deltanet": {"chunk_size": 1, "num_hidden_layers": 1},
    "retnet": {"num_hidden_layers": 1},
    "gla": {"chunk_size": 1, "num_hidden_layers": 1},
    "mlstm": {"chunk_size": 1, "num_hidden_layers": 1},
    "memora": {"num_hidden_layers": 1},
    "transformer": {"num_hidden_layers": 1},
}


def compiles() -> bool:
    """Whether this machine has a C++ compiler that torch finds."""
    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


needs_compiler = pytest.mark.skipif(not compiles(), reason="torch.compile needs a C++ compiler here")


def prepared(name: str) -> tuple[miras.LM, torch.Tensor, LMState]:
    """A model, tokens (2, 30), and the state of rows that have read 10 and 8 of them."""
    torch.manual_seed(0)
    model = miras.LM(miras.preset(name).changed(SIZES | MODELS[name])).double()
    tokens = torch.randint(11, (2, 30))
    _, state = model(tokens[:, :10], valid=torch.arange(10) < torch.tensor([[10], [8]]))
    return model, tokens, state.detach()


def same(got: LMState, want: LMState) -> None:
    for (name, x), (_, y) in zip(got.tensors().items(), want.tensors().items(), strict=True):
        largest = float(y.abs().max()) if y.numel() else 0.0
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9 * (1 + largest), msg=name)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_step_inside_is_a_call(name):
    model, tokens, state = prepared(name)
    fast = miras.Compiled(model, backend="eager")
    chunk = 0 if name == "transformer" else model.config.memories()[0].stride()
    segment = MODELS[name].get("segment_size", 0)
    for t in range(14):
        at = (10 + t, 8 + t)  # tokens of each row before this one
        ends = chunk > 1 and any((n + 1) % chunk == 0 for n in at)
        begins = segment > 0 and any(n % segment == 0 for n in at)
        x = tokens[:, 10 + t : 11 + t]
        inside = fast._fitting(x, state) is not None
        assert inside == (not ends and not begins)
        logits, after = model(x, state)
        if inside:
            y, layers = model.one_token(x, state.layers, fast._place)
            there = LMState(layers, after.tokens, place=after.place)
            assert torch.equal(y, logits)
            assert all(map(torch.equal, there.tensors().values(), after.tensors().values()))
        state = after


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_one_graph_gives_the_models_numbers(name):
    model, tokens, state = prepared(name)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fast = miras.Compiled(model, backend="eager")  # the graph that is compiled, without a compiler
    quick = state
    for t in range(10, 30):
        want, state = model(tokens[:, t : t + 1], state)
        # As generation hands it on: the state, and the logits beside it.
        y, quick = fast(
            tokens[:, t : t + 1], StreamState(quick.layers, quick.tokens, want[:, -1], place=quick.place)
        )
        torch.testing.assert_close(y, want, rtol=0, atol=1e-9)
    same(quick, state)
    graphs = 2 if name == "transformer" else 1  # another one for a window that grows
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


# torch's own: its compiler imports what it has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@needs_compiler
@torch.no_grad()
def test_compiled_tokens_are_the_models():
    model, tokens, state = prepared("titans-mac")
    fast = miras.Compiled(model)
    y, quick = fast(tokens[:, 10:12], state)  # not a single token: the model itself
    want, state = model(tokens[:, 10:12], state)
    assert torch.equal(y, want)
    kept = quick.map(torch.clone)
    before = quick
    for t in range(12, 30):
        want, state = model(tokens[:, t : t + 1], state)
        y, quick = fast(tokens[:, t : t + 1], quick)
        torch.testing.assert_close(y, want, rtol=0, atol=1e-9)
    same(quick, state)
    same(before, kept)  # a state is a value


def test_what_is_not_one_token_without_a_gradient_goes_to_the_model():
    model, tokens, state = prepared("titans-mag")
    fast = miras.Compiled(model, backend="eager")
    for given in (tokens[:, 10:11], tokens[:, 10:14]):
        logits, _ = fast(given, state)
        assert logits.requires_grad
    with torch.no_grad(), miras.observe() as seen:
        fast(tokens[:, 10:11], state)
    assert seen.layers() == ("layers.0", "layers.1")


@torch.no_grad()
def test_no_compiler_is_said_in_one_line(monkeypatch):
    import torch._dynamo.exc as exc

    model, tokens, state = prepared("titans-lmm")
    fast = miras.Compiled(model)

    def fails(*_: object) -> None:
        raise exc.TorchDynamoException(
            "backend='inductor' raised:\nInvalidCxxCompiler: no compiler\nand a long trace"
        )

    monkeypatch.setattr(fast, "_step", fails)
    monkeypatch.setattr(fast, "_one_graph", lambda _: True)
    with pytest.raises(
        OSError, match="raised: InvalidCxxCompiler: no compiler; set CXX to a C\\+\\+ compiler"
    ):
        fast(tokens[:, 10:11], state)


@torch.no_grad()
def test_what_the_model_refuses_is_refused():
    model, tokens, state = prepared("titans-lmm")
    fast = miras.Compiled(model, backend="eager")
    with pytest.raises(ValueError, match="tokens must be"):
        fast(tokens[:, 10:11].int(), state)
    with pytest.raises(ValueError, match="it has 2 layers, this one 1"):
        fast(tokens[:, 10:11], LMState(state.layers * 2, state.tokens))
