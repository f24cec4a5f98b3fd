"""Thousands of tokens through memories at their default gates, untrained and trained, and at their extremes.

At the extremes every write is the largest step and nothing is ever forgotten.
A matrix under the step bound contracts towards what it is asked to hold, so its size is bounded. The
normalised MLP never sees its own scale, and its gradient falls with it: without forgetting it grows for ever,
more and more slowly, which is why it is only asked to stay finite and slow.
"""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from miras.core.algorithm import GradientDescent
from miras.core.bias import L2, Dot
from miras.core.memory import MLP, Matrix
from miras.core.recurrence import norm
from miras.core.rule import Rule, anchor_weights, base_of, init_state
from miras.data.novel import load_novel
from miras.engine import scan
from miras.nn.gates import Gate, Gates
from miras.nn.lm import LM
from miras.nn.memory import MemoryLayer, MemoryReader, MemoryState
from miras.train.loop import Run
from miras.train.options import Settings
from miras.train.tasks import TextTask
from miras.zoo import preset, presets

T, PIECE, HIDDEN = 4096, 512, 32
EXTREMES = {"lr": 30.0, "momentum": 30.0, "forget": -120.0, "delta": 3.0}


def push(model):
    """Every learned gate to its end, whatever is read: lr and momentum to the largest, forget to 0."""
    for part in model.modules():
        if isinstance(part, Gates):
            ends = [EXTREMES[o.name.split(".")[0]] for o in part.made if o.gate.source == "token"]
            part.reset_parameters(0.0)
            with torch.no_grad():
                for o, bias in biases(part):
                    bias.fill_(EXTREMES[o.name.split(".")[0]])
            assert len(ends) == len(list(biases(part))) + sum(o.gate.follows is not None for o in part.made)
    return model


def biases(part):
    """Every gate that has a projection, and its biases."""
    if part.proj is not None:
        sizes = [part.num_heads * o.width for o in part.by_head]
        yield from zip(part.by_head, part.proj.bias.split(sizes), strict=True)
    for o, own in zip(part.by_channel, part.channels, strict=True):
        yield o, own.up.bias


def tiny(name, **overrides):
    """A preset's model, as small as it can be and still be whole."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_heads": 2}
    return LM(preset(name).changed(sizes | {"window_size": 8, "num_persistent": 3} | overrides))


def streams(length=T):
    """Bytes (3, length): one repeated, random ones, and a novel's."""
    g = torch.Generator().manual_seed(0)
    novel = torch.tensor(list(load_novel().train[:length]))
    return torch.stack([torch.full((length,), 101), torch.randint(256, (length,), generator=g), novel])


def sizes(model, state):
    """|W| of every memory in a state at its last chunk's start, (memories, rows, heads)."""
    parts = [state] if isinstance(state, MemoryState) else list(state.layers)
    parts = [part if isinstance(part, MemoryState) else getattr(part, "memory", None) for part in parts]
    readers = [module for module in model.modules() if isinstance(module, MemoryReader)]
    found = []
    for reader, part in zip(readers, [part for part in parts if part is not None], strict=True):
        anchor, rule = part.memory.anchor, reader.rule
        base = base_of(rule, reader.A0(len(part.memory.phase)))
        found.append(norm(anchor_weights(rule, anchor, base))[None])
    return torch.cat(found) if found else torch.zeros(0)


@torch.no_grad()
def read(model, x):
    """|W| after every piece, (pieces, memories, rows, heads); outputs and states must be finite."""
    state, found = None, []
    for at in range(0, x.shape[1], PIECE):
        y, state = model(x[:, at : at + PIECE], state)
        parts = {"output": y, **state.tensors()}
        bad = [name for name, part in parts.items() if not part.isfinite().all()]
        assert not bad, f"not finite within tokens {at} to {at + PIECE}: {bad}"
        found.append(sizes(model, state))
    return torch.stack(found)


def hardly_grows(found, factor):
    """Over the last half, |W| grows by less than `factor`."""
    half = found[: len(found) // 2].amax(0)
    growth = (found[len(found) // 2 :].amax(0) / half).max().item()
    assert growth < factor, f"|W| grew by {growth:.3g} over the last half, to {found[-1].max():.3g}"


def train(model, steps=200):
    """The model after steps on two lanes of the novel, at least a chunk at a time, states carried."""
    chunk_size = model.config.memories()[0].stride()
    tokens = np.frombuffer(load_novel().train, np.uint8)
    task = TextTask(tokens, batch_size=2, seq_len=max(32, chunk_size), align=chunk_size, seed=0)
    losses = [metrics["loss"] for metrics in Run(model, task, Settings(steps=steps)).until(steps)]
    assert losses[-1] < losses[0] - 1  # it has learned something, so its gates have moved
    return model


def stays_finite(name, chunk_size, length):
    """A preset with its own gates reads `length` tokens of each stream, untrained and trained."""
    model, x = tiny(name, chunk_size=chunk_size), streams(length)
    read(model, x)
    read(train(model), x)


RULES = {name: preset(name).memories()[0].rule for name in presets() if preset(name).memories()}
CHUNKED = [name for name, rule in RULES.items() if rule.chunk_size > 1]
EXACT = [name for name, rule in RULES.items() if rule.chunk_size == 1]


# Exact recurrences that correct an error must be bounded where they are given chunks; Hebbian ones grow in no way.
CORRECTING = [name for name in EXACT if isinstance(RULES[name].bias, L2)]


ALIKE = [
    name
    for i, (name, rule) in enumerate(RULES.items())
    if name != "titans-mac" and rule in list(RULES.values())[:i]
]
"""Presets whose memory has the rule of an earlier one, in another place of the model."""


@pytest.mark.parametrize("chunk_size", [16, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in CHUNKED + CORRECTING],
)
def test_default_gates(name, chunk_size):
    stays_finite(name, chunk_size, 2000)


@pytest.mark.parametrize("name", EXACT)
def test_default_gates_of_the_exact_recurrences(name):
    stays_finite(name, 1, 2000)


@pytest.mark.parametrize("name", presets())
def test_presets_at_the_extremes(name):
    config = preset(name)
    model = tiny(name)
    if not any(isinstance(part, Gates) for part in model.modules()):
        return
    found = read(push(model), streams(2000))
    memory = config.memories()[0]
    if memory.gates.get("forget", Gate()).follows or memory.features.keys == "forget":
        return  # what it forgets is tied to what it writes: both ends are an empty memory
    # What is only ever added grows with the number of tokens; a reflection (lr = 2) keeps all that it is given.
    adds = isinstance(memory.rule.bias, Dot) or memory.rule.algorithm.steps > 1
    hardly_grows(found, 2.1 if adds else 1.5)


@pytest.mark.parametrize("chunk_size", [1, 4, 16, 64])
@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
@pytest.mark.parametrize("memory", [Matrix(), MLP()], ids=["matrix", "mlp"])
def test_layers(memory, momentum, chunk_size):
    torch.manual_seed(0)
    algorithm = GradientDescent(momentum=momentum, step_bound=10.0 if momentum else 1.0)
    rule = Rule(memory, algorithm=algorithm, chunk_size=chunk_size)
    layer = push(MemoryLayer(HIDDEN, 2, rule))
    found = read(layer, torch.randn(256, HIDDEN)[streams()])
    hardly_grows(found, 1.5)
    # Twice what was measured.
    assert found.max() < (20 if isinstance(memory, Matrix) else 100)


WIDTH, LONG = 16, 2048


def keys(kind, g):
    """(1, 1, LONG, WIDTH) unit keys: one, two in turn for stretches, random, or around one direction."""
    own = torch.randn(LONG, WIDTH, generator=g, dtype=torch.float64)
    if kind == "one":
        own = own[:1].expand(LONG, WIDTH)
    elif kind == "stretches":
        own = own[:2][(torch.arange(LONG) % 32 >= 8).long()]
    elif kind == "bundle":
        own = own + 3 * torch.randn(WIDTH, generator=g, dtype=torch.float64)
    return normalize(own, dim=-1)[None, None]


def steps(kind, g):
    """`lr` (1, 1, LONG): always the largest, random, or random among 0 and the largest."""
    draw = torch.rand(1, 1, LONG, generator=g, dtype=torch.float64)
    return {"full": torch.ones_like(draw), "random": draw, "switched": (draw < 0.5).double()}[kind]


def grown(rule, k, gates, g):
    """|W| of a matrix (pieces, 1, 1) that reads the keys and random values of norm 4."""
    v = torch.randn(1, 1, LONG, WIDTH, generator=g, dtype=torch.float64)
    state = init_state(rule, {"w": torch.randn(1, 1, WIDTH, WIDTH, generator=g, dtype=torch.float64) / 4})
    found = []
    for at in range(0, LONG, PIECE):
        now = slice(at, at + PIECE)
        parts = (x[:, :, now] for x in (k, k, v))
        _, state = scan(rule, state, *parts, {n: x[:, :, now] for n, x in gates.items()})
        found.append(norm(state.A))
    return torch.stack(found)


@pytest.mark.parametrize("chunk_size", [1, 4, 16, 64])
@pytest.mark.parametrize("step", ["full", "random", "switched"])
@pytest.mark.parametrize("key", ["one", "stretches", "random", "bundle"])
@torch.no_grad()
def test_bounded_steps_of_a_matrix(key, step, chunk_size):
    # lr up to 1, nothing forgotten: the bound is all that holds the weights.
    g = torch.Generator().manual_seed(0)
    rule = Rule(algorithm=GradientDescent(step_bound=1.0), chunk_size=chunk_size)
    gates = {"lr": steps(step, g), "forget": torch.zeros(1, 1, LONG, dtype=torch.float64)}
    found = grown(rule, keys(key, g), gates, g)
    hardly_grows(found, 1.5)
    assert found.max() < 40


TOP = 0.9
"""The largest momentum; the largest lr is 1 - TOP."""


def pushes(kind, chunk_size, g):
    """`lr` and `momentum` (1, 1, LONG), and the chosen ends that could add up to more than one full step."""
    at, draw = torch.arange(LONG), torch.rand(2, LONG, generator=g, dtype=torch.float64)
    first = at % chunk_size == 0
    lr, momentum = {
        "full": (draw[0] >= 0, draw[0] >= 0),
        "random": (draw[0], draw[1]),
        "switched": (draw[0] < 0.5, draw[1] < 0.8),
        "written and carried": (first, ~first),  # at momentum 0, then carried through the whole chunk
        "carried and written": (draw[0] >= 0, ~first),
        "late": (at % chunk_size == chunk_size - 1, draw[0] >= 0),
        "bursts": (at % 32 < 8, draw[0] >= 0),
    }[kind]
    return {"lr": (1 - TOP) * lr.double()[None, None], "momentum": TOP * momentum.double()[None, None]}


PUSHES = ("full", "random", "switched", "written and carried", "carried and written", "late", "bursts")


@pytest.mark.parametrize("chunk_size", [4, 16, 64])
@pytest.mark.parametrize("push", PUSHES)
@pytest.mark.parametrize("key", ["one", "stretches", "random"])
@torch.no_grad()
def test_bounded_steps_of_a_matrix_with_momentum(key, push, chunk_size):
    g = torch.Generator().manual_seed(0)
    algorithm = GradientDescent(momentum=True, step_bound=1 / (1 - TOP))
    gates = pushes(push, chunk_size, g) | {"forget": torch.zeros(1, 1, LONG, dtype=torch.float64)}
    found = grown(Rule(algorithm=algorithm, chunk_size=chunk_size), keys(key, g), gates, g)
    hardly_grows(found, 1.5)
    assert found.max() < 40


@pytest.mark.parametrize("chunk_size", [4, 16, 64])
@torch.no_grad()
def test_without_the_bound_one_key_is_too_much(chunk_size):
    # What the bound is for: a chunk of equal keys takes chunk_size full steps at once.
    rule = Rule(chunk_size=chunk_size)
    g = torch.Generator().manual_seed(0)
    k, v = keys("one", g)[:, :, :PIECE], torch.randn(1, 1, PIECE, WIDTH, generator=g, dtype=torch.float64)
    gates = {"lr": torch.ones(1, 1, PIECE, dtype=torch.float64), "forget": torch.zeros(1, 1, PIECE).double()}
    _, state = scan(rule, init_state(rule, {"w": torch.zeros(1, 1, WIDTH, WIDTH).double()}), k, k, v, gates)
    assert norm(state.A).item() > 1e6
