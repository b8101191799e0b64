"""Who gets the tokens: one outbox per client, which outlives a broken stream for a while.

Lives in the asyncio loop; the engine's thread reaches it through `deliver_from_thread`.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvtransfer.errors import LostError
from kvtransfer.tokens import Attachment, Outbox
from prad.core.sampling import TokenEvent

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Session:
    client_id: str
    outbox: Outbox
    expiry: asyncio.TimerHandle | None = None  # set while no stream is attached


class Sessions:
    """By secrets that decode makes and only the client learns: who knows a client's name or its request ids
    can't act for it. `on_gone` is called with a session when it ends and its sequences are nobody's: its
    client takes its frames too slowly, or has been without a stream for `detach_s`."""

    def __init__(self, max_frames: int, detach_s: float, on_gone: Callable[[str], None]) -> None:
        self._max_frames = max_frames
        self._detach_s = detach_s
        self._on_gone = on_gone
        self._sessions: dict[str, _Session] = {}
        self._loop = asyncio.get_running_loop()

    @property
    def flushed(self) -> bool:
        return all(s.outbox.flushed for s in self._sessions.values())

    def knows(self, session: str) -> bool:
        return session in self._sessions

    def attach(self, client_id: str, session: str, received: int) -> tuple[str, Attachment]:
        """The session, and a stream's cursor that goes on after frame `received`.

        A new session where the one that the client shows is not known ("": it is its first): whatever it
        knew before is gone. Raises ProtocolError.
        """
        known = self._sessions.get(session)
        if known is None:
            session, known = secrets.token_hex(16), _Session(client_id, Outbox(self._max_frames))
            self._sessions[session] = known
            received = 0
        if known.expiry is not None:
            known.expiry.cancel()
            known.expiry = None
        return session, known.outbox.attach(received)

    def detach(self, session: str, attachment: Attachment) -> None:
        """A stream has ended; the session waits for the next one."""
        known = self._sessions.get(session)
        if known is not None and known.outbox.detach(attachment):
            why = f"had no token stream for {self._detach_s} s"
            known.expiry = self._loop.call_later(self._detach_s, self._drop, session, why)

    def acknowledge(self, session: str, number: int) -> None:
        """Raises ProtocolError for a frame that never was."""
        if session in self._sessions:
            self._sessions[session].outbox.acknowledge(number)

    def deliver(self, events: Mapping[str, Sequence[TokenEvent]]) -> None:
        """One frame for each session that is still there."""
        for session, its_events in events.items():
            known = self._sessions.get(session)
            if known is None:
                continue
            if known.outbox.full:
                self._drop(session, "takes its token frames too slowly")
            else:
                known.outbox.append(its_events)

    def deliver_from_thread(self, events: Mapping[str, Sequence[TokenEvent]]) -> None:
        self._loop.call_soon_threadsafe(self.deliver, events)

    def close(self) -> None:
        """Lets every stream end in order once it has taken its frames."""
        for session in self._sessions.values():
            session.outbox.close()
            if session.expiry is not None:
                session.expiry.cancel()

    def _drop(self, session: str, why: str) -> None:
        gone = self._sessions.pop(session)
        logger.warning("client %s %s: its sequences are cancelled", gone.client_id, why)
        if gone.expiry is not None:
            gone.expiry.cancel()
        gone.outbox.fail(LostError(f"this client {why}"))
        self._on_gone(session)
