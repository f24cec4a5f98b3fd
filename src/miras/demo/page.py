"""The demo's page, one self-contained HTML file, and its contents."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from miras.report.chart import Chart, Curve
from miras.report.explorer import Watched, agreement, heat, page_data, tracks_of
from miras.report.frame import render

STRIPES = 120
_READ = "tokens read (one byte each)"


@dataclass(frozen=True)
class ModelCard:
    """A model of the demo; `role` is "memory" or "twin"."""

    name: str
    parameters: int
    role: str
    note: str


@dataclass(frozen=True)
class HeadlineRow:
    """One row of the table at the top; every cell is shown as given."""

    label: str
    value: str
    comparison: str
    note: str


@dataclass(frozen=True)
class Haystack:
    """Needles found in one kind of text of `context` bytes: percent of `n` trials, for both
    models."""

    name: str
    context: int
    memory: float
    twin: float
    n: int


@dataclass(frozen=True)
class NeedleAct:
    """Act one: a needle read early in `bytes_read` bytes and asked for at the end.

    `haystack` describes the text around it, `retrained` is whether the models were trained in this
    run. Shipped figures: `accuracy` over context length, measured by `command`, and `others`, the
    needles found in other texts. The other curves are over tokens read: process memory in MB, mean
    write rate, and the norm of the memory; for the last two one piece in `watched_of` was observed.
    """

    needle: str
    key: str
    value: str
    answer: str
    twin_answer: str
    question: str
    haystack: str
    needle_position: int
    twin_window: int
    bytes_read: int
    seconds: float
    process_memory: Curve
    write_rate: Curve
    memory_norm: Curve
    watched_of: int
    retrained: bool
    accuracy: list[Curve]
    chance: float
    command: str
    others: list[Haystack]
    notes: list[str] = field(default_factory=list)

    @property
    def correct(self) -> bool:
        """Whether the model with memory gave the value."""
        return self.answer == self.value

    @property
    def twin_correct(self) -> bool:
        """Whether the attention-only twin gave it."""
        return self.twin_answer == self.value

    @property
    def bytes_per_second(self) -> float:
        """Reading speed."""
        return self.bytes_read / self.seconds

    @property
    def peak_memory_mb(self) -> float:
        """Peak memory of the process while reading."""
        return max(self.process_memory.y)

    @property
    def marked(self) -> list[tuple[str, str]]:
        """The needle in parts (text, kind); its key and its value have a kind."""
        starts = sorted((self.needle.find(word), word, kind) for word, kind in self._words if word)
        parts, end = [], 0
        for start, word, kind in starts:
            if start >= end:
                parts += [(self.needle[end:start], ""), (word, kind)]
                end = start + len(word)
        return [*parts, (self.needle[end:], "")]

    @property
    def _words(self) -> tuple[tuple[str, str], ...]:
        return (self.key, "key"), (self.value, "value")


@dataclass(frozen=True)
class ConditionAverage:
    """Average bits per byte over the held-out book under one condition."""

    condition: str
    bits_per_byte: float
    note: str


@dataclass(frozen=True)
class GeneratedText:
    """A prompt and what the model wrote after it."""

    prompt: str
    continuation: str
    settings: str


@dataclass(frozen=True)
class SavedMemory:
    """A memory saved to `file`, and the largest difference of `compared` after a fresh process
    loaded it."""

    file: str
    bytes: int
    max_difference: float
    compared: str


@dataclass(frozen=True)
class LearningAct:
    """Act two: training loss over `loss_x`, bits per byte along a held-out book, a generated text,
    the saved memory."""

    loss: list[Curve]
    loss_x: str
    held_out: list[Curve]
    averages: list[ConditionAverage]
    fair_reading: list[str]
    book: str
    generated: GeneratedText
    saved: SavedMemory


@dataclass(frozen=True)
class SurpriseAct:
    """Act three: a page that was read, and its source."""

    watched: Watched
    source: str


@dataclass(frozen=True)
class DemoReport:
    """Everything the page shows; `timings` are (part, seconds)."""

    title: str
    models: list[ModelCard]
    date: str
    hardware: str
    commands: list[str]
    versions: dict[str, str]
    timings: list[tuple[str, float]]
    headline: list[HeadlineRow]
    needle: NeedleAct
    learning: LearningAct
    surprise: SurpriseAct


def write_report(path: Path, report: DemoReport) -> Path:
    """Write the page and return its path."""
    path.write_text(render_report(report), encoding="utf-8")
    return path


def render_report(report: DemoReport) -> str:
    """The page as self-contained HTML text."""
    watched = report.surprise.watched
    stripes, every = heat(watched.bits, STRIPES)
    averages = [average.bits_per_byte for average in report.learning.averages]
    return render(
        "demo.html",
        package="miras.demo",
        title=report.title,
        report=report,
        charts=charts(report),
        stripes=stripes,
        every=every,
        least=min(averages),
        most=max(averages),
        data=page_data(watched, tracks_of(watched), "predictive"),
        notes=[agreement(watched)],
        plain="".join(watched.pieces),
    )


def charts(report: DemoReport) -> dict[str, Chart]:
    """The charts of acts one and two, by their idents."""
    needle, learning = report.needle, report.learning

    def reading(ident: str, title: str, label: str, curve: Curve, height: int) -> Chart:
        return Chart(ident, title, _READ, label, [curve], height, floor=0)

    found: Sequence[Chart] = (
        Chart(
            "needle-accuracy",
            "Needles found at each text length",
            "context length (bytes, log scale)",
            "needles found (%), with 95 % Wilson intervals",
            needle.accuracy,
            log_x=True,
            floor=0,
            ceiling=100,
            reference=(needle.chance, f"guessing, {needle.chance:.1g} %"),
        ),
        reading(
            "memory-use", "Process memory while reading", "process memory (MB)", needle.process_memory, 240
        ),
        reading("write-rate", "How strongly it writes", "mean write rate", needle.write_rate, 170),
        reading("memory-norm", "How large the memory is", "memory norm |W|", needle.memory_norm, 170),
        Chart("loss", "Training", learning.loss_x, "bits per byte", learning.loss, 280),
        Chart(
            "held-out",
            "Reading a held-out book",
            "position in the book (bytes)",
            "bits per byte, lower is better",
            learning.held_out,
            340,
        ),
    )
    return {chart.ident: chart for chart in found}
