"""One writer at a time, also where the system has no locks, and no write to what is no lock of ours."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from miras.cli import main
from miras.store import files
from miras.store.lock import hold

HERE = files.host_tag()


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "folder", "large", "fifo"])
def test_what_has_the_locks_name_is_not_written_to(tmp_path: Path, kind: str):
    victim, lock = tmp_path / "victim", tmp_path / ".s.lock"
    victim.write_bytes(b"precious" * 8)
    if kind == "symlink":
        lock.symlink_to(victim)
    elif kind == "hardlink":
        lock.hardlink_to(victim)
    elif kind == "folder":
        lock.mkdir()
    elif kind == "fifo":
        os.mkfifo(lock)
    else:
        lock.write_bytes(b"precious" * 8)
    with (
        pytest.raises(ValueError, match=r"\.s\.lock is not a lock made by miras"),
        hold(tmp_path / "s", "wait"),
    ):
        pass
    assert victim.read_bytes() == b"precious" * 8 and lock.exists()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_process_id_is_one(tmp_path: Path):
    lock = tmp_path / ".s.lock"
    with hold(tmp_path / "s", "wait"):
        assert lock.read_text() == f"{os.getpid()} {HERE}"
    assert not lock.exists()
    for text in (
        "",
        f"{2**22 + 1} {HERE}",
        f"{os.getpid()} {HERE}",
        "odd",
    ):  # nobody's, a dead one's, our own, no lock
        lock.write_text(text)
        with hold(tmp_path / "s", "wait"):
            pass
    for text in (f"{os.getppid()} {HERE}", "17 0a0a0a", "17"):  # a living one's, and another machine's
        lock.write_text(text)
        with (
            pytest.raises(
                ValueError, match=r"is in use by process \d+; wait. This file system has no locks"
            ) as caught,
            hold(tmp_path / "s", "wait"),
        ):
            pass
        assert f"remove {lock}" in str(caught.value) and lock.read_text() == text


def test_two_trainings_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = ["train", "--out", str(tmp_path / "run"), "--needle", "--steps", "1", "--hidden-size", "16"]
    line += ["--num-hidden-layers", "1", "--num-heads", "2", "--window-size", "8", "--chunk-size", "4"]
    line += ["--num-persistent", "0", "--batch-size", "1", "--seq-len", "16"]
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/.run.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("17")
        file.flush()
        assert main(line) == 2
    said = capsys.readouterr().err
    assert (
        "run is in use by process 17; a run can have one writer at a time: wait for it, or choose another --out"
        in said
    )
    assert main(line) == 0
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "metrics.jsonl",
        "model",
        "step-0",
        "step-1",
    ]


def test_metrics_behind_a_link_do_not_leave_the_run(tmp_path: Path):
    from miras.train.run import Metrics

    (tmp_path / "victim").write_text("precious")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "victim")
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    metrics.add({"step": 0})
    metrics.close()
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "metrics.jsonl").is_symlink()
