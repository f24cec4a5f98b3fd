"""Folders go both ways: what one side saves the other loads, to the bit, and nothing that does not fit gets in."""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

import miras
from hf.conftest import build, config, text
from miras.cli import main
from miras.core.bias import L2
from miras.data.tokens import ByteTokenizer
from miras.hf import MirasConfig, MirasForCausalLM, MirasForSequenceClassification, MirasModel, byte_tokenizer
from miras.nn.config import ModelConfig
from miras.nn.folder import OF_TRANSFORMERS, load_model, model_hash, save_model
from miras.nn.lm import LM
from miras.zoo import preset, presets

EXTREMES = ("titans-mag", "transformer", "retnet", "mamba2", "hgrn2", "mlstm", "ttt-mlp", "moneta", "memora")


@dataclass(frozen=True)
class Halved(L2):
    """A third-party bias."""


@pytest.mark.parametrize("name", presets())
def test_configs_go_through_transformers_unchanged(tmp_path, name):
    wanted = config(name)
    MirasConfig.of(wanted).save_pretrained(tmp_path)
    found = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(found, MirasConfig) and found.model_config() == wanted
    assert found.model_config().to_dict() == wanted.to_dict()
    assert found.num_attention_heads == 2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", EXTREMES)
@torch.no_grad()
def test_a_detour_through_transformers_changes_nothing(tmp_path, name, tied):
    lm, tokens = build(name, tie_word_embeddings=tied), text(1, 13)
    save_model(lm, tmp_path / "ours")
    model, about = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert isinstance(model, MirasForCausalLM) and not model.training
    assert not any(about.values()), about
    assert torch.equal(model(tokens).logits, lm(tokens)[0])
    model.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    assert model_hash(again) == model_hash(lm) and torch.equal(again(tokens)[0], lm(tokens)[0])
    stored = [load_file(tmp_path / side / "model.safetensors").keys() for side in ("ours", "theirs")]
    assert stored[0] == stored[1] and ("lm_head.weight" in stored[0]) != tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_what_was_saved_is_read_by_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(build(), "ours")
    AutoModelForCausalLM.from_pretrained("ours").save_pretrained("theirs")
    said = []
    for folder in ("ours", "theirs"):
        assert main(["generate", folder, "--prompt", "It was", "--tokens", "8", "--temperature", "0"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0]


def test_every_field_of_transformers_is_known_as_theirs():
    theirs = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    written = MirasConfig.of(config(), num_labels=3, problem_type="regression").to_dict().keys()
    ours = {f.name for f in dataclasses.fields(ModelConfig)} | {"format_version"}
    assert theirs <= OF_TRANSFORMERS and written <= ours | OF_TRANSFORMERS and not ours & OF_TRANSFORMERS


def test_classifiers_and_bare_models(tmp_path):
    save_model(build(), tmp_path / "lm")
    torch.manual_seed(0)
    made = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=3)
    assert isinstance(made, MirasForSequenceClassification)
    assert 0.1 < float(made.score.weight.detach().std()) * 4 < 3  # new, and as a new model has it
    made.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert again.num_labels == 3
    tokens = text(1, 7)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, made(tokens).logits)
        bare = AutoModel.from_pretrained(tmp_path / "lm")
        assert isinstance(bare, MirasModel)
        lm = load_model(tmp_path / "lm")
        assert torch.equal(lm.lm_head(bare(tokens).last_hidden_state), lm(tokens)[0])
    with pytest.raises(ValueError, match="holds a MirasForSequenceClassification, not a language model"):
        load_model(tmp_path / "classifier")


@pytest.mark.parametrize("name", ["titans-mag", "mamba2", "retnet", "hgrn2"])
def test_short_weights_leave_gates_and_memories_in_fp32(tmp_path, name):
    lm, tokens = build(name), text(1, 12)
    save_model(lm, tmp_path / "m")
    wanted = {n: x.dtype for n, x in lm.to(torch.bfloat16).state_dict().items()}
    assert torch.float32 in wanted.values() and torch.bfloat16 in wanted.values()
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16),
        AutoModelForCausalLM.from_config(MirasConfig.of(config(name)), dtype=torch.bfloat16),
        MirasForCausalLM(MirasConfig.of(config(name))).to(torch.bfloat16),
    ):
        assert {n: x.dtype for n, x in model.state_dict().items()} == wanted
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, lm(tokens)[0])
    model.save_pretrained(tmp_path / "short")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "short")
    assert {n: x.dtype for n, x in again.state_dict().items()} == wanted
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, lm(tokens)[0])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["titans-mag", "retnet", "memora"])
def test_a_model_made_on_no_device_gets_the_values_of_a_new_one(name, tied):
    torch.manual_seed(5)
    wanted = MirasForCausalLM(MirasConfig.of(config(name, tie_word_embeddings=tied)))
    with torch.device("meta"):
        model = MirasForCausalLM(MirasConfig.of(config(name, tie_word_embeddings=tied)))
    assert {x.device.type for x in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    with torch.no_grad():
        for x in [*model.parameters(), *model.buffers()]:
            x.fill_(torch.nan)
    torch.manual_seed(5)
    model.init_weights()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    found = dict([*model.named_parameters(), *model.named_buffers()])
    for n, x in [*wanted.named_parameters(), *wanted.named_buffers()]:
        assert torch.equal(found[n], x), n


def test_a_weight_that_a_file_lacks_is_new_and_the_others_are_kept(tmp_path, caplog):
    lm = build()
    save_model(lm, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    lost = [n for n in stored if n.endswith(("A0.w1", "v.conv", "layers.1.mixer.out.weight"))]
    assert len(lost) == 5
    save_file(
        {n: x for n, x in stored.items() if n not in lost}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    model, about = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert about["missing_keys"] == set(lost)
    new = MirasForCausalLM(MirasConfig.of(config())).state_dict()
    for n, x in model.state_dict().items():
        if n in lost:
            assert 0.5 < float(x.std() / new[n].std()) < 2, n
        else:
            assert torch.equal(x, stored[n]), n


@pytest.mark.parametrize("name", ["titans-mac", "titans-mag", "memora-h", "transformer"])
def test_a_folder_of_format_1_goes_through_transformers_as_it_is(tmp_path, name):
    told = json.loads((Path(__file__).parents[1] / "golden" / "format1" / f"{name}.json").read_text())
    lm, tokens = LM(ModelConfig.from_dict(told["config"])), text(1, 20) % 32
    save_model(lm, tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(model(tokens).logits, lm(tokens)[0])
    model.save_pretrained(tmp_path / "b")
    for folder in ("a", "b"):
        written = json.loads((tmp_path / folder / "config.json").read_text())
        assert told["config"].items() <= written.items()
        assert model_hash(load_model(tmp_path / folder)) == model_hash(lm)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert again.lm().config == lm.config and torch.equal(again(tokens).logits, lm(tokens)[0])


def test_layers_with_rules_of_their_own_go_through_transformers(tmp_path):
    slow, fast = (preset(name, chunk_size=4).memories()[0] for name in ("yaad", "titans-lmm"))
    config = ModelConfig(hidden_size=16, num_hidden_layers=2, num_heads=2, pattern=(slow, fast))
    model, tokens = MirasForCausalLM(MirasConfig.of(config)), text(1, 9)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm().config == config == load_model(tmp_path).config
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def foreign() -> ModelConfig:
    return config(bias=Halved())


def test_code_that_a_config_names_runs_only_where_it_is_trusted(tmp_path):
    model = MirasForCausalLM(MirasConfig.of(foreign()))
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert (
        values["pattern"][0]["memory"]["rule"]["bias"]["name"].endswith(":Halved")
        and "_trusted" not in values
    )
    (tmp_path / "config.json").write_text(json.dumps(values | {"_trusted": True}))  # a lie is no trust
    for load in (
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False),
        lambda: MirasForCausalLM(MirasConfig.from_pretrained(tmp_path)),
    ):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load()
    for found in (
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True),
        MirasForCausalLM.from_pretrained(tmp_path, trust_remote_code=True),
        MirasForCausalLM(MirasConfig.from_pretrained(tmp_path, trust_remote_code=True)),
    ):
        assert isinstance(found.lm().config.memories()[0].rule.bias, Halved)
    with pytest.raises(ValueError, match="trust_remote_code=True"):  # trust does not outlive its call
        MirasForCausalLM(MirasConfig.from_pretrained(tmp_path))


def test_a_config_that_describes_no_model_is_refused(tmp_path):
    save_model(build(), tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for change, reason in (
        ({"num_heads": 3}, "hidden_size 16 is not a multiple of num_heads 3"),
        ({"format_version": 99}, "format version 99 is unknown"),
        ({"pattern": [{"name": "magic"}]}, "unknown pattern 'magic'"),
        ({"spiral": 3}, "unknown fields spiral; known are format_version, hidden_size"),
    ):
        path.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=reason):
            AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("ours", [False, True])
def test_saved_folders_load_where_nobody_imports_miras_first(tmp_path, ours):
    """`trust_remote_code` in a process of its own: the module in the folder finds the package."""
    lm, tokens = build(), text(1, 9)
    if ours:
        save_model(lm, tmp_path / "m", ByteTokenizer().files())  # as `miras train` does
    else:
        MirasForCausalLM.of(lm).save_pretrained(tmp_path / "m")
        byte_tokenizer().save_pretrained(tmp_path / "m")
    torch.save((tokens, lm(tokens)[0].detach()), tmp_path / "wanted.pt")
    code = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
try:
    AutoConfig.from_pretrained("m", trust_remote_code=False)
    sys.exit("loaded without trust")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
model = AutoModelForCausalLM.from_pretrained("m", trust_remote_code=True)
tokens, wanted = torch.load("wanted.pt")
assert torch.equal(model(tokens).logits, wanted)
model.save_pretrained("again")
assert type(model).__module__ == "miras.hf.model", type(model)
tokenizer = AutoTokenizer.from_pretrained("m", trust_remote_code=True)
assert tokenizer("caf\u00e9").input_ids == list("caf\u00e9".encode()), tokenizer
"""
    environment = os.environ | {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HOME": str(tmp_path / "home"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors", "modeling_miras.py"]
    a, b = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("m", "again"))
    assert (a.items() <= b.items() and a["auto_map"] == b["auto_map"]) if ours else a == b
    module = (tmp_path / "m" / "modeling_miras.py").read_text()
    assert module.count("\n") < 15 and "miras-torch" in module


def test_names_at_the_root_are_those_of_the_module():
    for name in (
        "MirasConfig",
        "MirasModel",
        "MirasForCausalLM",
        "MirasForSequenceClassification",
        "MirasCache",
    ):
        assert getattr(miras, name) is getattr(sys.modules["miras.hf"], name)
