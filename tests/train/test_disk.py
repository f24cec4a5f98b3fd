"""Saving when the disk is full or a rename fails: one line, exit status 2, and what was there is there still."""

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from miras.cli import main
from miras.nn.folder import load_model, save_model
from miras.nn.lm import LM
from miras.store import files
from miras.store.files import write_atomically
from miras.stream import load_state, read, save_state
from miras.train.checkpoint import checkpoints, load_checkpoint
from miras.train.loop import Run
from miras.train.options import Settings
from miras.train.tasks import TextTask
from miras.zoo import preset

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_heads": 2,
    "window_size": 8,
    "num_persistent": 2,
    "chunk_size": 4,
}
CALLS = ["open", "write", "fsync"]


def fill_disk(monkeypatch: pytest.MonkeyPatch, call: str, name: str) -> None:
    """From now on this call fails as on a full disk, for files with `name` in their path."""
    real = {each: getattr(os, each) for each in ("open", "write", "fsync", "close")}
    paths: dict[int, str] = {}

    def full(where: str) -> bool:
        return name in where

    def opened(path, flags, *rest, **options):
        if call == "open" and flags & os.O_CREAT and full(str(path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        handle = real["open"](path, flags, *rest, **options)
        paths[handle] = str(path)
        return handle

    def write(handle, data):
        if call == "write" and full(paths.get(handle, "")):
            if len(data) > 100:
                return real["write"](handle, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real["write"](handle, data)

    def fsync(handle):
        if call == "fsync" and full(paths.get(handle, "")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real["fsync"](handle)

    def close(handle):
        paths.pop(handle, None)
        return real["close"](handle)

    for fake, what in ((opened, "open"), (write, "write"), (fsync, "fsync"), (close, "close")):
        monkeypatch.setattr(os, what, fake)


def build(seed: int = 0) -> LM:
    torch.manual_seed(seed)
    return LM(preset("titans-mag", **TINY))  # pyright: ignore


def begun(steps: int) -> Run:
    task = TextTask(np.arange(300) % 7, batch_size=1, seq_len=16, align=4, seed=0)
    run = Run(build(), task, Settings(steps=steps))
    list(run.until(steps))
    return run


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def contents(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "training.safetensors", "training.json"]
)
def test_a_full_disk_during_a_checkpoint(tmp_path, monkeypatch, call, file):
    run = begun(2)
    first = run.save(tmp_path, {}, {}, keep=1)
    before = contents(tmp_path)
    list(run.until(run.step + 1))
    with monkeypatch.context() as patch:
        fill_disk(patch, call, file)
        with pytest.raises(OSError, match="step-3") as caught:
            run.save(tmp_path, {}, {}, keep=1)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "step-3")
    assert names(tmp_path) == ["step-2"] and contents(tmp_path) == before
    assert load_checkpoint(first)[2]["step"] == 2
    run.save(tmp_path, {}, {}, keep=1)
    assert names(tmp_path) == ["step-3"]


@pytest.mark.parametrize("call", CALLS)
def test_a_full_disk_while_a_state_is_saved(tmp_path, monkeypatch, call):
    model = build()
    path = tmp_path / "memory.state"
    save_state(path, read(model, np.arange(20)).state, model)
    before = path.read_bytes()
    more = read(model, np.arange(30)).state
    with monkeypatch.context() as patch:
        fill_disk(patch, call, path.name)
        with pytest.raises(OSError, match=r"memory\.state") as caught:
            save_state(path, more, model)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert names(tmp_path) == [path.name] and path.read_bytes() == before
    assert load_state(path, model)[1].tokens == (20,)


FLAGS = [
    *("--hidden-size", "16", "--num-hidden-layers", "1", "--num-heads", "2", "--window-size", "8"),
    *("--num-persistent", "2", "--chunk-size", "4", "--batch-size", "1", "--seq-len", "16", "--threads", "1"),
]


@pytest.mark.parametrize("call", CALLS)
def test_the_commands_say_that_the_disk_is_full(tmp_path, monkeypatch, capsys, call):
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("The memory learns while it reads. " * 20)
    line = ["train", "--out", "run", "--text", "text.txt", *FLAGS, "--steps", "6", "--checkpoint-every", "2"]
    with monkeypatch.context() as patch:
        fill_disk(patch, call, ".step-4.")
        assert main(line) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == f"miras: No space left on device: {Path('run/step-4')}"
    assert "Traceback" not in err
    there = checkpoints(Path("run"))
    assert [path.name for path in there] == ["step-0", "step-2"]
    assert all(load_checkpoint(path)[2]["step"] == int(path.name[5:]) for path in there)
    assert not [path for path in Path("run").iterdir() if path.name.startswith(".")]

    assert main([*line, "--resume"]) == 0
    assert main(["stream", "run/model", "text.txt", "--save-state", "memory.state"]) == 0
    before = Path("memory.state").read_bytes()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        fill_disk(patch, call, "memory.state")
        assert main(["stream", "run/model", "text.txt", "--save-state", "memory.state"]) == 2
    # Where no file can be made at all, it is said before anything is read.
    early = "--save-state memory.state cannot be written (No space left on device)"
    early += "; choose a place where you may write"
    late = "No space left on device: memory.state"
    assert capsys.readouterr().err == f"miras: {early if call == 'open' else late}\n"
    assert Path("memory.state").read_bytes() == before
    assert names(tmp_path) == ["memory.state", "run", "text.txt"]
    torch.set_num_threads(threads)


def test_metrics_survive_a_full_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["train", "--out", "run", "--needle", *FLAGS, "--steps", "4", "--checkpoint-every", "2"]
    assert main(line) == 0
    before = Path("run/metrics.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        fill_disk(patch, "write", "metrics.jsonl")
        assert main([*line, "--steps", "6", "--resume"]) == 2
    assert "No space left on device: run/metrics.jsonl" in capsys.readouterr().err
    assert Path("run/metrics.jsonl").read_bytes() == before
    assert main([*line, "--steps", "6", "--resume"]) == 0
    assert Path("run/metrics.jsonl").read_bytes().startswith(before)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_model_that_cannot_be_replaced_stays(tmp_path, monkeypatch, failing):
    """Where names cannot be exchanged, the first rename moves the old model aside, the second names the new one."""
    save_model(build(0), tmp_path / "model")
    before = contents(tmp_path)
    real, calls = Path.rename, []

    def rename(self, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_exchange", lambda: None)
        patch.setattr(Path, "rename", rename)
        with pytest.raises(OSError, match="model"):
            save_model(build(1), tmp_path / "model")
    assert names(tmp_path) == ["model"] and contents(tmp_path) == before
    save_model(build(1), tmp_path / "model")
    assert names(tmp_path) == ["model"]
    found, wanted = load_model(tmp_path / "model").state_dict(), build(1).state_dict()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    save_model(build(0), tmp_path / "model")
    before = contents(tmp_path)
    aside = tmp_path / f".model.1-{files.host_tag()}-00000000.old"
    (tmp_path / "model").rename(aside)
    monkeypatch.setattr(files, "living", lambda *_: False)
    with monkeypatch.context() as patch:
        fill_disk(patch, "write", ".model.")
        with pytest.raises(OSError, match="model"):
            save_model(build(1), tmp_path / "model")
    assert names(tmp_path) == ["model"]
    assert contents(tmp_path) == before
    save_model(build(1), tmp_path / "model")
    assert names(tmp_path) == ["model"]


def test_drafts_that_kills_left_are_swept(tmp_path, monkeypatch):
    run = begun(1)
    monkeypatch.setattr(files, "living", lambda pid, *_: pid == 1)
    own = f"{os.getpid()}-{files.host_tag()}"
    for name in (
        ".step-0.7-0a0a0a-00000000.draft",
        f".step-1.{own}-00000000.draft",
        ".step-1.1-0a0a0a-0.draft",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    others = (
        ".mine",
        ".mine.draft",
        ".step-1.x.draft",
        ".step-2.1-0a0a0a-00000000.draft",
        ".a.7-0a0a0a-00000000.draft",
    )
    for name in others:
        (tmp_path / name).write_bytes(b"not ours, or not dead")
    run.save(tmp_path, {}, {}, keep=1)
    assert names(tmp_path) == sorted([*others, ".step-1.1-0a0a0a-0.draft", "step-1"])


def test_a_whole_checkpoint_is_not_written_again(tmp_path):
    run = begun(1)
    path = run.save(tmp_path, {}, {}, keep=1)
    at = path.stat().st_ino
    assert run.save(tmp_path, {}, {}, keep=1) == path and path.stat().st_ino == at
    (path / "model.safetensors").write_bytes(b"half")
    run.save(tmp_path, {}, {}, keep=1)
    assert path.stat().st_ino != at and load_checkpoint(path)[2]["step"] == 1


def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        save_model(build(), tmp_path / "model", {"extra.json": b"{}"})
        write_atomically(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes.pop("model") == 0o750 and set(modes.values()) == {0o640}, modes


def test_short_writes_are_gone_on_with(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:1000]))
    save_model(build(), tmp_path / "model")
    wanted = build().state_dict()
    found = load_model(tmp_path / "model").state_dict()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
