"""What is read, under which names, in which order, and what every unreadable thing says."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from miras.data import ByteTokenizer, Document, prepare, read_documents


def read(*sources: str | Path) -> dict[str, bytes]:
    documents = list(read_documents(sources))
    assert len({document.name for document in documents}) == len(documents)
    return {document.name: document.data for document in documents}


def make_tar(path: Path, mode: str, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, mode) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    return path


def test_plain_and_compressed_files(tmp_path: Path):
    text = "Zeilen\nund Wörter\n".encode() * 100
    (tmp_path / "plain.txt").write_bytes(text)
    (tmp_path / "noend").write_bytes(text)
    for suffix, compress in {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}.items():
        (tmp_path / f"{suffix}.txt.{suffix}").write_bytes(compress(text))
    files = ["plain.txt", "noend", "gz.txt.gz", "xz.txt.xz", "bz2.txt.bz2"]
    found = read(*(tmp_path / file for file in files))
    assert list(found) == ["plain.txt", "noend", "gz.txt", "xz.txt", "bz2.txt"]
    assert set(found.values()) == {text}


def test_what_no_name_tells_the_first_bytes_tell(tmp_path: Path):
    text = "Zeilen\nund Wörter\n".encode() * 100
    for name, data in {
        "gz": gzip.compress(text),
        "xz": lzma.compress(text),
        "bz2": bz2.compress(text),
        "le": b"\xff\xfe" + text.decode().encode("utf-16-le"),
        "be": b"\xfe\xff" + text.decode().encode("utf-16-be"),
        "be.gz": gzip.compress(b"\xfe\xff" + text.decode().encode("utf-16-be")),
    }.items():
        (tmp_path / name).write_bytes(data)
        assert list(read(tmp_path / name).values()) == [text], name
    (tmp_path / "cut").write_bytes("text".encode("utf-16")[:-1])
    with pytest.raises(ValueError, match="cut' is damaged"):
        read(tmp_path / "cut")


def test_zip_archives(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {
            "z.txt": b"last",
            "a/b.txt": b"x" * 3000,
            "a/": b"",
            "p.png": b"\0",
            "e": b"",
        }.items():
            archive.writestr(name, data)
        archive.writestr("u.txt", "Wörter".encode("utf-16"))
    wanted = {"a/b.txt": b"x" * 3000, "u.txt": "Wörter".encode(), "z.txt": b"last"}
    assert read(tmp_path / "z.zip") == wanted
    whole = (tmp_path / "z.zip").read_bytes()
    assert read(tmp_path) == {f"z.zip/{name}": data for name, data in wanted.items()}
    at = whole.index(b"u.txt") + 7  # in what was packed
    for damaged in (
        whole[: len(whole) // 2],
        whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
        b"no zip",
    ):
        (tmp_path / "z.zip").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"z\.zip' is damaged"):
            read(tmp_path / "z.zip")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
def test_pipes_are_read_once_and_packed_or_not(tmp_path: Path):
    text = b"What comes through a pipe. " * 9000  # more than a pipe holds
    (tmp_path / "plain.txt").write_bytes(text)
    make_tar(tmp_path / "a.tar.gz", "w:gz", {"a.txt": text})
    wanted = prepare(tmp_path / "plain.txt", ByteTokenizer(), tmp_path / "cache")
    os.mkfifo(tmp_path / "pipe")

    def through(data: bytes) -> Path:
        threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,), daemon=True).start()
        return tmp_path / "pipe"

    assert list(read(through(text)).values()) == [text]
    for data in (text, gzip.compress(text), (tmp_path / "a.tar.gz").read_bytes()):
        found = prepare(through(data), ByteTokenizer(), tmp_path / "cache")
        assert found.tokens_sha256 == wanted.tokens_sha256
    with pytest.raises(ValueError, match="pipe' is empty"):
        prepare(through(b""), ByteTokenizer(), tmp_path / "cache")


def test_one_path_needs_no_list(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"a")
    assert list(read_documents(str(tmp_path / "a.txt"))) == [Document("a.txt", b"a")]


@pytest.mark.parametrize(
    ("name", "mode"),
    [("t.tar", "w"), ("t.tar.gz", "w:gz"), ("t.tgz", "w:gz"), ("t.tar.xz", "w:xz"), ("t.tar.bz2", "w:bz2")],
)
def test_archives_are_read_by_name_and_nothing_leaves_them(tmp_path: Path, name: str, mode: str):
    members = {
        "z.txt": b"last",
        "../evil.txt": b"kept inside",
        "picture": b"\x89PNG\0",
        "a/b.txt": b"x" * 3000,
        "empty": b"",
    }
    path = make_tar(tmp_path / name, mode, members)
    assert list(read(path).items()) == [
        ("../evil.txt", b"kept inside"),
        ("a/b.txt", b"x" * 3000),
        ("z.txt", b"last"),
    ]
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert not (tmp_path.parent / "evil.txt").exists()


def test_folders_are_read_in_order_of_name(tmp_path: Path):
    for name in [
        "b.txt",
        "a/z.txt",
        "a/c.txt.gz",
        ".hidden/x.txt",
        "a/.secret",
        "a/none.txt",
        "a/picture.png",
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "a/c.txt.gz").write_bytes(gzip.compress(b"zipped"))
    (tmp_path / "a/none.txt").write_bytes(b"")
    (tmp_path / "a/picture.png").write_bytes(b"\x89PNG\0\0")
    make_tar(tmp_path / "a/t.tar.xz", "w:xz", {"in.txt": b"in"})
    assert list(read(tmp_path).items()) == [
        ("a/c.txt", b"zipped"),
        ("a/t.tar.xz/in.txt", b"in"),
        ("a/z.txt", b"a/z.txt"),
        ("b.txt", b"b.txt"),
    ]


def test_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ["b.txt", "a.txt", "c.md", "sub/d.txt", "literal[1].txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    assert list(read(tmp_path / "?.txt")) == ["a.txt", "b.txt"]
    assert list(read(tmp_path / "**" / "*.txt")) == ["a.txt", "b.txt", "literal[1].txt", "sub/d.txt"]
    assert list(read(tmp_path / "literal[1].txt")) == ["literal[1].txt"], (
        "a file of that name comes before a pattern"
    )
    assert len(read(tmp_path / "**")) == 5, "each file once"
    monkeypatch.chdir(tmp_path)
    assert list(read("s*")) == ["d.txt"]
    assert list(read("c.md", "*.txt")) == ["c.md", "a.txt", "b.txt", "literal[1].txt"]


def test_what_is_missing_is_named_at_the_call(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    for source in ["nothing.txt", "folder", "*.txt"]:
        with pytest.raises(FileNotFoundError, match=source.replace("*", r"\*")):
            read_documents([tmp_path / source])
    with pytest.raises(ValueError, match="at least one file"):
        read_documents([])


def test_what_is_no_text_is_named(tmp_path: Path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "utf16.txt").write_bytes("text".encode("utf-16-le"))  # without its mark
    make_tar(tmp_path / "binary.tar", "w", {"a": b"\0\0", "b": b""})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.bin").write_bytes(b"\0")
    for name, reason in {
        "empty.txt": "is empty",
        "utf16.txt": "UTF-8",
        "binary.tar": "no text in",
        "folder": "no text in",
        "fold*": "no text in",
    }.items():
        with pytest.raises(ValueError, match=reason) as caught:
            read(tmp_path / name)
        assert name in str(caught.value)


def test_damage_is_an_error_and_never_a_shorter_text(tmp_path: Path):
    text = bytes(range(1, 256)) * 2000
    whole = {
        "a.txt.gz": gzip.compress(text),
        "a.txt.xz": lzma.compress(text),
        "a.txt.bz2": bz2.compress(text),
        "a.tar": make_tar(tmp_path / "x.tar", "w", {"a": text}).read_bytes()[:-20000],
        "a.tar.gz": make_tar(tmp_path / "x.tar.gz", "w:gz", {"a": text}).read_bytes(),
        "a.tar.xz": make_tar(tmp_path / "x.tar.xz", "w:xz", {"a": text}).read_bytes(),
    }
    for name, data in whole.items():
        path = tmp_path / name
        for damaged in (data[: len(data) * 2 // 3], b"not what the name says"):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"a\.[a-z.0-9]+' is damaged"):
                read(path)


def test_every_bit_of_a_tars_headers_counts(tmp_path: Path):
    """A bit in a later member's header ends the list of members for tarfile, without a word."""
    path = make_tar(tmp_path / "a.tar", "w", {f"{n}.txt": b"text %d" % n for n in range(4)})
    whole, text = path.read_bytes(), read(path)
    for at in range(3 * 512, 4 * 512, 5):  # the header of 1.txt
        for bit in (1, 128):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            try:
                # What follows the checksum's digits is read by nobody.
                assert read(path) == text and 1536 + 148 <= at < 1536 + 156
            except ValueError as error:
                assert "a.tar' is damaged" in str(error)


def test_a_tar_that_is_cut_between_two_members_is_damaged(tmp_path: Path):
    path = make_tar(tmp_path / "a.tar", "w", {f"{n}.txt": b"text %d" % n for n in range(4)})
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for cut in range(512, end, 512):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"a\.tar' is damaged"):
            read(path)
    path.write_bytes(whole[:1536] + bytes(512) + whole[2048:])  # a sector that reads as zeros
    with pytest.raises(ValueError, match="there is more data after byte 1,536"):
        read(path)
    path.write_bytes(whole[: end + 512])  # one block of zeros is an end, as tar has it
    assert len(read(path)) == 4


def test_a_sparse_member_is_not_believed(tmp_path: Path):
    """A tar of a few kilobytes may say that a member has 40 GB, all of them zeros."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        sparse = tarfile.TarInfo("sparse")
        sparse.size = 4
        sparse.pax_headers = {
            "GNU.sparse.map": "0,4",
            "GNU.sparse.size": str(40 << 30),
            "GNU.sparse.name": "big",
        }
        archive.addfile(sparse, io.BytesIO(b"data"))
        small = tarfile.TarInfo("small")
        small.size = 4
        archive.addfile(small, io.BytesIO(b"text"))
    assert read(tmp_path / "a.tar") == {"small": b"text"}
