"""A changed byte in a model's folder is seen; a folder without checksums, as older versions wrote it, opens."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from miras.cli import main
from miras.data.tokens import ByteTokenizer
from miras.nn import folder as folders
from miras.nn.folder import load_model, read_config, save_model
from miras.nn.lm import LM
from miras.store.checksums import CHECKSUMS, check_sealed, read_checked, sealed
from miras.stream.source import open_model
from miras.zoo import preset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = LM(preset("titans-lmm", hidden_size=16, num_hidden_layers=1, num_heads=2, chunk_size=4))
    return save_model(model, tmp_path / "model", ByteTokenizer().files())


def digits(data: bytes) -> list[bytes]:
    """The data with one digit made another, for each of its digits."""
    return [
        data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        for at in range(len(data))
        if data[at] in b"0123456789"
    ]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_every_changed_digit_is_seen(folder: Path, name: str):
    whole = (folder / name).read_bytes()
    read: Callable[[], object] = (
        (lambda: read_config(folder)) if name == "config.json" else lambda: open_model(folder)
    )
    for changed in digits(whole)[:: 1 if name == "config.json" else 40]:
        (folder / name).write_bytes(changed)
        with pytest.raises(ValueError, match=f"{name} has changed since it was saved"):
            read()
    (folder / name).write_bytes(whole)
    read()


def test_a_folder_without_checksums_opens(folder: Path):
    (folder / CHECKSUMS).unlink()
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text())))
    assert load_model(folder).config == read_config(folder)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\xff"])
def test_checksums_that_are_damaged_are_named(folder: Path, text: str, capsys: pytest.CaptureFixture[str]):
    (folder / CHECKSUMS).write_text(text, encoding="latin-1")
    assert main(["info", str(folder)]) == 2
    assert f"{CHECKSUMS} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{}", "3"])
def test_checksums_that_tell_nothing_check_nothing(folder: Path, text: str):
    (folder / CHECKSUMS).write_text(text)
    assert read_checked(folder / "config.json") == (folder / "config.json").read_bytes()


def test_sealed_values_tell_when_they_changed():
    values = json.loads(json.dumps(sealed({"a": 1.5, "b": [1, {"c": "ü"}]})))
    check_sealed(values)
    check_sealed({"a": 1})  # an older file has no checksum
    with pytest.raises(ValueError, match="checksum"):
        check_sealed(values | {"a": 2.5})


def test_sizes_are_not_believed_before_the_file_has_them(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing of a model that its weights do not fit is made: a small file could ask for any memory."""
    values = json.loads((folder / "config.json").read_text())
    (folder / CHECKSUMS).unlink()
    made: list[str] = []
    monkeypatch.setattr(
        folders, "LM", lambda config: (made.append(torch.get_default_device().type), LM(config))[1]
    )
    for change in ({"hidden_size": 1 << 20}, {"vocab_size": 1 << 34}, {"num_hidden_layers": 1 << 40}):
        (folder / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=r"the weights do not fit config|must be at most 2147483647"):
            load_model(folder)
    assert set(made) == {"meta"}
