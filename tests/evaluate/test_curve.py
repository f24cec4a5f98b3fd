"""Every condition equals one call on the whole text with masks made by hand."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from miras.data.tokens import FileTokenizer
from miras.evaluate import CONDITIONS, stream_curve
from miras.nn.lm import LM
from miras.nn.reading import Piece, read_pieces

Make = Callable[..., LM]
Text = NDArray[np.uint8]


def bits(model: LM, ids: Text, **masks: torch.Tensor) -> NDArray[np.float64]:
    """Bits of tokens 1 and on, from one call."""
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.no_grad():
        logits, _ = model(tokens, **{name: mask[None] for name, mask in masks.items()})
    return F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none").double().numpy() / math.log(2)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", ["titans-mag", "titans-lmm"])
def test_a_condition_is_its_masks(tiny: Make, text: Text, condition: str, name: str):
    model = tiny(name).double()
    ids, at = text[:301], torch.arange(301)
    masks = {
        "learning": {},
        "frozen": {"write": at < 0},
        "frozen-warmed": {"write": at < 150},
        "reset": {"reset": at % 37 == 0},
    }
    wanted = bits(model, ids, **masks[condition])
    curve = stream_curve(model, ids, condition, segment=37, bins=7, piece=64)
    assert curve.condition == condition
    assert curve.num_tokens == curve.num_bytes == 300
    assert curve.mean == pytest.approx(wanted.mean(), abs=1e-6)
    # Bins of 43 tokens; the first has one less to score.
    parts = [wanted[max(0, start - 1) : start + 42] for start in range(0, 301, 43)]
    assert curve.bits_per_byte == pytest.approx([part.mean() for part in parts], abs=1e-6)
    assert curve.positions == tuple(start + 21.5 for start in range(0, 301, 43))
    assert curve.seconds > 0


def test_conditions_differ_where_they_should(tiny: Make, text: Text):
    model = tiny()
    curves = {name: stream_curve(model, text[:400], name, segment=100, bins=4) for name in CONDITIONS}
    learning, frozen, warmed, reset = (curves[name].bits_per_byte for name in CONDITIONS)
    assert len({curve.mean for curve in curves.values()}) == 4
    assert warmed[:2] == learning[:2] and warmed[2:] != learning[2:]
    assert reset[0] == pytest.approx(learning[0]) and reset[1] != learning[1]
    assert frozen[0] != learning[0]


@pytest.mark.parametrize("name", ["titans-mag", "titans-lmm", "transformer"])
def test_reset_is_a_run_of_its_own_for_every_segment(tiny: Make, text: Text, name: str):
    model = tiny(name)
    curve = stream_curve(model, text[:96], "reset", segment=32, bins=3, piece=17)
    for number, mean in enumerate(curve.bits_per_byte):
        alone = bits(model, text[32 * number : 32 * number + 32])
        if number == 0:
            assert mean == pytest.approx(alone.mean(), abs=1e-5)
        else:  # a segment's first token is predicted by the segment before it
            before = bits(model, text[32 * number - 32 : 32 * number + 1])[-1]
            assert mean == pytest.approx((alone.sum() + before) / 32, abs=1e-5)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_state_that_would_grow_ends_with_its_segment(
    tiny: Make, text: Text, condition: str, monkeypatch: pytest.MonkeyPatch
):
    model = tiny("titans-mag", window_size=None).double()
    ids, at, sizes = text[:200], torch.arange(200), []

    def watched(*args: Any, **options: Any) -> Iterator[Piece]:
        for part in read_pieces(*args, **options):
            sizes.append(part.state.nbytes())
            yield part

    monkeypatch.setattr("miras.evaluate.stream.read_pieces", watched)
    curve = stream_curve(model, ids, condition, segment=40, warm=100, bins=1, piece=16)
    masks = {"frozen": {"write": at < 0}, "frozen-warmed": {"write": at < 100}}.get(condition, {})
    wanted = bits(model, ids, reset=at % 40 == 0, **masks)
    assert curve.mean == pytest.approx(wanted.mean(), abs=1e-6)
    assert max(sizes) == max(sizes[:3]) and len(sizes) == 15


def test_an_attention_only_model_does_not_notice_freezing(tiny: Make, text: Text):
    model = tiny("transformer")
    assert stream_curve(model, text[:200], "frozen").mean == stream_curve(model, text[:200]).mean


def test_bytes_are_those_of_the_text(tiny: Make, text: Text, tmp_path: Path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    words = text.tobytes().decode(errors="ignore") + " naïve — “café” 日本語 🙂🙂"
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet)
    made.train_from_iterator([words], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer(tmp_path)
    model = tiny(vocab_size=tokenizer.vocab_size)
    ids = tokenizer.encode(words)
    total = bits(model, ids).sum()
    for piece in (8, 64, 5000):
        curve = stream_curve(model, ids, piece=piece, tokenizer=tokenizer)
        # All bytes but the first token's, to which its piece gives an even share.
        assert abs(curve.num_bytes - len(words.encode())) < 4
        assert curve.num_tokens == len(ids) - 1
        assert curve.mean == pytest.approx(total / len(words.encode()), rel=3e-3)


@pytest.mark.parametrize(("tokens", "bins"), [(2, 100), (3, 100), (50, 49), (50, 50), (50, 1), (201, 100)])
def test_every_bin_has_a_number(tiny: Make, text: Text, tokens: int, bins: int):
    curve = stream_curve(tiny(), text[:tokens], bins=bins)
    assert len(curve.positions) == len(curve.bits_per_byte) <= bins
    assert np.isfinite(curve.bits_per_byte).all()


def test_a_memory_mapped_text_is_scored_and_progress_told(tiny: Make, text: Text, tmp_path: Path):
    text[:100].tofile(tmp_path / "ids")
    told: list[int] = []
    mapped = np.memmap(tmp_path / "ids", dtype=np.uint8, mode="r")
    curve = stream_curve(tiny(), mapped, piece=48, progress=told.append)
    assert curve.mean == stream_curve(tiny(), text[:100], piece=48).mean
    assert told == [48, 96, 100]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"condition": "thawed"}, "unknown condition 'thawed'; known are learning, frozen"),
        ({"segment": 0}, "segment must be at least 1"),
        ({"warm": -1}, "warm must not be negative"),
        ({"bins": 0}, "bins must be at least 1"),
        ({"tokens": np.array([5])}, "at least 2 tokens"),
    ],
)
def test_values_without_sense_are_refused(tiny: Make, options: dict[str, object], reason: str):
    with pytest.raises(ValueError, match=reason):
        stream_curve(tiny(), **({"tokens": np.array([1, 2, 3])} | options))  # pyright: ignore
