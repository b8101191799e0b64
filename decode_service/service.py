"""The gRPC face: hand-offs in, token frames out. Everything else is the engine's."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from decode_service.hand_offs import HandOffs
from decode_service.protocol import DecodeEngine, Reservation
from decode_service.sessions import Sessions
from kvtransfer import codec
from kvtransfer.errors import ProtocolError, RejectedError, RejectReason, TransferError
from kvtransfer.messages import Cancel, Description, Open
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.proto.handoff_pb2_grpc import DecodeServicer
from kvtransfer.rpc import code_of
from kvtransfer.tokens import Attachment
from prad.core.kv import ModelSpec

logger = logging.getLogger(__name__)


class DecodeService(DecodeServicer):
    """The three calls of the contract."""

    def __init__(
        self,
        engine: DecodeEngine,
        sessions: Sessions,
        model: ModelSpec,
        instance: str,
        *,
        idle_s: float,
        shared_memory: bool,
    ) -> None:
        """idle_s, shared_memory: as for `HandOffs`."""
        self._engine = engine
        self._sessions = sessions
        self._model = model
        self._instance = instance
        self._idle_s = idle_s
        self._shared_memory = shared_memory
        self._draining: RejectedError | None = None
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
            running_sequences=status.running_sequences,
            instance=self._instance,
        )
        message: pb.Description = codec.encode(description)
        return message

    async def HandOffs(self, _: object, context: Any) -> None:  # noqa: N802
        hand_offs = HandOffs(
            self._model,
            self._admit,
            self._engine.write,
            idle_s=self._idle_s,
            shared_memory=self._shared_memory,
        )
        async with _errors_as_status(context):
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
                        replies += [reply for frame in message.frames for reply in hand_offs.receive(frame)]
                    if replies:
                        await context.write(pb.HandOffReplies(replies=replies))
            finally:
                hand_offs.close()
                waiting = [task for task in (reading, stopping) if task is not None]
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)

    async def Tokens(self, _: object, context: Any) -> None:  # noqa: N802
        async with _errors_as_status(context):
            control = await context.read()
            if control is grpc.aio.EOF or control.WhichOneof("control") != "attach":
                raise ProtocolError("a token stream begins with Attach")
            attach = control.attach
            if not attach.client_id:
                raise ProtocolError("Attach names no client_id")
            session, attachment = self._sessions.attach(attach.client_id, attach.session, attach.received)
            listener = asyncio.create_task(self._listen(session, attachment, context))
            try:
                await context.write(pb.TokenReply(attached=pb.Attached(session=session)))
                while (frame := await attachment.next()) is not None:
                    await context.write(pb.TokenReply(frame=codec.encode(frame)))
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
                    self._engine.cancel(session, codec.decode(Cancel, control.cancel))
                else:
                    raise ProtocolError(f"{kind} within a token stream")
        except TransferError as error:
            attachment.fail(error)

    def _admit(self, session: str, request: Open) -> Reservation:
        if self._draining is not None:
            raise self._draining
        if not self._sessions.knows(session):
            raise RejectedError(RejectReason.NOT_ATTACHED, "this session has no token stream: attach first")
        return self._engine.admit(session, request)


@asynccontextmanager
async def _errors_as_status(context: Any) -> AsyncIterator[None]:
    """Ends the stream with our error's status; what is no message of ours is an error of the client's."""
    try:
        yield
    except (TransferError, DecodeError) as cause:
        error = cause if isinstance(cause, TransferError) else ProtocolError(f"not a message: {cause}")
        logger.info("a stream ends: %s", error)
        await context.abort(code_of(error), str(error))
