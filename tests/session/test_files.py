"""A session goes on from its file as if there had been no stop: after a kill, from no other file, with one writer."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from miras.data.tokens import ByteTokenizer
from miras.nn.folder import model_hash, save_model
from miras.nn.lm import LM
from miras.session import files
from miras.session.learning import Learning
from miras.session.lock import hold
from miras.session.session import Session
from miras.store import files as disk
from miras.stream import read, save_state
from session.helpers import equal, logits

Make = Callable[..., LM]

KILLED = """
import os, signal, sys
from pathlib import Path
from miras.data.tokens import ByteTokenizer
from miras.nn.folder import load_model
from miras.session.session import Session
from miras.store import files
place, how = Path(sys.argv[1]), sys.argv[2]
session = Session(load_model(place / "model"), ByteTokenizer(), keep=40)
text = (place / "text").read_bytes()
session.feed(text[:101], "one")
session.mark("there")
session.generate(5, seed=3)
session.save(place / "s.miras")
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
if how == "in a save":
    write = files.write_whole
    files.write_whole = lambda handle, data: (write(handle, data[:5000]), os.fsync(handle), die())
    session.feed(text[101:120])
    session.save(place / "s.miras")
session.feed(text[101:500], piece=16, progress=die)
"""


@pytest.mark.parametrize("how", ["in a save", "in a feed"])
def test_after_kill_9_another_process_goes_on_with_identical_numbers(
    tiny: Make, text: bytes, tmp_path: Path, how: str
):
    save_model(tiny(), tmp_path / "model")
    (tmp_path / "text").write_bytes(text)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, how], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir() if path.name.endswith((".lock", ".draft"))]
    assert len(left) == (2 if how == "in a save" else 0)  # the lock's file and half a save

    found = Session.load(tmp_path / "s.miras", tiny(), ByteTokenizer())
    never = Session(tiny(), ByteTokenizer(), keep=40)
    never.feed(text[:101], "one")
    never.mark("there")
    never.generate(5, seed=3)
    close = torch.equal if torch.get_num_threads() == 1 else lambda a, b: torch.allclose(a, b, atol=1e-4)
    assert found.tokens == 106 and list(found.marks) == ["there"]
    assert close(logits(found, text[101:150]), logits(never, text[101:150]))
    assert list(found.sample(20, seed=1)) == list(never.sample(20, seed=1))
    found.rewind("there")
    never.rewind("there")
    assert close(logits(found, text[101:150]), logits(never, text[101:150]))
    # What the killed process left is in nobody's way, and is tidied up.
    found.save(tmp_path / "s.miras")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "s.miras", "text"]


@pytest.mark.parametrize("name", ["titans-mag", "titans-mac", "titans-lmm", "transformer"])
def test_all_of_it_comes_back(tiny: Make, text: bytes, tmp_path: Path, name: str):
    model = tiny(name)
    session = Session(model, ByteTokenizer(), keep=30, folder="somewhere")
    session.save(tmp_path / "new.miras")
    assert equal(Session.load(tmp_path / "new.miras", model, ByteTokenizer()).now.state, session.now.state)
    session.feed(text[:53], "one")
    session.mark("a mark/of.any name")
    session.feed(text[53:100], "two", learning=Learning(lr=1e-2, segment=12, replay=3))
    session.mark("b")
    session.feed(text[100:120], "three")
    session.save(tmp_path / "s.miras")
    found = Session.load(tmp_path / "s.miras", model, ByteTokenizer())
    assert (found.keep, found.folder, found.created) == (30, "somewhere", session.created)
    assert list(found.marks) == ["a mark/of.any name", "b"]
    for a, b in zip([found.now, *found.marks.values()], [session.now, *session.marks.values()], strict=True):
        assert equal(a.state, b.state) and a.tokens == b.tokens
        assert a.delta.keys() == b.delta.keys() and all(torch.equal(a.delta[n], b.delta[n]) for n in a.delta)
        assert a.past.seen == b.past.seen
        assert [bytes(x) for x in a.past.segments] == [bytes(x) for x in b.past.segments]
        for one, two in zip(a.episodes, b.episodes, strict=True):
            assert bytes(one.kept) == bytes(two.kept)
            assert {**vars(one), "kept": 0} == {**vars(two), "kept": 0}
    # What moments share is held once, in memory and on disk.
    assert found.marks["b"].delta is found.now.delta and found.now.delta
    with safe_open(tmp_path / "s.miras", "pt") as file:
        assert len([n for n in file.keys() if n.startswith("delta.")]) == len(found.now.delta)  # noqa: SIM118
        assert len([n for n in file.keys() if n.startswith("episodes.")]) == 3  # noqa: SIM118


def test_a_tokenizer_with_many_ids(tiny: Make, tmp_path: Path):
    class Wide(ByteTokenizer):
        vocab_size = 70_000
        fingerprint = "wide"

    model = tiny(vocab_size=70_000)
    session = Session(model, Wide())
    session.feed(np.array([69_999, 3, 256]))
    session.save(tmp_path / "s.miras")
    assert Session.load(tmp_path / "s.miras", model, Wide()).now.episodes[0].kept.tolist() == [69_999, 3, 256]


@pytest.fixture
def saved(session: Session, text: bytes, tmp_path: Path) -> tuple[Session, Path]:
    session.feed(text[:50], "one")
    session.save(tmp_path / "s.miras")
    return session, tmp_path / "s.miras"


def test_a_flipped_byte_is_refused_by_name(saved: tuple[Session, Path]):
    session, path = saved
    data = path.read_bytes()
    body = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for at in [*range(0, 8), *range(8, body, 487), *range(body, len(data), 4999), len(data) - 1]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            found = Session.load(path, session.base, session.tokenizer)
        except ValueError as error:
            assert str(path) in str(error)
            assert at < body or "checksum differs: a byte has changed" in str(error)
            refused += 1
        else:
            assert at < body and equal(found.now.state, session.now.state)  # padding of the header
    assert refused > 20


def test_what_is_cut_off_foreign_or_newer_is_refused_by_name(
    saved: tuple[Session, Path], tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    session, path = saved
    data = path.read_bytes()

    def refused(reason: str, model: LM = session.base) -> None:
        with pytest.raises(ValueError, match=reason) as caught:
            Session.load(path, model, session.tokenizer)
        assert str(path) in str(caught.value)

    refused(f"belongs to another model: .*{session.hash}.*{model_hash(tiny(seed=1))}", tiny(seed=1))

    class Other(ByteTokenizer):
        fingerprint = "other"

    with pytest.raises(
        ValueError, match="belongs to another tokenizer: it was saved with bytes, this is other"
    ):
        Session.load(path, session.base, Other())
    for size in (0, 4, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        refused("corrupt or truncated")
    path.write_bytes(data.replace(b"[50]", b"[51]"))
    refused("checksum differs")
    monkeypatch.setattr(files, "FORMAT_VERSION", 2)
    session.save(path)
    monkeypatch.undo()
    refused("format version 2, this miras reads up to 1")
    folder = save_model(session.base, tmp_path / "model")
    path.write_bytes((folder / "model.safetensors").read_bytes())
    refused("is not a saved session")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"s\.miras does not exist"):
        Session.load(path, session.base, session.tokenizer)


def test_a_streams_state_is_a_session_without_a_past(session: Session, text: bytes, tmp_path: Path):
    state = read(session.base, np.frombuffer(text[:50], dtype=np.uint8)).state
    save_state(tmp_path / "old.state", state, session.base)
    found = Session.load(tmp_path / "old.state", session.base, session.tokenizer)
    assert found.tokens == 50 and found.now.episodes == () and equal(found.now.state, state)
    assert files.read_header(tmp_path / "old.state").tokens == 50
    found.feed(text[50:60])
    found.save(tmp_path / "old.state")
    assert Session.load(tmp_path / "old.state", session.base, session.tokenizer).tokens == 60
    two = read(session.base, np.zeros((2, 5), dtype=np.int64)).state
    save_state(tmp_path / "two.state", two, session.base)
    with pytest.raises(ValueError, match=r"two\.state holds 2 streams; a session can continue only one"):
        Session.load(tmp_path / "two.state", session.base, session.tokenizer)


def test_a_model_that_somebody_trains_is_noticed(saved: tuple[Session, Path]):
    session, path = saved
    before = path.read_bytes()
    with torch.no_grad():
        session.base.model.norm.weight += 1
    with pytest.raises(ValueError, match=f"the model was {session.hash} when the session began"):
        session.save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("call", ["write_whole", "replace"])
def test_a_full_disk_leaves_the_old_file(
    saved: tuple[Session, Path], text: bytes, monkeypatch: pytest.MonkeyPatch, call: str
):
    session, path = saved
    before = path.read_bytes()
    session.feed(text[50:70])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(disk if call == "write_whole" else os, call, full)
        with pytest.raises(OSError, match="No space left") as caught:
            session.save(path)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before and [each.name for each in path.parent.iterdir()] == [path.name]
    session.save(path)
    assert Session.load(path, session.base, session.tokenizer).tokens == 70


HOLDER = """
import sys
from miras.session.lock import hold
with hold(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused(saved: tuple[Session, Path], text: bytes):
    session, path = saved
    before = path.read_bytes()
    command = [sys.executable, "-c", HOLDER, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        session.feed(text[50:60])
        with pytest.raises(ValueError, match=rf"s\.miras is in use by process {other.pid}"):
            session.save(path)
        assert path.read_bytes() == before
        assert Session.load(path, session.base, session.tokenizer).tokens == 50  # reading is free
        other.kill()
        other.wait()
    # A killed process's lock is none, though its file is there.
    assert (path.parent / ".s.miras.lock").exists()
    session.save(path)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_held_session_may_be_saved_by_its_holder(saved: tuple[Session, Path]):
    session, path = saved
    with hold(path):
        session.save(path)
        assert (path.parent / ".s.miras.lock").read_text().split()[0] == str(os.getpid())
    assert not (path.parent / ".s.miras.lock").exists()


def test_the_sessions_of_a_folder(saved: tuple[Session, Path], text: bytes):
    session, path = saved
    session.mark("a")
    session.feed(text[50:60], "two")
    session.save(path.with_name("b.miras"))
    path.with_name("broken.miras").write_bytes(path.read_bytes()[:100])
    path.with_name("other.txt").write_text("no session")
    (_, b), (_, broken), (name, first) = Session.saved(path.parent)
    assert isinstance(broken, ValueError) and "broken.miras is corrupt or truncated" in str(broken)
    assert isinstance(first, files.SessionHeader) and isinstance(b, files.SessionHeader)
    assert name == path and first.tokens == 50 and first.nbytes == path.stat().st_size
    assert b.tokens == 60 and b.marks == {"a": 50} and [e[0] for e in b.episodes] == ["one", "two"]
    assert b.about.model == session.hash and "hidden 16" in b.summary and not b.learned
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Session.saved(path)
