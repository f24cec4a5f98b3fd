"""What a stream reads: files and pipes, packed or not, in UTF-8 or UTF-16, and what it refuses."""

import bz2
import gzip
import io
import lzma
import os
import sys
import tarfile
import threading
import zipfile
from contextlib import closing
from pathlib import Path

import pytest

from miras.stream.source import open_text, text_blocks, text_length

TEXT = "Wörter, die ankommen.\n" * 9000  # more than a block, and than a pipe holds
PLAIN = TEXT.encode()
WAYS = {
    "plain": PLAIN,
    "gz": gzip.compress(PLAIN),
    "xz": lzma.compress(PLAIN),
    "bz2": bz2.compress(PLAIN),
    "le": b"\xff\xfe" + TEXT.encode("utf-16-le"),
    "be": b"\xfe\xff" + TEXT.encode("utf-16-be"),
}


def read(name: str) -> bytes:
    with closing(open_text(name)) as file:
        return b"".join(text_blocks(file, name))


@pytest.mark.parametrize("way", WAYS)
def test_standard_input_files_and_pipes_give_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
):
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_bytes(WAYS[way])
    with file.open("rb") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read("-") == PLAIN
    assert read(str(file)) == PLAIN
    assert text_length(str(file)) == (None if way in ("gz", "xz", "bz2") else len(WAYS[way]))
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=(WAYS[way],), daemon=True).start()
    assert text_length(str(pipe)) is None
    assert read(str(pipe)) == PLAIN


def test_what_is_typed_is_read_at_once(monkeypatch: pytest.MonkeyPatch):
    """Even a text of fewer bytes than tell a packed one, and one that begins as bz2 does."""
    out, into = os.pipe()
    with os.fdopen(out, "rb") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with closing(open_text_after(into, b"hi\n")) as file:
            blocks = text_blocks(file, "-")
            assert next(blocks) == b"hi\n"
            os.write(into, b"BZ")
            assert next(blocks) == b"BZ"
            os.close(into)
            assert list(blocks) == []


def open_text_after(into: int, typed: bytes) -> io.IOBase:
    os.write(into, typed)
    return open_text("-")  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_archives_are_refused_with_the_way_to_read_them(tmp_path: Path, kind: str):
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "text")
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            archive.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(ValueError, match=r"is a \.(tar|zip) archive.*(tar -xOf|unzip -p) ARCHIVE \| miras"):
        read(str(path))


def test_damage_and_nothing_are_named(tmp_path: Path):
    for name, data in {"cut": WAYS["gz"][:-9], "half": WAYS["le"][:-1]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            read(str(tmp_path / name))
    (tmp_path / "none").write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match="none is empty"):
        read(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="No such file"):
        read(str(tmp_path / "missing"))
