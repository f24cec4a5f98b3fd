"""Delay Ctrl-C, SIGTERM and SIGHUP while something is saved."""

import contextlib
import errno
import os
import signal
import stat
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""The signals that ask a program to end: Ctrl-C, the system, a closed terminal."""


class Held:
    """Inside the `with` block, signals that would stop the program are recorded in `came` and wait
    for its end.

    At the end each recorded signal goes to the previous handler, unless the block raises, which
    takes precedence. Blocks nest. Ignored signals stay ignored. Outside the main thread, where no
    signal arrives, it does nothing.
    """

    def __init__(self) -> None:
        self.came: list[int] = []
        self._obeying = False
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int] = {}

    def __enter__(self) -> "Held":
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for number in self.came if kind is None else ():
            signal.raise_signal(number)

    def obeyed(self) -> "_Obeyed":
        """A `with` block inside this one that a signal, also an earlier one, ends with
        KeyboardInterrupt.

        Every Ctrl-C does; of other signals only the first, so that the work has time to end.
        """
        return _Obeyed(self)

    def over(self, *, leaving: bool = False) -> None:
        """Mark the recorded signals as handled; an exiting program ignores further ones."""
        self.came.clear()
        if leaving:
            self._before = dict.fromkeys(self._before, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came.append(number)
        if number == getattr(signal, "SIGHUP", None):
            _leave_terminal()
        if self._obeying and (number == signal.SIGINT or self.came.count(number) == 1):
            raise KeyboardInterrupt


class _Obeyed:
    def __init__(self, held: Held) -> None:
        self._held = held

    def __enter__(self) -> None:
        if self._held.came:
            raise KeyboardInterrupt
        self._held._obeying = True

    def __exit__(self, *error: object) -> None:
        self._held._obeying = False


def _leave_terminal() -> None:
    """Discard output if the terminal is gone, instead of failing in the middle of a save."""
    for handle in (0, 1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(handle).st_mode) and not os.isatty(handle):
                nowhere = os.open(os.devnull, os.O_RDWR)
                os.dup2(nowhere, handle)
                os.close(nowhere)


def worked(work: Callable[[], None], save: Callable[[], str]) -> str:
    """Work, then save: a signal ends the work at once, but never the save.

    Returns the message of `save`; after a signal the KeyboardInterrupt carries it. Work that ends
    because of a closed pipe is saved too.
    """
    with Held() as stops:
        stopped = False
        try:
            with stops.obeyed():
                work()
        except KeyboardInterrupt:
            stopped = True
        except OSError as error:
            if not nobody_reads(error):
                raise
            save()
            raise
        said = save()
        if stopped or stops.came:
            stops.over()
            raise KeyboardInterrupt(said)
    return said


def nobody_reads(error: OSError) -> bool:
    """Whether writing failed because the pipe or the terminal is closed."""
    return isinstance(error, BrokenPipeError) or error.errno == errno.EIO
