"""The options of `miras report`. This module does not import torch, so --help is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Read a text and write an HTML page: every token coloured by how much it surprised the model.

    The page is one self-contained file with predictive, momentary and accumulated surprise by layer
    and head, an overview strip of the text, and the gates of the memories.
    """

    kind: Positional[Literal["surprise"]]
    """The report to write."""
    model: Positional[Path]
    """A model folder."""
    file: Positional[str]
    """The text, plain or .xz .gz .bz2, also through a pipe; '-' reads standard input."""
    out: Path = Path("surprise.html")
    """The page to write."""
    tokens: int = 50_000
    """Tokens to read from the start of the text; 0 reads all of it, and the page grows with
    them."""
    layers: tuple[int, ...] = ()
    """Memory layers to show, counted from 0; without it all, or as many as a small page has room
    for."""
    load_state: Path | None = None
    """Continue from this saved state."""
    piece: int = 2048
    """Tokens read per call; affects memory use, not the results."""
    threads: int = 0
    """Number of torch threads; 0 uses torch's default."""
    trust_remote_code: bool = False
    """Import and run the classes and functions outside miras that the model's config names."""
