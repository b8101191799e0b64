"""The gRPC face: hand-offs in, token frames out. Everything else is the engine's."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from decode_service.hand_offs import HandOffs
from decode_service.protocol import DecodeEngine, Reservation
from decode_service.sessions import Sessions
from kvtransfer import codec
from kvtransfer.errors import ProtocolError, RejectedError, RejectReason, TransferError
from kvtransfer.messages import Description, Open
from kvtransfer.outbox import Attachment
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.proto.handoff_pb2_grpc import DecodeServicer
from kvtransfer.status import status_of
from prad.core.layout import ModelSpec

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
        return codec.description_to_proto(description)

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
            client_id = control.attach.client_id
            if not client_id:
                raise ProtocolError("Attach names no client_id")
            name, attachment = self._sessions.attach(client_id, control.attach.received)
            listener = asyncio.create_task(self._listen(client_id, attachment, context))
            try:
                await context.write(pb.TokenReply(attached=pb.Attached(session=name)))
                while (frame := await attachment.next()) is not None:
                    await context.write(codec.frame_to_proto(frame))
                await context.write(pb.TokenReply(ended=pb.Ended()))
                await asyncio.wait((listener,))  # until the client goes
            finally:
                self._sessions.detach(client_id, attachment)
                listener.cancel()
                await asyncio.gather(listener, return_exceptions=True)

    async def _listen(self, client_id: str, attachment: Attachment, context: Any) -> None:
        try:
            while (control := await context.read()) is not grpc.aio.EOF:
                kind = control.WhichOneof("control")
                if kind == "acknowledge":
                    self._sessions.acknowledge(client_id, control.acknowledge.frame)
                elif kind == "cancel":
                    self._engine.cancel(client_id, codec.cancel_from_proto(control.cancel))
                else:
                    raise ProtocolError(f"{kind} within a token stream")
        except TransferError as error:
            attachment.fail(error)

    def _admit(self, request: Open) -> Reservation:
        if self._draining is not None:
            raise self._draining
        if not self._sessions.knows(request.client_id):
            raise RejectedError(
                RejectReason.NOT_ATTACHED, f"client {request.client_id} has no token stream: attach first"
            )
        return self._engine.admit(request)


@asynccontextmanager
async def _errors_as_status(context: Any) -> AsyncIterator[None]:
    """Ends the stream with our error's status."""
    try:
        yield
    except TransferError as error:
        logger.info("a stream ends: %s", error)
        await context.abort(status_of(error), str(error))
