"""Text on disk -> documents: plain files, compressed files, archives, folders and globs."""

import bz2
import codecs
import contextlib
import glob
import gzip
import io
import lzma
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

Sources = Sequence[str | Path] | str | Path

OPEN = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
TAR = (".tar", ".tar.gz", ".tar.xz", ".tar.bz2", ".tgz", ".txz", ".tbz2")
ZIP = ".zip"
READABLE = "Plain text, .gz, .xz, .bz2, .zip and tar archives of these kinds can be read."
MAGIC = {
    b"\x1f\x8b\x08": gzip.open,
    b"\xfd7zXZ\0": lzma.open,
    **{b"BZh%d1AY&SY" % level: bz2.open for level in range(1, 10)},
}
"""First bytes of compressed files, for files without a telling name, such as pipes."""
NUL = "it has NUL bytes (UTF-16 without its byte order mark must be saved as UTF-8)"
DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError)
"""Errors raised by reading a damaged file."""


@dataclass(frozen=True)
class Document:
    """One text and its name: a file's, relative to the folder or archive it was found in."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Source:
    """The files that one entry of `sources` names; `only`: it is a single file, which must be
    text."""

    label: str
    files: tuple[tuple[Path, str], ...]
    only: bool


def read_documents(sources: Sources) -> Iterator[Document]:
    """Every non-empty text in `sources`, in their order, by name within a folder, glob or archive.

    Memory: one document at a time. Files that are not text (with a NUL byte) and empty files are
    skipped in folders, globs and archives, and are an error if named. UTF-16 with its byte order
    mark becomes UTF-8. Without a known suffix the first bytes determine the compression. Missing
    files raise FileNotFoundError at the call; damaged ones and those without text raise ValueError
    while reading.
    """
    return _read(find_sources(sources))


def find_sources(sources: Sources) -> list[Source]:
    """The files in `sources`, unread; FileNotFoundError if an entry has none."""
    named = [sources] if isinstance(sources, str | Path) else list(sources)
    if not named:
        raise ValueError("No text was given: name at least one file, folder, archive or glob.")
    return [_find(str(each)) for each in named]


def _find(label: str) -> Source:
    path = Path(label).expanduser()
    if path.is_file() or is_pipe(path):
        return Source(label, ((path, _plain_name(path.name)),), only=True)
    if path.is_dir():
        found = _walk(path, path)
    elif glob.has_magic(label):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        found = [
            each for match in matches for each in (_walk(match, match.parent) if match.is_dir() else [match])
        ]
        # `**` matches a folder as well as its contents.
        found = list(dict.fromkeys(found))
        path = _common_folder(found)
    else:
        raise FileNotFoundError(f"No such file or folder: {label!r} (looked in {Path.cwd()}).")
    if not found:
        what = "is an empty folder" if path.is_dir() and not glob.has_magic(label) else "matches no file"
        raise FileNotFoundError(f"{label!r} {what} (looked in {Path.cwd()}; hidden files are ignored).")
    return Source(
        label, tuple((file, _plain_name(file.relative_to(path).as_posix())) for file in found), only=False
    )


def _walk(folder: Path, top: Path) -> list[Path]:
    inside = [file for file in folder.rglob("*") if file.is_file()]
    visible = [
        file for file in inside if not any(part.startswith(".") for part in file.relative_to(top).parts)
    ]
    return sorted(visible, key=lambda file: file.relative_to(top).as_posix())


def _common_folder(paths: list[Path]) -> Path:
    folder = paths[0].parent if paths else Path()
    while not all(path.is_relative_to(folder) for path in paths):
        folder = folder.parent
    return folder


def _plain_name(name: str) -> str:
    """The name without its compression suffix; an archive keeps its own."""
    if name.lower().endswith(TAR):
        return name
    suffix = Path(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in OPEN else name


def _read(sources: list[Source]) -> Iterator[Document]:
    for source in sources:
        empty = True
        for path, name in source.files:
            prefix = "" if source.only else f"{name}/"
            if path.name.lower().endswith(TAR):
                documents = _read_tar(path, prefix)
            elif path.name.lower().endswith(ZIP):
                documents = _read_zip(path, prefix)
            else:
                documents = _read_file(path, name, source.only)
            for document in documents:
                empty = False
                yield document
        if empty:
            raise ValueError(f"There is no text in {source.label!r}. {READABLE}")


def _read_file(path: Path, name: str, only: bool) -> Iterator[Document]:
    try:
        with open_unpacked(path) as file:
            data = _utf8(b"".join(iter(lambda: file.read(1 << 20), b"")))
    except DAMAGE as error:
        raise _damaged(path, error) from error
    if _is_text(data):
        yield Document(name, data)
    elif only:
        raise ValueError(f"{str(path)!r} {f'is not text: {NUL}' if data else 'is empty'}. {READABLE}")


def is_pipe(path: Path) -> bool:
    """Whether a name is a pipe, which can be read only once: a FIFO, or `<(command)`."""
    return path.exists() and not path.is_file() and not path.is_dir()


@contextlib.contextmanager
def standing(sources: Sources) -> Iterator[Sources]:
    """The sources with each pipe replaced by a decompressed file, for reading more than once."""
    named = [str(each) for each in ([sources] if isinstance(sources, str | Path) else sources)]
    with contextlib.ExitStack() as stack:
        for at, label in enumerate(named):
            if not is_pipe(Path(label).expanduser()):
                continue
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            plain = folder / "pipe"
            try:
                with open_unpacked(Path(label).expanduser()) as packed, plain.open("wb") as file:
                    shutil.copyfileobj(packed, file)
            except DAMAGE as error:
                raise _damaged(Path(label), error) from error
            with plain.open("rb") as file:
                kind = archive_kind(file.read(512))
            if not plain.stat().st_size:
                raise ValueError(f"{label!r} is empty. {READABLE}")
            named[at] = str(plain.rename(folder / f"pipe{kind or ''}"))
        yield named


def archive_kind(head: bytes) -> str | None:
    """The suffix of the archive type with these first 512 bytes; None if it is not an archive."""
    if head.startswith(b"PK\x03\x04"):
        return ZIP
    return ".tar" if head[257:262] == b"ustar" else None


class _Peeked(io.RawIOBase):
    """An unbuffered file, of which `begins` has looked at the first bytes."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self.raw, self.head = raw, b""

    def begins(self, words: Iterable[bytes]) -> bytes | None:
        """The magic number that the file begins with. Waits for no more bytes than needed."""
        words, more = list(words), b" "
        while more and any(len(word) > len(self.head) and word.startswith(self.head) for word in words):
            more = self.raw.read(1 << 16) or b""
            self.head += more
        return next((word for word in words if self.head.startswith(word)), None)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if not self.head:
            return self.raw.readinto(buffer)
        taken, self.head = self.head[: len(buffer)], self.head[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def close(self) -> None:
        self.raw.close()
        super().close()


def open_unpacked(file: Path | io.RawIOBase) -> IO[bytes]:
    """The bytes of a file, decompressed according to its name or else its first bytes, as they
    arrive."""
    if isinstance(file, Path):
        if (opened := OPEN.get(file.suffix.lower())) is not None:
            return cast(IO[bytes], opened(file, "rb"))
        file = cast(io.RawIOBase, file.open("rb", buffering=0))
    peeked = _Peeked(file)
    word = peeked.begins(MAGIC)
    return cast(IO[bytes], peeked if word is None else MAGIC[word](cast(Any, peeked), "rb"))


def as_utf8(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Blocks of a text, unchanged, or converted to UTF-8 if it begins with UTF-16's byte order
    mark."""
    rest = iter(blocks)
    head = next(rest, b"")
    while head in (b"\xff", b"\xfe") and (more := next(rest, b"")):
        head += more
    if head[:2] not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        yield from chain([head] if head else [], rest)
        return
    decoder = codecs.getincrementaldecoder("utf-16")()
    for block in chain([head], rest):
        if text := decoder.decode(block):
            yield text.encode()
    decoder.decode(b"", final=True)


def _utf8(data: bytes) -> bytes:
    return b"".join(as_utf8([data]))


def _read_zip(path: Path, prefix: str) -> Iterator[Document]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.infolist(), key=lambda member: member.filename):
                data = b"" if member.is_dir() else _utf8(archive.read(member))
                if _is_text(data):
                    yield Document(prefix + member.filename, data)
    except (*DAMAGE, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    except (
        RuntimeError,
        NotImplementedError,
    ) as error:  # a password, or a compression that Python does not support
        raise ValueError(f"{str(path)!r} cannot be unpacked here ({error}). Unpack it first.") from error


def _read_tar(path: Path, prefix: str) -> Iterator[Document]:
    # Members are read by name, and each step back would decompress the archive again: it is
    # decompressed once, to a temporary file.
    with tempfile.TemporaryFile() as plain:
        try:
            with _open_tar_stream(path) as packed:
                shutil.copyfileobj(packed, plain, 1 << 20)
            plain.seek(0)
            with tarfile.open(fileobj=plain, mode="r:") as archive:
                members = archive.getmembers()
                _check_end(plain, archive.offset)
                for member in sorted(members, key=lambda member: member.name):
                    file = archive.extractfile(member) if member.isreg() and not _has_holes(member) else None
                    data = b"" if file is None else _utf8(file.read())
                    if _is_text(data):
                        yield Document(prefix + member.name, data)
        except (*DAMAGE, tarfile.TarError) as error:
            raise _damaged(path, error) from error


def _has_holes(member: tarfile.TarInfo) -> bool:
    """Whether a member is a sparse file: not text, and of any declared size."""
    return member.issparse() and sum(size for _, size in member.sparse) < member.size  # pyright: ignore


def _check_end(plain: IO[bytes], at: int) -> None:
    """Raise ReadError unless the archive ends there: tarfile silently stops at a damaged header."""
    plain.seek(at)
    if plain.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(
            f"it is truncated or damaged at byte {at:,}, where a member or the end should begin"
        )
    while block := plain.read(1 << 20):
        if block.count(0) != len(block):
            raise tarfile.ReadError(f"there is more data after byte {at:,}, where it says that it ends")


def _open_tar_stream(path: Path) -> IO[bytes]:
    name = path.name.lower()
    if name.endswith(".tar"):
        return path.open("rb")
    packing = ".gz" if name.endswith("gz") else ".bz2" if name.endswith("bz2") else ".xz"
    return cast(IO[bytes], OPEN[packing](path, "rb"))


def _is_text(data: bytes) -> bool:
    return bool(data) and b"\0" not in data


def _damaged(path: Path, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return ValueError(
        f"{str(path)!r} is damaged or not what its name says ({error}). "
        "Make or download it again, or rename it."
    )
