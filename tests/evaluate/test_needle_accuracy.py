"""A needle is found when greedy generation would write it, and the interval is Wilson's."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

import miras
from miras.data.needle import NeedleSample, NeedleTask
from miras.evaluate import needle_accuracy, wilson
from miras.nn.lm import LM
from miras.nn.reading import read_pieces
from miras.stream import generate, read

Make = Callable[..., LM]


class Answered(NeedleTask):
    """Haystacks whose asked-for digits are what `model` writes, but for the samples in `wrong`."""

    def __init__(self, model: LM, wrong: set[int], length: int = 150, digits: int = 3) -> None:
        super().__init__(length, digits=digits)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "wrong", wrong)

    def sample(self, seed: int, index: int) -> NeedleSample:
        sample = super().sample(seed, index)
        tokens = sample.tokens.copy()
        for digit in range(self.digits):
            at = sample.answer.start + digit
            (tokens[at],) = generate(self.model, tokens[:at], 1, temperature=0)  # pyright: ignore
            if index in self.wrong and digit == index % self.digits:  # pyright: ignore
                tokens[at] ^= 1  # and the digits behind it are right again
        return replace(sample, tokens=tokens)


@pytest.mark.parametrize("piece", [4, 149, 2048])
def test_the_score_is_that_of_greedy_generation(tiny: Make, piece: int):
    model = tiny().double()
    result = needle_accuracy(model, Answered(model, {1, 2, 3}), n=7, batch_size=3, piece=piece)
    assert (result.length, result.n, result.correct) == (150, 7, 4)
    assert result.accuracy == 4 / 7 and (result.low, result.high) == wilson(4, 7)
    assert result.track is None and result.seconds > 0


def test_samples_are_those_of_the_task(tiny: Make):
    model = tiny()
    told: list[int] = []
    task = Answered(model, {4})
    assert needle_accuracy(model, task, n=5, batch_size=2, seed=9, progress=told.append).correct == 4
    assert told == [2, 4, 5]
    assert needle_accuracy(model, NeedleTask(150), n=3).correct == 0


def test_values_of_different_lengths_are_scored_whole(tiny: Make):
    model = tiny()
    task = NeedleTask(300, values=("word", "code"), needles=2, questions=2)
    samples = [task.sample(0, index) for index in range(4)]
    assert len({s.answer.start for s in samples}) > 1
    tokens = np.stack([s.tokens for s in samples])
    for piece in (64, 512):
        parts = list(read_pieces(model, tokens, piece=piece))
        predicted = np.concatenate([p.predicted for p in parts], 1)
        right = [(predicted[i, s.answer] == tokens[i, s.answer]).all() for i, s in enumerate(samples)]
        told = needle_accuracy(model, task, n=4, batch_size=4, piece=piece)
        assert told.correct == sum(right) == 0

    class Known(NeedleTask):
        """The same haystacks, with what the model says written in as the answers of all but the first."""

        def sample(self, seed: int, index: int) -> NeedleSample:
            sample = task.sample(seed, index)
            said = sample.tokens.copy()
            for at in range(sample.answer.start, sample.answer.stop - (index == 0)):
                (said[at],) = generate(model, said[:at], 1, temperature=0)
            return replace(sample, tokens=said)

    assert needle_accuracy(model, Known(300), n=4, batch_size=4, piece=64).correct >= 3


def test_the_track_is_the_mean_of_the_observation(tiny: Make):
    model, task = tiny(), NeedleTask(200, digits=2)
    result = needle_accuracy(model, task, n=4, batch_size=4, piece=48, track=True, bins=10)
    tokens = np.stack([task.sample(0, index).tokens for index in range(4)])
    seen = read(model, tokens, observe=True).seen
    assert seen is not None and result.track is not None

    def means(values: NDArray[np.float32]) -> list[float]:
        return values.mean((0, 1)).reshape(10, 20).mean(1).tolist()

    assert set(result.track.weight) == set(result.track.write_rate) == {"layers.0", "layers.1"}
    for layer in seen.layers():
        here = seen[layer]
        assert result.track.weight[layer] == pytest.approx(means(here["weight"].numpy()), rel=1e-3)
        rate = (here["lr.w1"].numpy() + here["lr.w2"].numpy()) / 2
        assert result.track.write_rate[layer] == pytest.approx(means(rate), rel=1e-3)
    assert result.track.positions == tuple(10.0 + 20 * i for i in range(10))


def test_tracking_changes_no_score_and_leaves_an_outer_observation_alone(tiny: Make):
    model = tiny()
    task = Answered(model, {0})
    with miras.observe() as outer:
        tracked = needle_accuracy(model, task, n=3, track=True, bins=3)
    assert tracked.correct == needle_accuracy(model, task, n=3).correct == 2
    # What it saw is the greedy generation that made the answers.
    assert outer["layers.0"]["weight"].shape[-1] == 3 * (148 + 149 + 150)
    with miras.observe() as outer:
        needle_accuracy(model, NeedleTask(150), n=1)
    assert outer["layers.0"]["weight"].shape[-1] == 150


def test_an_attention_only_model_has_no_track(tiny: Make):
    track = needle_accuracy(tiny("transformer"), NeedleTask(150), n=2, track=True).track
    assert track is not None and track.weight == {} and track.write_rate == {}


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson(correct: int, n: int, low: float, high: float):
    assert wilson(correct, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("name", ["n", "batch_size", "bins"])
def test_sizes_below_one_are_refused(tiny: Make, name: str):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        needle_accuracy(tiny(), NeedleTask(150), **{name: 0})  # pyright: ignore
