"""The tools that people use with `transformers` models: pipeline, Trainer, LoRA, lm_eval."""

import itertools
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf.conftest import Make, build, config, text
from miras.hf import MirasConfig, MirasForCausalLM, byte_tokenizer
from miras.nn.folder import load_model, save_model

TOKENIZER = byte_tokenizer()
WORDS = ["It was the best of times,", "it was", "the worst of times, it was the age of wisdom"]
EVERY_MIXER = ("titans-mag", "titans-lmm", "transformer", "titans-mac", "titans-mal", "gated-deltanet")


def test_a_pipeline_of_prompts(tiny: Make):
    model = tiny()
    run = pipeline("text-generation", model=model, tokenizer=TOKENIZER)
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    together = [found[0]["generated_text"] for found in run(WORDS, batch_size=3, **options)]
    for words, said in zip(WORDS, together, strict=True):
        ids = torch.tensor([list(words.encode())])
        made = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert said == TOKENIZER.decode(made, skip_special_tokens=True)


def arguments(folder, **changed) -> TrainingArguments:
    options = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(options | changed))


def training(folder, **changed) -> Trainer:
    torch.manual_seed(0)
    sentence = b"all work and no play makes jack a dull boy. " * 3
    rows = Dataset.from_list([{"input_ids": list(sentence[i : i + 20])} for i in range(24)])
    return Trainer(
        model=MirasForCausalLM(MirasConfig.of(config())),
        args=arguments(folder, **changed),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        data_collator=DataCollatorForLanguageModeling(TOKENIZER, mlm=False),
    )


def test_the_trainer_trains_and_resumes_to_the_same_weights(tmp_path):
    whole = training(tmp_path / "whole")
    whole.train()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(math.log(256), abs=1.0) and losses[-1] < losses[0] - 0.5
    assert math.isfinite(whole.evaluate()["eval_loss"])
    resumed = training(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    wanted = whole.model.state_dict()
    assert all(torch.equal(x, wanted[n]) for n, x in resumed.model.state_dict().items())
    saved = load_model(tmp_path / "whole" / "checkpoint-6").state_dict()
    assert all(torch.equal(x, wanted[n]) for n, x in saved.items())
    with pytest.raises(ValueError, match="omit activation_checkpointing"):
        training(tmp_path / "no", activation_checkpointing=True).train()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("name", EVERY_MIXER)
def test_lora_learns_on_the_projections_and_merges(tmp_path, name):
    tokens = text(2, 15)
    save_model(build(name), tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").double()
    before = {n: x.clone() for n, x in base.state_dict().items()}
    names = base.projections()
    assert {n.rpartition(".")[2] for n in names} <= {"q", "k", "v", "out", "proj"}
    assert len(names) >= 8 and not any("gates" in n for n in names)
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", target_modules=names, r=2, init_lora_weights=False)
    )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert len(trained) == 2 * len(names) and all("lora_" in n for n in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits
        model.save_pretrained(tmp_path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").double()
        again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval().double()
        torch.testing.assert_close(again(input_ids=tokens).logits, wanted)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=tokens).logits, wanted)
    kept = [n for n in before if not any(n == f"{name}.weight" for name in names)]
    assert all(torch.equal(merged.state_dict()[n], before[n]) for n in kept)


def surprise(model: MirasForCausalLM, context: str, rest: str) -> float:
    """Log-probability of `rest` after `context`, summed over its bytes, by `miras.LM`."""
    ids = torch.tensor([list((context + rest).encode())])
    with torch.no_grad():
        logits, _ = model.lm()(ids)
    each = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return float(each[len(context.encode()) - 1 :].sum())


@pytest.mark.filterwarnings("default")
def test_lm_eval_gives_our_log_likelihoods(tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    save_model(build(), tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    wrapped = HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=3, max_length=512, device="cpu")
    pairs = [(a, " " + b) for a, b in itertools.product(WORDS, ("foolishness,", "it was é", "x"))]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for pair, (found, _) in zip(pairs, wrapped.loglikelihood(asked), strict=True):
        assert found == pytest.approx(surprise(model, *pair), abs=1e-4), pair
    asked = [
        Instance("generate_until", {}, (words, {"until": ["\n"], "max_gen_toks": 5}), 0) for words in WORDS
    ]
    for words, found in zip(WORDS, wrapped.generate_until(asked), strict=True):
        ids = torch.tensor([list(words.encode())])
        made = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert found == TOKENIZER.decode(made, skip_special_tokens=True).split("\n")[0]
