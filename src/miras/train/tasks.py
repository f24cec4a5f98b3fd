"""Training tasks. A task provides the batch of a step and interprets its loss."""

import dataclasses
import hashlib
import math
from typing import Any, Protocol

import numpy as np
import torch

from miras.data.batches import Batch, Lanes
from miras.data.needle import Curriculum, NeedleTask, answered
from miras.data.tokens import TokenFile
from miras.nn.lm import LMState


class Task(Protocol):
    """Batches by step, and the states of their lanes.

    `states` holds the lanes' states per micro-batch; `finished` gets the predictions of a step and
    returns further metrics; `to_dict` and `restore` are for what a checkpoint must hold besides
    states.
    """

    micro_batches: int
    states: list[LMState | None]

    def batch(self, step: int, micro: int) -> Batch: ...
    def finished(self, step: int, batch: Batch, predicted: torch.Tensor) -> dict[str, float]: ...
    def bits_per_byte(self, nats: float) -> float: ...
    def asks_price(self) -> bool: ...
    def to_dict(self) -> dict[str, Any]: ...
    def restore(self, values: dict[str, Any]) -> None: ...


class TextTask:
    """Next-token prediction on lanes of consecutive text; with `carry`, each lane's state is
    carried on.

    Give `carry=False` for a model whose state grows with every token (`ModelConfig.grows`).
    """

    def __init__(
        self,
        tokens: Any,
        offsets: Any = None,
        *,
        batch_size: int,
        seq_len: int,
        align: int,
        seed: int,
        micro_batches: int = 1,
        carry: bool = True,
        bytes_per_token: float = 1.0,
    ) -> None:
        self.lanes = Lanes(tokens, offsets, batch_size=batch_size, seq_len=seq_len, align=align, seed=seed)
        self.lanes.steps_per_epoch(micro_batches)  # this refuses too few tokens for so many lanes
        self.data = _hash(tokens, offsets)
        self.micro_batches, self.carry, self.bytes_per_token = micro_batches, carry, bytes_per_token
        self.states: list[LMState | None] = [None] * micro_batches

    def batch(self, step: int, micro: int) -> Batch:
        return self.lanes.batch(step, micro, self.micro_batches)

    def finished(self, step: int, batch: Batch, predicted: torch.Tensor) -> dict[str, float]:
        if not self.carry:
            self.states = [None] * self.micro_batches
        return {}

    def bits_per_byte(self, nats: float) -> float:
        return nats / math.log(2) / self.bytes_per_token

    def asks_price(self) -> bool:
        return True

    def to_dict(self) -> dict[str, Any]:
        lanes = self.lanes
        return {
            "kind": "text",
            "data": self.data,
            "batch_size": lanes.batch_size,
            "seq_len": lanes.seq_len,
            "align": lanes.align,
            "seed": lanes.seed,
            "micro_batches": self.micro_batches,
            "carry": self.carry,
        }

    def restore(self, values: dict[str, Any]) -> None:
        _expect(self.to_dict(), values)


class NeedleTraining:
    """Needles in filler, with contexts that grow with success; only the answers are trained on.

    `kind` describes them; its length, needles and questions are replaced by each step's. The
    haystacks of a step have `least` to `crowd` needles, but at most one per `room` bytes, and as
    many questions: a long text then teaches as much as several short ones. `crowd=1` is one needle
    and one question.
    """

    def __init__(
        self,
        *,
        tokens_per_step: int = 4096,
        seed: int = 0,
        curriculum: Curriculum | None = None,
        kind: NeedleTask | None = None,
        crowd: int = 1,
        least: int = 1,
        room: int = 128,
        price_from: float = 0.3,
    ) -> None:
        self.tokens_per_step, self.seed = tokens_per_step, seed
        self.crowd, self.least, self.room = crowd, least, room
        self.curriculum = curriculum or Curriculum()
        self.kind = kind or NeedleTask(self.curriculum.lengths[0])
        self.price_from, self.priced = price_from, False
        self.micro_batches = 1
        self.states: list[LMState | None] = [None]

    def batch(self, step: int, micro: int) -> Batch:
        length = self.curriculum.length(self.seed, step)
        rows = max(1, self.tokens_per_step // length)
        most = max(1, min(self.crowd, length // self.room))
        rng = np.random.default_rng([self.seed, step, 1])
        needles = int(rng.integers(min(self.least, most), most + 1))
        task = dataclasses.replace(self.kind, length=length, needles=needles, questions=needles)
        # Samples are numbered by index, so steps must not overlap whatever their batch size.
        return task.batch(self.seed, step * self.tokens_per_step // rows, rows)

    def finished(self, step: int, batch: Batch, predicted: torch.Tensor) -> dict[str, float]:
        self.states = [None]
        accuracy = float(answered(predicted.numpy(), batch).mean())
        length = batch.tokens.shape[1]
        self.priced = self.priced or accuracy > self.price_from
        self.curriculum = self.curriculum.update(accuracy, length)
        return {"accuracy": accuracy, "length": length, "longest": self.curriculum.max_length}

    def bits_per_byte(self, nats: float) -> float:
        return nats / math.log(2)

    def asks_price(self) -> bool:
        return self.priced

    def to_dict(self) -> dict[str, Any]:
        return self._fixed() | {"curriculum": self.curriculum.to_dict(), "priced": self.priced}

    def _fixed(self) -> dict[str, Any]:
        kind = self.kind
        return {
            "kind": "needle",
            "data": None if kind.filler is None else hashlib.sha256(repr(kind.source).encode()).hexdigest(),
            "tokens_per_step": self.tokens_per_step,
            "seed": self.seed,
            "digits": kind.digits,
            "keys": list(kind.keys),
            "values": list(kind.values),
            "crowd": self.crowd,
            "least": self.least,
            "room": self.room,
        }

    def restore(self, values: dict[str, Any]) -> None:
        # Fields missing in a checkpoint of an older version had their defaults.
        older = {"keys": ["letters"], "values": ["number"], "crowd": 1, "least": 1, "room": 128}
        _expect(self._fixed(), older | values)
        self.curriculum = Curriculum.from_dict(values["curriculum"])
        self.priced = values["priced"]


def _expect(mine: dict[str, Any], values: dict[str, Any]) -> None:
    """Refuse a checkpoint of a task with other batches."""
    if values.get("kind") != mine["kind"]:
        raise ValueError(
            f"the checkpoint was trained on {values.get('kind')!r}, this run trains on {mine['kind']!r}; "
            f"use the options it was started with"
        )
    if values.get("data") != mine["data"]:
        before, now = (str(x)[:12] for x in (values.get("data"), mine["data"]))
        raise ValueError(
            f"the checkpoint was trained on other data (tokens of SHA-256 {before}, now {now}); "
            f"use the text and the tokenizer it was started with"
        )
    other = [n for n in mine if values.get(n) != mine[n]]
    if other:
        raise ValueError(
            "the checkpoint was trained with "
            + ", ".join(f"{n} {values.get(n)!r}, now {mine[n]!r}" for n in other)
            + "; use the options it was started with"
        )


def _hash(tokens: Any, offsets: Any) -> str:
    """SHA-256 of token ids and document ends: equal for equal batches."""
    if isinstance(tokens, TokenFile):
        start, ends = tokens.tokens_sha256.encode(), tokens.documents
    else:
        start = np.ascontiguousarray(tokens).tobytes()
        ends = [0, len(tokens)] if offsets is None else offsets
    return hashlib.sha256(start + np.asarray(ends, dtype=np.int64).tobytes()).hexdigest()


def as_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch's arrays as tensors."""
    return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in batch._asdict().items()}
