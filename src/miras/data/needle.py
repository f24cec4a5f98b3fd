"""A needle in a haystack, in bytes: a sentence with a number, hidden in filler, and a question at the end.

After RULER's S-NIAH-1 (single needle), with wording short enough for a context of 128 bytes.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from miras.data.batches import Batch

# The filler of RULER.
NOISE = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
SENTENCE = re.compile(rb"[.!?]['\")]*\s+(?=\S)")
WORD = re.compile(rb"\s+(?=\S)")


@dataclass(frozen=True)
class NeedleSample:
    """One haystack, `tokens` (length,) uint8: the prompt, then at `answer` the digits of the value."""

    tokens: NDArray[np.uint8]
    answer: slice
    key: str
    value: str
    depth: float  # where in the filler the needle is, from 0 (first) to 1 (right before the question)

    @property
    def text(self) -> bytes:
        return self.tokens.tobytes()

    @property
    def prompt(self) -> NDArray[np.uint8]:
        """(length - digits,): everything a model may read before it answers."""
        return self.tokens[: self.answer.start]

    def solved_by(self, generated: ArrayLike | bytes) -> bool:
        """Whether what was generated after the prompt, ids or bytes, begins with every digit of the value."""
        ids = list(generated) if isinstance(generated, bytes) else np.asarray(generated).reshape(-1).tolist()
        return ids[: len(self.value)] == list(self.value.encode())


@dataclass(frozen=True)
class NeedleTask:
    """Haystacks of exactly `length` bytes, question and answer included, each pure in (seed, index).

    `digits` of the value (RULER has 7), `key_letters` of the key. `filler` is text to hide the needle in
    (None: RULER's five noise sentences), a slice of it from a random sentence on, repeated when it is too
    short. `depth` in [0, 1] fixes where the needle is, at the nearest sentence boundary; None draws one
    uniformly. ValueError when `length` is too small.
    """

    length: int
    digits: int = 5
    key_letters: int = 3
    filler: bytes | None = None
    depth: float | None = None

    def __post_init__(self) -> None:
        for name, top in {"digits": 18, "key_letters": 64}.items():
            if not 1 <= getattr(self, name) <= top:
                raise ValueError(f"`{name}` must be in 1..{top}, got {getattr(self, name)}.")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"`depth` must be in [0, 1] or None (a random one), got {self.depth}.")
        if self.filler is not None and not self.filler.strip():
            raise ValueError("`filler` has no text. Give some, or None for the noise sentences.")
        if self.length < self.min_length:
            raise ValueError(
                f"`length` must be at least {self.min_length} bytes for {self.digits} digits and "
                f"{self.key_letters} key letters, got {self.length}. Take more, or a shorter key or value."
            )

    @property
    def min_length(self) -> int:
        """The bytes of needle, question and answer, without any filler."""
        needle, question = self._sentences("k" * self.key_letters, "0" * self.digits)
        return len(needle) + len(question)

    def sample(self, seed: int, index: int) -> NeedleSample:
        """Haystack number `index` of `seed`; key and value are the same at every length."""
        rng = np.random.default_rng([seed, index])
        key = "".join(chr(97 + letter) for letter in rng.integers(26, size=self.key_letters))
        value = str(rng.integers(10 ** (self.digits - 1), 10**self.digits))
        needle, question = self._sentences(key, value)
        size = self.length - len(needle) - len(question)
        hay = _slice(NOISE if self.filler is None else self.filler, size, rng)
        places = _boundaries(hay)
        if self.depth is None:
            place = int(places[rng.integers(len(places))])
        else:
            place = int(places[np.abs(places - self.depth * size).argmin()])
        data = b"".join([hay[:place], needle, hay[place:], question])
        return NeedleSample(
            tokens=np.frombuffer(data, dtype=np.uint8),
            answer=slice(self.length - self.digits, self.length),
            key=key,
            value=value,
            depth=place / size if size else 0.0,
        )

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """(batch_size, length): samples step * batch_size and on, weight 1 where the target is a digit."""
        first = step * batch_size
        samples = [self.sample(seed, index) for index in range(first, first + batch_size)]
        tokens = np.stack([sample.tokens for sample in samples]).astype(np.int64)
        targets = np.zeros_like(tokens)
        targets[:, :-1] = tokens[:, 1:]
        weight = np.zeros(tokens.shape, dtype=np.float32)
        # Position t predicts byte t + 1: the last byte of the question predicts the first digit.
        weight[:, -self.digits - 1 : -1] = 1
        reset = np.zeros(tokens.shape, dtype=np.bool_)
        reset[:, 0] = True
        return Batch(tokens, targets, np.ones_like(reset), reset, weight)

    @staticmethod
    def _sentences(key: str, value: str) -> tuple[bytes, bytes]:
        needle = f"The special magic number for {key} is: {value}. "
        question = f" What is the special magic number for {key}? {value}"
        return needle.encode(), question.encode()


def score(predicted: ArrayLike, batch: Batch) -> NDArray[np.bool_]:
    """(B,) whether all weighted targets are predicted, by ids (B, T) or logits (B, T, V) of one forward pass.

    It is also what greedy generation would score: as long as all digits before are right, both have read the
    same.
    """
    ids = np.asarray(predicted)
    ids = ids.argmax(-1) if ids.ndim == 3 else ids
    if ids.shape != batch.targets.shape:
        raise ValueError(
            f"Predictions must be ids {batch.targets.shape} or logits with one more axis, "
            f"got {np.shape(predicted)}."
        )
    return ((ids == batch.targets) | (batch.weight == 0)).all(axis=1)


def _slice(text: bytes, size: int, rng: np.random.Generator) -> bytes:
    """`size` bytes of `text`, from a random sentence (or else word) on, going round at its end."""
    at = int(rng.integers(len(text)))
    ahead = text[at : at + 1000]
    ahead += text[: 1000 - len(ahead)]
    found = SENTENCE.search(ahead) or WORD.search(ahead)
    start = (at + found.end()) % len(text) if found else 0
    copies = -(-(start + size) // len(text))
    return text[start : start + size] if copies <= 1 else (text[start:] + text * (copies - 1))[:size]


def _boundaries(hay: bytes) -> NDArray[np.int64]:
    """Where a sentence may be put: before each sentence, or each word where there is one sentence only."""
    cuts = _after_space(hay, enders=b".!?")
    return cuts if len(cuts) > 1 else _after_space(hay, enders=None)


def _after_space(hay: bytes, enders: bytes | None) -> NDArray[np.int64]:
    """0 and every place after a space or line end that follows one of `enders`, with or without a quote."""
    data = np.frombuffer(hay, dtype=np.uint8)
    space = (data == 32) | (data == 10)
    ends = space[:-1] & ~space[1:]
    if enders is not None:
        stop = np.isin(data, np.frombuffer(enders, dtype=np.uint8))
        quote = np.isin(data, np.frombuffer(b"\"')", dtype=np.uint8))
        closed = stop.copy()
        closed[1:] |= quote[1:] & stop[:-1]
        ends[0:1] = False
        ends[1:] &= closed[:-2]
    return np.concatenate([[0], np.flatnonzero(ends) + 1])


@dataclass(frozen=True)
class Curriculum:
    """Lengths that grow with success: half of the batches at the longest reached, the rest at shorter ones.

    A value: `update` returns the next one, `to_dict` and `from_dict` carry it through a checkpoint.
    """

    lengths: tuple[int, ...] = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
    threshold: float = 0.8  # running accuracy at the longest length that raises it
    share_at_max: float = 0.5
    smoothing: float = 0.8  # of the running accuracy: the weight of what was before
    stage: int = 0
    accuracy: float = 0.0  # running, since the last raise

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(int(length) for length in self.lengths))
        if not self.lengths or self.lengths[0] < 1 or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"`lengths` must be positive and rise from one to the next, got {self.lengths}.")
        for name in ("threshold", "share_at_max", "accuracy"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"`smoothing` must be in [0, 1), got {self.smoothing}.")
        if not 0 <= self.stage < len(self.lengths):
            raise ValueError(f"`stage` must be in 0..{len(self.lengths) - 1}, got {self.stage}.")

    @property
    def max_length(self) -> int:
        """The longest length reached so far."""
        return self.lengths[self.stage]

    def length(self, seed: int, step: int) -> int:
        """The length of the batch at `step`."""
        rng = np.random.default_rng([seed, step])
        if self.stage == 0 or rng.random() < self.share_at_max:
            return self.max_length
        return self.lengths[int(rng.integers(self.stage))]

    def update(self, accuracy: float, length: int | None = None) -> "Curriculum":
        """After a batch of `length` (None: the longest) with this accuracy; shorter ones change nothing."""
        if not 0 <= accuracy <= 1:
            raise ValueError(f"`accuracy` must be in [0, 1], got {accuracy}.")
        if length is not None and length != self.max_length:
            return self
        running = self.smoothing * self.accuracy + (1 - self.smoothing) * accuracy
        if running > self.threshold and self.stage + 1 < len(self.lengths):
            return dataclasses.replace(self, stage=self.stage + 1, accuracy=0.0)
        return dataclasses.replace(self, accuracy=running)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "lengths": list(self.lengths)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Curriculum":
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"Unknown curriculum fields {unknown}; allowed: {sorted(known)}.")
        return cls(**fields)
