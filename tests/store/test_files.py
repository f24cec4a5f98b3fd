"""What appears whole or not at all, and that nothing which is not ours is removed or written to."""

import os
import threading
import time
from pathlib import Path

import pytest

from miras.store import files
from miras.store.files import appearing, drop, host_tag, place_folder, sweep, write_atomically

DEAD = 2**22 + 1  # no process has such an id


def left(name: str, pid: int = DEAD, host: str | None = None) -> str:
    return f".{name}.{pid}-{host or host_tag()}-0123abcd.draft"


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def test_a_name_sweeps_what_is_left_of_it_alone(tmp_path: Path):
    """`model` and `model.v2`, living writers, other machines, links, and what only looks like a draft."""
    kept = [
        left("model.v2"),
        left("model", os.getppid()),
        left("model", 1, "0a0a0a"),
        ".model.draft",
        ".model.abcdefgh.draft",
        ".model.old",
        ".other.draft",
    ]
    old = left("model", 2, "0b0b0b")
    for name in (*kept, left("model"), left("model", os.getpid()), old):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    os.utime(tmp_path / old, (0, 0))
    place_folder(tmp_path / "model", {"config.json": b"{}"})
    assert names(tmp_path) == sorted([*kept, "model"])


def test_two_writers_of_one_process_leave_each_other_alone(tmp_path: Path):
    with appearing(tmp_path / "a") as file:
        file.write(b"first")
        write_atomically(tmp_path / "a", b"second")
        assert (tmp_path / "a").read_bytes() == b"second"
    assert (tmp_path / "a").read_bytes() == b"first" and names(tmp_path) == ["a"]


def test_a_link_is_followed_or_replaced_as_asked(tmp_path: Path):
    (tmp_path / "outside").write_text("mine")
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(tmp_path / "outside")
    write_atomically(tmp_path / "a", b"new", follow=False)
    assert (tmp_path / "outside").read_text() == "mine" and not (tmp_path / "a").is_symlink()
    write_atomically(tmp_path / "b", b"new")
    assert (tmp_path / "outside").read_text() == "new" and (tmp_path / "b").is_symlink()


def test_a_draft_that_is_a_link_loses_only_the_link(tmp_path: Path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("mine")
    (tmp_path / left("a")).symlink_to(tmp_path / "outside")
    sweep(tmp_path, "a")
    assert names(tmp_path) == ["outside"] and names(tmp_path / "outside") == ["file"]


@pytest.mark.skipif(files._exchange() is None, reason="this system cannot exchange two names")
def test_a_folder_is_never_absent(tmp_path: Path):
    folder = tmp_path / "model"
    place_folder(folder, {"config.json": b"0"})
    absent, stop = [], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            try:
                (folder / "config.json").read_bytes()
            except FileNotFoundError:
                absent.append(True)

    thread = threading.Thread(target=watch)
    thread.start()
    for n in range(40):
        place_folder(folder, {"config.json": str(n).encode()})
    stop.set()
    thread.join()
    assert not absent and names(tmp_path) == ["model"]


def test_without_an_exchange_it_is_replaced_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "_exchange", lambda: None)
    for n in range(3):
        place_folder(tmp_path / "model", {"config.json": str(n).encode()})
        assert (tmp_path / "model/config.json").read_bytes() == str(n).encode()
    assert names(tmp_path) == ["model"]


def test_behind_a_link_the_linked_folder_changes(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for n in range(2):
        place_folder(tmp_path / "link", {"config.json": str(n).encode()})
    assert names(tmp_path) == ["link", "real"] and (tmp_path / "real/config.json").read_bytes() == b"1"


def test_a_dropped_folder_is_gone(tmp_path: Path):
    place_folder(tmp_path / "a", {"file": b"x"})
    drop(tmp_path / "a")
    assert names(tmp_path) == []


def test_who_lives():
    assert files.living(os.getpid(), host_tag(), 0)
    assert not files.living(DEAD, host_tag(), time.time())
    assert files.living(DEAD, "0a0a0a", time.time() - 3600)
    assert not files.living(DEAD, "0a0a0a", time.time() - 100_000)
