"""Retrieval accuracy over contexts of any length, at constant memory."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from miras.core.observe import Observation, observe
from miras.data.needle import NeedleTask
from miras.nn.lm import LM
from miras.nn.reading import read_pieces


@dataclass(frozen=True)
class Track:
    """What the memories did along the haystack, averaged over samples and heads.

    positions: (bins,), the middle of each bin in tokens; by layer, write_rate: the mean step size,
    and weight: the mean |W|, each (bins,).
    """

    positions: tuple[float, ...]
    write_rate: dict[str, tuple[float, ...]]
    weight: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class NeedleResult:
    """The number of needles found in n haystacks of `length` bytes; low and high: 95 % interval
    (Wilson)."""

    length: int
    n: int
    correct: int
    accuracy: float
    low: float
    high: float
    seconds: float
    track: Track | None = None


def needle_accuracy(
    model: LM,
    task: NeedleTask,
    *,
    n: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    piece: int = 2048,
    track: bool = False,
    bins: int = 100,
    progress: Callable[[int], None] | None = None,
) -> NeedleResult:
    """The fraction of samples 0 to n - 1 of `seed` whose last answers are, byte by byte, the
    model's most likely tokens.

    The correct answer is fed to the model (teacher forcing): as long as all bytes so far were
    right, greedy generation would have read the same, so the score is equal and takes one reading.
    Memory: batch_size streams and their tokens. `track` also observes the memories; `progress` is
    called with the number of samples done. Raises ValueError for sizes below 1.
    """
    for name, value in {"n": n, "batch_size": batch_size, "bins": bins}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    tracker = _Tracker(task.length, min(bins, task.length))
    correct = 0
    began = time.perf_counter()
    for first in range(0, n, batch_size):
        samples = [task.sample(seed, index) for index in range(first, min(n, first + batch_size))]
        tokens = np.stack([sample.tokens for sample in samples])
        # Values differ in length, so answers begin at different positions.
        asked = np.arange(task.length) >= np.array([[sample.answer.start] for sample in samples])
        found = np.ones(len(samples), dtype=np.bool_)
        pieces = read_pieces(model, tokens, piece=piece)
        while True:
            # A new observation per piece, because it keeps everything it sees.
            with observe() if track else nullcontext() as seen:
                part = next(pieces, None)
            if part is None:
                break
            if seen is not None:
                tracker.add(part.start, seen)
            here = asked[:, part.start : part.start + part.tokens.shape[1]]
            found &= ((part.predicted == part.tokens) | ~here).all(1)
        correct += int(found.sum())
        if progress is not None:
            progress(first + len(samples))
    low, high = wilson(correct, n)
    return NeedleResult(
        length=task.length,
        n=n,
        correct=correct,
        accuracy=correct / n,
        low=low,
        high=high,
        seconds=time.perf_counter() - began,
        track=tracker.track() if track else None,
    )


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the fraction correct / n."""
    z = 1.959963984540054
    share, scale = correct / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass
class _Tracker:
    """Sums of an observation by layer and bin, accumulated piece by piece."""

    length: int
    bins: int
    sums: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)

    def add(self, start: int, seen: Observation) -> None:
        """Add one piece's observation; rows of the sums: values, and counts."""
        for layer in seen.layers():
            values = seen[layer]
            rates = [x for name, x in values.items() if name.split(".")[0] == "lr"]
            for name, tensors in {"write_rate": rates, "weight": [values["weight"]]}.items():
                mean = torch.stack(tensors).double().mean((0, 1, 2)).cpu().numpy()
                at = np.arange(start, start + len(mean)) * self.bins // self.length
                sums = self.sums.setdefault(name, {}).setdefault(layer, np.zeros((2, self.bins)))
                sums[0] += np.bincount(at, mean, minlength=self.bins)
                sums[1] += np.bincount(at, minlength=self.bins)

    def track(self) -> Track:
        middles = (np.arange(self.bins) + 0.5) * self.length / self.bins
        means = {
            name: {layer: tuple((s[0] / s[1]).tolist()) for layer, s in layers.items()}
            for name, layers in self.sums.items()
        }
        return Track(tuple(middles.tolist()), means.get("write_rate", {}), means.get("weight", {}))
