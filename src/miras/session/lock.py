"""One writer at a time for a session's file, by a lock of the operating system, which dies with its process."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from miras.nn.folder import naming

try:
    import fcntl
except ImportError:
    fcntl = None
    import msvcrt

_held: set[Path] = set()


@contextlib.contextmanager
def hold(path: str | Path) -> Iterator[None]:
    """Keep other processes from writing a session's file; inside, the same process may ask again.

    The lock is a hidden file beside it, which holds the writer's process id. Raises ValueError, naming that, when
    another process has it.
    """
    path = Path(path).resolve()
    if path in _held:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(lock, path)
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        # Windows does not remove an open file: there it stays, and is no lock any more.
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(handle)


def _acquire(lock: Path, path: Path) -> int:
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        if not _try_lock(handle):
            holder = os.read(handle, 20).decode(errors="replace").strip()
            os.close(handle)
            raise ValueError(
                f"{path} is in use by {f'process {holder}' if holder else 'another process'}; a session has one "
                f"writer at a time: wait for it, or work on a copy (miras session fork)"
            )
        if _there(handle, lock):
            os.truncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())
            return handle
        os.close(handle)


def _there(handle: int, lock: Path) -> bool:
    """Whether an open file still has its name: who held the lock before may have removed it since we opened it."""
    try:
        return os.path.samestat(os.fstat(handle), lock.stat())
    except FileNotFoundError:
        return False


def _try_lock(handle: int) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            # One byte far behind the process id, which others must be able to read.
            os.lseek(handle, 1 << 20, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # pyright: ignore
            os.lseek(handle, 0, os.SEEK_SET)
    except (BlockingIOError, PermissionError):
        os.lseek(handle, 0, os.SEEK_SET)
        return False
    return True
