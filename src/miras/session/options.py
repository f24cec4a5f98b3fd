"""What `miras session` can be told; no torch here, so that help is quick."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a session's model is found and run."""

    model: Path | None = None
    """The model's folder, if it is no longer where it was when the session was saved."""
    threads: int = 0
    """Torch threads; 0 leaves torch's choice."""
    trust_remote_code: bool = False
    """Import and run the classes and functions outside miras that the model's config names."""


@dataclass(frozen=True, kw_only=True)
class NewOptions:
    """Begin a session with a model: a memory that nothing was read into yet."""

    session: Positional[Path]
    """The file to make, NAME.miras."""
    model: Positional[Path]
    """A model folder, as `miras train` writes it."""
    keep: int = 4096
    """Tokens of each episode that are kept in the file, for `recall` to ask what is left of it; 0 keeps none."""
    threads: int = 0
    """Torch threads; 0 leaves torch's choice."""
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
    """What to call the episode; the file's name without it."""
    piece: int = 2048
    """Tokens read at once: costs memory, changes no number."""
    learn: bool = False
    """Let the outer weights learn from the text too, slowly; the session keeps how they differ from the model's."""
    lr: float = 1e-5
    """Learning rate of --learn."""
    segment: int = 512
    """Tokens of one step of --learn, through which its gradient flows."""
    replay: int = 0
    """Past segments that --learn keeps in the session; one of them is learned again with each new segment."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions(ModelOptions):
    """Talk with a session.

    It reads each line that you type and goes on from it. Ctrl-D and Ctrl-C save and leave.
    """

    session: Positional[Path]
    """A session's file."""
    tokens: int = 200
    """Tokens of each answer."""
    temperature: float = 1.0
    """0 takes the most likely token each time."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens that has this much of the probability."""
    seed: int = 0
    name: str = "chat"
    """What to call the episode."""


@dataclass(frozen=True, kw_only=True)
class ForkOptions:
    """Copy a session: both go on from here, each for itself."""

    session: Positional[Path]
    """A session's file."""
    copy: Positional[Path]
    """The file to make, NAME.miras."""


@dataclass(frozen=True, kw_only=True)
class MarkOptions(ModelOptions):
    """Remember what a session is now under a name, to rewind to.

    It costs a whole state in the session's file.
    """

    session: Positional[Path]
    """A session's file."""
    name: Positional[str]
    """The mark."""
    drop: bool = False
    """Forget the mark instead."""


@dataclass(frozen=True, kw_only=True)
class RewindOptions(ModelOptions):
    """Make a session again what it was at a mark.

    What it read since then is gone; marks stay, later ones too.
    """

    session: Positional[Path]
    """A session's file."""
    name: Positional[str]
    """The mark."""


@dataclass(frozen=True, kw_only=True)
class ShowOptions(ModelOptions):
    """Show what a session is: its episodes and marks, what it costs, and how large each layer's memory is."""

    session: Positional[Path]
    """A session's file."""
    json: bool = False
    """Print JSON instead of text."""


@dataclass(frozen=True, kw_only=True)
class DiffOptions(ModelOptions):
    """Show which layers' memories moved from one session to another, and how far."""

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
    """Show what is left of each episode that a session has read.

    That is the loss on its kept tokens, read without writing, with the memory as it is now, as it was right after
    reading them, with a fresh one, and with one that has read another text instead.
    """

    session: Positional[Path]
    """A session's file."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class FindOptions:
    """Show the sessions in a folder."""

    folder: Positional[Path] = Path()
    """Where to look for files that end in .miras."""
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
