"""A document that begins is free of what was before it, also where that is not a number: values and gradients."""

import pytest
import torch

from miras.core.recurrence import recurrence
from miras.core.rule import init_state
from miras.engine import scan
from miras.nn.lm import LM, LMState
from miras.zoo import preset

SIZES = {"vocab_size": 17, "hidden_size": 8, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 16}
MODELS = {
    "titans-lmm": {"chunk_size": 4},
    "titans-linear": {"chunk_size": 4},
    "titans-mac": {"chunk_size": 4, "segment_size": 8, "num_persistent": 2},
    "titans-mag": {"chunk_size": 4, "window_size": 6, "num_persistent": 2},
    "titans-mal": {"chunk_size": 4, "window_size": 6},
    "moneta": {"chunk_size": 4},
    "swa": {"window_size": 6},
    "transformer": {},
    "deltaproduct": {},
    "mamba2": {},
}
TOKENS = torch.randint(0, 17, (2, 40), generator=torch.Generator().manual_seed(0))


def build(name: str) -> LM:
    torch.manual_seed(0)
    return LM(preset(name).changed(SIZES | MODELS[name]))


def broken(state: LMState) -> LMState:
    """A state whose second row is not a number anywhere."""
    tensors = {name: x.clone() for name, x in state.tensors().items()}
    for x in tensors.values():
        if x.is_floating_point():
            x[1] = torch.nan
    return state.with_tensors(tensors)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("count", "at"), [(1, 0), (5, 0), (19, 0), (19, 7)])
def test_a_reset_clears_what_is_not_a_number(name: str, count: int, at: int):
    model = build(name)
    with torch.no_grad():
        _, state = model(TOKENS[:, :11])
    reset = torch.zeros(2, count, dtype=torch.bool)
    reset[:, at] = True
    found = []
    for start in (state, broken(state)):
        model.zero_grad(set_to_none=True)
        logits, after = model(TOKENS[:, 11 : 11 + count], start, reset=reset)
        with torch.no_grad():
            later, last = model(TOKENS[:, 30:34], after.detach())
            for token in range(34, 36):  # one at a time, as decoding does
                step, last = model(TOKENS[:, token : token + 1], last)
                later = torch.cat([later, step], 1)
        numbers = {"logits": logits[:, at:].detach(), "later": later, **after.detach().tensors()}
        if at == 0:  # a token before it, in the broken document, would have no gradient that is one
            logits.square().sum().backward()
            numbers |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append(numbers)
    differ = [n for n, x in found[0].items() if not torch.equal(x, found[1][n])]
    assert not differ
    assert all(bool(x.isfinite().all()) for x in found[0].values())


@pytest.mark.parametrize("form", [recurrence, scan])
def test_the_definition_and_the_scan_clear_it_too(form):
    model = build("titans-lmm").double()
    memory = model.model.layers[0].mixer.reader
    q = k = v = torch.randn(2, 2, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gates = {n: torch.full((2, 2, 9), 0.1, dtype=torch.float64) for n in ("lr", "momentum", "forget")}
    initial = memory.A0(2)
    state = init_state(memory.rule, initial)
    bad = state.with_tensors(
        {n: x * torch.nan if x.is_floating_point() else x for n, x in state.tensors().items()}
    )
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 3] = True
    reads = [form(memory.rule, s, q, k, v, gates, reset=reset, initial=initial)[0] for s in (state, bad)]
    assert torch.equal(reads[0][:, :, 3:], reads[1][:, :, 3:]) and not reads[1][:, :, :3].isfinite().any()
