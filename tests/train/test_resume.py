"""Going on after a kill at any moment, and what a resumed run refuses."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from miras.cli import main
from miras.data.needle import NeedleTask
from miras.nn.folder import load_model, save_model
from miras.nn.lm import LM
from miras.store.checksums import CHECKSUMS
from miras.train.checkpoint import checkpoints, load_checkpoint, read_meta
from miras.train.loop import Run
from miras.train.options import Settings, TrainOptions
from miras.train.run import progress, train
from miras.train.tasks import NeedleTraining, TextTask
from miras.zoo import preset

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "window_size": 8, "num_persistent": 2}
SMALL = {"chunk_size": 4, **SIZES}
STEPS = 30


def options(out: Path, **changes) -> TrainOptions:
    values = {"out": out, "steps": 4, "batch_size": 1, "seq_len": 16, "checkpoint_every": 2, **SMALL}
    return TrainOptions(**(values | changes))


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def lines(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def start(out: Path, slow: bool) -> subprocess.Popen[str]:
    """A run of its own process; on a `slow` disk, so that most of its time goes into saves."""
    code = f"""
import os, sys, time
from pathlib import Path
from miras.train.options import TrainOptions
from miras.train.run import train
fsync = os.fsync
if {slow}:
    os.fsync = lambda handle: (time.sleep(0.004), fsync(handle))
sys.exit(train(TrainOptions(out=Path({str(out)!r}), steps={STEPS}, batch_size=1, seq_len=16, threads=1,
    checkpoint_every=1, resume={bool(checkpoints(out))}, **{SMALL!r})))
"""
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def test_kill_9_at_random_moments_changes_nothing(tmp_path):
    rng = random.Random(0)
    calm = start(tmp_path / "calm", slow=False)
    out = tmp_path / "killed"
    left = 0
    for kill in range(4):
        process = start(out, slow=True)
        # A few steps on; then in a save, and every other time at any moment.
        until = lines(out) + rng.randint(2, 5)
        deadline = time.monotonic() + 120
        while lines(out) < until or (kill % 2 == 0 and not list(out.glob(".step-*"))):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.004 if kill % 2 == 0 else 0.08))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        left += bool(list(out.glob(".step-*")))
        assert checkpoints(out)[-1].name != f"step-{STEPS}"
    assert left, "no kill came during a save"
    last = start(out, slow=False)
    for process in (calm, last):
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    found, wanted = rows(out), rows(tmp_path / "calm")
    assert [row["step"] for row in found] == list(range(STEPS))
    assert [row["loss"] for row in found] == [row["loss"] for row in wanted]
    a, b = (load_model(tmp_path / name / "model").state_dict() for name in ("calm", "killed"))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_bare_resume_is_as_it_began(tmp_path, capsys):
    """Also in what changes no number: how many checkpoints are kept and how often, and where tokens are."""
    (tmp_path / "text.txt").write_text("The memory learns while it reads. " * 20)
    before = torch.get_num_threads()
    line = ["train", "--out", str(tmp_path / "run"), "--text", str(tmp_path / "text.txt"), "--steps", "6"]
    line += ["--checkpoint-every", "1", "--keep", "4", "--threads", "1", "--cache", str(tmp_path / "cache")]
    line += ["--hidden-size", "16", "--num-hidden-layers", "1", "--num-heads", "2", "--window-size", "8"]
    line += ["--num-persistent", "2", "--chunk-size", "4", "--batch-size", "1", "--seq-len", "16"]
    try:
        assert main(line) == 0
        torch.set_num_threads(2)
        assert main([*line[:3], "--resume", "--steps", "9"]) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-6", "step-7", "step-8", "step-9"]
    assert not (tmp_path / "run/tokens").exists()


def test_threads_that_torch_chose_are_told(tmp_path):
    assert train(options(tmp_path)) == 0
    assert read_meta(checkpoints(tmp_path)[-1])["options"]["threads"] == torch.get_num_threads()


def test_every_changed_digit_of_what_a_checkpoint_says_is_seen(tmp_path):
    assert train(options(tmp_path)) == 0
    newest = checkpoints(tmp_path)[-1]
    file = newest / "training.json"
    whole = file.read_bytes()
    for at in range(0, len(whole), 3):
        if whole[at] in b"0123456789":
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(ValueError, match=r"training\.json is missing, truncated or changed"):
                read_meta(newest)
    file.write_bytes(whole)
    wanted = read_meta(newest)
    (newest / CHECKSUMS).unlink()  # as an older version wrote it
    assert read_meta(newest) == wanted and load_checkpoint(newest)[2] == wanted


def test_metrics_are_on_the_disk_before_a_checkpoint_is(tmp_path, monkeypatch):
    """What a power cut may take from the file is then only what the run does again."""
    real, synced = os.fsync, []

    def fsync(handle: int) -> None:
        file = tmp_path / "metrics.jsonl"
        if file.exists() and os.path.samestat(os.fstat(handle), file.stat()):
            synced.append(lines(tmp_path))
        real(handle)

    def save(self: Run, *arguments: object) -> Path:
        assert synced[-1] == self.step
        return real_save(self, *arguments)

    real_save = Run.save
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Run, "save", save)
    assert train(options(tmp_path)) == 0
    assert synced == [0, 2, 4]


def test_steps_that_the_metrics_lack_are_told(tmp_path, capsys):
    assert train(options(tmp_path)) == 0
    file = tmp_path / "metrics.jsonl"
    kept = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(kept[0] + kept[1][:5])
    assert train(options(tmp_path, steps=6, resume=True)) == 0
    assert "metrics.jsonl lacks 3 of the 4 steps before this one" in capsys.readouterr().err
    assert [row["step"] for row in rows(tmp_path)] == [0, 4, 5]


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"format_version": 7}', "\x00\xff"])
def test_meta_data_that_is_not_whole_is_one_line(tmp_path, capsys, text):
    assert train(options(tmp_path)) == 0
    newest = checkpoints(tmp_path)[-1]
    (newest / "training.json").write_text(text, encoding="latin-1")
    (newest / CHECKSUMS).unlink()
    with pytest.raises(ValueError, match=r"step-4.training\.json"):
        read_meta(newest)
    capsys.readouterr()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    flags = ["--hidden-size", "16", "--seq-len", "16", "--resume"]
    assert main(["train", "--out", str(tmp_path), *flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(newest / "training.json") in err
    assert f"{tmp_path / 'step-2'} is older: move step-4 away" in err
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "training.safetensors", "training.json"]
)
def test_a_truncated_checkpoint_names_the_older_one_which_goes_on(tmp_path, file):
    assert train(options(tmp_path)) == 0
    wanted = rows(tmp_path)
    path = checkpoints(tmp_path)[-1] / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"step-4.*; .*step-2 is older: move step-4 away"):
        train(options(tmp_path, resume=True))
    path.parent.rename(tmp_path / "away")
    assert train(options(tmp_path, resume=True)) == 0
    assert [row["loss"] for row in rows(tmp_path)] == [row["loss"] for row in wanted]


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "config.json"])
def test_one_changed_byte_is_found(tmp_path, file):
    assert train(options(tmp_path)) == 0
    path = checkpoints(tmp_path)[-1] / file
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{file} is corrupt"):
        load_checkpoint(path.parent)


def test_other_data_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_text("one text to learn " * 30)
    run = options(tmp_path / "run", text=(str(tmp_path / "a.txt"),))
    assert train(run) == 0
    (tmp_path / "a.txt").write_text("two text to learn " * 30)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = options(tmp_path / "run", text=run.text, resume=True, steps=6)
    with pytest.raises(ValueError, match="was trained on other data"):
        train(again)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    (tmp_path / "a.txt").write_text("one text to learn " * 30)
    assert train(again) == 0


def test_a_task_refuses_what_would_give_other_batches():
    sizes = {"batch_size": 2, "seq_len": 16, "align": 4, "seed": 0}
    tokens = np.arange(200) % 7
    task = TextTask(tokens, **sizes)
    saved = json.loads(json.dumps(task.to_dict()))
    TextTask(tokens.copy(), **sizes).restore(saved)
    with pytest.raises(ValueError, match="other data"):
        TextTask(tokens + 1, **sizes).restore(saved)
    with pytest.raises(ValueError, match="other data"):
        TextTask(tokens, [0, 100, 200], **sizes).restore(saved)
    for name, other in {"batch_size": 1, "seq_len": 8, "align": 8, "seed": 1}.items():
        with pytest.raises(ValueError, match=f"{name} {sizes[name]}, now {other}"):
            TextTask(tokens, **(sizes | {name: other})).restore(saved)
    needle = NeedleTraining(seed=1)
    with pytest.raises(ValueError, match="seed 1, now 2"):
        NeedleTraining(seed=2).restore(needle.to_dict())
    with pytest.raises(ValueError, match="other data"):
        NeedleTraining(seed=1, kind=NeedleTask(128, filler=b"books")).restore(needle.to_dict())
    with pytest.raises(ValueError, match="crowd 1, now 4"):
        NeedleTraining(seed=1, crowd=4).restore(needle.to_dict())
    older = {
        n: v for n, v in needle.to_dict().items() if n not in ("keys", "values", "crowd", "least", "room")
    }
    NeedleTraining(seed=1).restore(older)


@pytest.mark.parametrize("with_model", [True, False])
def test_a_run_from_a_model_resumes_with_and_without_it(tmp_path, with_model):
    torch.manual_seed(3)
    # No preset has these sizes, so that only the checkpoint can tell them.
    save_model(LM(preset("swa-lmm", **(SMALL | {"chunk_size": 8}))), tmp_path / "model")  # pyright: ignore
    sizes = dict.fromkeys(SMALL)
    begin = {"model": tmp_path / "model", **sizes}
    assert train(options(tmp_path / "whole", steps=6, **begin)) == 0
    assert train(options(tmp_path / "parts", steps=6, **begin)) == 0
    for name in ("step-6", "metrics.jsonl"):
        (tmp_path / "parts" / name).rename(tmp_path / name)
    rest = begin if with_model else sizes
    assert train(options(tmp_path / "parts", steps=6, resume=True, **rest)) == 0
    a, b = (load_model(tmp_path / name / "model") for name in ("whole", "parts"))
    assert a.config == b.config and a.config.memories()[0].stride() == 8
    assert all(torch.equal(x, b.state_dict()[n]) for n, x in a.state_dict().items())
    # What a resumed run saves still knows the model that it began with.
    assert train(options(tmp_path / "parts", steps=8, resume=True, **sizes)) == 0
    assert train(options(tmp_path / "parts", steps=9, resume=True, **begin)) == 0
    with pytest.raises(ValueError, match=r"the run began with .*model, not with .*other"):
        train(options(tmp_path / "parts", resume=True, **sizes, model=tmp_path / "other"))


def test_metrics_keep_their_history_and_drop_what_was_cut(tmp_path):
    assert train(options(tmp_path)) == 0
    file = tmp_path / "metrics.jsonl"
    history = file.read_bytes()
    file.write_bytes(history + b'{"step": 4, "loss": 1.0}\n3\n\xff\n{"step": 5, "lo')
    assert train(options(tmp_path, steps=5, resume=True)) == 0
    assert file.read_bytes().startswith(history) and [row["step"] for row in rows(tmp_path)] == [*range(5)]


def test_tokens_per_second_are_those_of_a_step_also_after_a_resume():
    task = TextTask(np.arange(300) % 7, batch_size=1, seq_len=16, align=4, seed=0)
    run = Run(LM(preset("titans-mag", **SMALL)), task, Settings(steps=4))  # pyright: ignore
    run.step, run.tokens = 3, 1_000_000
    console = Console(record=True, force_terminal=False, width=200)
    with progress(console, 4, run) as show:
        show({"step": 3, "loss": 1.0, "bits_per_byte": 1.0, "tokens": 1_000_016, "seconds": 0.5})
    assert " 32 tokens/s" in console.export_text()
