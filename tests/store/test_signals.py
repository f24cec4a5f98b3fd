"""Signals wait while something is saved, and mean afterwards what they meant before."""

import signal
import threading
from collections.abc import Iterator

import pytest

from miras.store.signals import STOPS, Held, worked


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOPS}
    signal.signal(signal.SIGHUP, signal.default_int_handler)  # its default would end the tests
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_waits_for_the_end(number: int):
    done = []
    with pytest.raises(KeyboardInterrupt), Held() as stops:
        signal.raise_signal(number)
        with Held():
            signal.raise_signal(number)
        done.append(list(stops.came))
    assert done == [[number, number]]
    assert signal.getsignal(number) is signal.default_int_handler


def test_what_is_dealt_with_is_not_told_again():
    with Held() as stops:
        signal.raise_signal(signal.SIGINT)
        stops.over()


def test_an_error_is_what_the_caller_hears_of():
    with pytest.raises(OSError, match="full"), Held():
        signal.raise_signal(signal.SIGINT)
        raise OSError("full")


def test_a_block_that_obeys_ends_at_once():
    after = []
    with Held() as stops:
        with pytest.raises(KeyboardInterrupt), stops.obeyed():
            signal.raise_signal(signal.SIGINT)
            after.append("not reached")
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), stops.obeyed():
            after.append("not reached either")
        stops.over()
    assert after == []


def test_what_is_ignored_stays_so():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup asks for
    with Held() as stops, stops.obeyed():
        signal.raise_signal(signal.SIGHUP)
    assert stops.came == []


def test_other_threads_change_nothing():
    def inside() -> None:
        with Held():
            seen.append(signal.getsignal(signal.SIGINT))

    seen: list[object] = []
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


@pytest.mark.parametrize("when", ["work", "save", "both", "never"])
def test_work_is_saved_whatever_comes(when: str):
    saved = []

    def work() -> None:
        if when in ("work", "both"):
            signal.raise_signal(signal.SIGINT)

    def save() -> str:
        if when in ("save", "both"):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGHUP)
        saved.append(True)
        return "saved"

    if when == "never":
        assert worked(work, save) == "saved"
    else:
        with pytest.raises(KeyboardInterrupt, match="saved"):
            worked(work, save)
    assert saved == [True]


def test_work_that_fails_is_not_saved():
    with pytest.raises(OSError, match="full"):
        worked(lambda: (_ for _ in ()).throw(OSError(28, "full")), lambda: pytest.fail("saved"))  # pyright: ignore


def test_a_closed_terminal_is_saved_too():
    saved = []

    def work() -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        worked(work, lambda: saved.append(True) or "")
    assert saved == [True]
