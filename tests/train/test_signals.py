"""Signals in a step and in each call of a save: a checkpoint of every finished step, and a whole one."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from miras.cli import main
from miras.nn.folder import load_model, save_model
from miras.nn.lm import LM
from miras.store.signals import STOPS
from miras.train.checkpoint import checkpoints, load_checkpoint
from miras.train.loop import Run
from miras.zoo import preset

LINE = [
    *(
        "train",
        "--out",
        "run",
        "--needle",
        "--hidden-size",
        "16",
        "--num-hidden-layers",
        "1",
        "--num-heads",
        "2",
    ),
    *(
        "--window-size",
        "8",
        "--num-persistent",
        "2",
        "--chunk-size",
        "4",
        "--batch-size",
        "1",
        "--seq-len",
        "16",
    ),
]


@pytest.fixture(autouse=True)
def harmless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A signal that no handler of ours takes must not end the tests: it fails the one that is at it."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in STOPS}
    for number in STOPS:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPS)
def test_signals_in_a_step_and_in_the_save_behind_it(number: int, capsys, monkeypatch: pytest.MonkeyPatch):
    real, fsync = Run.advance, os.fsync

    def advance(self: Run) -> dict[str, float]:
        if self.step == 2:
            signal.raise_signal(number)
            signal.raise_signal(number)
            monkeypatch.setattr(os, "fsync", lambda handle: (fsync(handle), signal.raise_signal(number)))
        return real(self)

    monkeypatch.setattr(Run, "advance", advance)
    assert main([*LINE, "--steps", "9"]) == 130
    assert "step-3 has everything" in capsys.readouterr().err
    assert load_checkpoint(checkpoints(Path("run"))[-1])[2]["step"] == 3


def test_a_signal_in_the_last_save_loses_no_model(capsys, monkeypatch: pytest.MonkeyPatch):
    real = Run.save

    def save(self: Run, *arguments: object) -> Path:
        if self.step:
            signal.raise_signal(signal.SIGINT)
        return real(self, *arguments)  # pyright: ignore

    monkeypatch.setattr(Run, "save", save)
    assert main([*LINE, "--steps", "2"]) == 0
    assert "The model is" in capsys.readouterr().err
    load_model("run/model")


def test_from_python_a_save_is_finished_before_a_signal_is_obeyed(monkeypatch: pytest.MonkeyPatch):
    models = [LM(preset("titans-mag", hidden_size=16, num_hidden_layers=1, num_heads=2)) for _ in range(2)]
    save_model(models[0], "model")
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (real(handle), signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        save_model(models[1], "model")
    found, wanted = (m.state_dict() for m in (load_model("model"), models[1]))
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert sorted(path.name for path in Path().iterdir()) == ["model"]
