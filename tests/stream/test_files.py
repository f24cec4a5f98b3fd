"""A stream goes on from its file as if there had been no stop, and from no other file."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from miras.nn.folder import model_hash, save_model
from miras.nn.lm import LM, LMState
from miras.nn.reading import StreamState
from miras.stream import files, load_state, read, read_header, save_state

Make = Callable[..., LM]
Text = NDArray[np.uint8]


def equal(a: LMState, b: LMState) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(
        torch.equal(left[n], right[n]) and left[n].dtype == right[n].dtype for n in left
    )


FRESH = """
import sys, numpy as np
from miras.nn.folder import load_model
from miras.stream import generate, load_state, read
folder, state, text, out = sys.argv[1:]
model = load_model(folder)
state, header = load_state(state, model)
made = list(generate(model, np.zeros(0, dtype=np.uint8), 20, seed=3, state=state))
np.savez(out, losses=read(model, np.fromfile(text, dtype=np.uint8), state, piece=32).losses, made=made)
"""


def test_a_fresh_process_goes_on_with_identical_numbers(tiny: Make, text: Text, tmp_path: Path):
    from miras.stream import generate

    model = tiny()
    save_model(model, tmp_path / "model")
    state = read(model, text[:101]).state  # in the middle of a chunk
    save_state(tmp_path / "state", state, model)
    text[101:180].tofile(tmp_path / "text")
    names = ("model", "state", "text", "out.npz")
    subprocess.run([sys.executable, "-c", FRESH, *(tmp_path / name for name in names)], check=True)
    found = np.load(tmp_path / "out.npz")
    wanted = read(model, text[101:180], state, piece=32).losses
    assert not np.isnan(wanted).any()
    if torch.get_num_threads() == 1:
        np.testing.assert_array_equal(found["losses"], wanted)
    np.testing.assert_allclose(found["losses"], wanted, atol=1e-5)
    made = list(generate(model, text[:0], 20, seed=3, state=state))
    assert found["made"].tolist() == made


@pytest.mark.parametrize("name", ["titans-mag", "titans-lmm", "transformer"])
@pytest.mark.parametrize("length", [1, 40, 43])
def test_every_tensor_comes_back(tiny: Make, text: Text, tmp_path: Path, name: str, length: int):
    model = tiny(name, window_size=None)
    state = read(model, text[: 2 * length].reshape(2, length)).state
    written = save_state(tmp_path / "s", state, model, extra={"note": "two streams"})
    loaded, header = load_state(tmp_path / "s", model)
    assert isinstance(loaded, StreamState) and equal(loaded, state)
    assert header == written == read_header(tmp_path / "s")
    assert header.tokens == (length, length) and header.extra == {"note": "two streams"}
    assert header.model == model_hash(model) and header.time.endswith("+00:00")
    assert model.config.pattern[0].name in header.summary


def test_a_plain_state_comes_back_plain(tiny: Make, tmp_path: Path):
    model = tiny()
    save_state(tmp_path / "s", model.initial(1), model)
    loaded, _ = load_state(tmp_path / "s", model)
    assert type(loaded) is LMState and equal(loaded, model.initial(1))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_other_types_come_back_exactly(tiny: Make, text: Text, tmp_path: Path, kind: torch.dtype):
    model = tiny().to(kind)
    state = read(model, text[:50]).state
    save_state(tmp_path / "s", state, model)
    stored = {x.dtype for x in load_file(tmp_path / "s").values()}
    assert stored <= {torch.float32, torch.float64, torch.int64}
    assert equal(load_state(tmp_path / "s", model)[0], state)


@pytest.fixture
def saved(tiny: Make, text: Text, tmp_path: Path) -> tuple[LM, Path]:
    model = tiny()
    save_state(tmp_path / "a.state", read(model, text[:50]).state, model)
    return model, tmp_path / "a.state"


def test_the_state_of_another_model_is_refused_by_name(saved: tuple[LM, Path], tiny: Make):
    model, path = saved
    other = tiny(seed=1)
    with pytest.raises(ValueError, match="belongs to another model") as refusal:
        load_state(path, other)
    assert model_hash(model) in str(refusal.value) and model_hash(other) in str(refusal.value)


def test_a_flipped_byte_is_refused_anywhere(saved: tuple[LM, Path]):
    model, path = saved
    data = path.read_bytes()
    body = 8 + int.from_bytes(data[:8], "little")
    state, _ = load_state(path, model)
    refused = 0
    for at in [*range(0, 16), *range(16, body, 397), *range(body, len(data), 9973), len(data) - 1]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            loaded, _ = load_state(path, model)
        except ValueError as error:
            assert str(path) in str(error)
            assert at < body or "checksum differs" in str(error)
            refused += 1
        else:
            assert at < body and equal(loaded, state)  # padding of the header
    assert refused > 30


def test_a_changed_header_is_refused(saved: tuple[LM, Path]):
    model, path = saved
    data = path.read_bytes()
    assert data.count(b"[50]") == 1
    path.write_bytes(data.replace(b"[50]", b"[51]"))
    with pytest.raises(ValueError, match="checksum differs"):
        load_state(path, model)


def test_a_cut_off_file_is_refused(saved: tuple[LM, Path]):
    model, path = saved
    data = path.read_bytes()
    for size in (0, 4, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="corrupt or truncated"):
            load_state(path, model)


def test_what_is_no_state_is_refused(saved: tuple[LM, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, path = saved
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_state(tmp_path / "nowhere", model)
    with pytest.raises(FileNotFoundError, match="is a folder; a stream's state is a single file"):
        load_state(tmp_path, model)
    save_file({"x": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="is not a stream's state"):
        load_state(tmp_path / "weights", model)
    save_file(
        {"x": torch.zeros(1)}, tmp_path / "odd", metadata={"format": "miras-state", "format_version": "x"}
    )
    with pytest.raises(ValueError, match="header"):
        load_state(tmp_path / "odd", model)
    monkeypatch.setattr(files, "FORMAT_VERSION", 2)
    save_state(path, model.initial(1), model)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format version 2, this miras reads up to 1"):
        load_state(path, model)
    with pytest.raises(ValueError, match="format version 2"):
        read_header(path)


def test_saving_again_replaces_the_file_and_leaves_nothing_else(saved: tuple[LM, Path], text: Text):
    model, path = saved
    state = read(model, text[:60]).state
    save_state(path, state, model)
    assert equal(load_state(path, model)[0], state)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
