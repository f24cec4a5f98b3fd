"""Every example is taken apart by a plain reading of it, which knows nothing of how it was made."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miras.data.recall import IGNORE, RecallTask


@st.composite
def tasks(draw: st.DrawFn) -> RecallTask:
    pairs = draw(st.integers(1, 12))
    return RecallTask(
        vocab_size=2 * draw(st.integers(pairs + 1, 60)),
        length=2 * draw(st.integers(2 * pairs, 60)),
        pairs=pairs,
        noise=draw(st.booleans()),
    )


@given(task=tasks(), seed=st.integers(0, 2**40), start=st.integers(0, 2**40))
def test_an_example_is_pairs_and_then_each_key_once(task: RecallTask, seed: int, start: int):
    tokens, labels = task.batch(seed, start, 3)
    assert tokens.shape == labels.shape == (3, task.length) and tokens.dtype == labels.dtype == np.int64
    assert tokens.min() >= 0 and tokens.max() < task.vocab_size and IGNORE == -100
    half, context = task.vocab_size // 2, 2 * task.pairs
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        keys, values, rest = row[:context:2], row[1:context:2], row[context:]
        assert len(set(keys)) == len(set(values)) == task.pairs
        assert all(1 <= key < half for key in keys) and all(half <= value for value in values)
        book = dict(zip(keys, values, strict=True))
        at = [place for place, token in enumerate(rest) if token in book]
        assert len(at) == task.pairs and all(place % 2 == 0 for place in at)
        assert {rest[place] for place in at} == set(keys), "each once, and noise is never one of them"
        assert wanted[:context] == [IGNORE] * context
        assert wanted[context:] == [book.get(token, IGNORE) for token in rest]
        if not task.noise:
            assert all(token == 0 for token in rest if token not in book)


@given(task=tasks(), seed=st.integers(0, 1000), start=st.integers(0, 1000))
def test_an_example_depends_on_seed_and_index_alone(task: RecallTask, seed: int, start: int):
    tokens, labels = task.batch(seed, start, 4)
    for row in range(4):
        again = task.batch(seed, start + row, 1)
        assert (again[0] == tokens[row]).all() and (again[1] == labels[row]).all()
        single = task.example(seed, start + row)
        assert (single[0] == tokens[row]).all() and (single[1] == labels[row]).all()


def test_the_global_generator_is_neither_read_nor_moved():
    task = RecallTask(64, 64, 8, noise=True)
    np.random.seed(5)
    first, then = task.batch(0, 0, 2), np.random.random()
    np.random.seed(5)
    assert np.random.random() == then
    assert (task.batch(0, 0, 2)[0] == first[0]).all()


def test_examples_do_not_repeat():
    task = RecallTask(64, 64, 8)
    seen = {task.example(seed, index)[0].tobytes() for seed in range(3) for index in range(100)}
    assert len(seen) == 300


def test_a_fresh_process_agrees():
    code = (
        "from miras.data.recall import RecallTask; print(RecallTask(64, 48, 8, noise=True).batch(4, 17, 2))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{RecallTask(64, 48, 8, noise=True).batch(4, 17, 2)}\n"


def test_small_gaps_are_the_likeliest():
    task = RecallTask(64, 66, 1)
    _, labels = task.batch(0, 0, 4000)
    gap = (labels != IGNORE).argmax(1) - 2
    found = np.bincount(gap // 2, minlength=32) / 4000
    law = np.arange(1, 33) ** -0.99
    law /= law.sum()
    assert np.abs(found - law).max() < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert found[0] > 0.2 and abs(found[16:].sum() - law[16:].sum()) < 0.03

    flat = RecallTask(64, 66, 1, power=1.0).batch(0, 0, 4000)[1]
    spread = np.bincount(((flat != IGNORE).argmax(1) - 2) // 2, minlength=32) / 4000
    assert spread.max() < 0.05 and spread.min() > 0.015

    _, several = RecallTask(64, 128, 8).batch(0, 0, 500)
    asked = (several != IGNORE)[:, 16::2].mean(0)
    assert asked[0] > 0.8 and asked[0] > asked[5] > asked[20] > 0 and asked[40:].mean() < 0.1


def test_keys_draw_their_places_in_the_order_of_the_pairs():
    """The first key's gap follows the law whatever the others do; the last takes what is left."""
    tokens, _ = RecallTask(64, 82, 8).batch(1, 0, 4000)
    first, last = ((tokens[:, 16:] == tokens[:, at, None]).argmax(1) // 2 for at in (0, 14))
    law = np.arange(1, 34) ** -0.99
    law /= law.sum()
    assert np.abs(np.bincount(first, minlength=33) / 4000 - law).max() < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert last.mean() > first.mean() + 2


def test_noise_is_uniform_over_all_but_the_keys():
    task = RecallTask(32, 400, 4, noise=True)
    tokens, labels = task.batch(0, 0, 300)
    rest = tokens[:, 8:][labels[:, 8:] == IGNORE]
    share = np.bincount(rest, minlength=32) / len(rest)
    values = share[16:]
    assert values.max() < 1.1 * values.min() and abs(share[0] / values.mean() - 1) < 0.1
    # One of 15 keys is left out of an example with probability 4 / 15.
    assert np.abs(share[1:16] / values.mean() - 11 / 15).max() < 0.15


def test_the_tightest_sizes_work():
    tokens, labels = RecallTask(vocab_size=10, length=16, pairs=4).batch(0, 0, 5)
    assert (np.sort(tokens[:, 8::2], 1) == [1, 2, 3, 4]).all() and (labels[:, 8::2] >= 5).all()


def test_sizes_that_do_not_fit_are_refused():
    for wrong, words in (
        ({"length": 30}, r"2 \* pairs \+ 2 \* pairs <= length.*at least 32, got 30"),
        ({"length": 63}, "even"),
        ({"vocab_size": 16}, "at least 18, got 16"),
        ({"vocab_size": 65}, "even"),
        ({"pairs": 0}, "pairs"),
        ({"power": 0.0}, "power"),
        ({"power": 1.5}, "power"),
    ):
        with pytest.raises(ValueError, match=words):
            RecallTask(**({"vocab_size": 64, "length": 64, "pairs": 8} | wrong))  # pyright: ignore
    task = RecallTask(64, 64, 8)
    for seed, start, size in ((0, 0, 0), (0, -1, 2), (-1, 0, 2)):
        with pytest.raises(ValueError, match="size"):
            task.batch(seed, start, size)
