"""What is generated is what the model says, token by token, at a constant cost."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from miras.nn.lm import LM
from miras.stream import generate, read
from miras.stream.generation import sample

Make = Callable[..., LM]
Text = NDArray[np.uint8]


@pytest.mark.parametrize("name", ["titans-mag", "titans-lmm", "transformer"])
def test_greedy_generation_is_the_argmax_of_one_call_on_it_all(tiny: Make, text: Text, name: str):
    model = tiny(name)
    made = list(generate(model, text[:37], 30, temperature=0))
    assert len(made) == 30
    ids = torch.tensor([[*text[:37].tolist(), *made]])
    with torch.no_grad():
        logits, _ = model(ids)
    assert made == logits[0, 36:-1].argmax(-1).tolist()


def test_a_token_costs_one_call_on_one_token(tiny: Make, text: Text, monkeypatch: pytest.MonkeyPatch):
    model = tiny()
    lengths: list[int] = []
    forward = model.forward
    run = generate(model, text[:100], 12)
    monkeypatch.setattr(
        model, "forward", lambda ids, *a, **k: lengths.append(ids.shape[1]) or forward(ids, *a, **k)
    )
    sizes = {run.state.nbytes() for _ in run}
    assert lengths == [1] * 12 and len(sizes) == 1
    assert not any(x.requires_grad for x in run.state.tensors().values())


def test_compiled_generation_reads_with_the_step(tiny: Make, text: Text, monkeypatch: pytest.MonkeyPatch):
    # tests/nn/test_compiled.py compiles; here the step stands in for its graph.
    model, steps = tiny(), [0]

    def counted(step: Callable[..., object], **_: object) -> Callable[..., object]:
        def run(*given: object) -> object:
            steps[0] += 1
            return step(*given)

        return run

    monkeypatch.setattr(torch, "compile", counted)
    made = list(generate(model, text[:37], 30, temperature=0, compiled=True))
    assert made == list(generate(model, text[:37], 30, temperature=0))
    assert 15 < steps[0] < 30  # the others end a chunk


def test_the_state_has_read_what_was_handed_out(tiny: Make, text: Text):
    model = tiny()
    whole = list(generate(model, text[:20], 16, temperature=0))
    run = generate(model, text[:20], 16, temperature=0)
    first = [next(run) for _ in range(7)]
    assert run.state.tokens.tolist() == [27]
    rest = list(generate(model, text[:0], 9, temperature=0, state=run.state))
    assert first + rest == whole
    behind = read(model, text[:12]).state
    assert list(generate(model, text[12:20], 16, temperature=0, state=behind)) == whole


def test_a_seed_decides_and_nothing_else(tiny: Make, text: Text):
    model = tiny()
    before = torch.get_rng_state()
    first = list(generate(model, text[:20], 30, seed=5))
    torch.manual_seed(1234)
    after = torch.get_rng_state()
    assert list(generate(model, text[:20], 30, seed=5)) == first
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(before, after)
    assert list(generate(model, text[:20], 30, seed=6)) != first


def drawn(logits: torch.Tensor, temperature: float, top_p: float, n: int = 4000) -> Counter[int]:
    random = torch.Generator().manual_seed(0)
    return Counter(sample(logits, temperature, top_p, random) for _ in range(n))


@pytest.mark.parametrize(
    ("top_p", "allowed"),
    [(1.0, {0, 1, 2, 3}), (0.96, {0, 1, 2, 3}), (0.85, {1, 2, 3}), (0.5, {3}), (1e-9, {3})],
)
def test_top_p_draws_from_the_smallest_sufficient_set(top_p: float, allowed: set[int]):
    share = torch.tensor([0.05, 0.15, 0.25, 0.55])
    counts = drawn(share.log(), 1.0, top_p)
    assert set(counts) == allowed
    kept = share[sorted(allowed)] / share[sorted(allowed)].sum()
    found = torch.tensor([counts[i] for i in sorted(allowed)]) / counts.total()
    assert (found - kept).abs().max() < 0.03


def test_temperature_sharpens_and_flattens():
    logits = torch.tensor([0.0, 1.0])
    for temperature in (0.5, 2.0):
        wanted = (logits / temperature).softmax(-1)[1]
        assert abs(drawn(logits, temperature, 1.0)[1] / 4000 - wanted) < 0.03
    assert set(drawn(logits, 0.0, 1.0, 20)) == {1}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0"),
        ({"num_tokens": -1}, "num_tokens must not be negative"),
        ({"prompt": np.zeros(0, dtype=np.int64)}, "the prompt is empty"),
        ({"prompt": np.array([3, 256])}, "token id 256 is outside"),
        ({"prompt": np.zeros((2, 3), dtype=np.int64)}, "one row of tokens, got 2"),
    ],
)
def test_values_without_sense_are_refused_at_the_call(tiny: Make, options: dict[str, object], reason: str):
    with pytest.raises(ValueError, match=reason):
        generate(tiny(), **({"prompt": np.array([1]), "num_tokens": 1} | options))  # pyright: ignore


def test_nothing_is_generated_when_nothing_is_asked_for(tiny: Make, text: Text):
    run = generate(tiny(), text[:5], 0)
    assert list(run) == [] and run.state.tokens.tolist() == [5]
