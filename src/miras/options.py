"""What the commands can be told; no torch here, so that help is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from miras.train.options import ModelOptions

Condition = Literal["learning", "frozen", "frozen-warmed", "reset"]


@dataclass(frozen=True, kw_only=True)
class InfoOptions(ModelOptions):
    """Show what a model is: its choices, equations, gates, parameters, state and cost.

    Sizes given here replace the model's own, to see what they would make of it.
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
    """Show every preset as a point of the design space: memory, bias, retention, algorithm, chunk and gates."""

    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Measure bits per byte of a long text that is read as one stream, under several conditions."""

    model: Positional[Path]
    """A model folder."""
    text: tuple[str, ...] = ()
    """Files, .xz .gz .bz2, .zip and tar archives, folders or globs, read one after the other. Without it, the last
    chapters of the embedded novel, which training on it leaves out."""
    conditions: tuple[Condition, ...] = ("learning", "frozen", "frozen-warmed", "reset")
    """learning: memories write all along. frozen: they never do. frozen-warmed: only for the first `warm`
    tokens. reset: everything begins anew at every segment, attention windows too."""
    segment: int = 2048
    """Tokens between resets. A model whose attention has no window is reset so under every condition, because its
    state would grow with every token."""
    warm: int | None = None
    """Tokens before frozen-warmed stops writing; half of them without it."""
    twin: Path | None = None
    """Another model folder to read the same text with, such as the attention-only twin."""
    tokens: int | None = None
    """Tokens to read; all of them without it."""
    bins: int = 100
    """Points of each curve."""
    piece: int = 2048
    """Tokens read at once: costs memory, changes no number."""
    threads: int = 0
    """Torch threads; 0 leaves torch's choice."""
    trust_remote_code: bool = False
    """Import and run the classes and functions outside miras that the model's config names."""
    json: Path | None = None
    """File to write the curves to."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Go on with a text, one token at a time at a constant cost."""

    model: Positional[Path]
    """A model folder."""
    prompt: str = ""
    """The text to go on with; may be left out when a state is loaded."""
    tokens: int = 200
    """Tokens to generate."""
    temperature: float = 1.0
    """0 takes the most likely token each time."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens that has this much of the probability."""
    seed: int = 0
    compile: bool = False
    """Compile the reading of single tokens first (takes a while, and a C++ compiler), for long continuations."""
    threads: int = 0
    """Torch threads; 0 leaves torch's choice."""
    trust_remote_code: bool = False
    """Import and run the classes and functions outside miras that the model's config names."""
    load_state: Path | None = None
    """Go on from this saved state."""
    save_state: Path | None = None
    """Save the state after the last token here."""


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """Read a text of any length in constant memory, learning all along, and keep what was learned."""

    model: Positional[Path]
    """A model folder."""
    file: Positional[str]
    """The text, plain or .xz .gz .bz2, also through a pipe; '-' reads standard input."""
    load_state: Path | None = None
    """Go on from this saved state."""
    save_state: Path | None = None
    """Save the state here, at the end or when stopped with Ctrl-C."""
    piece: int = 2048
    """Tokens read at once: costs memory, changes no number."""
    write: bool = True
    """Whether the memories learn."""
    threads: int = 0
    """Torch threads; 0 leaves torch's choice."""
    trust_remote_code: bool = False
    """Import and run the classes and functions outside miras that the model's config names."""
