"""Text on disk -> documents: plain files, compressed files, archives, folders and globs."""

import bz2
import glob
import gzip
import lzma
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

Sources = Sequence[str | Path] | str | Path

OPEN = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
TAR = (".tar", ".tar.gz", ".tar.xz", ".tar.bz2", ".tgz", ".txz", ".tbz2")
READABLE = "Plain text, .gz, .xz, .bz2 and tar archives of these kinds can be read."


@dataclass(frozen=True)
class Document:
    """One text and the name it goes by: a file's, relative to the folder or archive it was found in."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Source:
    """The files one entry of `sources` stands for, with names; `only`: it is one file, which must be text."""

    label: str
    files: tuple[tuple[Path, str], ...]
    only: bool


def read_documents(sources: Sources) -> Iterator[Document]:
    """Every non-empty text that `sources` name, in their order, by name within a folder, glob or archive.

    Memory: one document at a time. Files that are not text (a NUL byte) and empty ones are skipped in
    folders, globs and archives, and are an error when named. What is missing raises FileNotFoundError at the
    call, what is damaged or holds no text ValueError while reading.
    """
    return _read(find_sources(sources))


def find_sources(sources: Sources) -> list[Source]:
    """The files that `sources` stand for, unread; FileNotFoundError when one stands for none."""
    named = [sources] if isinstance(sources, str | Path) else list(sources)
    if not named:
        raise ValueError("No text was named: give at least one file, folder, archive or glob.")
    return [_find(str(each)) for each in named]


def _find(label: str) -> Source:
    path = Path(label).expanduser()
    if path.is_file():
        return Source(label, ((path, _plain_name(path.name)),), only=True)
    if path.is_dir():
        found = _walk(path, path)
    elif glob.has_magic(label):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        found = [
            each for match in matches for each in (_walk(match, match.parent) if match.is_dir() else [match])
        ]
        # `**` matches a folder as well as what is in it.
        found = list(dict.fromkeys(found))
        path = _common_folder(found)
    else:
        raise FileNotFoundError(f"No such file or folder: {label!r} (looked in {Path.cwd()}).")
    if not found:
        what = "is an empty folder" if path.is_dir() and not glob.has_magic(label) else "matches no file"
        raise FileNotFoundError(f"{label!r} {what} (looked in {Path.cwd()}; hidden files are left out).")
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
    """The name without the suffix that says how the text is packed; an archive keeps its own."""
    if name.lower().endswith(TAR):
        return name
    suffix = Path(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in OPEN else name


def _read(sources: list[Source]) -> Iterator[Document]:
    for source in sources:
        empty = True
        for path, name in source.files:
            if path.name.lower().endswith(TAR):
                documents = _read_tar(path, "" if source.only else f"{name}/")
            else:
                documents = _read_file(path, name, source.only)
            for document in documents:
                empty = False
                yield document
        if empty:
            raise ValueError(f"There is no text in {source.label!r}. {READABLE}")


def _read_file(path: Path, name: str, only: bool) -> Iterator[Document]:
    opened = OPEN.get(path.suffix.lower())
    try:
        if opened is None:
            data = path.read_bytes()
        else:
            with opened(path, "rb") as file:
                data = file.read()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise _damaged(path, error) from error
    if _is_text(data):
        yield Document(name, data)
    elif only:
        what = "is not text: it has NUL bytes (UTF-16 must be saved as UTF-8)" if data else "is empty"
        raise ValueError(f"{str(path)!r} {what}. {READABLE}")


def _read_tar(path: Path, prefix: str) -> Iterator[Document]:
    # Members are read by name, and each step back would unpack the archive again: it is unpacked once, aside.
    with tempfile.TemporaryFile() as plain:
        try:
            with _open_tar_stream(path) as packed:
                shutil.copyfileobj(packed, plain, 1 << 20)
            plain.seek(0)
            with tarfile.open(fileobj=plain, mode="r:") as archive:
                members = archive.getmembers()
                _check_end(plain, archive.offset)
                for member in sorted(members, key=lambda member: member.name):
                    file = archive.extractfile(member) if member.isreg() else None
                    data = file.read() if file is not None else b""
                    if _is_text(data):
                        yield Document(prefix + member.name, data)
        except (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError) as error:
            raise _damaged(path, error) from error


def _check_end(plain: IO[bytes], at: int) -> None:
    """Raise ReadError when an archive does not end there: tarfile stops at a damaged header in silence."""
    plain.seek(at)
    if plain.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(
            f"it is cut off or damaged at byte {at:,}, where no member begins or the end is due"
        )
    while block := plain.read(1 << 20):
        if block.count(0) != len(block):
            raise tarfile.ReadError(f"there is more behind byte {at:,}, where it says that it ends")


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
