"""Files of earlier versions open and mean the same (tests/golden/make.py wrote them)."""

import json
from pathlib import Path

import pytest
import torch

import miras
from miras.data.tokens import ByteTokenizer
from miras.nn.folder import load_model, model_hash
from miras.stream.files import load_state

V1 = Path(__file__).parent / "golden" / "v1"
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


def test_a_session_of_format_1_goes_on_where_it_stopped() -> None:
    model = load_model(V1 / "talker")
    assert model_hash(model) == TOLD["talker"]["hash"]
    session = miras.Session.load(V1 / "talker.session", model, ByteTokenizer())
    session.feed("And goes on.")
    loss = session.feed("The memory reads on.").loss
    assert loss == pytest.approx(TOLD["talker"]["loss"], abs=1e-4)
