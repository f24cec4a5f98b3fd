"""Terminal output of commands: a progress bar, text as it is generated, sizes."""

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from miras.store.terminal import printable


class Plain(Console):
    """A console without markup in names and without control characters from files."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Plain text for printed values and tables."""
        return super().render_str(printable(text) if self.is_terminal else text, **options)


def progress_bar() -> Progress:
    """A live display on standard error, separate from printed output."""
    columns = ("{task.description}", BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def say(text: str) -> None:
    """Print immediately; on a terminal without control characters, which a model may generate."""
    if sys.stdout.isatty():
        text = printable(text)
    sys.stdout.write(text)
    sys.stdout.flush()


def size_text(count: int) -> str:
    """Bytes in a suitable unit, such as 1.2 MiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError
