"""The way back, both ends: numbered frames of tokens, each of which arrives exactly once and in order.

Decode keeps a client's frames in an `Outbox` until they are acknowledged; a stream takes them through an
`Attachment`, and a newer stream of the client supersedes it and starts after what the client says it has.
Prefill reads them from a `TokenStream`, which survives broken connections. An outbox is one asyncio loop's.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Any, Self

import grpc
from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential

from kvtransfer.errors import FencedError, GoneError, LostError, ProtocolError, TimedOutError, TransferError
from kvtransfer.messages import Ask, Cancel, TokenFrame, decode, encode
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.rpc import read, translated
from kvtransfer.settings import TransferSettings
from prad.core.sampling import TokenEvent

logger = logging.getLogger(__name__)

_REMEMBERED_CANCELS = 256


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


class TokenStream:
    """A client's frames, each exactly once and in order (`DecodeClient.attach` makes it).

    After a broken connection it shows its session and goes on behind the last frame it yielded. A frame is
    acknowledged only after the consumer came back for the next one.
    """

    def __init__(self, stub: Any, client_id: str, settings: TransferSettings) -> None:
        self.client_id = client_id
        self._stub = stub
        self._settings = settings
        self._call: Any = None
        self.session = ""
        """What shows decode that this is the client; nobody else may know it. Empty until `attach`."""
        self._connected = False
        self._received = 0
        self._heard_at = 0.0  # in the loop's time: when it attached, or the last frame came
        self._closed = False
        self._ended = False
        self._done = 0
        self._acknowledged = 0
        # a cancel is idempotent, and a connection may break with it on the way: the latest are said again
        self._cancels: deque[Cancel] = deque()
        self._said: deque[Cancel] = deque(maxlen=_REMEMBERED_CANCELS)
        self._asking: Ask | None = None
        self._asked_at: float | None = None  # the first question that no frame has come after
        self._to_say = asyncio.Event()
        self._speaker: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """False while a broken connection is being made again."""
        return self._connected

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def __aiter__(self) -> AsyncIterator[TokenFrame]:
        """Raises LostError when decode gave up this client's sequences: it started anew, shut down, or was
        not reached in its time (`TransferSettings.silence_s`). FencedError when another stream of this client
        took over."""
        while True:
            try:
                message = await self._read()
            except GoneError:
                raise
            except LostError as error:
                if self._closed:
                    raise GoneError("this stream was closed") from error
                self._connected = False
                logger.warning("the connection to decode broke: %s", error)
                await self._reattach()
                logger.info("connected to decode again: nothing was lost")
                continue
            frame = decode(TokenFrame, message.frame)
            if frame.number != self._received + 1:
                raise ProtocolError(f"frame {frame.number} after frame {self._received}")
            self._received = frame.number
            self._heard_at = asyncio.get_running_loop().time()
            self._asked_at = None
            yield frame
            self._done = frame.number
            if self._done - self._acknowledged >= self._settings.acknowledge_every:
                self._to_say.set()

    def cancel(self, request_id: str, attempt: int, choice: int | None = None) -> None:
        """Ends a handed-over request, or one choice of it; frames on the way may still name it. Not for a
        hand-off that is not committed: `HandOff.abort` is."""
        self._cancels.append(Cancel(request_id, attempt, choice))
        self._to_say.set()

    def ask(self, ask: Ask) -> None:
        """Asks after sequences that were handed over: a frame comes, in which an event ends with an error
        each that decode does not have, behind all others of it. Said once: who waits on asks again, and then
        a decode service that does not answer is noticed."""
        now = asyncio.get_running_loop().time()
        if self._asked_at is None:
            self._asked_at = now
        elif now - self._asked_at >= self._settings.answer_timeout_s:
            self.doubt()
        self._asking = ask
        self._to_say.set()

    def doubt(self) -> None:
        """Decode did not answer elsewhere: the connection is made anew, which asks for an answer. Nothing is
        lost if there is one."""
        if self._connected:
            self._connected = False
            self._call.cancel()

    async def close(self) -> None:
        """Ends the stream; decode cancels what still runs for this client a while later."""
        self._closed = True
        await self._hang_up()

    async def attach(self) -> None:
        """Connects. Raises LostError (not there, or the session is a new one) or TimedOutError."""
        if self._closed:
            raise GoneError("this stream was closed")
        await self._hang_up()
        call = self._stub.Tokens()
        attach = pb.Attach(client_id=self.client_id, session=self.session, received=self._received)
        async with translated(call, self._settings.attach_timeout_s, "Attach"):
            await call.write(pb.TokenControl(attach=attach))
            reply = await read(call)
        session = reply.attached.session
        if self.session not in ("", session):
            call.cancel()
            raise GoneError("decode has given up this client's sequences")
        self.session, self._call, self._ended = session, call, False
        self._connected = True
        self._heard_at = asyncio.get_running_loop().time()
        self._acknowledged = self._received
        self._asked_at = None
        self._cancels.extendleft(reversed(self._said))
        self._said.clear()
        self._to_say.set()
        self._speaker = asyncio.create_task(self._speak(call))

    async def _read(self) -> Any:
        if not self._ended:
            async with translated(self._call, None, "a token frame"):
                message = await read(self._call)
            self._ended = message.WhichOneof("reply") == "ended"
        if self._ended:
            self._call.cancel()  # decode waits for that
            raise GoneError("decode has shut down")
        return message

    async def _reattach(self) -> None:
        """With random pauses, so that many clients of a decode service that came back do not come at once."""
        retrying = AsyncRetrying(
            retry=retry_if_exception(_may_help),
            wait=wait_random_exponential(self._settings.backoff_first_s, self._settings.backoff_max_s),
            reraise=True,
        )
        now, silence_s = asyncio.get_running_loop().time(), self._settings.silence_s
        try:
            async with asyncio.timeout_at(max(now + self._settings.reattach_s, self._heard_at + silence_s)):
                await retrying(self.attach)
        except TimeoutError as error:
            raise TimedOutError(f"decode was not reached again within {silence_s:g} s") from error

    async def _speak(self, call: Any) -> None:
        """The one writer of a connection: cancels, acknowledgements and questions, until it breaks."""
        try:
            while True:
                await self._to_say.wait()
                self._to_say.clear()
                while self._cancels:
                    await call.write(pb.TokenControl(cancel=encode(self._cancels[0])))
                    self._said.append(self._cancels.popleft())
                if self._done > self._acknowledged:
                    number = self._done
                    await call.write(pb.TokenControl(acknowledge=pb.Acknowledge(frame=number)))
                    self._acknowledged = number
                if self._asking is not None:
                    ask, self._asking = self._asking, None
                    await call.write(pb.TokenControl(ask=encode(ask)))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reader sees the same break and attaches again

    async def _hang_up(self) -> None:
        if self._speaker is not None:
            self._speaker.cancel()
            await asyncio.gather(self._speaker, return_exceptions=True)
            self._speaker = None
        if self._call is not None:
            self._call.cancel()


def _may_help(error: BaseException) -> bool:
    """Whether attaching again may help."""
    return isinstance(error, LostError) and not isinstance(error, GoneError)
