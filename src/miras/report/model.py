"""Plain-data description of a demo run, the only input the report page needs."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

MEMORY = "memory"
TWIN = "twin"


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of `correct` out of `n` trials, in percent (95 % by default)."""
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"need 0 <= correct <= n and n > 0, got {correct} of {n}")
    share = correct / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


@dataclass(frozen=True)
class Curve:
    """One line of a chart: `x`, `y` of shape (n,), with `low`, `high` and `counts` of shape (n,) or empty.

    `role` is "memory" or "twin" to give the line that model's colour, or empty; NaN in `y` leaves a gap.
    """

    name: str
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    role: str = ""

    def __post_init__(self) -> None:
        n = len(self.x)
        if len(self.y) != n:
            raise ValueError(f"curve {self.name!r}: {n} x values but {len(self.y)} y values")
        for label in ("low", "high", "counts"):
            if len(getattr(self, label)) not in (0, n):
                raise ValueError(f"curve {self.name!r}: {label} must be empty or hold {n} values")
        if bool(self.low) != bool(self.high):
            raise ValueError(f"curve {self.name!r}: give both low and high, or neither")


@dataclass(frozen=True)
class ModelCard:
    """One of the models shown, with its parameter count; `role` is "memory", "twin" or empty."""

    name: str
    parameters: int
    role: str = ""
    note: str = ""


@dataclass(frozen=True)
class Timing:
    """Wall-clock `seconds` that one part of the demo took."""

    label: str
    seconds: float


@dataclass(frozen=True)
class Header:
    """Who ran, when, with what, for how long, and how to do it again."""

    models: list[ModelCard]
    date: str
    commands: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    hardware: str = ""
    title: str = "A memory that learns while it reads"


@dataclass(frozen=True)
class HeadlineRow:
    """One row of the headline table; every cell is text that is shown as given."""

    label: str
    value: str
    comparison: str = ""
    note: str = ""


@dataclass(frozen=True)
class AccuracyPoint:
    """Needle accuracy at one context length (bytes): percent of `n` trials, 95 % interval in percent."""

    context: int
    accuracy: float
    n: int
    low: float
    high: float

    @classmethod
    def from_counts(cls, context: int, correct: int, n: int) -> AccuracyPoint:
        """Build the point and its Wilson interval from `correct` answers out of `n` trials."""
        low, high = wilson_interval(correct, n)
        return cls(context, 100 * correct / n, n, low, high)


@dataclass(frozen=True)
class AccuracySeries:
    """Needle accuracy of one model over context length; `role` is "memory", "twin" or empty."""

    name: str
    points: list[AccuracyPoint]
    role: str = ""


@dataclass(frozen=True)
class NeedleAccuracy:
    """Accuracy over context length, the `command` that measured it, and whether that was before this run.

    `chance` is the accuracy of guessing in percent, drawn as a reference line when given.
    """

    series: list[AccuracySeries]
    precomputed: bool
    command: str
    chance: float | None = None


@dataclass(frozen=True)
class Haystack:
    """Needles found in one kind of text of `context` bytes: percent of `n` trials, for both models."""

    name: str
    context: int
    memory: float
    twin: float
    n: int


@dataclass(frozen=True)
class NeedleAct:
    """Act one: a needle read early in `bytes_read` bytes and asked for at the end.

    `haystack` is what the text around it is made of, `weights` where the models come from, and `others` how many
    needles they find in other texts. `needle_position` (byte offset) and `twin_window` (bytes the twin can see) draw
    the map of the text; the curves run over tokens read: process memory in MB, mean write rate, and the norm of the
    memory.
    """

    needle: str
    key: str
    value: str
    answer: str
    correct: bool
    bytes_read: int
    seconds: float
    peak_memory_mb: float
    twin_answer: str | None = None
    twin_correct: bool | None = None
    question: str = ""
    haystack: str = ""
    weights: str = ""
    others: list[Haystack] = field(default_factory=list)
    needle_position: int | None = None
    twin_window: int | None = None
    accuracy: NeedleAccuracy | None = None
    process_memory: list[Curve] = field(default_factory=list)
    write_rate: list[Curve] = field(default_factory=list)
    memory_norm: list[Curve] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def bytes_per_second(self) -> float:
        """Reading speed in bytes per second."""
        return self.bytes_read / self.seconds if self.seconds > 0 else math.nan


@dataclass(frozen=True)
class ConditionAverage:
    """Average bits per byte over the held-out book under one condition, with an optional interval."""

    condition: str
    bits_per_byte: float
    note: str = ""
    low: float | None = None
    high: float | None = None
    role: str = ""


@dataclass(frozen=True)
class GeneratedText:
    """A prompt and what the model wrote after it."""

    prompt: str
    continuation: str
    settings: str = ""


@dataclass(frozen=True)
class SavedMemory:
    """A memory written to `file` (`bytes` long) and the largest output difference after loading it again."""

    file: str
    bytes: int
    max_difference: float
    fresh_process: bool = True
    compared: str = ""


@dataclass(frozen=True)
class LearningAct:
    """Act two: training loss, bits per byte along a held-out book, generated text and the saved memory.

    `loss` runs over `loss_x`; `held_out` runs over the byte position in the book, one curve a condition.
    """

    loss: list[Curve] = field(default_factory=list)
    loss_x: str = "training bytes"
    held_out: list[Curve] = field(default_factory=list)
    averages: list[ConditionAverage] = field(default_factory=list)
    fair_reading: list[str] = field(default_factory=list)
    book: str = ""
    generated: GeneratedText | None = None
    saved: SavedMemory | None = None


@dataclass(frozen=True)
class SurpriseLayer:
    """One kind of surprise, `values` of shape (characters,) in `unit`, not negative; NaN means not measured.

    `kind` is "momentary", "accumulated" or "predictive" (or another word, then give `explanation`).
    """

    kind: str
    unit: str
    values: list[float]
    explanation: str = ""


@dataclass(frozen=True)
class SurprisePage:
    """Act three: a page of text and one or more layers with one value for each of its characters."""

    text: str
    layers: list[SurpriseLayer]
    source: str = ""
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for layer in self.layers:
            if len(layer.values) != len(self.text):
                raise ValueError(
                    f"layer {layer.kind!r} holds {len(layer.values)} values for {len(self.text)} characters"
                )


@dataclass(frozen=True)
class DemoReport:
    """Everything the page shows; an act that was not run is None."""

    header: Header
    headline: list[HeadlineRow] = field(default_factory=list)
    needle: NeedleAct | None = None
    learning: LearningAct | None = None
    surprise: SurprisePage | None = None
    method: list[str] = field(default_factory=list)

    def to_json(self, indent: int | None = None) -> str:
        """Return standard JSON text, with numbers that are not finite written as null."""
        return json.dumps(_encode(self), ensure_ascii=False, allow_nan=False, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> DemoReport:
        """Read what `to_json` wrote; a null where a number belongs becomes NaN."""
        return _decode(cls, json.loads(text), "report")


def _encode(value: Any) -> Any:
    """Turn dataclasses, lists and numbers into what the json module writes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): _encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Rebuild a value of the annotated type `kind` from parsed JSON, naming the place in errors."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _decode(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, got {type(value).__name__}")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise ValueError(f"{where}: unknown fields {', '.join(unknown)}")
        return typing.cast(Any, kind)(**{k: _decode(hints[k], v, f"{where}.{k}") for k, v in value.items()})
    if origin is list:
        return [_decode(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        return {k: _decode(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and value is None:
        return math.nan
    return value
