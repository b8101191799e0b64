"""The gRPC face: hand-offs in, token frames out. Everything else is the engine's."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from decode_service.protocol import DecodeEngine, Reservation
from decode_service.sessions import Sessions
from kvtransfer import (
    Description,
    LostError,
    ModelSpec,
    Open,
    ProtocolError,
    RejectedError,
    RejectReason,
    TimedOutError,
    TransferError,
    codec,
)
from kvtransfer.outbox import Attachment
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.proto.handoff_pb2_grpc import DecodeServicer
from kvtransfer.receiver import Committed, Receiver, Receiving, read_open
from kvtransfer.status import failure_to_proto, status_of

logger = logging.getLogger(__name__)


class DecodeService(DecodeServicer):
    """The three calls of the contract."""

    def __init__(
        self, engine: DecodeEngine, sessions: Sessions, model: ModelSpec, instance: str, idle_s: float
    ) -> None:
        """idle_s: how long a hand-off may be silent before its room is given back."""
        self._engine = engine
        self._sessions = sessions
        self._model = model
        self._instance = instance
        self._idle_s = idle_s
        self._draining: RejectedError | None = None

    def drain(self, retry_after_s: float) -> None:
        """From now on nothing is admitted; what is in goes on."""
        self._draining = RejectedError(RejectReason.DRAINING, "this service is shutting down", retry_after_s)

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

    async def HandOff(self, _: object, context: Any) -> None:  # noqa: N802
        async with _told(context):
            try:
                request = self._admissible(await self._read(context))
                reservation = self._engine.admit(request)
            except RejectedError as rejected:
                await context.write(_rejection(rejected))
                return
            try:
                await context.write(pb.HandOffReply(accepted=pb.Accepted(reserved_blocks=reservation.blocks)))
                await self._receive(context, request, reservation)
            except TransferError as error:
                reservation.release()
                logger.info("hand-off %s fails: %s", request.request_id, error)
                await context.write(failure_to_proto(error))
                while await self._next(context) is not None:
                    pass  # see the proto: prefill hangs up when it has read why
            finally:
                reservation.release()

    async def _receive(self, context: Any, request: Open, reservation: Reservation) -> None:
        receiver = Receiver(request, reservation)
        while isinstance(receiver.state, Receiving):
            receiver.receive(await self._read(context))
        if isinstance(receiver.state, Committed):
            reservation.commit(receiver.state.first_tokens)
            await context.write(pb.HandOffReply(committed=pb.Committed()))

    async def Tokens(self, _: object, context: Any) -> None:  # noqa: N802
        async with _told(context):
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
                    self._engine.cancel(codec.cancel_from_proto(control.cancel))
                else:
                    raise ProtocolError(f"{kind} within a token stream")
        except TransferError as error:
            attachment.fail(error)

    async def _read(self, context: Any) -> pb.HandOffFrame:
        """The next frame of a hand-off. Raises TimedOutError or LostError if none comes."""
        frame = await self._next(context)
        if frame is None:
            raise LostError("the hand-off ended without Commit or Abort")
        return frame

    async def _next(self, context: Any) -> pb.HandOffFrame | None:
        """The next frame, None at the end. Raises TimedOutError."""
        try:
            async with asyncio.timeout(self._idle_s):
                frame = await context.read()
        except TimeoutError as error:
            raise TimedOutError(f"the hand-off was silent for {self._idle_s} s") from error
        return None if frame is grpc.aio.EOF else frame

    def _admissible(self, frame: pb.HandOffFrame) -> Open:
        request = read_open(frame, self._model)
        if self._draining is not None:
            raise self._draining
        if not self._sessions.knows(request.client_id):
            raise RejectedError(
                RejectReason.NOT_ATTACHED, f"client {request.client_id} has no token stream: attach first"
            )
        return request


def _rejection(error: RejectedError) -> pb.HandOffReply:
    rejected = pb.Rejected(
        reason=pb.Rejected.Reason.ValueType(error.reason),
        message=error.message,
        retry_after_ms=round(error.retry_after_s * 1000),
    )
    return pb.HandOffReply(rejected=rejected)


@asynccontextmanager
async def _told(context: Any) -> AsyncIterator[None]:
    """Ends the stream with our error's status."""
    try:
        yield
    except TransferError as error:
        logger.info("a stream ends: %s", error)
        await context.abort(status_of(error), str(error))
