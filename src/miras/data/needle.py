"""Needles in a haystack, in bytes: sentences with a value each, hidden in filler, and a question at
the end.

After RULER's NIAH tasks (S-NIAH-1 to 3 and MK-NIAH-1), with wording short enough for a context of
128 bytes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from miras.data.batches import Batch
from miras.data.fillers import FILLERS, NOISE, Book, Filler


@dataclass(frozen=True)
class Needle:
    """A key and its value; `kind` is "number", "word" or "code"."""

    key: str
    value: str
    kind: str = "number"

    @property
    def sentence(self) -> bytes:
        return f"The special magic {self.kind} for {self.key} is: {self.value}. ".encode()

    @property
    def question(self) -> bytes:
        """The question, up to the value."""
        return f"What is the special magic {self.kind} for {self.key}? ".encode()


@dataclass(frozen=True)
class NeedleSample:
    """One haystack, `tokens` (length,) uint8: the prompt, and from `answer` on the requested value.

    `answers` are the positions of all requested values, including the last.
    """

    tokens: NDArray[np.uint8]
    answer: slice
    key: str
    value: str
    # where in the filler the needle is, from 0 (first) to 1 (right before the question)
    depth: float
    needles: tuple[Needle, ...] = ()
    answers: tuple[slice, ...] = ()

    @property
    def text(self) -> bytes:
        return self.tokens.tobytes()

    @property
    def prompt(self) -> NDArray[np.uint8]:
        """(length - bytes of the value,): everything a model may read before it answers."""
        return self.tokens[: self.answer.start]

    def solved_by(self, generated: ArrayLike | bytes) -> bool:
        """Whether the continuation of the prompt, ids or bytes, begins with the complete value."""
        ids = list(generated) if isinstance(generated, bytes) else np.asarray(generated).reshape(-1).tolist()
        return ids[: len(self.value)] == list(self.value.encode())


@dataclass(frozen=True)
class NeedleTask:
    """Haystacks of exactly `length` bytes, including question and answer; each depends only on
    (seed, index).

    `needles` are hidden, with different keys; the question at the end asks for one. With more than
    one of `questions` the others are in the filler after all needles, with their answers. Kinds of
    key and value are drawn for each needle from `keys` ("letters", "word", "number", "code") and
    `values` ("number", "word", "code"); `digits` of a value that is a number (RULER has 7),
    `key_letters` of a key of letters. `filler`: one of the package's by name, a Filler, your own
    text (from a random sentence on, repeated if it is too short) or None for RULER's five noise
    sentences. `depth` in [0, 1] fixes the position of the requested needle, at the nearest sentence
    boundary; None draws it uniformly. ValueError if `length` is too small.
    """

    length: int
    digits: int = 5
    key_letters: int = 3
    filler: bytes | str | Filler | None = None
    depth: float | None = None
    needles: int = 1
    questions: int = 1
    keys: tuple[str, ...] = ("letters",)
    values: tuple[str, ...] = ("number",)

    def __post_init__(self) -> None:
        for name, top in {"digits": 18, "key_letters": 64, "needles": 1000, "questions": 1000}.items():
            if not 1 <= getattr(self, name) <= top:
                raise ValueError(f"`{name}` must be in 1..{top}, got {getattr(self, name)}.")
        for name, known in {"keys": KEYS, "values": VALUES}.items():
            unknown = [kind for kind in getattr(self, name) if kind not in known]
            if unknown or not getattr(self, name):
                raise ValueError(
                    f"`{name}` must be one or more of {', '.join(known)}, got {getattr(self, name)!r}."
                )
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"`depth` must be in [0, 1] or None (a random one), got {self.depth}.")
        if isinstance(self.filler, bytes) and not self.filler.strip():
            raise ValueError("`filler` has no text. Give some, or None for the noise sentences.")
        if isinstance(self.filler, str) and self.filler not in FILLERS:
            raise ValueError(f"`filler` must be one of {', '.join(FILLERS)}, got {self.filler!r}.")
        if self.length < self.min_length:
            raise ValueError(
                f"`length` must be at least {self.min_length} bytes for {self.digits} digits and "
                f"{self.key_letters} key letters, {self.needles} needle{'s' * (self.needles > 1)} and "
                f"{self.questions} question{'s' * (self.questions > 1)}, got {self.length}. Take more, or a shorter "
                f"key or value."
            )

    @property
    def min_length(self) -> int:
        """The bytes of needles, questions and answers, without any filler."""
        key = "k" * max(self._widest(kind, self.key_letters) for kind in self.keys)
        longest = [Needle(key, "v" * self._widest(kind, self.digits), kind) for kind in self.values]
        sentence = max(len(n.sentence) for n in longest)
        question = max(len(n.question) + len(n.value) for n in longest)
        return self.needles * sentence + self.questions * (question + 2) - 1

    @property
    def source(self) -> Filler:
        """The filler that hides the needles."""
        if isinstance(self.filler, str):
            return FILLERS[self.filler]
        return (
            Book(self.filler or NOISE)
            if self.filler is None or isinstance(self.filler, bytes)
            else self.filler
        )

    def sample(self, seed: int, index: int) -> NeedleSample:
        """Haystack number `index` of `seed`; keys and values are the same for every length."""
        rng = np.random.default_rng([seed, index])
        needles = self._needles(rng)
        # No needle is asked for twice before the others: its answer could be copied.
        order = rng.permutation(self.needles).tolist() if self.needles > 1 else [0]
        asked, *others = (order[i % self.needles] for i in range(self.questions))
        last = b" " + needles[asked].question
        fixed = sum(len(n.sentence) for n in needles) + len(last) + len(needles[asked].value)
        fixed += sum(len(needles[n].question) + len(needles[n].value) + 2 for n in others)
        size = self.length - fixed
        hay = self.source.text(size, rng)
        places = _boundaries(hay)
        at = [int(places[rng.integers(len(places))]) for _ in needles]
        if self.depth is not None:
            at[asked] = int(places[np.abs(places - self.depth * size).argmin()])
        # Insertions: (position, 0 for a needle and 1 for a question, which needle).
        put = [(place, 0, n) for n, place in enumerate(at)]
        # After all needles: a question right after its own needle could be answered from the last
        # tokens.
        behind = places[places >= max(at)]
        put += [(int(behind[rng.integers(len(behind))]), 1, n) for n in others]
        parts: list[bytes] = []
        answers: list[slice] = []
        made = done = 0
        for place, question, n in [*sorted(put), (size, 2, asked)]:
            needle, value = needles[n], needles[n].value.encode()
            before = hay[done:place] + (needle.sentence, needle.question, last)[question]
            parts.append(before)
            made, done = made + len(before), place
            if question:
                answers.append(slice(made, made + len(value)))
                parts.append(value if question == 2 else value + b". ")
                made += len(parts[-1])
        return NeedleSample(
            tokens=np.frombuffer(b"".join(parts), dtype=np.uint8),
            answer=answers[-1],
            key=needles[asked].key,
            value=needles[asked].value,
            depth=at[asked] / size if size else 0.0,
            needles=tuple(needles),
            answers=tuple(answers),
        )

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """(batch_size, length): samples step * batch_size and on, weight 1 where the target is in
        an answer."""
        first = step * batch_size
        samples = [self.sample(seed, index) for index in range(first, first + batch_size)]
        tokens = np.stack([sample.tokens for sample in samples]).astype(np.int64)
        targets = np.zeros_like(tokens)
        targets[:, :-1] = tokens[:, 1:]
        weight = np.zeros(tokens.shape, dtype=np.float32)
        for row, sample in enumerate(samples):
            for answer in sample.answers:
                # Position t predicts byte t + 1: the last byte of the question predicts the value's
                # first.
                weight[row, answer.start - 1 : answer.stop - 1] = 1
        reset = np.zeros(tokens.shape, dtype=np.bool_)
        reset[:, 0] = True
        return Batch(tokens, targets, np.ones_like(reset), reset, weight)

    def _needles(self, rng: np.random.Generator) -> list[Needle]:
        found: list[Needle] = []
        while len(found) < self.needles:
            key = KEYS[_one(self.keys, rng)](self.key_letters, rng)
            kind = _one(self.values, rng)
            value = VALUES[kind](self.digits, rng)
            if all(key != needle.key for needle in found):
                found.append(Needle(key, value, kind))
        return found

    @staticmethod
    def _widest(kind: str, size: int) -> int:
        return {"word": 8, "code": 9}.get(kind, size)


def _one(kinds: tuple[str, ...], rng: np.random.Generator) -> str:
    # Of one kind nothing is drawn.
    return kinds[int(rng.integers(len(kinds))) if len(kinds) > 1 else 0]


def _letters(size: int, rng: np.random.Generator) -> str:
    return "".join(chr(97 + letter) for letter in rng.integers(26, size=size))


def _number(size: int, rng: np.random.Generator) -> str:
    return str(rng.integers(10 ** (size - 1), 10**size))


def _word(size: int, rng: np.random.Generator) -> str:
    """Two or three syllables, 4 to 8 letters."""
    draws = rng.integers(1 << 30, size=(int(rng.integers(2, 4)), 3)).tolist()
    word = "".join("bcdfghklmnprstvwz"[a % 17] + "aeiou"[b % 5] + "nrslt....."[c % 10] for a, b, c in draws)
    return word.replace(".", "")[:8]


def _code(size: int, rng: np.random.Generator) -> str:
    """Like the beginning of a UUID: 3f9a-07b2."""
    digits = "".join("0123456789abcdef"[d] for d in rng.integers(16, size=8))
    return f"{digits[:4]}-{digits[4:]}"


Kind = Callable[[int, np.random.Generator], str]
"""From a requested size, which not every kind uses, to a text."""

KEYS: dict[str, Kind] = {"letters": _letters, "word": _word, "number": _number, "code": _code}
VALUES: dict[str, Kind] = {"number": _number, "word": _word, "code": _code}


def score(predicted: ArrayLike, batch: Batch) -> NDArray[np.bool_]:
    """(B,) whether all weighted targets are predicted, from ids (B, T) or logits (B, T, V) of one
    forward pass.

    Greedy generation would have the same score: as long as all previous bytes are right, both have
    read the same.
    """
    return (_right(predicted, batch) | (batch.weight == 0)).all(axis=1)


def answered(predicted: ArrayLike, batch: Batch) -> NDArray[np.bool_]:
    """(answers of the batch,) whether all targets of each answer are predicted; arguments as in
    `score`."""
    right, weighted = _right(predicted, batch).reshape(-1), batch.weight.reshape(-1) > 0
    starts = np.flatnonzero(weighted & ~np.concatenate([[False], weighted[:-1]]))
    return np.logical_and.reduceat(right | ~weighted, starts) if len(starts) else np.zeros(0, dtype=np.bool_)


def _right(predicted: ArrayLike, batch: Batch) -> NDArray[np.bool_]:
    ids = np.asarray(predicted)
    ids = ids.argmax(-1) if ids.ndim == 3 else ids
    if ids.shape != batch.targets.shape:
        raise ValueError(
            f"Predictions must be ids {batch.targets.shape} or logits with one more axis, "
            f"got {np.shape(predicted)}."
        )
    return ids == batch.targets


def _boundaries(hay: bytes) -> NDArray[np.int64]:
    """Where a sentence may be inserted: before each sentence, or before each word if there is only
    one sentence."""
    cuts = _after_space(hay, enders=b".!?")
    return cuts if len(cuts) > 1 else _after_space(hay, enders=None)


def _after_space(hay: bytes, enders: bytes | None) -> NDArray[np.int64]:
    """0 and every position after a space or line end that follows one of `enders`, with or without
    a quote."""
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
    """Lengths that grow with success: half of the batches at the longest length reached, the rest
    at shorter ones.

    A value: `update` returns the next one; `to_dict` and `from_dict` are for checkpoints.
    """

    lengths: tuple[int, ...] = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
    threshold: float = 0.8  # running accuracy at which the longest length is raised
    share_at_max: float = 0.5
    smoothing: float = 0.8  # smoothing factor of the running accuracy
    stage: int = 0
    accuracy: float = 0.0  # running accuracy since the last raise

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
        """The curriculum after a batch of `length` (None: the longest) with this accuracy; shorter
        ones change nothing."""
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
