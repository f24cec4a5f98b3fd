"""The mask is looked at by eye: what carries weight decodes to the digits and to nothing else."""

import re
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miras.data import FILLERS, Curriculum, Filler, NeedleTask, load_novel, mixture, score
from miras.data.fillers import NOISE
from miras.data.needle import _boundaries, answered

BOOK = load_novel().heldout
KINDS = ("letters", "number", "word", "code")


@given(length=st.integers(92, 3000), index=st.integers(0, 10**6), book=st.booleans())
def test_a_sample_is_one_needle_in_filler_of_exactly_that_length(length: int, index: int, book: bool):
    sample = NeedleTask(length, filler=BOOK if book else None).sample(3, index)
    text = sample.text.decode()
    assert sample.tokens.shape == (length,) and sample.tokens.dtype == np.uint8
    needle, question = (
        f"The special magic number for {sample.key} is: {sample.value}. ",
        f" What is the special magic number for {sample.key}? {sample.value}",
    )
    assert text.count(needle) == 1 and text.endswith(question)
    assert text.count(sample.value) == 2 and text.count("magic") == 2
    assert len(sample.key) == 3 and sample.key.isalpha() and sample.key.islower()
    assert len(sample.value) == 5 and 10_000 <= int(sample.value) <= 99_999
    assert sample.tokens[sample.answer].tobytes().decode() == sample.value
    assert sample.prompt.tobytes().decode() + sample.value == text

    # Without the needle the filler is a stretch of the source; the needle stands before one of its words.
    place = text.index(needle)
    hay = text[:place] + text[place + len(needle) : -len(question)]
    source = (BOOK if book else NOISE * 50).decode("latin-1")
    assert hay.encode().decode("latin-1") in source + source[:3000]
    assert place == 0 or text[place - 1] in " \n"
    assert sample.depth == (place / len(hay) if hay else 0)


@given(
    length=st.integers(100, 400),
    digits=st.integers(1, 7),
    letters=st.integers(1, 5),
    step=st.integers(0, 1000),
)
def test_weight_is_on_the_digits_and_on_nothing_else(length: int, digits: int, letters: int, step: int):
    task = NeedleTask(length, digits=digits, key_letters=letters)
    batch = task.batch(7, step, 3)
    assert all(field.shape == (3, length) for field in batch)
    for row in range(3):
        sample = task.sample(7, 3 * step + row)
        weighted = batch.weight[row] == 1
        assert bytes(batch.targets[row][weighted].tolist()).decode() == sample.value
        assert weighted.sum() == batch.weight[row].sum() == digits
        assert bytes(batch.tokens[row][weighted].tolist()).decode() == " " + sample.value[:-1]
        assert (batch.tokens[row] == sample.tokens).all()
    assert (batch.targets[:, :-1] == batch.tokens[:, 1:]).all() and (batch.targets[:, -1] == 0).all()
    assert batch.valid.all() and batch.reset[:, 0].all() and not batch.reset[:, 1:].any()
    assert (batch.tokens.dtype, batch.weight.dtype, batch.reset.dtype) == (np.int64, np.float32, np.bool_)


def test_everything_fits_128_bytes():
    assert NeedleTask(128).min_length == 92 and NeedleTask(128, digits=7).min_length == 96
    NeedleTask(92).sample(0, 0)
    with pytest.raises(ValueError, match=r"at least 92 bytes.*got 91"):
        NeedleTask(91)


def test_a_depth_is_kept_and_a_random_one_is_uniform():
    for depth in (0.0, 0.25, 0.5, 1.0):
        assert abs(NeedleTask(4000, depth=depth).sample(0, 1).depth - depth) < 0.01
        assert abs(NeedleTask(20_000, depth=depth, filler=BOOK).sample(0, 1).depth - depth) < 0.02
    depths = [NeedleTask(2048).sample(0, index).depth for index in range(400)]
    counts = np.histogram(depths, bins=4, range=(0, 1))[0]
    assert counts.min() > 60, counts


def test_needles_stand_between_sentences():
    hay = b'One. "Two!" she said.\nThree? (Four.) "Five" six 3.5 e.g.'
    starts = [b"One", b'"Two', b"she", b"Three", b"(Four", b'"Five']
    assert [hay[cut:].startswith(start) for cut, start in zip(_boundaries(hay), starts, strict=True)] == [
        True
    ] * 6
    assert _boundaries(b"no end of it").tolist() == [0, 3, 7, 10], "one sentence: between its words"
    assert _boundaries(b"").tolist() == _boundaries(b"word").tolist() == [0]


def test_slices_are_from_everywhere_in_the_book():
    task = NeedleTask(600, filler=BOOK, depth=0.0)
    hays = [task.sample(0, index).text.split(b". ", 1)[1][:300] for index in range(60)]
    counts = np.histogram([(BOOK + BOOK[:600]).index(hay) for hay in hays], bins=4, range=(0, len(BOOK)))[0]
    assert counts.sum() == 60 and counts.min() > 5, counts


def test_samples_do_not_repeat_and_lengths_share_their_needles():
    task = NeedleTask(128)
    texts = {task.sample(seed, index).text for seed in range(3) for index in range(100)}
    assert len(texts) == 300
    long, short = NeedleTask(2048).sample(0, 5), task.sample(0, 5)
    assert (long.key, long.value) == (short.key, short.value)


def test_a_fresh_process_agrees():
    code = "from miras.data import NeedleTask; print(NeedleTask(500).sample(4, 17).text.decode())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == NeedleTask(500).sample(4, 17).text.decode() + "\n"


def test_a_million_bytes_take_no_time():
    for filler in (None, BOOK):
        task = NeedleTask(1_000_000, filler=filler)
        start = time.perf_counter()
        assert len(task.sample(0, 0).text) == 1_000_000
        assert time.perf_counter() - start < 1


def test_score_wants_every_digit_and_looks_at_nothing_else():
    task = NeedleTask(160)
    batch = task.batch(0, 0, 4)
    predicted = np.where(batch.weight == 1, batch.targets, 0)
    assert score(predicted, batch).tolist() == [True] * 4
    for row in range(1, 4):
        predicted[row, 160 - 6 + row] = 0  # the first, second or third digit is wrong
    predicted[0, -1] = predicted[0, 10] = 99  # behind and before the answer
    predicted[1] = batch.targets[1]
    assert score(predicted, batch).tolist() == [True, True, False, False]
    assert (score(np.eye(256)[predicted], batch) == score(predicted, batch)).all()
    with pytest.raises(ValueError, match="Predictions must be"):
        score(predicted[:, 1:], batch)


def test_generated_answers():
    sample = NeedleTask(128).sample(0, 0)
    value = sample.value.encode()
    assert sample.solved_by(value) and sample.solved_by(list(value)) and sample.solved_by(value + b"0. The")
    assert (
        not sample.solved_by(value[:-1]) and not sample.solved_by(b" " + value) and not sample.solved_by([])
    )


@pytest.mark.parametrize("filler", [*FILLERS, mixture()], ids=str)
@given(
    length=st.integers(1500, 1900),
    needles=st.integers(1, 5),
    questions=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=6)
def test_several_needles_and_questions(
    filler: str | Filler, length: int, needles: int, questions: int, seed: int
):
    task = NeedleTask(
        length,
        filler=filler,
        needles=needles,
        questions=questions,
        keys=KINDS,
        values=KINDS[1:],
    )
    sample = task.sample(seed, 1)
    text = sample.text
    assert len(text) == length and len(sample.needles) == needles and len(sample.answers) == questions
    assert len({n.key for n in sample.needles}) == needles
    questions_begin = text.index(b"What is the special magic")
    for needle in sample.needles:
        assert text[:questions_begin].count(needle.sentence) == 1
    for answer in sample.answers:
        asked = [n for n in sample.needles if text[: answer.start].endswith(n.question)]
        assert len(asked) == 1 and text[answer].decode() == asked[0].value
        read = [text.index(needle.sentence) for needle in sample.needles]
        assert max(read) < answer.start, "asked before all needles are read"
    assert sample.answer == sample.answers[-1] and sample.answer.stop == length
    assert (
        text[sample.answer].decode() == sample.value
        and sample.prompt.tobytes() == text[: sample.answer.start]
    )
    weighted = task.batch(seed, 1, 1).weight[0]
    batch = task.batch(seed, 1, 1)
    assert weighted.sum() == sum(a.stop - a.start for a in sample.answers)
    for answer in sample.answers:
        assert bytes(batch.targets[0, answer.start - 1 : answer.stop - 1].tolist()) == text[answer]


def test_keys_and_values_are_of_every_kind():
    task = NeedleTask(500, keys=KINDS, values=KINDS[1:])
    needles = [task.sample(0, index).needles[0] for index in range(200)]
    for kind, form in {
        "number": r"[1-9]\d{4}",
        "word": "[a-z]{4,8}",
        "code": "[0-9a-f]{4}-[0-9a-f]{4}",
    }.items():
        values = [n.value for n in needles if n.kind == kind]
        assert len(values) > 30 and all(re.fullmatch(form, value) for value in values)
    forms = ("[a-z]{3}", "[a-z]{4,8}", r"\d{3}", "[0-9a-f]{4}-[0-9a-f]{4}")
    assert all(sum(bool(re.fullmatch(form, n.key)) for n in needles) > 25 for form in forms)
    assert sum(bool(re.fullmatch("|".join(forms), n.key)) for n in needles) == 200


def test_the_depth_is_that_of_the_needle_that_is_asked_for():
    task = NeedleTask(8000, needles=4, depth=0.25)
    for index in range(20):
        sample = task.sample(0, index)
        (asked,) = [n for n in sample.needles if n.key == sample.key]
        assert abs(sample.depth - 0.25) < 0.02
        assert abs(sample.text.index(asked.sentence) / 8000 - 0.25) < 0.04


def test_no_needle_is_asked_for_twice_while_others_are_not():
    for index in range(20):
        sample = NeedleTask(1000, needles=4, questions=4).sample(0, index)
        assert len({sample.text[answer] for answer in sample.answers}) == 4


def test_a_needle_asked_for_is_any_of_them():
    samples = [NeedleTask(1000, needles=4).sample(0, index) for index in range(200)]
    counts = np.bincount([[n.key for n in s.needles].index(s.key) for s in samples], minlength=4)
    assert counts.min() > 25, counts


def test_answers_are_scored_one_by_one():
    batch = NeedleTask(600, needles=3, questions=3).batch(0, 0, 2)
    assert answered(batch.targets, batch).tolist() == [True] * 6
    predicted = batch.targets.copy()
    places = np.flatnonzero(batch.weight[1])
    predicted[1, places[5]] ^= 1  # the first digit of the second answer of the second haystack
    assert answered(predicted, batch).tolist() == [True, True, True, True, False, True]
    assert score(predicted, batch).tolist() == [True, False]


def test_wrong_tasks_are_refused():
    for wrong in (
        {"digits": 0},
        {"digits": 19},
        {"key_letters": 0},
        {"depth": 1.1},
        {"filler": b" \n"},
        {"filler": "poems"},
        {"needles": 0},
        {"questions": 0},
        {"keys": ("names",)},
        {"values": ()},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            NeedleTask(500, **wrong)


def test_curriculum_rises_when_the_longest_is_solved():
    now = Curriculum(lengths=(128, 256, 512), smoothing=0.5)
    assert now.max_length == 128 and {now.length(0, step) for step in range(50)} == {128}
    assert now.update(1.0).stage == 0 and now.update(1.0).update(1.0).stage == 0, ".5, .75: not yet .8"
    up = now.update(1.0).update(1.0).update(1.0)
    assert (up.stage, up.accuracy, up.max_length) == (1, 0.0, 256)
    assert now.stage == 0, "a value, not a counter"
    assert up.update(1.0, length=128) == up, "a shorter batch says nothing about the longest"
    assert up.update(1.0, length=256) == up.update(1.0) != up
    for _ in range(20):
        up = up.update(1.0)
    assert up.stage == 2 and up.accuracy > 0.99


def test_curriculum_lengths_are_half_at_the_longest_and_a_function_of_the_step():
    now = Curriculum(stage=8)
    lengths = [now.length(1, step) for step in range(4000)]
    assert lengths == [now.length(1, step) for step in range(4000)]
    assert abs(lengths.count(2048) / 4000 - 0.5) < 0.05
    assert all(abs(lengths.count(length) / 4000 - 0.5 / 8) < 0.03 for length in now.lengths[:-1])
    assert {Curriculum(stage=3, share_at_max=1.0).length(0, step) for step in range(50)} == {384}


def test_curriculum_goes_through_a_checkpoint():
    import json

    now = Curriculum(stage=2, accuracy=0.37)
    assert Curriculum.from_dict(json.loads(json.dumps(now.to_dict()))) == now
    with pytest.raises(ValueError, match="speed"):
        Curriculum.from_dict({"speed": 1})


def test_wrong_curricula_are_refused():
    for wrong in (
        {"lengths": ()},
        {"lengths": (2, 1)},
        {"lengths": (1, 1)},
        {"threshold": 1.5},
        {"share_at_max": -0.1},
        {"smoothing": 1.0},
        {"stage": 9},
        {"accuracy": 2.0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Curriculum(**wrong)
    with pytest.raises(ValueError, match="accuracy"):
        Curriculum().update(float("nan"))
