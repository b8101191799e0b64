"""uvicorn as our services run it: on a socket that is bound before anything else, ended by a signal once."""

import errno
import signal
import socket
from types import FrameType

import uvicorn

from prad.core.errors import PradError

KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections: a request must not meet one being closed."""


class Server(uvicorn.Server):
    """A signal ends `serve` and is then done with: uvicorn would raise it again, and the process would die of
    it before the rest is closed."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def bound(
    host: str, port: int, error: type[PradError], flags: str, *, backlog: int | None = None
) -> socket.socket:
    """A socket on an address of this machine; a name's IPv4 address, if it has one. It listens at once if
    `backlog` says how many may wait. Raises `error`, which names `flags`, by which another address is chosen.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family = min(found, key=lambda each: each[0] != socket.AF_INET)[0]
        # TCP by name: of such sockets alone asyncio switches off Nagle's algorithm, by which the second part
        # of an answer waits until the client acknowledges the first, for 40 ms
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as wrong:
        raise error(
            f"cannot listen on {host!r}: {wrong.strerror}; choose another address by {flags}"
        ) from wrong
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        if backlog is not None:
            listening.listen(backlog)
    except OSError as wrong:
        listening.close()
        if wrong.errno == errno.EADDRINUSE:
            taken = f"port {port} on {host} is taken; choose another by {flags}, or stop what uses it"
            raise error(taken) from wrong
        message = f"cannot listen on {host}:{port}: {wrong.strerror}; choose another address by {flags}"
        raise error(message) from wrong
    return listening
