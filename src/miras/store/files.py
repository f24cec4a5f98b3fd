"""Atomic writing of files and folders, and removal of what interrupted writers left."""

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from miras.store.signals import Held

_LEFT = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)-(?P<host>[0-9a-f]{6})-[0-9a-f]{8}\.(?P<kind>draft|old)")
"""Suffixes of files being written (`draft`) and of a folder that is being replaced (`old`)."""

_FOREIGN = 86_400.0
"""Seconds after which a draft of another machine counts as dead: no save takes that long."""

_own: set[str] = set()
"""Names that this process is writing now."""


@contextlib.contextmanager
def naming(path: Path) -> Generator[None, None, None]:
    """An OSError inside the `with` block names this path, even if the system names none (a full
    disk)."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), str(path)) from error


def write_whole(handle: int, data: bytes) -> None:
    """Write all of it to an open file, in as many calls as necessary."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def write_atomically(path: Path, data: bytes, *, follow: bool = True) -> None:
    """Write a file atomically, even if the machine stops in between.

    An OSError names `path` and leaves an earlier file unchanged. A symbolic link is followed or,
    without `follow`, replaced.
    """
    with Held(), naming(path), appearing(Path(os.path.realpath(path)) if follow else path) as file:
        write_whole(file.fileno(), data)


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that gets its name once all of it is on the disk, and is removed if writing
    fails.

    Drafts left by killed writers are removed. An OSError names `path`.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, re.escape(path.name))
        with _draft(path) as draft:
            with open(_made(draft), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        sync_names(path.parent)


def place_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files atomically, replacing an older one.

    If the system can exchange two names, one of the two folders exists at every moment. An OSError
    names `folder`.
    """
    with Held(), naming(folder):
        folder = Path(os.path.realpath(folder))
        folder.parent.mkdir(parents=True, exist_ok=True)
        restore(folder)
        sweep(folder.parent, re.escape(folder.name))
        with _draft(folder) as draft:
            draft.mkdir()
            for name, data in files.items():
                handle = _made(draft / name)
                try:
                    write_whole(handle, data)
                    os.fsync(handle)
                finally:
                    os.close(handle)
            sync_names(draft)
            if not folder.exists():
                draft.rename(folder)
            elif not _exchanged(draft, folder):
                _replaced(draft, folder)
        sync_names(folder.parent)


def drop(folder: Path) -> None:
    """Remove a folder so that nobody sees a partial one."""
    with Held(), _draft(folder) as draft:
        folder.rename(draft)


def sweep(folder: Path, names: str) -> None:
    """Remove what killed writers of these names (a pattern) left in a folder, and nothing else.

    Drafts of living processes stay; so do those of other machines for a day.
    """
    there: list[Path] = []
    with contextlib.suppress(OSError):
        there = list(folder.iterdir())
    for path in there:
        found = _LEFT.fullmatch(path.name)
        if found is None or not re.fullmatch(names, found["name"]) or not _dead(found, path):
            continue
        if found["kind"] == "draft" or (folder / found["name"]).exists():
            _remove(path)


def restore(folder: Path) -> None:
    """Restore a folder's name after a kill between the two renames of `place_folder`."""
    if folder.exists() or not folder.parent.is_dir():
        return
    for path in folder.parent.iterdir():
        found = _LEFT.fullmatch(path.name)
        if found and found["name"] == folder.name and found["kind"] == "old" and _dead(found, path):
            path.rename(folder)
            return


def check_place(flag: str, path: Path, ours: Callable[[Path], bool], kind: str) -> None:
    """Raise ValueError, before work starts, if a file cannot be written or would overwrite
    something else.

    `ours` says whether an existing file is of this `kind` and may be replaced.
    """
    real = Path(os.path.realpath(path))
    if real.is_dir():
        raise ValueError(f"{flag} {path} is a folder; give a file in it")
    if real.exists() and not (real.is_file() and (not real.stat().st_size or ours(real))):
        raise ValueError(f"{flag} {path} exists and is not {kind}; choose another file, or remove it first")
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        with _draft(real) as draft:
            os.close(_made(draft))
    except OSError as error:
        raise ValueError(
            f"{flag} {path} cannot be written ({error.strerror}); choose a place where you may write"
        ) from error


def sync_names(folder: Path) -> None:
    """Flush a folder's names to disk, on systems that can. Files are complete in either case."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def living(pid: int, host: str, since: float) -> bool:
    """Whether a process that left a mark at that time is alive; one of another machine (`host_tag`)
    counts as alive for a day."""
    if host != host_tag() or sys.platform == "win32":
        return time.time() - since < _FOREIGN
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is alive and belongs to another user
        pass
    return True


@functools.cache
def host_tag() -> str:
    """Six digits that identify this machine."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def _dead(found: re.Match[str], path: Path) -> bool:
    """Whether nobody is writing this any more."""
    if int(found["pid"]) == os.getpid() and found["host"] == host_tag():
        return path.name not in _own
    try:
        return not living(int(found["pid"]), found["host"], path.lstat().st_mtime)
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` that identifies its writer; removed at the end if it still
    exists."""
    draft = _hidden(path, "draft")
    _own.add(draft.name)
    try:
        yield draft
    finally:
        _remove(draft)
        _own.discard(draft.name)


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{host_tag()}-{secrets.token_hex(4)}.{kind}")


def _made(path: Path) -> int:
    """A new file with the mode given by the umask, open for writing."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _exchanged(a: Path, b: Path) -> bool:
    """Exchange two names at once; False where the system cannot."""
    call = _exchange()
    if call is None:
        return False
    if call(os.fsencode(a), os.fsencode(b)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code))


@functools.cache
def _exchange() -> Callable[[bytes, bytes], Any] | None:
    """The system call that exchanges two paths, if there is one."""
    try:
        system = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            swap = system.renamex_np
            return lambda a, b: swap(a, b, 2)  # RENAME_SWAP
        rename, here = system.renameat2, -100  # AT_FDCWD
    except (AttributeError, OSError, TypeError):
        return None
    return lambda a, b: rename(here, a, here, b, 2)  # RENAME_EXCHANGE


def _replaced(draft: Path, folder: Path) -> None:
    """Give a draft the name of an existing folder, which is moved aside, and back if this fails."""
    old = _hidden(folder, "old")
    folder.rename(old)
    try:
        draft.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    _remove(old)
