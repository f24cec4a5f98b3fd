"""Files of earlier versions open and mean the same (tests/golden/make.py wrote them)."""

import json
from pathlib import Path

import pytest
import torch

import miras
from miras.data.tokens import ByteTokenizer
from miras.nn.folder import load_model, model_hash
from miras.stream.files import load_state

GOLDEN = Path(__file__).parent / "golden"
V1 = GOLDEN / "v1"
CONFIGS = sorted(path.stem for path in (GOLDEN / "format1").glob("*.json"))
TOLD = json.loads((V1 / "told.json").read_text())
TOKENS = torch.arange(61).mul(7).remainder(31)[None]


@pytest.mark.parametrize("name", [name for name in TOLD if name != "talker"])
def test_a_folder_and_a_state_of_format_1_give_the_numbers_they_gave(name: str) -> None:
    model = load_model(V1 / name)
    assert model_hash(model) == TOLD[name]["hash"]
    told = torch.tensor(TOLD[name]["logits"], dtype=torch.float64)
    with torch.no_grad():
        state, _ = load_state(V1 / f"{name}.state", model)
        from_file, _ = model(TOKENS[:, 37:], state)
        model.double()
        _, state = model(TOKENS[:, :37])
        logits, _ = model(TOKENS[:, 37:], state)
    torch.testing.assert_close(logits[0, -1], told, rtol=0, atol=1e-9)
    torch.testing.assert_close(from_file[0, -1].double(), told, rtol=0, atol=2e-4)


def filled(model: miras.LM) -> miras.LM:
    """The model with weights that its parameters' names and sizes say."""
    with torch.no_grad():
        for i, (_, p) in enumerate(sorted(model.named_parameters())):
            p.copy_(
                (torch.arange(p.numel(), dtype=torch.float64) * 0.37 + i).sin().float().mul(0.3).view_as(p)
            )
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_format_1_means_what_it_meant(name: str) -> None:
    """The same model, parameter by parameter, under the same hash, which its states name; also when written again."""
    told = json.loads((GOLDEN / "format1" / f"{name}.json").read_text())
    config = miras.ModelConfig.from_dict(told["config"])
    assert config.to_dict() == told["config"] and told["config"]["format_version"] == 1
    model = filled(miras.LM(config))
    assert model_hash(model) == told["hash"]
    with torch.no_grad():
        logits = model.double()(TOKENS)[0][0, -1]
    torch.testing.assert_close(logits, torch.tensor(told["logits"], dtype=torch.float64), rtol=0, atol=1e-9)
    changed = config.changed({"vocab_size": 33}).to_dict()
    assert changed["format_version"] == 2
    again = miras.ModelConfig.from_dict(json.loads(json.dumps(changed)))
    assert again.changed({"vocab_size": config.vocab_size}) == config


def test_a_session_of_format_1_goes_on_where_it_stopped() -> None:
    model = load_model(V1 / "talker")
    assert model_hash(model) == TOLD["talker"]["hash"]
    session = miras.Session.load(V1 / "talker.session", model, ByteTokenizer())
    session.feed("And goes on.")
    loss = session.feed("The memory reads on.").loss
    assert loss == pytest.approx(TOLD["talker"]["loss"], abs=1e-4)
