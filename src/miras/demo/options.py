"""The options of `miras demo`. This module does not import torch, so --help is fast."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Find a needle in a million bytes, learn to read a novel, and write a report."""

    out: Path = Path("demo")
    """Folder for the report, the model and the saved memory."""
    retrain_needle: bool = False
    """Instead retrain the needle model and its attention-only twin, in a quarter of an hour, and
    write them to OUT."""
    books: Path | None = None
    """With --retrain-needle: a folder of texts to train on in addition to the mixture of
    fillers."""
    needle_bytes: int = 1_000_000
    """Bytes of filler and needle read in act one; fewer on a slow machine."""
    reading_seconds: float = 95.0
    """Seconds of training in act two, for the model and its twin together."""
    seed: int = 0
    threads: int = 0
    """Number of torch threads; 0 uses torch's default."""
