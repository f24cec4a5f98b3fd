"""kill -9 at every call that touches the disk: what was there before, or what was being saved, is there whole."""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from miras.cli import main
from miras.data.tokens import ByteTokenizer, prepare
from miras.nn.folder import load_model, model_hash, save_model
from miras.nn.lm import LM
from miras.session.session import Session
from miras.store import files
from miras.stream import load_state, read, save_state
from miras.train.checkpoint import checkpoints, load_checkpoint
from miras.train.loop import Run
from miras.train.options import Settings
from miras.train.tasks import TextTask
from miras.zoo import preset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "chunk_size": 4, "window_size": 8}
CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir", "rmdir", "unlink", "ftruncate")
TEXT = np.arange(300) % 7


def build(seed: int) -> LM:
    torch.manual_seed(seed)
    return LM(preset("titans-mag", num_persistent=2, **SIZES))  # pyright: ignore


def killed_at(count: int, work: Callable[[], None]) -> bool:
    """Do the work in a process that is killed at its count-th disk call, in half a write; whether it was."""
    torch.set_num_threads(1)
    child = os.fork()
    if not child:
        left = count

        def dying(real: Callable[..., object], name: str) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    if name == "write":
                        real(arguments[0], arguments[1][: len(arguments[1]) // 2])  # pyright: ignore
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return call

        for name in CALLS:
            setattr(os, name, dying(getattr(os, name), name))
        files._exchanged = dying(files._exchanged, "exchange")  # pyright: ignore
        status = 1
        with contextlib.suppress(BaseException):
            work()
            status = 0
        os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def model_folder(place: Path) -> tuple[Callable[[], None], Callable[[], object], set[object]]:
    models = [build(0), build(1)]
    save_model(models[0], place / "model")
    hashes: set[object] = {model_hash(model) for model in models}
    return (
        lambda: save_model(models[1], place / "model") and None,
        lambda: model_hash(load_model(place / "model")),
        hashes,
    )


def checkpoint(place: Path) -> tuple[Callable[[], None], Callable[[], object], set[object]]:
    run = Run(build(0), TextTask(TEXT, batch_size=1, seq_len=16, align=4, seed=0), Settings(steps=9))
    list(run.until(2))
    run.save(place, {}, {}, keep=1)
    list(run.until(3))

    def found() -> object:
        return load_checkpoint(checkpoints(place)[-1])[2]["step"]

    return lambda: run.save(place, {}, {}, keep=1) and None, found, {2, 3}


def state(place: Path) -> tuple[Callable[[], None], Callable[[], object], set[object]]:
    model = build(0)
    save_state(place / "a", read(model, TEXT[:20]).state, model)
    more = read(model, TEXT[:30]).state
    return (
        lambda: save_state(place / "a", more, model) and None,
        lambda: load_state(place / "a", model)[1].tokens,
        {(20,), (30,)},
    )


def session(place: Path) -> tuple[Callable[[], None], Callable[[], object], set[object]]:
    model = build(0)
    made = Session(model, ByteTokenizer())
    made.feed(b"The first day.")
    made.save(place / "s.miras")
    made.feed(b"The second one.")
    return (
        lambda: made.save(place / "s.miras"),
        lambda: Session.load(place / "s.miras", model, ByteTokenizer()).tokens,
        {14, 29},
    )


def fork(place: Path) -> tuple[Callable[[], None], Callable[[], object], set[object]]:
    model = build(0)
    made = Session(model, ByteTokenizer())
    made.feed(b"The first day.")
    made.save(place / "s.miras")
    line = ["session", "fork", str(place / "s.miras"), str(place / "t.miras")]

    def found() -> object:
        there = place / "t.miras"
        return Session.load(there, model, ByteTokenizer()).tokens if there.exists() else None

    return lambda: main(line) and None, found, {14, None}


def tokens(place: Path) -> tuple[Callable[[], None], Callable[[], object], set[object]]:
    (place / "text").write_bytes(b"The memory reads on. " * 50)

    def made() -> object:
        return prepare(place / "text", ByteTokenizer(), place / "cache").num_tokens

    return lambda: made() and None, made, {1050}


KINDS = {each.__name__: each for each in (model_folder, checkpoint, state, session, fork, tokens)}


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_at_every_disk_call(kind: str, tmp_path: Path):
    place, count, results = tmp_path, 0, []
    while True:
        count += 1
        place = tmp_path / str(count)
        place.mkdir()
        work, found, wanted = KINDS[kind](place)
        killed = killed_at(count, work)
        value = found()
        assert value in wanted, (count, value)
        results.append(value)
        if kind != "fork" or value is None:
            work()  # the next save works, and takes what the kill left with it
        hidden = [path.name for path in place.rglob(".*") if not path.name.endswith(".lock")]
        assert kind == "fork" or not hidden, (count, hidden)
        if not killed:
            break
    print(f"\n| kills while saving: {kind} | {count - 1} kills | 0 lost or half saves |")
    assert count > 5
