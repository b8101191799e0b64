"""The gRPC face: hand-offs in, token frames out, and who gets these: one outbox per client, which outlives a
broken stream for a while. Everything else is the engine's.

Lives in the asyncio loop; the engine's thread reaches it through `Sessions.deliver_from_thread`.
"""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from inspect import isasyncgenfunction
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from decode_service.engine import PagedEngine
from decode_service.hand_offs import HandOffs
from decode_service.reservations import Reservation, is_name
from kvtransfer.errors import LostError, ProtocolError, RejectedError, RejectReason, TransferError
from kvtransfer.messages import Ask, Cancel, Description, Open, decode, encode
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.proto.handoff_pb2_grpc import DecodeServicer
from kvtransfer.rpc import code_of
from kvtransfer.tokens import Attachment, Outbox
from prad.core.kv import ModelSpec
from prad.core.sampling import TokenEvent

logger = logging.getLogger(__name__)

_AT_ONCE = 256  # frames that are received before others have their turn


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
        self._closed = False
        self._loop = asyncio.get_running_loop()

    @property
    def flushed(self) -> bool:
        return all(s.outbox.flushed for s in self._sessions.values())

    def knows(self, session: str) -> bool:
        return session in self._sessions

    def attach(self, client_id: str, session: str, received: int) -> tuple[str, Attachment]:
        """The session, and a stream's cursor that goes on after frame `received`.

        A new session where the one that the client shows is not known ("": it is its first): whatever it
        knew before is gone. A session of the same name that has no stream is then given up at once, and not
        only after `detach_s`: its client was started anew. One with a stream stays: a name is no secret.
        Raises ProtocolError; LostError for a new one when all are closed.
        """
        known = self._sessions.get(session)
        if known is None:
            if self._closed:
                raise LostError("this service is shutting down")
            for before in [
                s for s, its in self._sessions.items() if its.client_id == client_id and its.expiry
            ]:
                self._drop(before, "was started anew")
            session, known = secrets.token_hex(16), _Session(client_id, Outbox(self._max_frames))
            self._sessions[session] = known
            received = 0
        attachment = known.outbox.attach(received)  # or raises, and the session waits on for its next stream
        if known.expiry is not None:
            known.expiry.cancel()
            known.expiry = None
        if self._closed:
            attachment.close()
        return session, attachment

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
        """Lets every stream end in order once it has taken its frames, one that comes again as well."""
        self._closed = True
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


class DecodeService(DecodeServicer):
    """The three calls of the contract."""

    def __init__(
        self,
        engine: PagedEngine,
        sessions: Sessions,
        model: ModelSpec,
        *,
        idle_s: float,
        shared_memory: bool,
    ) -> None:
        """idle_s, shared_memory: as for `HandOffs`."""
        self._engine = engine
        self._sessions = sessions
        self._model = model
        self._idle_s = idle_s
        self._shared_memory = shared_memory
        self._draining: RejectedError | None = None
        self._refusals = Refusals()
        self._stopping = asyncio.Event()

    def drain(self, retry_after_s: float) -> None:
        """From now on nothing is admitted; what is in goes on."""
        self._draining = RejectedError(RejectReason.DRAINING, "this service is shutting down", retry_after_s)

    def stop(self) -> None:
        """Ends the streams of hand-offs; nothing may be running."""
        self._stopping.set()

    async def Describe(self, _: pb.DescribeRequest, context: Any) -> pb.Description:  # noqa: N802
        status = self._engine.status()
        description = Description(
            model=self._model,
            block_size=status.block_size,
            total_blocks=status.total_blocks,
            free_blocks=status.free_blocks,
            max_sequences=status.max_sequences,
        )
        message: pb.Description = encode(description)
        return message

    async def HandOffs(self, _: object, context: Any) -> None:  # noqa: N802
        hand_offs = HandOffs(
            self._model,
            self._engine,
            self._admit,
            idle_s=self._idle_s,
            shared_memory=self._shared_memory,
        )
        async with self._refusals.as_status(context):
            stopping = asyncio.create_task(self._stopping.wait())
            reading: asyncio.Future[Any] | None = None
            try:
                while not stopping.done():
                    reading = reading or asyncio.ensure_future(context.read())
                    timeout = hand_offs.expires_in()
                    await asyncio.wait(
                        (reading, stopping), timeout=timeout, return_when=asyncio.FIRST_COMPLETED
                    )
                    replies = hand_offs.expire()
                    if reading.done():
                        message, reading = reading.result(), None
                        if message is grpc.aio.EOF:
                            return
                        for number, frame in enumerate(message, 1):
                            replies += hand_offs.receive(frame)
                            if number % _AT_ONCE == 0:  # one peer's message may be long
                                await asyncio.sleep(0)
                    if replies:
                        await context.write(pb.HandOffReplies(replies=replies))
            finally:
                hand_offs.close()
                waiting = [task for task in (reading, stopping) if task is not None]
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)

    async def Tokens(self, _: object, context: Any) -> None:  # noqa: N802
        async with self._refusals.as_status(context):
            control = await context.read()
            if control is grpc.aio.EOF or control.WhichOneof("control") != "attach":
                raise ProtocolError("a token stream begins with Attach")
            attach = control.attach
            if not is_name(attach.client_id):
                raise ProtocolError("Attach names no client_id of a few printable characters")
            session, attachment = self._sessions.attach(attach.client_id, attach.session, attach.received)
            listener = asyncio.create_task(self._listen(session, attachment, context))
            try:
                await context.write(pb.TokenReply(attached=pb.Attached(session=session)))
                while (frame := await attachment.next()) is not None:
                    await context.write(pb.TokenReply(frame=encode(frame)))
                await context.write(pb.TokenReply(ended=pb.Ended()))
                await asyncio.wait((listener,))  # until the client goes
            finally:
                self._sessions.detach(session, attachment)
                listener.cancel()
                await asyncio.gather(listener, return_exceptions=True)

    async def _listen(self, session: str, attachment: Attachment, context: Any) -> None:
        try:
            while (control := await context.read()) is not grpc.aio.EOF:
                kind = control.WhichOneof("control")
                if kind == "acknowledge":
                    self._sessions.acknowledge(session, control.acknowledge.frame)
                elif kind == "cancel":
                    self._engine.cancel(session, decode(Cancel, control.cancel))
                elif kind == "ask":
                    self._answer(session, decode(Ask, control.ask))
                else:
                    raise ProtocolError(f"{kind} within a token stream")
        except TransferError as error:
            attachment.fail(error)
        except DecodeError as error:
            attachment.fail(ProtocolError(f"not a message: {error}"))
        except Exception:
            logger.exception("a token stream can no longer be listened to")
            attachment.fail(LostError("the decode service failed"))

    def _answer(self, session: str, ask: Ask) -> None:
        missing = self._engine.missing(session, ask)
        if missing:
            logger.warning("%d sequences that a client waits for are not here", len(missing))
        self._sessions.deliver_from_thread({session: missing})  # behind what the engine has put there

    def _admit(self, session: str, request: Open) -> Reservation:
        if self._draining is not None:
            raise self._draining
        if not self._sessions.knows(session):
            raise RejectedError(RejectReason.NOT_ATTACHED, "this session has no token stream: attach first")
        return self._engine.admit(session, request)


class ReadableMessages(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses what is no message, in one line, before its call sees it: gRPC itself logs a traceback for
    each. Calls that read by themselves, as ours that take a stream, do the same by `Refusals`."""

    def __init__(self) -> None:
        self._refusals = Refusals()

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        call = handler.unary_unary or handler.unary_stream or handler.stream_stream

        async def one(data: bytes, context: Any) -> Any:
            async with self._refusals.as_status(context):
                request = handler.request_deserializer(data)
            return await call(request, context)

        async def each(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
            requests = (handler.request_deserializer(data) async for data in messages)
            async with self._refusals.as_status(context):
                async for answer in call(requests, context):
                    yield answer

        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(one, None, handler.response_serializer)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(one, None, handler.response_serializer)
        if isasyncgenfunction(call):
            return grpc.stream_stream_rpc_method_handler(each, None, handler.response_serializer)
        return handler


class Refusals:
    """How calls end that our errors end; the log has a line of it now and then, however many there are."""

    def __init__(self, every_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s = every_s
        self._clock = clock
        self._next_at = -math.inf
        self._suppressed = 0

    @asynccontextmanager
    async def as_status(self, context: Any) -> AsyncIterator[None]:
        """Ends the call with our error's status; what is no message of ours is an error of the client's."""
        try:
            yield
        except (TransferError, DecodeError) as cause:
            error = cause if isinstance(cause, TransferError) else ProtocolError(f"not a message: {cause}")
            self._tell(error)
            await context.abort(code_of(error), str(error))

    def _tell(self, error: TransferError) -> None:
        if (now := self._clock()) < self._next_at:
            self._suppressed += 1
            return
        more = f" ({self._suppressed} more ended since the last such line)" if self._suppressed else ""
        logger.info("a call ends: %s%s", error, more)
        self._suppressed, self._next_at = 0, now + self._every_s
