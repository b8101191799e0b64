"""Signals that end a stack: a closed terminal is one of them, unless nobody is to heed it."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from local_stack.signals import signals_later, stopped_by_signals


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    assert {number: signal.getsignal(number) for number in numbers} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_it_ends_as_ctrl_c_does(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), stopped_by_signals():
        signal.raise_signal(number)


def test_a_closed_terminal_told_twice_is_no_second_ctrl_c() -> None:
    with stopped_by_signals():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_while_a_child_starts_it_waits(number: signal.Signals) -> None:
    started = []

    def start() -> None:
        with stopped_by_signals(), signals_later():
            signal.raise_signal(number)
            started.append("the child")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert started


def test_what_is_ignored_stays_so_for_children_too() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopped_by_signals(), signals_later():
            signal.raise_signal(signal.SIGHUP)
            say = "import signal; print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
            assert subprocess.check_output([sys.executable, "-c", say], text=True) == "True\n"
    finally:
        signal.signal(signal.SIGHUP, before)
