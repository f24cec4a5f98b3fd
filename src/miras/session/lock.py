"""One writer at a time for a session's file."""

from contextlib import AbstractContextManager
from pathlib import Path

from miras.store import lock


def hold(path: str | Path) -> AbstractContextManager[None]:
    """Keep other processes from writing a session's file; raises like `miras.store.lock.hold`."""
    return lock.hold(
        path, "a session can have one writer at a time: wait for it, or work on a copy (miras session fork)"
    )
