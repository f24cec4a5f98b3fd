"""The options of the commands. This module does not import torch, so --help is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from miras.train.options import ModelOptions

Condition = Literal["learning", "frozen", "frozen-warmed", "reset"]


@dataclass(frozen=True, kw_only=True)
class InfoOptions(ModelOptions):
    """Show a model: its choices, equations, gates, parameters, state and cost.

    Sizes given here replace the model's own.
    """

    model: Positional[str]
    """A preset's name or a model folder."""
    vocab_size: int | None = None
    json: bool = False
    """Print JSON instead of text."""
    trust_remote_code: bool = False
    """Import and run the classes and functions outside miras that the model's config names."""


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """Show every preset as a point of the design space: memory, bias, retention, algorithm, chunk
    and gates."""

    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Measure bits per byte of a long text read as one stream, under several conditions."""

    model: Positional[Path]
    """A model folder."""
    text: tuple[str, ...] = ()
    """Files, .xz .gz .bz2, .zip and tar archives, folders or globs, read one after the other. By
    default the held-out chapters of the embedded novel."""
    conditions: tuple[Condition, ...] = ("learning", "frozen", "frozen-warmed", "reset")
    """learning: memories write throughout. frozen: they never write. frozen-warmed: they write for
    the first `warm` tokens only. reset: memories, convolutions and attention restart every
    `segment` tokens."""
    segment: int = 2048
    """Tokens between two resets. A model with full attention is reset under every condition,
    because its state would grow with every token."""
    warm: int | None = None
    """Tokens before frozen-warmed stops writing; by default half of the text."""
    twin: Path | None = None
    """Another model folder to read the same text with, such as an attention-only model."""
    tokens: int | None = None
    """Tokens to read; all by default."""
    bins: int = 100
    """Points of each curve."""
    piece: int = 2048
    """Tokens read per call; affects memory use, not the results."""
    threads: int = 0
    """Number of torch threads; 0 uses torch's default."""
    trust_remote_code: bool = False
    """Import and run the classes and functions outside miras that the model's config names."""
    json: Path | None = None
    """File to write the curves to."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Continue a text, at constant cost per token."""

    model: Positional[Path]
    """A model folder."""
    prompt: str = ""
    """The text to continue; may be omitted if a state is loaded."""
    tokens: int = 200
    """Tokens to generate."""
    temperature: float = 1.0
    """Sampling temperature; 0 always takes the most likely token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with at least this total probability."""
    seed: int = 0
    compile: bool = False
    """Compile the one-token step first. For long continuations; takes a while and needs a C++
    compiler."""
    threads: int = 0
    """Number of torch threads; 0 uses torch's default."""
    trust_remote_code: bool = False
    """Import and run the classes and functions outside miras that the model's config names."""
    load_state: Path | None = None
    """Continue from this saved state."""
    save_state: Path | None = None
    """File to save the final state to."""


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """Read a text of any length in constant memory while the memory learns, and save its state."""

    model: Positional[Path]
    """A model folder."""
    file: Positional[str]
    """The text, plain or .xz .gz .bz2, also through a pipe; '-' reads standard input."""
    load_state: Path | None = None
    """Continue from this saved state."""
    save_state: Path | None = None
    """File to save the state to, at the end or after Ctrl-C."""
    piece: int = 2048
    """Tokens read per call; affects memory use, not the results."""
    write: bool = True
    """Whether the memories learn."""
    threads: int = 0
    """Number of torch threads; 0 uses torch's default."""
    trust_remote_code: bool = False
    """Import and run the classes and functions outside miras that the model's config names."""
