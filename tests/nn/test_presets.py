"""What every named model keeps, at small sizes: streams, masks, causality, gradients, files, types, cost."""

import itertools
import json
import math
import random

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import miras.engine.exact
import miras.nn.memory
from miras.core.retention import ProximalElasticNet
from miras.core.rule import State, close_chunk
from miras.layers.attention import Window
from miras.nn.config import ModelConfig
from miras.nn.gates import Gates, Precise
from miras.nn.lm import LM
from miras.nn.memory import MemoryState
from miras.zoo import override, preset, presets

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "chunk_size": 4,
    "window_size": 8,
    "segment_size": 8,
    "num_persistent": 3,
}
YAAD = preset("yaad").memories()[0]
CASES = {
    # A rule of the single token is what its paper says; the others get more than a few chunks.
    name: SIZES | {"chunk_size": min(SIZES["chunk_size"], preset(name).stride())}
    for name in presets()
} | {
    "transformer-full": SIZES | {"window_size": None},
    "titans-mac-pooled": SIZES | {"pool": 4},
    "titans-mac-yaad": SIZES | {"rule": YAAD.rule, "gates": YAAD.gates, "chunk_size": 4},
}


def named(name):
    """The preset that a case is of."""
    return next(p for p in sorted(presets(), key=len, reverse=True) if name.startswith(p))


def config(name, **changed):
    return preset(named(name)).changed(CASES[name] | changed)


MEMORIES = tuple(name for name in CASES if config(name).memories())


def build(name, **changed):
    """The model with livelier gates than at the start of training: all over their ranges."""
    torch.manual_seed(0)
    model = LM(config(name, **changed))
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, Gates):
                part.reset_parameters(0.3)
    return model


def text(rows, T, seed=0):
    return torch.randint(256, (rows, T), generator=torch.Generator().manual_seed(seed))


def mask(share, *shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def memories(state):
    """The memories' own states in a model's state."""
    found = []
    for part in state.layers:
        part = part if isinstance(part, MemoryState | Window) else part.memory
        found += [part.memory] if isinstance(part, MemoryState) else []
    return found


def near(x, y, tolerance, what="logits"):
    """Two tensors agree to `tolerance` of the larger of 1 and their largest entry."""
    assert x.shape == y.shape and x.dtype == y.dtype, what
    if x.numel():
        assert x.isfinite().all(), what
        gap, size = (x - y).abs().max().item(), max(1.0, y.abs().max().item())
        assert gap <= tolerance * size, f"{what}: off by {gap:.3g}, largest entry {size:.3g}"


def close(a, b, tolerance):
    """Logits and every tensor of the state are the same numbers."""
    near(a[0], b[0], tolerance)
    for (name, x), y in zip(a[1].tensors().items(), b[1].tensors().values(), strict=True):
        near(x, y, tolerance, name)


def in_pieces(model, tokens, cuts, state=None, **masks):
    logits = []
    for a, b in itertools.pairwise([0, *cuts, tokens.shape[1]]):
        y, state = model(tokens[:, a:b], state, **{n: m[:, a:b] for n, m in masks.items()})
        logits.append(y)
    return torch.cat(logits, 1), state


both = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["fp32", "fp64"]
)
every = pytest.mark.parametrize("name", CASES)


@every
@both
@torch.no_grad()
def test_pieces_are_the_whole(name, dtype, tolerance):
    model, rng = build(name).to(dtype), random.Random(0)
    tokens = text(2, 53)
    reset = mask(0.05, 2, 53)
    for masks in ({}, {"reset": reset, "write": mask(0.8, 2, 53, seed=1)}):
        whole = model(tokens, **masks)
        for count in (1, 4, 9):
            cuts = sorted(rng.sample(range(1, 53), count))
            close(in_pieces(model, tokens, cuts, **masks), whole, tolerance)


@every
@both
@torch.no_grad()
def test_prefill_then_one_token_at_a_time(name, dtype, tolerance):
    model = build(name).to(dtype)
    tokens = text(2, 33)
    for prefill in (0, 1, 10, 16):
        cuts = range(max(prefill, 1), 33)
        close(in_pieces(model, tokens, cuts), model(tokens), tolerance)


def compact(state, row):
    """A row's tensors; from windows of full attention, only the places that hold a token."""
    found = {}
    for name, x in state.select([row]).tensors().items():
        found[name] = x
    for name in [n for n in found if n.endswith("position")]:
        stem, there = name.removesuffix("position"), found[name][0] >= 0
        for part in ("k", "v"):
            found[stem + part] = found[stem + part][:, :, there]
        found[name] = found[name][:, there]
    return found


@every
@both
@pytest.mark.parametrize("where", ["left", "right", "holes"])
@torch.no_grad()
def test_padded_rows_are_each_row_alone(name, dtype, tolerance, where):
    model, T = build(name).to(dtype), 30
    tokens, length = text(4, T), torch.tensor([30, 17, 6, 0])
    at = torch.arange(T)
    valid = {
        "left": at >= T - length[:, None],
        "right": at < length[:, None],
        "holes": mask(0.6, 4, T) & (length > 0)[:, None],
    }[where]
    logits, state = model(tokens, valid=valid)
    assert not logits[~valid].any()
    # ... and the state is good to go on with, again padded.
    more, also = text(4, 9, seed=5), mask(0.7, 4, 9, seed=6)
    later, state = model(more, state, valid=also)
    for b in range(4):
        alone, own = None, None
        if valid[b].any():
            alone, own = model(tokens[b : b + 1, valid[b]])
            near(logits[b : b + 1, valid[b]], alone, tolerance)
        alone, own = model(more[b : b + 1, also[b]], own)
        near(later[b : b + 1, also[b]], alone, tolerance)
        mine, expected = compact(state, b), compact(own, 0)
        for n in expected:
            near(mine[n], expected[n], tolerance, n)


@every
@both
@torch.no_grad()
def test_packed_documents_are_each_document_alone(name, dtype, tolerance):
    model, lengths = build(name).to(dtype), ([7, 1, 12, 20], [20, 3, 2, 15])
    tokens, reset = text(2, 40), torch.zeros(2, 40, dtype=torch.bool)
    spans = []
    for b, row in enumerate(lengths):
        for start, n in zip(itertools.accumulate([0, *row]), row, strict=False):
            reset[b, start] = True
            spans.append((b, slice(start, start + n)))
    for warm in (None, model(text(2, 6, seed=3))[1]):  # what was read before must not matter either
        logits, state = model(tokens, warm, reset=reset)
        for b, span in spans:
            alone, own = model(tokens[b : b + 1, span])
            near(logits[b : b + 1, span], alone, tolerance)
            if span.stop == 40:
                more = text(1, 5, seed=4)
                later = [model(more, s)[0] for s in (state.select([b]), own)]
                near(*later, tolerance)


@pytest.mark.parametrize("name", MEMORIES)
@torch.no_grad()
def test_reading_without_writing(name):
    model, off = build(name), torch.zeros(2, 14, dtype=torch.bool)
    for read in (8, 10):  # on a chunk's edge, and in mid-chunk
        _, warm = model(text(2, read))
        logits, after = model(text(2, 14, seed=1), warm, write=off)
        written, _ = model(text(2, 14, seed=1), warm)
        assert (logits - written).abs().max() > 1e-3
        assert memories(warm)
        for old, new in zip(memories(warm), memories(after), strict=True):
            assert isinstance(new, State)
            assert new.phase.tolist() == [(read + 14) % model.config.memories()[0].rule.chunk_size] * 2
            for part in ("A", "S", "anchor"):
                # A chunk that was open when writing ended closes at the weights of then.
                expected = getattr(
                    close_chunk(model.config.memories()[0].rule, old) if part == "anchor" else old, part
                )
                for n, x in getattr(new, part).items():
                    assert torch.equal(x, expected[n]), (part, n)
        for n, x in after.tensors().items():
            if x.numel() and ("tails" in n or n.split(".")[-1] in ("k", "v", "position", "next")):
                assert not torch.equal(x, warm.tensors()[n]), n


@every
@pytest.mark.parametrize("at", [5, 6, 11])
@torch.no_grad()
def test_no_token_sees_a_later_one(name, at):
    model = build(name)
    tokens = text(2, 23)
    changed = tokens.clone()
    changed[:, at] = (changed[:, at] + 1 + text(2, 1, seed=9)[:, 0] % 255) % 256
    before, _ = model(tokens)
    after, _ = model(changed)
    assert torch.equal(before[:, :at], after[:, :at])
    # Two layers of window 8 carry a token 14 further.
    assert ((before - after)[:, at : at + 8].abs().amax(-1) > 1e-6).all()


@every
@torch.no_grad()
def test_rows_do_not_see_each_other(name):
    model = build(name)
    tokens, other = text(3, 23), text(3, 23, seed=1)
    other[1] = tokens[1]
    (one, kept), (two, kept_too) = model(tokens), model(other)
    assert torch.equal(one[1], two[1]) and not torch.equal(one[0], two[0])
    for n, x in kept.select([1]).tensors().items():
        assert torch.equal(x, kept_too.select([1]).tensors()[n]), n
    alone, _ = model(tokens[1:2])
    near(one[1:2], alone, 1e-5)


@every
def test_every_parameter_learns(name):
    # Two documents of 128 bytes, every byte once.
    model = build(name)
    tokens = torch.randperm(256, generator=torch.Generator().manual_seed(0))[None]
    reset = torch.zeros(1, 256, dtype=torch.bool)
    reset[0, 128] = True
    logits, _ = model(tokens, reset=reset)
    cross_entropy(logits[0, :-1], tokens[0, 1:]).backward()
    for n, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), n
        by_row = p.grad.flatten(1).abs().amax(1) if p.dim() > 1 else p.grad.abs()
        last = tokens[0, -1]  # read by no loss
        if n.endswith("embed_tokens.weight"):
            by_row = torch.cat([by_row[:last], by_row[last + 1 :]])
        assert (by_row > 0).all(), n


@every
def test_config_through_json(name):
    for changed in (
        {},
        {"tie_word_embeddings": True, "head_dim": 10, "intermediate_size": 48, "conv_size": 0},
    ):
        made = config(name, **changed)
        assert ModelConfig.from_dict(made.to_dict()) == made
        assert ModelConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    plain = preset(named(name))
    assert ModelConfig.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain
    assert override(plain) == plain


@every
@torch.no_grad()
def test_bytes_of_the_state(name):
    model = build(name)
    state, sizes = model.initial(1), []
    for T in (1, 6, 30):
        _, state = model(text(1, T), state)
        sizes.append(state.nbytes())
    if name == "transformer-full":
        token = 2 * (2 * 32 * 4 + 8)  # per layer a key and a value of 32 fp32 numbers and a position
        assert sizes == [model.state_bytes() + token * t for t in (1, 7, 37)]
    else:
        assert sizes == [model.state_bytes()] * 3


@pytest.mark.parametrize("name", MEMORIES)
@torch.no_grad()
def test_gates_keep_their_ranges(name):
    model = build(name)
    rule = model.config.memories()[0].rule
    for part in model.modules():
        if not isinstance(part, Gates):
            continue
        x = 30 * torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
        gates, made = part(x), {o.name: o for o in part.made}
        assert {n.split(".")[0] for n in gates} == set(rule.gates())
        momentum = max([0.0, *(o.gate.largest(2) for n, o in made.items() if n.startswith("momentum"))])
        assert momentum < 1
        for n, value in gates.items():
            _, gate, width, channels = made[n]
            tail = {None: (width,) if width > 1 else (), "input": (width, 1), "output": (1, width)}[channels]
            assert value.shape == (2, 2, 64, *tail) and value.dtype == torch.float32
            top = gate.largest(2) * (1 - momentum if n.split(".")[0] == "lr" else 1)
            assert value.min() >= 0 and value.max() <= top * (1 + 1e-6), n
            assert not n.startswith("forget") or top <= 1
            if gate.source == "token" and top < math.inf:
                # All of it is used, but for what GLA's root and Mamba's steps leave to very large inputs.
                high = 0.99 if gate.link in ("sigmoid", "hard") else 0.8
                assert value.min() < 0.01 * top and value.max() > high * top, n
            if gate.source == "fixed":
                assert (value == value[:1, :, :1]).all()


@every
@torch.no_grad()
def test_tied_embeddings_are_one_tensor(name):
    model, plain = build(name, tie_word_embeddings=True), build(name)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = model.to(dtype)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert plain.lm_head.weight is not plain.model.embed_tokens.weight
    assert plain.num_parameters() - model.num_parameters() == 256 * 32
    assert model(text(1, 5))[0].isfinite().all()


@every
@torch.no_grad()
def test_bfloat16(name):
    model, exact = build(name).to(torch.bfloat16), build(name)
    precise = [part for part in model.modules() if isinstance(part, Precise)]
    assert bool(precise) == (name in MEMORIES)
    kept = {id(p) for part in precise for p in part.parameters()}
    for n, p in model.named_parameters():
        assert p.dtype == (torch.float32 if id(p) in kept else torch.bfloat16), n
    logits, state = model(text(2, 25))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    for memory in memories(state):
        assert {x.dtype for x in memory.tensors().values()} == {torch.float32, torch.int64}
    more, state = model(text(2, 6, seed=1), state)
    assert more.isfinite().all()
    expected, _ = exact(text(2, 25))
    assert (logits - expected).abs().mean() < 0.1 * expected.abs().mean()


@every
def test_autocast(name, monkeypatch):
    model, seen = build(name), []
    run = miras.nn.memory.run

    def spy(rule, state, call, plan):
        seen.extend(x.dtype for x in (call.q, call.k, call.v, *call.gates.values(), *state.A.values()))
        assert not torch.is_autocast_enabled("cpu")
        return run(rule, state, call, plan)

    monkeypatch.setattr(miras.nn.memory, "run", spy)
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = model(text(2, 25))
        more, _ = model(text(2, 6, seed=1), state)
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all() and more.isfinite().all()
    assert set(seen) == ({torch.float32} if name in MEMORIES else set())
    for memory in memories(state):
        assert {x.dtype for x in memory.tensors().values()} == {torch.float32, torch.int64}
    (logits.float().square().mean() + more.float().square().mean()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every
@torch.no_grad()
def test_flops_per_token(name):
    # Counted: matrix products (mm, bmm, addmm, baddbmm). Not counted, here or by the formula: norms, links of gates,
    # masks, convolutions and whatever else is elementwise. The formula leaves out the cache of full
    # attention, so the T keys that every token of a whole call meets are added here.
    T = 256  # 8 windows, 16 chunks
    sizes = {"hidden_size": 64, "chunk_size": 16, "segment_size": 32}
    sizes["window_size"] = None if name.endswith("-full") else 32
    model = build(name, **sizes).requires_grad_(False)  # the counter's module hooks need that under no_grad
    # The counter does not know the product that adds in place.
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * a.numel() * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(text(1, T))
    counted = counter.get_total_flops() / T
    formula = model.flops_per_token()
    if name.endswith("-full"):
        formula += 2 * 4 * 64 * T
    assert formula == pytest.approx(counted, rel=0.15)


@every
@pytest.mark.parametrize("rows", [1, 2])
def test_a_state_is_a_value(name, rows, monkeypatch):
    # It shares nothing with the model, which an optimizer changes, and holds no more than it reports.
    monkeypatch.setattr(miras.engine.exact, "BLOCK", 8)
    model = build(name)
    learned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    states = [model.initial(rows)]
    for T, grad, masks in (
        (1, False, {}),
        (2, True, {}),
        (16, False, {}),
        (16, True, {}),
        (5, False, {"reset": mask(0.5, rows, 5)}),
    ):
        with torch.set_grad_enabled(grad):
            states.append(model(text(rows, T), states[-1].detach(), **masks)[1])
    for number, state in enumerate(states):
        for n, x in state.tensors().items():
            storage = x.untyped_storage()
            assert storage.nbytes() == x.nbytes, (number, n)
            assert not x.numel() or storage.data_ptr() not in learned, (number, n)


def test_memory_as_context_token_by_token_is_the_same_with_gradients():
    # Keys and values come from reads of the very weights that inner gradients are taken at.
    model, tokens = build("titans-mac", retention=ProximalElasticNet(0.02)).double(), text(2, 13)
    with torch.no_grad():
        expected = model(tokens)
    close(model(tokens), expected, 1e-12)
