"""One writer at a time, by a lock of the operating system, which ends with its process."""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from miras.store.files import host_tag, living, naming
from miras.store.signals import Held

try:
    import fcntl
except ImportError:
    fcntl = None
    import msvcrt

_held: set[Path] = set()

_LARGEST = 40
"""The largest size of a lock file: a process id and a machine."""


@contextlib.contextmanager
def hold(path: str | Path, advice: str, name: str | None = None) -> Iterator[None]:
    """Keep other processes from writing to this path; reentrant within a process.

    The lock is a hidden file beside it with the writer's process id. Raises ValueError if another
    process has it, with its id and `advice` (`name`: how to call the path), or if another file has
    the lock's name. On a file system without locks the process id itself is the lock.
    """
    name = str(path) if name is None else name
    path = Path(path).resolve()
    if path in _held:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    with Held(), naming(path):
        made = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(lock, name, advice)
        _held.add(path)
    try:
        yield
    finally:
        with Held():
            _held.discard(path)
            # Windows does not remove an open file: there it stays, but is no longer a lock.
            with contextlib.suppress(OSError):
                lock.unlink()
            os.close(handle)
            if made:  # do not leave an empty folder behind
                with contextlib.suppress(OSError):
                    path.parent.rmdir()


def _acquire(lock: Path, name: str, advice: str) -> int:
    while True:
        handle = _opened(lock)
        try:
            locked = _try_lock(handle)
            pid, host, _ = (os.read(handle, _LARGEST).decode(errors="replace") + "  ").split(" ", 2)
            busy = f"{name} is in use by {f'process {pid}' if pid else 'another process'}; {advice}"
            if locked is False:
                raise ValueError(busy)
            if locked is None and _claimed(pid, host, handle):
                raise ValueError(
                    f"{busy}. This file system has no locks: if that process no longer exists, remove {lock}"
                )
            if _there(handle, lock):
                os.ftruncate(handle, 0)
                os.lseek(handle, 0, os.SEEK_SET)
                os.write(handle, f"{os.getpid()} {host_tag()}".encode())
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _opened(lock: Path) -> int:
    """The lock file, open. Raises ValueError if another file has its name, which must not be
    written to."""
    odd = f"{lock} is not a lock made by miras; check what it is, and remove it"
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise ValueError(odd) from error
        raise
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_size > _LARGEST:
        os.close(handle)
        raise ValueError(odd)
    return handle


def _claimed(pid: str, host: str, handle: int) -> bool:
    """Without locks: whether the recorded process is alive and not this one."""
    if not pid.isdigit() or (int(pid) == os.getpid() and host == host_tag()):
        return False
    return living(int(pid), host, os.fstat(handle).st_mtime if host else time.time())


def _there(handle: int, lock: Path) -> bool:
    """Whether an open file still has its name: the previous holder may have removed it since we
    opened it."""
    try:
        return os.path.samestat(os.fstat(handle), lock.stat())
    except FileNotFoundError:
        return False


def _try_lock(handle: int) -> bool | None:
    """Whether we hold the lock; None if there are no locks."""
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            # One byte far after the process id, which others must be able to read.
            os.lseek(handle, 1 << 20, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # pyright: ignore
            os.lseek(handle, 0, os.SEEK_SET)
    except (BlockingIOError, PermissionError):
        os.lseek(handle, 0, os.SEEK_SET)
        return False
    except OSError:
        return None
    return True
