"""Behind the calls of `transformers` is `miras.LM`: same numbers, streams, causality, gradients, masks, losses."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from hf.conftest import Make, build, config, text
from miras.hf import MirasCache, MirasConfig, MirasForCausalLM, MirasForSequenceClassification, MirasModel
from miras.nn.lm import LM
from miras.zoo import presets

every = pytest.mark.parametrize("name", presets())


@every
@torch.no_grad()
def test_logits_are_those_of_the_lm_to_the_bit(name):
    lm = build(name)
    model = MirasForCausalLM.of(lm)
    tokens = text(2, 19)
    assert torch.equal(model(tokens).logits, lm(tokens)[0])
    assert torch.equal(model.lm()(tokens)[0], lm(tokens)[0])
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == {
        n: p.data_ptr() for n, p in lm.named_parameters()
    }


@every
@torch.no_grad()
def test_a_cut_stream_is_the_whole(tiny: Make, name):
    model = tiny(name).double()
    tokens = text(2, 21)
    whole, cache, parts = model(tokens).logits, MirasCache(), []
    for a, b in ((0, 1), (1, 6), (6, 8), (8, 19), (19, 21)):
        parts.append(model(tokens[:, a:b], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-9, rtol=0)
    assert cache.get_seq_length() == 21 and cache.state is not None
    assert cache.state.tokens.tolist() == [21, 21]


@every
@torch.no_grad()
def test_no_token_sees_a_later_one(tiny: Make, name):
    model = tiny(name)
    tokens = text(1, 20)
    other = tokens.clone()
    other[:, 11:] = 255 - other[:, 11:]
    a, b = model(tokens).logits, model(other).logits
    assert torch.equal(a[:, :11], b[:, :11])
    assert not torch.equal(a[:, 11:], b[:, 11:])


@every
@torch.no_grad()
def test_padding_on_any_side_changes_nothing(tiny: Make, name):
    model = tiny(name).double()
    rows = [text(1, n, seed=n)[0] for n in (13, 5, 9)]
    tokens = torch.full((3, 13), 255)
    for side in ("left", "right"):
        mask = torch.zeros(3, 13, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(13 - len(row), 13) if side == "left" else slice(0, len(row))
            tokens[i, place], mask[i, place] = row, 1
        logits = model(tokens, attention_mask=mask).logits
        for i, row in enumerate(rows):
            alone = model(row[None]).logits[0]
            torch.testing.assert_close(logits[i, mask[i].bool()], alone, atol=1e-9, rtol=0)


@every
def test_every_parameter_learns_from_the_loss(name):
    lm = build(name)
    model = MirasForCausalLM.of(lm).train()
    tokens = text(2, 18)
    model(tokens, labels=tokens).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    lm.zero_grad()
    logits, _ = lm(tokens)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    wanted = {n: p.grad for n, p in lm.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for n, grad in wanted.items():
        torch.testing.assert_close(found[n], grad, atol=1e-6, rtol=1e-4)


def test_a_model_made_from_its_config_is_the_lm_of_the_same_seed():
    for tied in (False, True):
        torch.manual_seed(3)
        lm = LM(config(tie_word_embeddings=tied))
        torch.manual_seed(3)
        model = MirasForCausalLM(MirasConfig.of(config(tie_word_embeddings=tied)))
        wanted = lm.state_dict()
        assert model.state_dict().keys() == wanted.keys()
        assert all(torch.equal(x, wanted[n]) for n, x in model.state_dict().items())


def test_generate_finds_the_arguments_that_it_inspects():
    names = set(inspect.signature(MirasForCausalLM.forward).parameters)
    assert {"attention_mask", "past_key_values", "use_cache", "logits_to_keep", "labels"} <= names
    assert "position_ids" not in names  # or generate would number positions, and rebasing would restart them


@torch.no_grad()
def test_logits_to_keep(tiny: Make):
    model, tokens = tiny(), text(2, 12)
    whole = model(tokens).logits
    assert torch.equal(model(tokens, logits_to_keep=3).logits, whole[:, -3:])
    picked = torch.tensor([0, 5])
    assert torch.equal(model(tokens, logits_to_keep=picked).logits, whole[:, picked])


@torch.no_grad()
def test_losses_count_scored_tokens_once(tiny: Make):
    model, tokens = tiny(), text(2, 12)
    logits = model(tokens).logits
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(model(tokens, labels=tokens).loss, each.mean())
    some = tokens.masked_fill(torch.arange(12) < 5, -100)
    torch.testing.assert_close(model(tokens, labels=some).loss, each[:, 4:].mean())
    summed = model(tokens, labels=tokens, num_items_in_batch=10).loss
    torch.testing.assert_close(summed, each.sum() / 10)


@torch.no_grad()
def test_what_padding_would_predict_is_not_scored(tiny: Make):
    model, tokens = tiny(), text(1, 9)
    padded = F.pad(tokens, (4, 0), value=255)
    mask = F.pad(torch.ones_like(tokens), (4, 0))
    labels = padded.masked_fill(mask == 0, -100)
    loss = model(padded, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, model(tokens, labels=tokens).loss)


@torch.no_grad()
def test_embeddings_in_place_of_ids(tiny: Make):
    model, tokens = tiny(), text(2, 10)
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(tokens).logits)


@torch.no_grad()
def test_write_and_reset_masks_reach_the_memory(tiny: Make):
    model, tokens = tiny(), text(2, 16)
    never = torch.zeros(2, 16, dtype=torch.bool)
    start = never.clone()
    start[:, 7] = True
    assert torch.equal(model(tokens, write=never).logits, model.lm()(tokens, write=never)[0])
    torch.testing.assert_close(model(tokens, reset=start).logits[:, 7:], model(tokens[:, 7:]).logits)


@torch.no_grad()
def test_the_base_model_gives_the_last_hidden_states(tiny: Make):
    model, tokens = tiny(), text(2, 10)
    out = model.base_model(tokens)
    assert isinstance(model.base_model, MirasModel)
    assert torch.equal(model.lm_head(out.last_hidden_state), model(tokens).logits)
    assert model(tokens, use_cache=False).past_key_values is None
    assert model.train()(tokens).past_key_values is None
    first, second = model.eval()(tokens, return_dict=False)
    assert first.shape == (2, 10, 256) and isinstance(second, MirasCache)


@torch.no_grad()
def test_classification_reads_the_last_token_of_each_row():
    torch.manual_seed(0)
    model = MirasForSequenceClassification(MirasConfig.of(config(), num_labels=3, pad_token_id=255)).eval()
    rows = [text(1, n, seed=n).clamp(max=254) for n in (9, 4)]
    alone = torch.cat([model.score(model.model(row).last_hidden_state[:, -1]) for row in rows])
    for side in ("left", "right"):
        pads = [(9 - row.shape[1], 0) if side == "left" else (0, 9 - row.shape[1]) for row in rows]
        tokens = torch.cat([F.pad(row, pad, value=255) for row, pad in zip(rows, pads, strict=True)])
        torch.testing.assert_close(model(tokens).logits, alone)
        torch.testing.assert_close(model(tokens, attention_mask=(tokens != 255).long()).logits, alone)
    labels = torch.tensor([2, 0])
    torch.testing.assert_close(model(tokens, labels=labels).loss, F.cross_entropy(alone, labels))
    one = MirasForSequenceClassification(MirasConfig.of(config(), num_labels=1)).eval()
    torch.testing.assert_close(
        one(rows[0], labels=torch.tensor([0.5])).loss, (one(rows[0]).logits[0, 0] - 0.5) ** 2
    )


@torch.no_grad()
def test_new_tokens_can_be_added(tiny: Make):
    model, tokens = tiny(), text(1, 8)
    before = model(tokens).logits
    model.resize_token_embeddings(260, mean_resizing=False)
    assert model.config.vocab_size == 260 and model.config.model_config().vocab_size == 260
    assert torch.equal(model(tokens).logits[..., :256], before)
    assert model(torch.tensor([[258, 259]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": torch.zeros(1, 3)}, "must be .B, T. int64"),
        ({"input_ids": text(2, 3), "attention_mask": torch.ones(2, 2)}, "attention_mask must be"),
        ({"input_ids": text(2, 3), "attention_mask": torch.ones(2, 1, 3, 3)}, "attention_mask must be"),
        ({"input_ids": text(1, 3), "position_ids": torch.arange(3)[None]}, "documents of a packed batch"),
        ({"input_ids": text(1, 3), "output_attentions": True}, "output_attentions is not supported"),
        ({"input_ids": text(1, 3), "output_hidden_states": True}, "output_hidden_states is not supported"),
        ({"input_ids": text(1, 3), "past_key_values": object()}, "must be a MirasCache, got a object"),
    ],
)
def test_what_cannot_be_read_is_refused(tiny: Make, given, reason):
    with pytest.raises(ValueError, match=reason):
        tiny()(**given)


def test_gradient_checkpointing_says_why_it_is_not_needed(tiny: Make):
    with pytest.raises(ValueError, match="already recompute groups of chunks in the backward pass"):
        tiny().activation_checkpointing_enable()


def test_autoregressive_state_is_fp32_under_bfloat16_weights(tiny: Make):
    model = tiny().to(torch.bfloat16)
    out = model(text(2, 9))
    assert out.logits.dtype == torch.bfloat16 and out.past_key_values is not None
    types = {n: x.dtype for n, x in out.past_key_values.state.tensors().items() if x.is_floating_point()}
    assert {t for n, t in types.items() if ".memory.memory." in n} == {torch.float32}
    assert {t for n, t in types.items() if ".memory.memory." not in n} == {torch.bfloat16}
