"""Fillers are what they say, and nothing that is held out is ever made to train on."""

import lzma
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miras.data import FILLERS, HELDOUT, TRAIN, Filler, load_novel, mixture, read_books
from miras.data.fillers import NOISE, Lorem

KINDS = {**FILLERS, "mixture": mixture(), "books": mixture([b"One book. " * 50, b"Another. " * 20])}
WINDOW = 24
"""Bytes in a row that two texts may not share: longer than any word, shorter than any line."""


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@given(size=st.integers(0, 700), seed=st.integers(0, 10**6))
@settings(max_examples=10)
def test_a_text_has_the_size_asked_for_and_follows_from_the_seed(kind: Filler, size: int, seed: int):
    text = kind.text(size, np.random.default_rng(seed))
    assert len(text) == size and text == kind.text(size, np.random.default_rng(seed))


@pytest.mark.parametrize("name", FILLERS)
def test_texts_of_different_seeds_differ(name: str):
    texts = {FILLERS[name].text(500, np.random.default_rng(seed)) for seed in range(40)}
    # The five sentences can begin with five of them.
    assert len(texts) == 5 if name == "noise" else len(texts) >= 38


def windows(text: bytes) -> set[bytes]:
    return {text[at : at + WINDOW] for at in range(len(text) - WINDOW + 1)}


def test_the_kinds_are_to_train_on_or_held_out():
    assert not set(TRAIN) & set(HELDOUT) and set(TRAIN) | set(HELDOUT) == set(FILLERS)
    assert {type(kind) for kind in mixture().kinds} == {type(FILLERS[name]) for name in TRAIN}
    assert not any(FILLERS[name] in mixture().kinds for name in HELDOUT)


def test_no_text_that_is_held_out_is_made_to_train_on():
    made = [
        FILLERS[name].text(3000, np.random.default_rng([1, seed])) for name in TRAIN for seed in range(60)
    ]
    trained = set().union(*(windows(text) for text in [*made, load_novel().train]))
    for name in HELDOUT:
        held = b"".join(FILLERS[name].text(3000, np.random.default_rng([2, seed])) for seed in range(20))
        shared = windows(held) & trained
        # The novel repeats phrases of its own: "the sergeant and his men, ..."; nothing else shares any.
        assert len(shared) <= (0.01 * len(windows(held)) if name == "chapters" else 0), (
            name,
            list(shared)[:5],
        )
    everything = b"\n".join(made)
    assert not re.search(rb"\d{20}", everything), "rows of digits are held out"
    assert not re.search(rb"\d{4}-\d\d-\d\d \d\d:\d\d", everything), "dates are held out"
    assert load_novel().heldout[:2000] not in load_novel().train


def test_what_is_held_out_is_what_it_says():
    lorem = FILLERS["lorem"].text(5000, np.random.default_rng(0)).decode()
    assert set(re.findall("[a-z]+", lorem[:-20].lower())) <= set(Lorem().words)
    assert FILLERS["noise"].text(300, np.random.default_rng(0)) in NOISE * 5
    assert re.fullmatch(rb"(\d{70}\n)+\d*", FILLERS["digits"].text(1000, np.random.default_rng(0)))
    assert FILLERS["chapters"].text(400, np.random.default_rng(0)) in load_novel().heldout
    assert FILLERS["novel"].text(400, np.random.default_rng(0)) in load_novel().train


def test_a_mixture_has_every_kind_and_switches_sometimes():
    book = b"Call me Ishmael. " * 40
    plain, switched = (mixture([book]).__class__(mixture([book]).kinds, switch) for switch in (0.0, 1.0))
    texts = [plain.text(600, np.random.default_rng(seed)) for seed in range(300)]
    assert 100 < sum(b"Ishmael" in text for text in texts) < 200, "books as often as all else"
    assert sum(text.count(b"Ishmael") in (35, 36) for text in texts) == sum(b"Ishmael" in t for t in texts)
    cut = [switched.text(600, np.random.default_rng(seed)).count(b"Ishmael") for seed in range(300)]
    assert sum(0 < n < 30 for n in cut) > 100


def test_books_are_read_from_a_folder(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"long enough " * 1000)
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"packed book " * 1000))
    (tmp_path / "readme.txt").write_bytes(b"short")
    assert [book[:12] for book in read_books(tmp_path)] == [b"long enough ", b"packed book "]
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.txt.xz").unlink()
    with pytest.raises(ValueError, match="no text of 10,000 bytes"):
        read_books(tmp_path)
