"""The options of `miras demo`. This module does not import torch, so --help is fast."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Find a needle in a million bytes, learn to read a novel, and leave a report to look at."""

    out: Path = Path("demo")
    """Folder for the report, the model and the saved memory."""
    retrain_needle: bool = False
    """Train the needle model and its twin anew, in a quarter of an hour, and put them in OUT
    instead."""
    books: Path | None = None
    """With --retrain-needle: a folder of texts to train on beside the mixture of fillers."""
    needle_bytes: int = 1_000_000
    """Bytes of filler and needle that are read in act one, fewer on a machine that is too slow for
    them."""
    reading_seconds: float = 95.0
    """Seconds of training in act two, of the model and its twin, which take turns."""
    seed: int = 0
    threads: int = 0
    """Number of torch threads; 0 uses torch's default."""
