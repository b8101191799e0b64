"""Prefill's side of the way back: one stream of token frames per client, across broken connections."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Self

import grpc

from kvtransfer import codec
from kvtransfer.calls import read, translated
from kvtransfer.errors import LostError, ProtocolError, TimedOutError
from kvtransfer.messages import Cancel, TokenFrame
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.settings import TransferSettings

_REMEMBERED_CANCELS = 256


class TokenStream:
    """A client's frames, each exactly once and in order (`DecodeClient.attach` makes it).

    After a broken connection it attaches again with back-off and goes on behind the last frame it yielded.
    A frame is acknowledged only after the consumer came back for the next one.
    """

    def __init__(self, stub: Any, client_id: str, settings: TransferSettings) -> None:
        self.client_id = client_id
        self._stub = stub
        self._settings = settings
        self._call: Any = None
        self._session = ""
        self._connected = False
        self._received = 0
        self._closed = False
        self._ended = False
        self._done = 0
        self._acknowledged = 0
        # a cancel is idempotent, and a connection may break with it on the way: the latest are said again
        self._cancels: deque[Cancel] = deque()
        self._said: deque[Cancel] = deque(maxlen=_REMEMBERED_CANCELS)
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
        not reached for `reattach_timeout_s`. FencedError when another stream of this client took over."""
        while True:
            try:
                message = await self._read()
            except _GoneError:
                raise
            except LostError as error:
                if self._closed:
                    raise _GoneError("this stream was closed") from error
                self._connected = False
                await self._reattach()
                continue
            frame = codec.frame_from_proto(message.frame)
            if frame.number != self._received + 1:
                raise ProtocolError(f"frame {frame.number} after frame {self._received}")
            self._received = frame.number
            yield frame
            self._done = frame.number
            if self._done - self._acknowledged >= self._settings.acknowledge_every:
                self._to_say.set()

    def cancel(self, request_id: str, attempt: int, choice: int | None = None) -> None:
        """Ends a handed-over request, or one choice of it; frames on the way may still name it. Not for a
        hand-off that is not committed: `HandOff.abort` is."""
        self._cancels.append(Cancel(request_id, attempt, choice))
        self._to_say.set()

    async def close(self) -> None:
        """Ends the stream; decode cancels what still runs for this client a while later."""
        self._closed = True
        await self._hang_up()

    async def attach(self) -> None:
        """Connects. Raises LostError (not there, or the session is a new one) or TimedOutError."""
        if self._closed:
            raise _GoneError("this stream was closed")
        await self._hang_up()
        call = self._stub.Tokens()
        attach = pb.Attach(client_id=self.client_id, received=self._received)
        async with translated(call, self._settings.attach_timeout_s, "Attach"):
            await call.write(pb.TokenControl(attach=attach))
            reply = await read(call)
        session = reply.attached.session
        if self._session not in ("", session):
            call.cancel()
            raise _GoneError("decode has given up this client's sequences")
        self._session, self._call, self._ended = session, call, False
        self._connected = True
        self._acknowledged = self._received
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
            raise _GoneError("decode has shut down")
        return message

    async def _reattach(self) -> None:
        pause = self._settings.backoff_first_s
        try:
            async with asyncio.timeout(self._settings.reattach_timeout_s):
                while True:
                    try:
                        return await self.attach()
                    except _GoneError:
                        raise
                    except LostError:
                        await asyncio.sleep(pause)
                        pause = min(2 * pause, self._settings.backoff_max_s)
        except TimeoutError as error:
            raise TimedOutError(
                f"decode was not reached again within {self._settings.reattach_timeout_s} s"
            ) from error

    async def _speak(self, call: Any) -> None:
        """The one writer of a connection: cancels and acknowledgements, until the connection breaks."""
        try:
            while True:
                await self._to_say.wait()
                self._to_say.clear()
                while self._cancels:
                    await call.write(codec.cancel_to_proto(self._cancels[0]))
                    self._said.append(self._cancels.popleft())
                if self._done > self._acknowledged:
                    number = self._done
                    await call.write(pb.TokenControl(acknowledge=pb.Acknowledge(frame=number)))
                    self._acknowledged = number
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reader sees the same break and attaches again

    async def _hang_up(self) -> None:
        if self._speaker is not None:
            self._speaker.cancel()
            await asyncio.gather(self._speaker, return_exceptions=True)
            self._speaker = None
        if self._call is not None:
            self._call.cancel()


class _GoneError(LostError):
    """Attaching again cannot help."""
