"""The whole stack as child processes of one command: started, watched, stopped together."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx

from local_stack.signals import signals_later
from prad.core.errors import PradError

_POLL_S = 0.1
_STOP_S = 50.0
"""More than decode takes at most: its drain, and what it still sends."""
_LOG_LINES = 12


class StackError(PradError):
    """A part of the stack did not start, or ended by itself."""


@dataclass(frozen=True, slots=True)
class Service:
    """One child: `prad NAME ARGUMENTS`, its output in `log`."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def check(self) -> None:
        """Raises StackError with the end of the log if the process has ended."""
        if self.process.poll() is not None:
            lines = self.log.read_text(errors="replace", encoding="utf-8").splitlines()[-_LOG_LINES:]
            tail = "\n".join(f"  {line}" for line in lines)
            raise StackError(f"{self.name} ended with status {self.process.returncode}:\n{tail}")


class Stack:
    """Use it in a `with`: leaving stops the children, the last started first."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._services: list[Service] = []

    def __enter__(self) -> Self:
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StackError(f"logs cannot be kept in {self._logs}: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for service in reversed(self._services):
                service.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    service.process.wait(_STOP_S)
        finally:  # whoever has not ended by now, also because of a second Ctrl-C
            for service in self._services:
                service.process.kill()
                service.process.wait()

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Starts `prad NAME ARGUMENTS` in a session of its own: Ctrl-C reaches it through us, in order.
        Raises StackError if its log cannot be written."""
        log = self._logs / f"{name}.log"
        try:
            opened = log.open("wb")
        except OSError as error:
            raise StackError(f"the log of {name} cannot be kept: {error}") from error
        with opened as file, signals_later():
            process = subprocess.Popen(
                [sys.executable, "-m", "prad_cli", name, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._services.append(Service(name, process, log))

    def kill(self, name: str) -> None:
        """Ends a child at once, without a chance to tidy up, and watches it no longer."""
        (service,) = (s for s in self._services if s.name == name)
        service.process.kill()
        service.process.wait()
        self._services.remove(service)

    def wait_until(self, ready: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Waits until `ready()`. Raises StackError if a child ends, or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise StackError(f"{what} took longer than {timeout_s:g} s; the logs are in {self._logs}")
            time.sleep(_POLL_S)

    def watch(self) -> None:
        """Returns never; raises StackError when a child ends by itself."""
        while True:
            self.check()
            time.sleep(_POLL_S * 5)

    def check(self) -> None:
        for service in self._services:
            service.check()


def require_free(port: int) -> None:
    """Raises StackError if something listens on the port of this machine already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise StackError(f"port {port} is taken; stop what uses it, or choose another") from error


def answers(url: str) -> bool:
    """Whether a GET of `url` answers 200."""
    try:
        return httpx.get(url, timeout=5.0, trust_env=False).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
