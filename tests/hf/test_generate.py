"""`generate` in all its ways, and the cache it goes on with: each prompt as if alone, every token read once."""

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.generation import BaseStreamer

from hf.conftest import Make, text
from miras.hf import MirasCache, MirasForCausalLM
from miras.nn.lm import LMState

CORE = ("titans-mag", "titans-lmm", "transformer", "gated-deltanet", "moneta", "titans-mac")
core = pytest.mark.parametrize("name", CORE)
GREEDY = {"do_sample": False, "max_new_tokens": 6}


@torch.no_grad()
def greedy(model: MirasForCausalLM, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """The most likely continuation of rows of one length, by one call of the whole text for each token."""
    lm = model.lm()
    for _ in range(count):
        tokens = torch.cat([tokens, lm(tokens)[0][:, -1:].argmax(-1)], 1)
    return tokens


@contextmanager
def fed(model: MirasForCausalLM) -> Iterator[list[torch.Tensor]]:
    """The ids of every call inside; by a hook, because `generate` inspects the signature of `forward`."""
    seen: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    yield seen
    hook.remove()


def left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([F.pad(row, (width - row.shape[1], 0), value=255) for row in rows])
    mask = torch.cat([F.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@core
def test_greedy_with_and_without_a_cache(tiny: Make, name):
    model, tokens = tiny(name), text(2, 9)
    wanted = greedy(model, tokens, 6)
    assert torch.equal(model.generate(tokens, **GREEDY), wanted)
    assert torch.equal(model.generate(tokens, **GREEDY, use_cache=False), wanted)
    assert torch.equal(model.generate(tokens, **GREEDY, prefill_chunk_size=4), wanted)


@core
def test_left_padded_prompts_are_each_as_if_alone(tiny: Make, name):
    model, rows = tiny(name), [text(1, n, seed=n) for n in (11, 3, 7)]
    out = model.generate(**left_padded(rows), **GREEDY, output_logits=True, return_dict_in_generate=True)
    for i, row in enumerate(rows):
        alone = model.generate(row, **GREEDY, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(out.sequences[i, 11:], alone.sequences[0, row.shape[1] :])
        for x, y in zip(out.logits, alone.logits, strict=True):
            torch.testing.assert_close(x[i], y[0], atol=1e-5, rtol=1e-5)


@core
def test_beams_are_the_best_sequences(tiny: Make, name):
    model, tokens = tiny(name), text(1, 6)
    # Three beams of two tokens are enough to find the best pair whose first token is among the three best.
    out = model.generate(tokens, num_beams=3, max_new_tokens=2, do_sample=False, num_return_sequences=2)
    with torch.no_grad():
        first = model(tokens).logits[0, -1].log_softmax(-1)
        pairs = []
        for a in first.topk(3).indices:
            after = model(torch.cat([tokens, a.view(1, 1)], 1)).logits[0, -1].log_softmax(-1)
            pairs += [(float(first[a] + p), [int(a), b]) for b, p in enumerate(after)]
    best = sorted(pairs, reverse=True)[:2]
    assert out[:, 6:].tolist() == [pair for _, pair in best]
    longer = {"num_beams": 4, "max_new_tokens": 7, "do_sample": False}
    assert torch.equal(model.generate(tokens, **longer), model.generate(tokens, **longer, use_cache=False))


def test_beams_of_padded_prompts(tiny: Make):
    model, rows = tiny(), [text(1, n, seed=n) for n in (9, 4)]
    out = model.generate(**left_padded(rows), num_beams=3, max_new_tokens=4, do_sample=False)
    for i, row in enumerate(rows):
        alone = model.generate(row, num_beams=3, max_new_tokens=4, do_sample=False)
        assert torch.equal(out[i, 9:], alone[0, row.shape[1] :])


def test_several_samples_of_each_prompt(tiny: Make):
    model, tokens = tiny(), text(2, 7)
    torch.manual_seed(1)
    out = model.generate(tokens, do_sample=True, num_return_sequences=3, max_new_tokens=5)
    assert out.shape == (6, 12) and torch.equal(out[:, :7], tokens.repeat_interleave(3, 0))
    torch.manual_seed(1)
    assert torch.equal(out, model.generate(tokens.repeat_interleave(3, 0), do_sample=True, max_new_tokens=5))
    assert len({tuple(row.tolist()) for row in out}) == 6


def test_embeddings_as_a_prompt(tiny: Make):
    model, tokens = tiny(), text(2, 9)
    out = model.generate(inputs_embeds=model.get_input_embeddings()(tokens), **GREEDY)
    assert torch.equal(out, greedy(model, tokens, 6)[:, 9:])


def test_a_streamer_gets_every_token(tiny: Make):
    class Heard(BaseStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    heard = Heard()
    out = tiny().generate(text(1, 5), **GREEDY, streamer=heard)
    assert heard.ids == out[0].tolist() and heard.ended


@pytest.mark.parametrize(
    ("warm", "new", "chunk"),
    [(3, 9, None), (5, 5, None), (5, 4, None), (8, 4, None), (50, 4, None), (3, 9, 3), (8, 4, 3), (5, 1, 3)],
)
def test_a_warm_cache_is_fed_every_new_token_once(tiny: Make, warm, new, chunk):
    model, old, tokens = tiny(), text(1, warm), text(1, new, seed=1)
    whole = torch.cat([old, tokens], 1)
    wanted = greedy(model, whole, 6)
    for turn in ("new", "whole"):
        cache = MirasCache()
        with torch.no_grad():
            model(old, past_key_values=cache)
        given = cache.begin_turn(tokens) if turn == "new" else {"input_ids": whole}
        with fed(model) as seen:
            out = model.generate(**given, past_key_values=cache, **GREEDY, prefill_chunk_size=chunk)
        assert torch.equal(torch.cat(seen, 1), wanted[:, warm:-1]), turn
        assert torch.equal(out[:, -6:], wanted[:, -6:])
        assert cache.state is not None and cache.state.tokens.tolist() == [warm + new + 5]


@core
def test_turns_read_what_was_made_and_never_drop_a_token(tiny: Make, name):
    model, cache, history = tiny(name), MirasCache(), torch.zeros(1, 0, dtype=torch.long)
    for i, size in enumerate((5, 1, 8, 3)):
        tokens = text(1, size, seed=i)
        history = greedy(model, torch.cat([history, tokens], 1), 6)
        out = model.generate(**cache.begin_turn(tokens), past_key_values=cache, **GREEDY)
        assert torch.equal(out[:, -6:], history[:, -6:])
        assert cache.state is not None and cache.state.tokens.tolist() == [history.shape[1] - 1]
        assert torch.equal(cache.pending, history[:, -1:])


def test_turns_of_padded_rows(tiny: Make):
    model, cache = tiny(), MirasCache()
    turns = [[text(1, n, seed=n) for n in sizes] for sizes in ((4, 9), (6, 2))]
    history = [torch.zeros(1, 0, dtype=torch.long)] * 2
    for rows in turns:
        history = [greedy(model, torch.cat(pair, 1), 6) for pair in zip(history, rows, strict=True)]
        given = cache.begin_turn(**left_padded(rows))
        out = model.generate(**given, past_key_values=cache, **GREEDY)
        assert torch.equal(out[:, -6:], torch.cat([row[:, -6:] for row in history]))


def test_samples_of_a_warm_cache(tiny: Make):
    model, old, new = tiny(), text(1, 7), text(1, 3, seed=1)
    cache = MirasCache()
    with torch.no_grad():
        model(old, past_key_values=cache)
    fork = copy.copy(cache)
    for given, state in ((fork.begin_turn(new), fork), ({"input_ids": torch.cat([old, new], 1)}, cache)):
        torch.manual_seed(2)
        out = model.generate(
            **given, past_key_values=state, do_sample=True, num_return_sequences=3, max_new_tokens=4
        )
        torch.manual_seed(2)
        whole = torch.cat([old, new], 1).expand(3, -1)
        assert torch.equal(out[:, -4:], model.generate(whole, do_sample=True, max_new_tokens=4)[:, -4:])
        assert state.batch_size == 3


def test_a_returned_cache_goes_on(tiny: Make):
    model, tokens, new = tiny(), text(1, 7), text(1, 4, seed=1)
    out = model.generate(tokens, **GREEDY, return_dict_in_generate=True)
    whole = torch.cat([out.sequences, new], 1)
    wanted = greedy(model, whole, 6)
    fork = copy.copy(out.past_key_values)
    assert torch.equal(model.generate(whole, past_key_values=fork, **GREEDY), wanted)
    again = out.past_key_values.begin_turn(new)
    got = model.generate(**again, past_key_values=out.past_key_values, **GREEDY)
    assert torch.equal(got[:, -6:], wanted[:, -6:])


def warm(model: MirasForCausalLM) -> MirasCache:
    cache = MirasCache()
    model.generate(text(1, 5), past_key_values=cache, **GREEDY)
    return cache


def test_what_would_drop_tokens_is_refused(tiny: Make):
    model, new = tiny(), text(1, 14, seed=1)
    for given in ({"input_ids": new}, {"input_ids": new[:, :3]}, {"inputs": new}):
        with pytest.raises(ValueError, match=r"has read 10 tokens, but this prompt does not start with them"):
            model.generate(**given, past_key_values=warm(model), **GREEDY)
    with pytest.raises(ValueError, match="has not been read yet, and these inputs omit it"):
        model(new, past_key_values=warm(model))
    cache = warm(model)
    with torch.no_grad():
        model(cache.begin_turn(new)["input_ids"], past_key_values=cache)  # no mask is a mask of ones
    cache = warm(model)
    cache.pending = None  # left out on purpose
    assert cache.begin_turn(new)["input_ids"].shape == new.shape


def test_a_whole_prompt_is_recognised_after_chunks_and_single_tokens(tiny: Make):
    model, tokens = tiny(), text(2, 12)
    cache = MirasCache()
    with torch.no_grad():
        for a, b in itertools.pairwise((0, 1, 2, 7, 12)):
            model(tokens[:, a:b], past_key_values=cache)
    more = torch.cat([tokens, text(2, 3, seed=1)], 1)
    changed = more.clone()
    changed[1, 4] += 1
    with pytest.raises(ValueError, match="does not start with them"):
        model.generate(changed % 256, past_key_values=cache, **GREEDY)
    assert torch.equal(model.generate(more, past_key_values=cache, **GREEDY), greedy(model, more, 6))


def test_a_cache_that_does_not_hold_what_was_returned_is_closed(tiny: Make):
    model, tokens = tiny(), text(2, 6)
    beams = model.generate(tokens, num_beams=2, max_new_tokens=3, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="used by a beam search"):
        model.generate(**beams.past_key_values.begin_turn(tokens), past_key_values=beams.past_key_values)
    ends = int(greedy(model, tokens, 2)[1, 6])  # the second row ends with its first token
    assert ends not in greedy(model, tokens, 4)[0, 6:]
    cache = MirasCache()
    some = GREEDY | {"max_new_tokens": 4, "eos_token_id": ends, "pad_token_id": 0}
    model.generate(tokens, past_key_values=cache, **some)
    with pytest.raises(ValueError, match="row 1 of this batch ended before the others"):
        model(tokens, past_key_values=cache)


def test_other_caches_are_refused(tiny: Make):
    model, tokens = tiny(), text(1, 4)
    with pytest.raises(ValueError, match="cache_implementation='static' is not supported"):
        model.generate(tokens, **GREEDY, cache_implementation="static")
    with pytest.raises(ValueError, match="must be a MirasCache, got a DynamicCache"):
        model.generate(tokens, **GREEDY, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(tokens, **GREEDY, prompt_lookup_num_tokens=2)


def read(tiny: Make, rows: int = 3) -> tuple[MirasForCausalLM, MirasCache, LMState]:
    model, cache = tiny(), MirasCache()
    with torch.no_grad():
        model(text(rows, 6), past_key_values=cache)
    assert cache.state is not None
    return model, cache, cache.state


def same(a: LMState, b: LMState) -> bool:
    pairs = zip(a.tensors().values(), b.tensors().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_the_cache_moves_whole_rows(tiny: Make):
    _, cache, state = read(tiny)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert cache.state is not None and same(cache.state, state.select([2, 0, 0]))
    cache.batch_select_indices(torch.tensor([False, True, True]))
    assert same(cache.state, state.select([0, 0]))
    cache.batch_repeat_interleave(2)
    assert same(cache.state, state.select([0, 0, 0, 0])) and cache.batch_size == 4 and len(cache) == 2
    cache.offload(0)
    cache.prefetch(0)
    assert same(cache.state, state.select([0, 0, 0, 0]))


def test_the_cache_counts_and_forgets(tiny: Make):
    model, cache = tiny(), MirasCache()
    model(text(3, 6), past_key_values=cache)  # with a graph, which a cache does not keep
    assert (state := cache.state) is not None
    fork = copy.deepcopy(cache)
    assert fork.state is not None and same(fork.state, state)
    assert (
        cache.get_seq_length() == 6 and cache.get_mask_sizes(2, 0) == (8, 0) and cache.get_max_length() == -1
    )
    assert cache.is_initialized and not cache.is_compileable and not cache.is_croppable
    cache.begin_turn(text(3, 2))
    assert cache.get_seq_length() == 0 and cache.state is state
    with pytest.raises(ValueError, match="cannot undo its last 2 tokens"):
        cache.crop(-2)
    cache.reset()
    assert cache.state is None and cache.batch_size == -1 and len(cache) == 0 and not cache.is_initialized
    with torch.no_grad():
        model(text(3, 6), past_key_values=cache)
    assert cache.state is not None and same(cache.state, state)


def test_a_fork_does_not_touch_its_parent(tiny: Make):
    model, cache, state = read(tiny, rows=1)
    before = {n: x.clone() for n, x in state.tensors().items()}
    fork = copy.copy(cache)
    model.generate(**fork.begin_turn(text(1, 9, seed=3)), past_key_values=fork, **GREEDY)
    assert cache.state is state and cache.pending is None and cache.get_seq_length() == 6
    assert all(torch.equal(x, before[n]) for n, x in state.tensors().items())


def test_rows_that_do_not_fit_are_refused(tiny: Make):
    model, cache, _ = read(tiny, rows=2)
    with pytest.raises(ValueError, match="the state has 2 rows"):
        model(text(3, 2), past_key_values=cache)
    model.generate(**cache.begin_turn(text(2, 2)), past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match="the cache holds 2 rows, got 1"):
        cache.begin_turn(text(1, 2))
