"""Multi-query associative recall: pairs of keys and values, then every key again as a query for its
value.

After zoology's MQAR (Arora et al. 2023, arXiv 2312.04927). T tokens of an example, V the
vocabulary.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
"""The label at positions without a query."""


@dataclass(frozen=True)
class RecallTask:
    """Examples of `length` tokens with `pairs` queries; each depends only on (seed, index).

    Keys are drawn from 1..V/2-1 and values from V/2..V-1, both without replacement. The first
    2 * pairs tokens are key, value, key, value ...; then each key occurs once more, 2 * i tokens
    into the rest. In the order of the pairs, each key draws its i in 0..(T - 2 * pairs)/2 - 1 with
    p(i) ~ (i + 1)^(power - 1) from the free ones: close to 1 / i, uniform for power = 1. All other
    tokens are 0, or with `noise` uniform over all tokens but the example's keys. (In zoology noise
    may be one of the keys, which is then a query without a label, and it comes from another
    generator, so the seed does not determine the example.) ValueError for sizes that do not fit.
    """

    vocab_size: int
    length: int
    pairs: int
    noise: bool = False
    power: float = 0.01

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"RecallTask: `pairs` must be at least 1, got {self.pairs}.")
        if self.vocab_size % 2 or self.vocab_size < 2 * self.pairs + 2:
            raise ValueError(
                f"RecallTask: `vocab_size` must be even, half of it keys from 1 on and half values; for "
                f"{self.pairs} pairs take at least {2 * self.pairs + 2}, got {self.vocab_size}."
            )
        if self.length % 2 or self.length < 4 * self.pairs:
            raise ValueError(
                f"RecallTask: `length` must be even and hold every key twice, 2 * pairs + 2 * pairs <= length; for "
                f"{self.pairs} pairs take at least {4 * self.pairs}, got {self.length}. Or take fewer pairs."
            )
        if not 0 < self.power <= 1:
            raise ValueError(f"RecallTask: `power` must be in (0, 1], 1 for uniform gaps, got {self.power}.")

    def example(self, seed: int, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Example number `index` of `seed`: tokens (T,), labels (T,) as in `batch`."""
        rng = np.random.default_rng([seed, index])
        half, context = self.vocab_size // 2, 2 * self.pairs
        keys = 1 + rng.choice(half - 1, self.pairs, replace=False)
        values = half + rng.choice(half, self.pairs, replace=False)
        places = (self.length - context) // 2
        weight = np.arange(1, places + 1) ** (self.power - 1.0)
        gaps = rng.choice(places, self.pairs, replace=False, p=weight / weight.sum())
        asked = context + 2 * gaps

        tokens = np.zeros(self.length, dtype=np.int64)
        if self.noise:
            others = np.setdiff1d(np.arange(self.vocab_size), keys)
            tokens[context:] = rng.choice(others, self.length - context)
        tokens[:context:2], tokens[1:context:2], tokens[asked] = keys, values, keys
        labels = np.full(self.length, IGNORE, dtype=np.int64)
        labels[asked] = values
        return tokens, labels

    def batch(self, seed: int, start: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Examples start .. start + size - 1 of `seed`: tokens (size, T) and labels (size, T), both
        int64.

        A label is at the key that queries it: the prediction expected at that position, without a
        shift. It is -100 at positions without a query.
        """
        if size < 1 or start < 0 or seed < 0:
            raise ValueError(
                f"RecallTask: `size` must be at least 1, `start` and `seed` at least 0; got {size=}, {start=}, "
                f"{seed=}."
            )
        examples = [self.example(seed, index) for index in range(start, start + size)]
        return np.stack([tokens for tokens, _ in examples]), np.stack([labels for _, labels in examples])
