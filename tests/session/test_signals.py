"""Signals at every call of a save, and in every step of learning: what was read is kept, in whole pieces."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from miras.cli import main
from miras.data.tokens import ByteTokenizer
from miras.nn.folder import save_model
from miras.nn.lm import LM
from miras.session import session as sessions
from miras.session.session import Session
from miras.store.signals import STOPS
from miras.stream import load_state
from session.helpers import equal, logits

Make = Callable[..., LM]
CALLS = ("open", "write", "fsync", "replace")


@pytest.fixture(autouse=True)
def harmless() -> Iterator[None]:
    """A signal that no handler of ours takes must not end the tests: it fails the one that is at it."""
    before = {number: signal.getsignal(number) for number in STOPS}
    for number in STOPS:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def place(tiny: Make, text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_model(tiny(), tmp_path / "model")
    (tmp_path / "day.txt").write_bytes(text[:64])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MIRAS_DEBUG", raising=False)
    assert main(["session", "new", "s.miras", "model"]) == 0
    return tmp_path


def signals_in(monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> list[str]:
    """From now on a signal arrives in each such call for a draft; the calls so far."""
    calls: list[str] = []
    real = getattr(os, call)

    def called(*arguments: object, **options: object) -> object:
        done = real(*arguments, **options)
        # The lock's process id is written before anything is read.
        if (call == "write" and len(arguments[1]) > 100) or call == "fsync" or "draft" in str(arguments[0]):  # pyright: ignore
            calls.append(call)
            signal.raise_signal(number)
            signal.raise_signal(number)
        return done

    monkeypatch.setattr(os, call, called)
    return calls


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", STOPS)
def test_a_signal_during_the_save_of_a_session(
    place: Path, tiny: Make, call: str, number: int, capsys, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        calls = signals_in(patch, call, number)
        assert main(["session", "feed", "s.miras", "day.txt"]) == 130
    assert calls and "miras: stopped; s.miras: 64 tokens" in capsys.readouterr().err
    assert Session.load("s.miras", tiny(), ByteTokenizer()).tokens == 64
    assert sorted(path.name for path in place.iterdir()) == ["day.txt", "model", "s.miras"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("line", ["stream model day.txt", "generate model --prompt abcd --tokens 60"])
def test_a_signal_during_the_save_of_a_state(
    place: Path, tiny: Make, call: str, line: str, capsys, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        calls = signals_in(patch, call, signal.SIGINT)
        # The first file is only to see that a state can be written there: nothing is lost with it.
        patch.setattr("miras.commands.check_state_place", lambda *_: None)
        assert main([*line.split(), "--save-state", "a"]) == 130
    assert calls and "state after 64 tokens saved to a" in capsys.readouterr().err
    assert load_state("a", tiny())[1].tokens == (64,)


@pytest.mark.parametrize("number", STOPS)
def test_a_second_signal_while_the_first_one_saves(
    place: Path, tiny: Make, number: int, capsys, monkeypatch: pytest.MonkeyPatch
):
    real = sessions.read_pieces

    def stopped(*arguments: object, **options: object):
        for part in real(*arguments, **options):  # pyright: ignore
            yield part
            if part.start == 32:
                signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(sessions, "read_pieces", stopped)
        calls = signals_in(patch, "fsync", number)
        assert main(["session", "feed", "s.miras", "day.txt", "--piece", "16"]) == 130
    assert calls and "s.miras: 48 tokens" in capsys.readouterr().err
    last = Session.load("s.miras", tiny(), ByteTokenizer()).now.episodes[-1]
    assert (last.name, last.tokens) == ("day.txt", 48) and last.after is not None


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_signal_in_a_step_of_learning(
    place: Path, tiny: Make, text: bytes, where: str, monkeypatch: pytest.MonkeyPatch
):
    real, count = torch.optim.AdamW.step, 0

    def step(self: torch.optim.AdamW, *arguments: object) -> object:
        nonlocal count
        count += 1
        if count == 2 and where == "before":
            signal.raise_signal(signal.SIGINT)
        done = real(self, *arguments)  # pyright: ignore
        if count == 2 and where == "after":
            signal.raise_signal(signal.SIGINT)
        return done

    line = "session feed s.miras day.txt --learn --lr 1e-2 --segment 16 --replay 4"
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        assert main(line.split()) == 130
    found = Session.load("s.miras", tiny(), ByteTokenizer())
    (place / "day.txt").write_bytes(text[: found.tokens])
    assert main(["session", "new", "whole.miras", "model"]) == 0
    assert main([*line.replace("s.miras", "whole.miras").split()]) == 0
    whole = Session.load("whole.miras", tiny(), ByteTokenizer())
    assert found.tokens == 32 and found.now.episodes[-1].learned == 2 and found.now.past.seen == 2
    assert equal(found.now.state, whole.now.state)
    assert torch.equal(logits(found, text[32:60]), logits(whole, text[32:60]))


def test_many_signals_end_without_a_traceback(place: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    from miras import cli

    real = cli._say

    def say(text: str) -> None:
        signal.raise_signal(signal.SIGINT)
        real(text)
        signal.raise_signal(signal.SIGINT)

    def work(*_: object) -> int:
        try:
            signal.raise_signal(signal.SIGINT)
            return 0
        finally:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli, "_say", say)
    monkeypatch.setitem(cli.COMMANDS, "info", work)
    assert main(["info"]) == 130
    assert "miras: stopped" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_while_an_episode_begins_and_ends_leave_no_trace(tiny: Make, monkeypatch: pytest.MonkeyPatch):
    session = Session(tiny(), ByteTokenizer())
    real = sessions.loss_of

    def loss_of(*arguments: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return real(*arguments)  # pyright: ignore

    monkeypatch.setattr(sessions, "loss_of", loss_of)
    with pytest.raises(KeyboardInterrupt):
        session.feed(np.array([], dtype=np.int64))
    assert session.now.episodes == () and not session._open
    with pytest.raises(KeyboardInterrupt):
        session.feed(b"some bytes to keep")
    assert session.now.episodes[-1].after is not None and not session._open
