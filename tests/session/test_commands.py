"""`miras session`: what is printed, what is written, and one clear line for what goes wrong."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from miras.cli import main
from miras.data.tokens import ByteTokenizer
from miras.nn.folder import save_model
from miras.nn.lm import LM
from miras.session import session as sessions
from miras.session.files import read_header
from miras.session.options import COMMANDS
from miras.session.session import Session
from session.helpers import equal, logits

Make = Callable[..., LM]


@pytest.fixture(scope="module")
def shared(tiny: Make, text: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and a session that has read the first 100 bytes of it; nothing writes to it."""
    folder = tmp_path_factory.mktemp("shared")
    save_model(tiny(), folder / "model")
    (folder / "day1.txt").write_bytes(text[:100])
    (folder / "day2.txt").write_bytes(text[100:160])
    session = Session(tiny(), ByteTokenizer(), keep=20, folder=str(folder / "model"))
    session.feed(text[:100], "day1.txt")
    session.save(folder / "s.miras")
    return folder


@pytest.fixture
def place(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with `model`, `day1.txt`, `day2.txt` and the session `s.miras`."""
    for name in ("model", "day1.txt", "day2.txt"):
        (tmp_path / name).symlink_to(shared / name)
    (tmp_path / "s.miras").write_bytes((shared / "s.miras").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MIRAS_DEBUG", raising=False)
    return tmp_path


def run(line: str) -> int:
    return main(["session", *line.split()])


def loaded(tiny: Make, name: str = "s.miras") -> Session:
    return Session.load(name, tiny(), ByteTokenizer())


def test_help_needs_no_torch():
    code = (
        "import sys; from miras.cli import main\n"
        "assert main(['session', '--help']) == 0 and main(['session']) == 2\n"
        f"for name in {list(COMMANDS)}: assert main(['session', name, '--help']) == 0, name\n"
        "found = {'torch', 'transformers', 'numpy'} & sys.modules.keys(); assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"usage: miras session {name} [-h]" in done.stdout


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            "fed s.miras day1.txt",
            "unknown command 'fed', perhaps you meant 'feed'; known are new, feed, chat",
        ),
        ("new a.session model", "a.session: the name of a session ends in .miras"),
        ("new s.miras model", "s.miras already exists"),
        ("new a.miras nowhere", "nowhere is not a model"),
        ("new a.miras model --keep -1", "keep must be at least 0"),
        ("feed none.miras day1.txt", "none.miras does not exist; give the file of a saved session"),
        ("feed day1.txt day1.txt", "day1.txt is corrupt or truncated"),
        ("feed broken.miras day1.txt", "broken.miras is corrupt or truncated"),
        ("feed flipped.miras day1.txt", "flipped.miras is corrupt: its checksum differs"),
        ("feed s.miras nowhere.txt", "No such file: 'nowhere.txt'"),
        ("feed s.miras empty.txt", "empty.txt is empty: nothing to read"),
        ("feed s.miras day1.txt --piece 0", "piece must be at least 1"),
        ("feed s.miras day1.txt --threads -1", "--threads must be 0"),
        ("feed s.miras day1.txt --learn --lr -1", "lr must be at least 0, got -1.0"),
        ("feed s.miras day1.txt --learn --segment 1", "segment must be at least 2, got 1"),
        ("feed s.miras day1.txt --learn --replay -1", "replay must be at least 0, got -1"),
        ("feed s.miras day1.txt --replay 3", "--replay requires --learn; add it"),
        ("feed s.miras day1.txt --lr 0.1", "--lr requires --learn; add it"),
        ("feed s.miras day1.txt --model other", "s.miras belongs to another model"),
        (
            "feed lost.miras day1.txt",
            "lost.miras: its model was in gone, which no longer exists; give the folder of model",
        ),
        ("chat s.miras --top-p 2", "top_p must be above 0 and at most 1"),
        ("chat s.miras --tokens -1", "num_tokens must not be negative"),
        ("fork s.miras t", "t: the name of a session ends in .miras; call it t.miras"),
        ("fork s.miras lost.miras", "lost.miras already exists"),
        ("fork broken.miras t.miras", "broken.miras is corrupt or truncated"),
        ("fork flipped.miras t.miras", "flipped.miras is corrupt: its checksum differs"),
        ("mark s.miras a --drop", "the session has no mark 'a'; it has no marks yet"),
        ("rewind s.miras a", "the session has no mark 'a'"),
        ("show none.miras", "none.miras does not exist"),
        ("diff s.miras none.miras", "none.miras does not exist"),
        ("recall broken.miras", "broken.miras is corrupt or truncated"),
        ("list nowhere", "nowhere is not a folder; give a folder"),
    ],
)
def test_what_goes_wrong_is_one_clear_line(
    place: Path, tiny: Make, line: str, reason: str, capsys: pytest.CaptureFixture[str]
):
    data = (place / "s.miras").read_bytes()
    (place / "empty.txt").touch()
    (place / "broken.miras").write_bytes(data[:-10])
    (place / "flipped.miras").write_bytes(data[:-10] + bytes([data[-10] ^ 1]) + data[-9:])
    if "other" in line:
        save_model(tiny(seed=1), place / "other")
    if "lost" in line:
        session = Session(tiny(), ByteTokenizer(), folder="gone")
        session.save(place / "lost.miras")
    before = {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}
    assert run(line) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert err.startswith("miras: ") and err.count("\n") == 1 and reason in err, err
    assert {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()} == before


def test_day_after_day(place: Path, tiny: Make, text: bytes, capsys: pytest.CaptureFixture[str]):
    """new, feed, mark, feed, fork, rewind, diff, list: the same as in one process."""
    for line in (
        "new a.miras model --keep 20",
        "feed a.miras day1.txt",
        "mark a.miras monday",
        "feed a.miras day2.txt --name tuesday",
        "fork a.miras b.miras",
        "rewind b.miras monday",
    ):
        assert run(line) == 0, line
    out = capsys.readouterr().out
    assert (
        "day1.txt: 100 tokens, loss " in out
        and "rewound from 160 tokens to 'monday'; b.miras: 100 tokens" in out
    )
    mine = Session(tiny(), ByteTokenizer(), keep=20)
    mine.feed(text[:100], "day1.txt")
    first = mine.fork()
    mine.feed(text[100:160])
    a, b = loaded(tiny, "a.miras"), loaded(tiny, "b.miras")
    assert [e.name for e in a.now.episodes] == ["day1.txt", "tuesday"] and list(a.marks) == ["monday"]
    assert equal(a.now.state, mine.now.state) and equal(b.now.state, first.now.state)
    assert a.folder == str((place / "model").resolve())
    assert not [path for path in place.iterdir() if path.name.startswith(".")]

    assert run("diff b.miras a.miras --heads --json") == 0
    found = json.loads(capsys.readouterr().out)
    for row, wanted in zip(found["memory"], b.diff(a), strict=True):
        assert (row["layer"], row["weight"], row["share"]) == (wanted.layer, wanted.weight, wanted.share)
        assert row["share"] > 0.001 and row["heads"] == list(wanted.heads)
    assert run("diff b.miras a.miras --heads") == 0
    out = capsys.readouterr().out
    assert "100 tokens against 160" in out and "head 1" in out and f"{wanted.share:.2%}" in out
    assert run("diff a.miras a.miras") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("layers.")]
    assert len(rows) == 4 and all(row[3:] == ["0", "0.00%"] for row in rows)

    (place / "c.miras").write_bytes(b"broken")
    assert run("list") == 0
    out = capsys.readouterr().out
    assert "a.miras  160     2         1" in out and "c.miras is corrupt or truncated" in out
    assert run("list . --json") == 0
    names = [(row["path"], row.get("tokens")) for row in json.loads(capsys.readouterr().out)]
    assert names == [("a.miras", 160), ("b.miras", 100), ("c.miras", None), ("s.miras", 100)]
    assert run("mark a.miras monday --drop") == 0
    assert loaded(tiny, "a.miras").marks == {}


def test_show_and_recall(place: Path, tiny: Make, capsys: pytest.CaptureFixture[str]):
    assert run("mark s.miras here") == 0
    capsys.readouterr()
    session = loaded(tiny)
    assert run("show s.miras --json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(json.dumps({**told, **session.describe()}))
    assert told["file bytes"] == (place / "s.miras").stat().st_size
    assert run("show s.miras") == 0
    out = capsys.readouterr().out
    assert "s.miras: 100 tokens in 1 episode on 1 day" in out and "mark 'here' at 100 tokens" in out
    assert f"|w1| {told['memory']['layers.1']['w1']:.4g}" in out and session.hash in out
    assert run("recall s.miras --json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    (wanted,) = session.recall()
    assert row == {**vars(wanted), "left": wanted.left} and row["kept"] == 20
    assert run("recall s.miras") == 0
    out = capsys.readouterr().out
    for value in (row["now"], row["after"], row["fresh"], row["other"], row["left"]):
        assert f"{value:.4f}" in out
    assert "20 of 100" in out and "base model" not in out


def test_learning(place: Path, tiny: Make, text: bytes, capsys: pytest.CaptureFixture[str]):
    assert run("feed s.miras day2.txt --learn --lr 1e-3 --segment 16 --replay 4") == 0
    out = capsys.readouterr().out
    assert "outer weights: 4 steps, now " in out
    session = loaded(tiny)
    assert session.now.delta and session.now.past.seen == 4
    mine = loaded(tiny, str((place / "model").resolve().parent / "s.miras"))
    mine.feed(text[100:160], learning=sessions.Learning(lr=1e-3, segment=16, replay=4))
    assert torch.equal(logits(session, text[:30]), logits(mine, text[:30]))
    assert run("recall s.miras") == 0
    assert "base model" in capsys.readouterr().out
    assert run("show s.miras") == 0
    assert "after learning" in capsys.readouterr().out
    assert run("feed s.miras day2.txt") == 0  # the model's hash is still that of the base
    assert read_header("s.miras").about.model == session.hash and read_header("s.miras").learned


def test_a_moved_model_is_found_again(place: Path, tiny: Make, capsys: pytest.CaptureFixture[str]):
    session = loaded(tiny)
    session.folder = str(place / "gone")
    session.save("s.miras")
    assert run("feed s.miras day2.txt") == 2
    assert "its model was in" in capsys.readouterr().err
    assert run("feed s.miras day2.txt --model model") == 0
    assert run("feed s.miras day2.txt") == 0
    assert loaded(tiny).tokens == 220


def test_ctrl_c_in_a_feed_keeps_what_was_read(
    place: Path, tiny: Make, text: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    pieces = sessions.read_pieces

    def stopped(*arguments: object, **options: object):
        for part in pieces(*arguments, **options):  # pyright: ignore
            yield part
            if part.start == 20:
                raise KeyboardInterrupt

    monkeypatch.setattr(sessions, "read_pieces", stopped)
    assert run("feed s.miras day2.txt --piece 20") == 130
    assert "miras: stopped; s.miras: 140 tokens" in capsys.readouterr().err
    session = loaded(tiny)
    last = session.now.episodes[-1]
    assert (last.name, last.tokens, bytes(last.kept)) == ("day2.txt", 40, text[100:120])
    monkeypatch.undo()
    mine = loaded(tiny, str((place / "model").resolve().parent / "s.miras"))
    mine.feed(text[100:140], piece=20)
    assert equal(session.now.state, mine.now.state)


def test_chat_through_a_pipe_keeps_others_out(
    place: Path, tiny: Make, text: bytes, capsys: pytest.CaptureFixture[str]
):
    command = [
        sys.executable,
        "-m",
        "miras.cli",
        "session",
        "chat",
        "s.miras",
        "--tokens",
        "12",
        "--seed",
        "5",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = [b"Hello\n", b"Who are you?\n"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=env, bufsize=0, **pipes) as other:
        assert other.stdin is not None and other.stdout is not None
        other.stdin.write(said[0])
        other.stdin.flush()
        first = other.stdout.read(1)
        assert run("feed s.miras day2.txt") == 2
        assert f"s.miras is in use by process {other.pid}" in capsys.readouterr().err
        assert run("show s.miras") == 0 and run("fork s.miras t.miras") == 0  # looking at it is free
        out, err = other.communicate(said[1])
    assert other.returncode == 0 and b"s.miras: 143 tokens" in err
    mine = loaded(tiny, "t.miras")
    heard = []
    with mine.episode("chat"):
        for turn, line in enumerate(said):
            mine.feed(line)
            heard.append(mine.generate(12, seed=5 + turn))
    assert (first + out).decode() == "".join(f"{answer}\n" for answer in heard)
    last = loaded(tiny).now.episodes[-1]
    assert (last.name, last.start, last.tokens, last.scored) == ("chat", 100, 43, 19)
    assert last.after == pytest.approx(mine.now.episodes[-1].after)
    assert run("feed s.miras day2.txt") == 0


@pytest.mark.parametrize("where", ["while it waits", "while it speaks"])
def test_ctrl_c_in_a_chat_saves_and_leaves(
    place: Path, tiny: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
):
    from miras.session import commands

    class Typed(io.BytesIO):
        def __next__(self) -> bytes:
            line = self.readline()
            if not line:
                raise KeyboardInterrupt
            return line

    def say(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Typed(b"abc\n")))
    if where == "while it speaks":
        monkeypatch.setattr(commands, "say", say)
    assert run("chat s.miras --tokens 6") == 130
    tokens = 110 if where == "while it waits" else 105
    assert f"stopped; s.miras: {tokens} tokens" in capsys.readouterr().err
    assert loaded(tiny).tokens == tokens and loaded(tiny).now.episodes[-1].name == "chat"


def test_nobody_listens_any_more(place: Path, tiny: Make, monkeypatch: pytest.MonkeyPatch):
    from miras.session import commands

    def say(_: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\n")))
    monkeypatch.setattr(commands, "say", say)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    assert run("chat s.miras") == 141
    assert loaded(tiny).tokens == 105


def test_lines_are_typed_on_a_terminal(
    place: Path, tiny: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lines = iter(["abc", "d"])

    def typed(prompt: str) -> str:
        assert prompt == "> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", typed)
    assert run("chat s.miras --tokens 2") == 0
    (*_, last) = loaded(tiny).now.episodes
    assert bytes(last.kept[:4]) == b"abc\n" and bytes(last.kept[6:8]) == b"d\n" and last.tokens == 10


def test_standard_input_is_a_text(
    place: Path, tiny: Make, text: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with open("day2.txt") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert run("feed s.miras -") == 0
    assert "standard input: 60 tokens" in capsys.readouterr().out
    last = loaded(tiny).now.episodes[-1]
    assert last.name == "standard input" and bytes(last.kept) == text[100:120]
