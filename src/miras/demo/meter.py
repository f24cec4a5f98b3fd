"""Progress bar and memory measurement of a running act."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

STATM = Path("/proc/self/statm")


def process_memory_mb() -> float:
    """Resident memory of this process in MB; its peak if the system reports only that."""
    if STATM.exists():
        return int(STATM.read_text().split()[1]) * resource.getpagesize() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


@contextmanager
def bar(console: Console, what: str, total: float) -> Iterator[Callable[[float, str], None]]:
    """A progress bar over `total`; the yielded function takes the progress and a short text."""
    shown = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[said]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with shown:
        task = shown.add_task(what, total=total, said="")
        yield lambda done, said: shown.update(task, completed=done, said=said)
    if not console.is_terminal:
        said = shown.tasks[0].fields["said"]
        console.print(f"{what}: {said}", highlight=False)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self.began
