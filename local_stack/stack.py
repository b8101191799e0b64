"""The whole stack as child processes of one command: started, watched, stopped together."""

import contextlib
import errno
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import MappingProxyType
from typing import IO, Self
from urllib.parse import urlsplit

from local_stack.endings import described_end
from local_stack.signals import signals_later
from prad.core.errors import PradError

_POLL_S = 0.1
_PATIENCE_S = 600.0
"""For whatever is waited for: a first start converts or fetches the model, maybe beside others' work."""
_STOP_S = 50.0
"""More than decode takes at most: its drain, and what it still sends."""
_LOG_LINES = 12
_LONGEST_LOG = 16 << 20
LOG_FORMAT = "%(asctime)s {service} %(levelname)s %(message)s"
"""Of a service's log; `_WARNING` is how such a line begins, and finds no such word within a message."""
_WARNING = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \S+ (?:WARNING|ERROR|CRITICAL) (.+)")


class StackError(PradError):
    """A part of the stack did not start, or ended by itself."""


@dataclass(frozen=True, slots=True)
class Service:
    """One child: `prad NAME ARGUMENTS`; its output is what `log` holds from byte `log_start` on."""

    name: str
    arguments: tuple[str, ...]
    process: "subprocess.Popen[bytes]"
    log: Path
    log_start: int

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def describe_end(self, then: str = "") -> str:
        """Why it ended, with what comes `then`, and below it the end of its log; only the log's name where a
        signal ended it, of which the log knows nothing."""
        status = self.process.wait()
        below = self._last_lines() if status >= 0 else [f"  its log: {self.log}"]
        return "\n".join((f"{self.name} {described_end(status)}{then}", *below))

    def check(self) -> None:
        """Raises StackError with why if the process has ended."""
        if self.ended:
            raise StackError(self.describe_end())

    def warnings(self) -> list[str]:
        """What its log says since its start that somebody has to know, each once."""
        found = (_WARNING.match(line) for line in self._lines())
        return list(dict.fromkeys(each[1] for each in found if each))

    def _last_lines(self) -> list[str]:
        return [f"  {line}" for line in self._lines()[-_LOG_LINES:]]

    def _lines(self) -> list[str]:
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            return file.read().decode("utf-8", errors="replace").splitlines()


class Stack:
    """Use it in a `with`: leaving stops the children, the last one first.

    `within`: by a child's name, what Python runs with its command, instead of `-m prad_cli`: a tracer.
    """

    def __init__(self, logs: Path, within: Mapping[str, Sequence[str]] = MappingProxyType({})) -> None:
        self._logs = logs
        self._within = within
        self._services: list[Service] = []

    def __enter__(self) -> Self:
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StackError(
                f"logs cannot be kept in {self._logs}: {error}; choose another --data-dir"
            ) from error
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

    def start(self, name: str, arguments: Sequence[str], *, before: str | None = None) -> None:
        """Starts `prad NAME ARGUMENTS` in a process group of its own: Ctrl-C reaches it through us, in order,
        in which it is the last, or stands before another child.
        In our session: between sessions Linux divides a core evenly, whoever of them is nice (autogroup).
        Raises StackError if its log cannot be written."""
        names = [service.name for service in self._services]
        place = len(names) if before is None else names.index(before)
        self._run(name, tuple(arguments), slice(place, place))

    def restart(self, name: str) -> None:
        """Starts a child that has ended once more, in its place of the order; its log goes on."""
        ((place, service),) = ((i, s) for i, s in enumerate(self._services) if s.name == name)
        self._run(name, service.arguments, slice(place, place + 1))

    def _run(self, name: str, arguments: tuple[str, ...], place: slice) -> None:
        log = self._logs / f"{name}.log"
        try:
            opened = _goes_on(log)
        except OSError as error:
            raise StackError(f"the log of {name} cannot be kept: {error}; move it away") from error
        with opened as file, signals_later():
            log_start = file.seek(0, os.SEEK_END)
            process = self._begin(name, arguments, file)
            self._services[place] = [Service(name, arguments, process, log, log_start)]

    def _begin(self, name: str, arguments: Sequence[str], log: IO[bytes]) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, *self._within.get(name, ("-m", "prad_cli")), name, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        """Waits until `ready()`. Raises StackError if a child ends, or if `what` takes longer than ten
        minutes."""
        deadline = time.monotonic() + _PATIENCE_S
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise StackError(
                    f"{what} took longer than {_PATIENCE_S:g} s; the logs are in {self._logs}, and prad "
                    "doctor looks for causes"
                )
            time.sleep(_POLL_S)

    def bound_logs(self) -> None:
        """A log that has grown too long becomes NAME.log.1; its service, which appends, goes on at its start.
        What is written in the same moment is lost."""
        for place, service in enumerate(self._services):
            with contextlib.suppress(OSError):  # somebody else moved it away
                if service.log.stat().st_size > _LONGEST_LOG:
                    self._begin_again(service.log)
                    self._services[place] = replace(service, log_start=0)

    @staticmethod
    def _begin_again(log: Path) -> None:
        with contextlib.suppress(OSError):  # a full disk takes no copy, and needs the room all the more
            shutil.copyfile(log, _before(log))
        os.truncate(log, 0)

    @property
    def services(self) -> tuple[Service, ...]:
        """The children, in order."""
        return tuple(self._services)

    def check(self) -> None:
        for service in self._services:
            service.check()


def _goes_on(log: Path) -> IO[bytes]:
    """The log, behind what earlier starts wrote; where that is too much it becomes NAME.log.1."""
    if log.exists() and log.stat().st_size > _LONGEST_LOG:
        log.replace(_before(log))
    return log.open("ab")


def _before(log: Path) -> Path:
    return log.with_name(f"{log.name}.1")


def require_apart(ports: Mapping[str, int]) -> None:
    """Raises StackError, which names the flags, if two of them say the same port."""
    flags: dict[int, str] = {}
    for flag, port in ports.items():
        if (other := flags.setdefault(port, flag)) != flag:
            raise StackError(f"{other} and {flag} are both {port}; choose another for one of them")


def require_free(port: int, flag: str, host: str = "127.0.0.1") -> None:
    """Raises StackError, which names the flag, if something listens on the port of this machine already."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise StackError(
                    f"port {port} is taken; stop what uses it, or choose another {flag}"
                ) from error
            raise StackError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another {flag} or --host"
            ) from error


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nothing listens on now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def answers(url: str) -> bool:
    """Whether a GET of `url` answers 200."""
    where = urlsplit(url)
    # not httpx: a client of its, with all that TLS wants, costs a poll as much as a service's whole answer
    connection = HTTPConnection(where.hostname or "", where.port, timeout=5.0)
    try:
        connection.request("GET", where.path)
        return connection.getresponse().status == HTTPStatus.OK
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
