"""Who gets the tokens: one outbox per client, which outlives a broken stream for a while.

Lives in the asyncio loop; the engine's thread reaches it through `deliver_from_thread`.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvtransfer.errors import LostError
from kvtransfer.outbox import Attachment, Outbox
from prad.core.tokens import TokenEvent

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Session:
    name: str
    outbox: Outbox
    expiry: asyncio.TimerHandle | None = None  # set while no stream is attached


class Sessions:
    """Clients by id. `on_gone` is called with a client's id when its session ends and its sequences are
    nobody's: it takes its frames too slowly, or has been without a stream for `detach_s`."""

    def __init__(
        self, instance: str, max_frames: int, detach_s: float, on_gone: Callable[[str], None]
    ) -> None:
        self._instance = instance
        self._max_frames = max_frames
        self._detach_s = detach_s
        self._on_gone = on_gone
        self._sessions: dict[str, _Session] = {}
        self._count = itertools.count(1)
        self._loop = asyncio.get_running_loop()

    @property
    def flushed(self) -> bool:
        return all(s.outbox.flushed for s in self._sessions.values())

    def knows(self, client_id: str) -> bool:
        return client_id in self._sessions

    def attach(self, client_id: str, received: int) -> tuple[str, Attachment]:
        """The session's name and a stream's cursor that goes on after frame `received`.

        A new name tells the client that whatever it knew before is gone. Raises ProtocolError.
        """
        session = self._sessions.get(client_id)
        if session is None:
            session = _Session(f"{self._instance}/{next(self._count)}", Outbox(self._max_frames))
            self._sessions[client_id] = session
            received = 0
        if session.expiry is not None:
            session.expiry.cancel()
            session.expiry = None
        return session.name, session.outbox.attach(received)

    def detach(self, client_id: str, attachment: Attachment) -> None:
        """A stream has ended; the session waits for the next one."""
        session = self._sessions.get(client_id)
        if session is not None and session.outbox.detach(attachment):
            why = f"had no token stream for {self._detach_s} s"
            session.expiry = self._loop.call_later(self._detach_s, self._drop, client_id, why)

    def acknowledge(self, client_id: str, number: int) -> None:
        """Raises ProtocolError for a frame that never was."""
        if client_id in self._sessions:
            self._sessions[client_id].outbox.acknowledge(number)

    def deliver(self, events: Mapping[str, Sequence[TokenEvent]]) -> None:
        """One frame for each client that is still there."""
        for client_id, of_client in events.items():
            session = self._sessions.get(client_id)
            if session is None:
                continue
            if session.outbox.full:
                self._drop(client_id, "takes its token frames too slowly")
            else:
                session.outbox.append(of_client)

    def deliver_from_thread(self, events: Mapping[str, Sequence[TokenEvent]]) -> None:
        self._loop.call_soon_threadsafe(self.deliver, events)

    def close(self) -> None:
        """Lets every stream end in order once it has taken its frames."""
        for session in self._sessions.values():
            session.outbox.close()
            if session.expiry is not None:
                session.expiry.cancel()

    def _drop(self, client_id: str, why: str) -> None:
        logger.warning("client %s %s: its sequences are cancelled", client_id, why)
        session = self._sessions.pop(client_id)
        if session.expiry is not None:
            session.expiry.cancel()
        session.outbox.fail(LostError(f"this client {why}"))
        self._on_gone(client_id)
