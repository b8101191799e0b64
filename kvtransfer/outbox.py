"""Decode's side of the way back: a client's numbered token frames, kept until acknowledged.

One asyncio loop owns an outbox. A stream takes frames through an `Attachment`; a newer one supersedes it and
starts after what the client says it has.
"""

import asyncio
from collections import deque
from collections.abc import Iterable

from kvtransfer.errors import FencedError, ProtocolError, TransferError
from kvtransfer.messages import TokenFrame
from prad.core.tokens import TokenEvent


class Outbox:
    """At most `max_frames` frames that the client has not acknowledged, oldest first."""

    def __init__(self, max_frames: int) -> None:
        self._max_frames = max_frames
        self._frames: deque[TokenFrame] = deque()
        self._last = 0
        self._attachment: Attachment | None = None

    @property
    def full(self) -> bool:
        return len(self._frames) >= self._max_frames

    @property
    def flushed(self) -> bool:
        """Whether the attached stream has taken every frame; nobody attached counts as flushed."""
        return self._attachment is None or self._attachment.taken == self._last

    def append(self, events: Iterable[TokenEvent]) -> None:
        """Numbers a new frame. The outbox must not be full: whoever appends decides what full means."""
        assert not self.full, "append to a full outbox"
        self._last += 1
        self._frames.append(TokenFrame(self._last, tuple(events)))
        if self._attachment is not None:
            self._attachment.wake()

    def acknowledge(self, number: int) -> None:
        """Forgets frames up to `number`. Raises ProtocolError for a frame that never was."""
        if number > self._last:
            raise ProtocolError(f"frame {number} is acknowledged, {self._last} is the last")
        while self._frames and self._frames[0].number <= number:
            self._frames.popleft()

    def attach(self, received: int) -> "Attachment":
        """A stream that goes on after frame `received`; supersedes the one before.

        Raises ProtocolError for a frame that never was.
        """
        self.acknowledge(received)
        self.fail(FencedError("a newer token stream of this client has taken over"))
        self._attachment = Attachment(self, received)
        return self._attachment

    def detach(self, attachment: "Attachment") -> bool:
        """The stream is gone; False, and no effect, if a newer one has taken over."""
        if self._attachment is not attachment:
            return False
        self._attachment = None
        return True

    def close(self) -> None:
        """Lets the attached stream end after the frames that are there."""
        if self._attachment is not None:
            self._attachment.close()

    def fail(self, error: TransferError) -> None:
        """Ends the attached stream, if there is one, with `error`, at once."""
        if self._attachment is not None:
            self._attachment.fail(error)

    def after(self, number: int) -> TokenFrame | None:
        """The frame after `number`, if there is one."""
        if number >= self._last:
            return None
        # numbers are consecutive, so the place follows from the oldest one; a frame acknowledged early is
        # skipped
        return self._frames[max(number + 1 - self._frames[0].number, 0)] if self._frames else None


class Attachment:
    """One stream's cursor through an outbox; `taken` is the number of the last frame it took."""

    def __init__(self, outbox: Outbox, received: int) -> None:
        self.taken = received
        self._outbox = outbox
        self._changed = asyncio.Event()
        self._failure: TransferError | None = None
        self._closed = False

    async def next(self) -> TokenFrame | None:
        """The next frame, as soon as there is one; None at the end.

        Raises what the stream was failed with: FencedError when a newer stream of the client took over.
        """
        while self._failure is None:
            frame = self._outbox.after(self.taken)
            if frame is not None:
                self.taken = frame.number
                return frame
            if self._closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        raise self._failure

    def wake(self) -> None:
        self._changed.set()

    def fail(self, error: TransferError) -> None:
        self._failure = error
        self.wake()

    def close(self) -> None:
        self._closed = True
        self.wake()
