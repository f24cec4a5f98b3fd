"""The options of `miras session`. This module does not import torch, so --help is fast."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How to find and run the model of a session."""

    model: Path | None = None
    """The model's folder, if it is no longer where it was when the session was saved."""
    threads: int = 0
    """Number of torch threads; 0 uses torch's default."""
    trust_remote_code: bool = False
    """Import and run the classes and functions outside miras that the model's config names."""


@dataclass(frozen=True, kw_only=True)
class NewOptions:
    """Create a session: a model with a memory that has read nothing yet."""

    session: Positional[Path]
    """The file to make, NAME.miras."""
    model: Positional[Path]
    """A model folder, as written by `miras train`."""
    keep: int = 4096
    """Tokens of each episode to keep in the file, so that `recall` can test what is left of it; 0
    keeps none."""
    threads: int = 0
    """Number of torch threads; 0 uses torch's default."""
    trust_remote_code: bool = False
    """Import and run the classes and functions outside miras that the model's config names."""


@dataclass(frozen=True, kw_only=True)
class FeedOptions(ModelOptions):
    """Read a text of any length into a session, as an episode of its own.

    Ctrl-C saves what was read.
    """

    session: Positional[Path]
    """A session's file."""
    file: Positional[str]
    """The text, plain or .xz .gz .bz2, also through a pipe; '-' reads standard input."""
    name: str | None = None
    """Name of the episode; by default the name of the file."""
    piece: int = 2048
    """Tokens read per call; affects memory use, not the results."""
    learn: bool = False
    """Let the outer weights learn from the text too, slowly. The session stores their difference
    from the model's."""
    lr: float = 1e-5
    """Learning rate of --learn."""
    segment: int = 512
    """Tokens per gradient step of --learn."""
    replay: int = 0
    """Past steps' tokens that --learn keeps in the session; each new step also learns from one of
    them."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions(ModelOptions):
    """Talk with a session.

    It reads each line that you type and continues it. Ctrl-D and Ctrl-C save and exit.
    """

    session: Positional[Path]
    """A session's file."""
    tokens: int = 200
    """Number of tokens of each answer."""
    temperature: float = 1.0
    """Sampling temperature; 0 always takes the most likely token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with at least this total probability."""
    seed: int = 0
    name: str = "chat"
    """Name of the episode."""


@dataclass(frozen=True, kw_only=True)
class ForkOptions:
    """Copy a session; the two continue independently."""

    session: Positional[Path]
    """A session's file."""
    copy: Positional[Path]
    """The file to make, NAME.miras."""


@dataclass(frozen=True, kw_only=True)
class MarkOptions(ModelOptions):
    """Mark the current state of a session with a name, to rewind to later.

    A mark stores a complete state in the session's file.
    """

    session: Positional[Path]
    """A session's file."""
    name: Positional[str]
    """The mark."""
    drop: bool = False
    """Delete the mark instead."""


@dataclass(frozen=True, kw_only=True)
class RewindOptions(ModelOptions):
    """Rewind a session to a mark.

    Everything read since then is lost; all marks stay, including later ones.
    """

    session: Positional[Path]
    """A session's file."""
    name: Positional[str]
    """The mark."""


@dataclass(frozen=True, kw_only=True)
class ShowOptions(ModelOptions):
    """Show a session: episodes, marks, size, and the norm of each layer's memory."""

    session: Positional[Path]
    """A session's file."""
    json: bool = False
    """Print JSON instead of text."""


@dataclass(frozen=True, kw_only=True)
class DiffOptions(ModelOptions):
    """Show how far each layer's memory differs between two sessions."""

    session: Positional[Path]
    """A session's file."""
    other: Positional[Path]
    """Another session of the same model."""
    heads: bool = False
    """Show every head."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class RecallOptions(ModelOptions):
    """Show how much is left of each episode of a session.

    This is the loss on its kept tokens, read without writing: with the current memory, with the
    memory right after reading them, with a fresh memory, and with one that has read another text
    instead.
    """

    session: Positional[Path]
    """A session's file."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class FindOptions:
    """Show the sessions in a folder."""

    folder: Positional[Path] = Path()
    """The folder with files that end in .miras."""
    json: bool = False
    """Print JSON instead of a table."""


COMMANDS: dict[str, type] = {
    "new": NewOptions,
    "feed": FeedOptions,
    "chat": ChatOptions,
    "fork": ForkOptions,
    "mark": MarkOptions,
    "rewind": RewindOptions,
    "show": ShowOptions,
    "diff": DiffOptions,
    "recall": RecallOptions,
    "list": FindOptions,
}
