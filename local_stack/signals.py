"""Signals of whoever starts a stack: none may end it without ending its children."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM, and SIGHUP when the terminal closes, end the command as Ctrl-C does: through the `with`, so
    that the children stop."""

    def interrupt(number: int, _: FrameType | None) -> None:
        if number == signal.SIGHUP:  # the shell and the kernel send it: the second is no second Ctrl-C
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _heeded(signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_later() -> Iterator[None]:
    """Signals that arrive inside are raised behind it: no child is started without being known."""
    arrived: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        arrived.append(number)

    before = {number: signal.signal(number, note) for number in _heeded(*_ENDING)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for arrived_number in arrived:
            signal.raise_signal(arrived_number)


def _heeded(*numbers: signal.Signals) -> list[signal.Signals]:
    """Without those that are ignored, as `nohup` has it: the children are to ignore them, too."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
