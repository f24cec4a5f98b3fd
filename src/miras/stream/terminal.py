"""How commands speak while they read: a live bar, text as it is made, sizes."""

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


def progress_bar() -> Progress:
    """A live display on standard error, where it does not mix with what is printed."""
    columns = ("{task.description}", BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def say(text: str) -> None:
    """Print at once; on a terminal without the control characters, which a model may make up."""
    if sys.stdout.isatty():
        text = "".join(x for x in text if x in "\n\t" or x.isprintable())
    sys.stdout.write(text)
    sys.stdout.flush()


def size_text(count: int) -> str:
    """Bytes in the unit that suits them, such as 1.2 MiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError
