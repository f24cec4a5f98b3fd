"""Files of strangers and of broken disks: one clear line each, and nothing that commands a terminal."""

import contextlib
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.table import Table

from miras.cli import main
from miras.data.tokens import ByteTokenizer
from miras.nn.folder import save_model
from miras.nn.lm import LM
from miras.session import commands, files
from miras.session.session import Session
from miras.stream import save_state
from miras.stream.files import read_header
from miras.stream.terminal import Plain

Make = Callable[..., LM]


@pytest.fixture
def place(tiny: Make, text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = tiny()
    save_model(model, "model")
    session = Session(model, ByteTokenizer(), folder=str(tmp_path / "model"))
    session.feed(text[:40], "one")
    session.save("a.miras")
    session.save("b.miras")
    save_state("a.state", session.now.state, model)
    return tmp_path


def told(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors."""
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]


def retold(path: Path, change: dict[str, str]) -> None:
    """Make a file say something else, without the header's checksum, as older versions wrote it."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"].pop("header_sha256", None)
    header["__metadata__"] |= change
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + data[8 + size :])


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{}", "[]", "7", '{"moments": []}', '"x"', "1" * 5000, "null"]
)
def test_headers_that_are_anything_else(place: Path, text: str, capsys: pytest.CaptureFixture[str]):
    for name in ("session", "tokens", "extra"):
        for path in (place / "a.miras", place / "a.state"):
            if name in told(path):
                retold(path, {name: text})
    for line in (
        "session show a.miras",
        "session feed a.miras a.miras",
        "generate model --prompt a --load-state a.state",
    ):
        assert main(line.split()) == 2
        said = capsys.readouterr().err
        assert " is corrupt: its " in said and said.count("\n") == 1, said
    with contextlib.suppress(
        ValueError
    ):  # and nothing else: without the tensors some of these pass for a header
        read_header("a.state")
    assert main(["session", "list", "."]) == 0
    assert "a.miras is corrupt" in capsys.readouterr().out


def test_every_bit_of_a_header_is_seen_without_the_tensors(place: Path):
    path = place / "a.miras"
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    first = files.read_header(path)
    start = whole.index(b'"__metadata__"')
    end = whole.index(b"}", whole.index(b'"summary"')) if b'"summary"' in whole else 8 + size
    for at in range(start, min(end, 8 + size), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            assert files.read_header(path) == first
        except ValueError as error:
            assert "a.miras" in str(error)


def test_one_file_that_cannot_be_read_does_not_hide_the_others(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    real = files.read_header

    def denied(path: Path, **options: bool) -> files.SessionHeader:
        if path.name == "a.miras":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(files, "read_header", denied)
    assert main(["session", "list", "."]) == 0
    out = capsys.readouterr().out
    assert "a.miras cannot be read: Permission denied" in out and "b.miras" in out


def test_a_file_that_may_not_be_read_is_not_said_to_be_missing(place: Path, monkeypatch: pytest.MonkeyPatch):
    def denied(self: Path, *_: object) -> object:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(PermissionError, match=r"a\.miras"):
        files.read_header(place / "a.miras")


def test_show_is_of_one_time(place: Path, tiny: Make, capsys: pytest.CaptureFixture[str], monkeypatch):
    """Another process saves while it looks."""
    real, calls = commands._loaded, []

    def loaded(path: Path, options: object) -> Session:
        found = real(path, options)  # pyright: ignore
        if not calls:
            calls.append(True)
            later = Session.load(path, tiny(), ByteTokenizer())
            later.feed(b"more of it", "two")
            later.save(path)
        return found

    monkeypatch.setattr(commands, "_loaded", loaded)
    assert main(["session", "show", "a.miras", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["tokens"] == 50 and shown["file bytes"] == (place / "a.miras").stat().st_size


def test_nothing_commands_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    evil = "a\x1b]0;owned\x07\x9b2Jb\u202e"
    out = io.StringIO()
    console = Plain(file=out, force_terminal=True, color_system=None, width=80)
    table = Table("name", box=None)
    table.add_row(evil)
    console.print(evil, table)
    assert "\x1b]" not in out.getvalue() and not set("\x07\x9b\u202e") & set(out.getvalue())
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main(["session", "show", evil]) == 2
    said = capsys.readouterr().err
    assert "a]0;owned2Jb" in said and not set("\x1b\x07\x9b\u202e") & set(said)


def test_what_was_loaded_is_no_longer_the_file(place: Path, tiny: Make):
    """Copying another file over an open session's must not change it, nor end the program."""
    session = Session.load("a.miras", tiny(), ByteTokenizer())
    before = {name: x.clone() for name, x in session.now.state.tensors().items()}
    (place / "a.miras").write_bytes(b"")
    assert all(torch.equal(x, before[name]) for name, x in session.now.state.tensors().items())
