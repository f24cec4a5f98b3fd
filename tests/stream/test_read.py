"""The loss of every token is that of one forward pass over all of them, wherever the stream is cut."""

import gc
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import miras
from miras.data.tokens import ByteTokenizer
from miras.nn import reading
from miras.nn.lm import LM
from miras.nn.reading import Spelling, StreamState, read_pieces
from miras.stream import read

Make = Callable[..., LM]
Text = NDArray[np.uint8]


def direct(model: LM, ids: Text) -> NDArray[np.float32]:
    """Losses of tokens 1 and on from one call on all of them."""
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.no_grad():
        logits, _ = model(tokens)
    return F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none").numpy()


@pytest.mark.parametrize("name", ["titans-mag", "titans-lmm", "transformer"])
@pytest.mark.parametrize("piece", [1, 7, 8, 50, 1000])
def test_pieces_of_any_size_give_the_losses_of_one_call(tiny: Make, text: Text, name: str, piece: int):
    model = tiny(name, window_size=None if name == "transformer" else 16)
    ids = text[:203]
    found = read(model, ids, piece=piece)
    assert found.losses.shape == (1, 203) and found.losses.dtype == np.float32
    assert np.isnan(found.losses[0, 0])
    np.testing.assert_allclose(found.losses[0, 1:], direct(model, ids), atol=1e-5)
    assert found.state.tokens.tolist() == [203]


@pytest.mark.parametrize("piece", [13, 64])
def test_losses_do_not_depend_on_the_cut_in_fp64(tiny: Make, text: Text, piece: int):
    model = tiny().double()
    np.testing.assert_allclose(
        read(model, text[:700], piece=piece).losses[0, 1:], direct(model, text[:700]), atol=1e-5
    )


@pytest.mark.parametrize("first", [1, 8, 45])
def test_a_second_reading_goes_on_and_scores_its_first_token(tiny: Make, text: Text, first: int):
    model = tiny()
    whole = read(model, text[:120])
    start = read(model, text[:first])
    assert isinstance(start.state, StreamState)
    rest = read(model, text[first:120], start.state)
    np.testing.assert_allclose(rest.losses, whole.losses[:, first:], atol=1e-5)
    assert rest.state.tokens.tolist() == [120]


def test_after_a_plain_state_the_first_token_has_no_prediction(tiny: Make, text: Text):
    model = tiny()
    with torch.no_grad():
        _, state = model(torch.from_numpy(text[:20].astype(np.int64))[None])
    losses = read(model, text[20:60], state).losses[0]
    assert np.isnan(losses[0])
    np.testing.assert_allclose(losses[1:], read(model, text[:60]).losses[0, 21:], atol=1e-5)


def test_arrays_tensors_memmaps_and_blocks_are_one_stream(tiny: Make, text: Text, tmp_path: Path):
    model = tiny()
    ids = text[:150]
    ids.tofile(tmp_path / "ids")
    wanted = read(model, ids, piece=64).losses

    def blocks() -> Iterator[Text | torch.Tensor]:
        for size in itertools.cycle((1, 0, 30, 2)):
            if not len(left := ids[blocks.at :]):
                return
            blocks.at += size
            yield left[:size] if size != 30 else torch.from_numpy(left[:size].astype(np.int32))

    blocks.at = 0
    for tokens in (
        ids.astype(np.int64),
        torch.from_numpy(ids.copy()),
        np.memmap(tmp_path / "ids", dtype=np.uint8, mode="r"),
        blocks(),
    ):
        np.testing.assert_array_equal(read(model, tokens, piece=64).losses, wanted)


def test_rows_are_streams_of_their_own(tiny: Make, text: Text):
    model = tiny()
    rows = text[:300].reshape(3, 100)
    together = read(model, rows, piece=24)
    assert together.losses.shape == (3, 100)
    for row, ids in enumerate(rows):
        np.testing.assert_allclose(together.losses[row, 1:], direct(model, ids), atol=1e-5)


def test_reading_without_writing_leaves_every_memory_as_it_was(tiny: Make, text: Text):
    model = tiny("titans-lmm")
    before = read(model, text[:96]).state  # the end of a chunk: its anchor is closed
    after = read(model, text[96:300], before, write=False).state
    old, new = before.tensors(), after.tensors()
    touched = [n for n in old if any(part in n for part in (".A.", ".S.", ".anchor."))]
    assert len(touched) == 2 * 3 * 2
    for name in touched:
        assert torch.equal(old[name], new[name]), name
    writing = read(model, text[96:300], before).state.tensors()
    assert not any(torch.equal(old[name], writing[name]) for name in touched)


def test_predictions_are_the_most_likely_tokens(tiny: Make, text: Text):
    model = tiny()
    ids = text[:90]
    pieces = list(read_pieces(model, ids, piece=32))
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(ids.astype(np.int64))[None])
    predicted = np.concatenate([part.predicted for part in pieces], 1)[0]
    assert predicted[0] == -1 and predicted[1:].tolist() == logits[0, :-1].argmax(-1).tolist()
    assert [part.start for part in pieces] == [0, 32, 64]
    assert np.concatenate([part.tokens for part in pieces], 1)[0].tolist() == ids.tolist()


def test_pieces_end_where_chunks_do(tiny: Make, text: Text):
    model = tiny()
    state = read(model, text[:3]).state
    sizes = [part.tokens.shape[1] for part in read_pieces(model, text[3:100], state, piece=30)]
    assert sizes == [21, 24, 24, 24, 4]  # up to place 24, then whole chunks of 8


def test_a_large_vocabulary_is_scored_in_parts(tiny: Make, text: Text, monkeypatch: pytest.MonkeyPatch):
    model = tiny()
    wanted = read(model, text[:100], piece=48).losses
    monkeypatch.setattr(reading, "LOGITS", 256 * 5)
    np.testing.assert_allclose(read(model, text[:100], piece=48).losses, wanted, atol=1e-5)


def test_observation_covers_every_token(tiny: Make, text: Text):
    model = tiny()
    found = read(model, text[:50], piece=16, observe=True)
    assert found.seen is not None and found.seen.layers() == ("layers.0", "layers.1")
    assert found.seen["layers.1"]["momentary"].shape == (1, 2, 50)
    assert read(model, text[:50]).seen is None
    with miras.observe() as outer:
        read(model, text[:50], piece=16)
    assert torch.equal(outer["layers.0"]["lr.w1"], found.seen["layers.0"]["lr.w1"])


def test_progress_counts_tokens(tiny: Make, text: Text):
    told: list[int] = []
    read(tiny(), text[:50], piece=16, progress=told.append)
    assert told == [16, 32, 48, 50]


def held() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    found = {x.data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is torch.Tensor}
    return sum(found.values())


def test_memory_is_constant_and_gradients_stay_on_between_pieces(tiny: Make, text: Text):
    model = tiny()
    sizes = []
    endless = itertools.repeat(text[:100])
    for part in itertools.islice(read_pieces(model, endless, piece=64), 8):
        assert torch.is_grad_enabled()
        assert not any(x.requires_grad for x in part.state.tensors().values())
        sizes.append((held(), part.state.nbytes()))
    assert sizes[2] == sizes[-1]


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (np.zeros(4), "arrays of integers"),
        (np.zeros((1, 2, 3), dtype=np.int64), "arrays of integers"),
        (np.array([1, 256]), "token id 256 is outside the model's vocabulary, 0 to 255"),
        (np.array([1, -3]), "token id -3 is outside"),
        ([np.zeros((2, 3), dtype=np.uint8), np.zeros((3, 3), dtype=np.uint8)], "equally many rows"),
    ],
)
def test_what_is_no_stream_is_refused(tiny: Make, tokens: object, reason: str):
    with pytest.raises(ValueError, match=reason):
        read(tiny(), tokens)  # pyright: ignore


def test_no_tokens_are_no_change(tiny: Make, text: Text):
    model = tiny()
    found = read(model, text[:0])
    assert found.losses.shape == (1, 0) and found.state.tokens.tolist() == [0]
    state = read(model, text[:10]).state
    assert read(model, text[:0], state).state is state
    with pytest.raises(ValueError, match="piece must be at least 1"):
        read(model, text, piece=0)


@given(words=st.text(max_size=40), cuts=st.lists(st.integers(1, 5), max_size=60))
def test_spelling_is_decoding_piece_by_piece(words: str, cuts: list[int]):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(words)
    spelling, said, at = Spelling(tokenizer.decode), "", 0
    for size in [*cuts, len(ids)]:
        said += spelling.push(ids[at : at + size])
        at += size
        assert words.startswith(said)
    assert said + spelling.rest() == words


def test_spelling_does_not_wait_for_bytes_that_never_become_a_character():
    spelling = Spelling(ByteTokenizer().decode)
    said = [spelling.push(np.array([byte])) for byte in b"a\xff\xff\xff\xff\xffb\xe2\x82"]
    assert "".join(said).replace("\ufffd", "") == "ab" and "".join(said).count("\ufffd") == 5
    assert spelling.rest() == "\ufffd"
