"""How messages go over gRPC: what its calls raise, in our words, and our errors in gRPC's; and what waits to
go out on a stream of hand-offs, frames in order, KV bytes gathered into few, large ones.

One task writes a stream: what is due together goes out together. A KV frame is filled until it is large
enough, or until somebody waits for it.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from kvtransfer.errors import LostError, ProtocolError, TimedOutError, TransferError, error_of, status_of
from kvtransfer.frames import Encoding, KVBytes, Outgoing, PlacedRows, Rows, SharedPayload
from kvtransfer.messages import frames_of, with_data
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.proto.handoff_pb2_grpc import DecodeServicer
from kvtransfer.settings import TransferSettings

_HAND_OFFS = "HandOffs"
_SERVICE = pb.DESCRIPTOR.services_by_name["Decode"].full_name
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_AHEAD = 4  # full KV frames that wait to be written before a sender has to wait
_TOGETHER = 64  # frames of one message

_Queued = tuple[pb.HandOffFrame | Outgoing, "asyncio.Future[None]"]

StreamRows = PlacedRows[int]
"""Of a pass: those of the hand-off of this number."""


def hand_offs_call(channel: Any) -> Any:
    """A stream of hand-offs; messages are written to it as bytes."""
    return channel.stream_stream(
        f"/{_SERVICE}/{_HAND_OFFS}", response_deserializer=pb.HandOffReplies.FromString
    )()


def add_decode(service: DecodeServicer, server: Any) -> None:
    """The contract's calls; that of hand-offs reads messages as their `Frame`s."""
    handlers = {
        "Describe": grpc.unary_unary_rpc_method_handler(
            service.Describe, pb.DescribeRequest.FromString, pb.Description.SerializeToString
        ),
        _HAND_OFFS: grpc.stream_stream_rpc_method_handler(
            service.HandOffs, frames_of, pb.HandOffReplies.SerializeToString
        ),
        "Tokens": grpc.stream_stream_rpc_method_handler(
            service.Tokens, pb.TokenControl.FromString, pb.TokenReply.SerializeToString
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))


def code_of(error: TransferError) -> Any:
    """The grpc.StatusCode with which a server ends a call because of `error`."""
    return _CODES[status_of(error)]


def error_behind(code: Any, details: str | None) -> TransferError:
    """The error behind the status with which a call has ended."""
    return error_of(code.value[0], details or code.name)


async def read(call: Any) -> Any:
    """The next message of a stream. Raises the error behind its status if it has ended, LostError if it
    ended in order where a message was due."""
    message = await call.read()
    if message is not grpc.aio.EOF:
        return message
    if await call.code() is grpc.StatusCode.OK:
        raise LostError("decode ended the stream")
    raise error_behind(await call.code(), await call.details())


@asynccontextmanager
async def translated(call: Any, timeout_s: float | None, what: str) -> AsyncIterator[None]:
    """Turns what gRPC raises into our errors; a stream that failed or timed out is cancelled."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        call.cancel()
        raise TimedOutError(f"no answer to {what} within {timeout_s} s") from error
    except grpc.aio.AioRpcError as error:
        raise error_behind(error.code(), error.details()) from error
    except asyncio.InvalidStateError as error:  # grpc.aio's word for writing to a stream that has ended
        raise error_behind(await call.code(), await call.details()) from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if call.cancelled() and task is not None and not task.cancelling():
            # grpc.aio's word for a call that someone else here has cancelled; this task itself goes on
            raise LostError(f"the stream was closed before {what}") from error
        call.cancel()
        raise
    except BaseException:
        call.cancel()
        raise


class FrameQueue:
    """Nothing here knows which hand-offs there are. After `fail` nothing goes out any more."""

    def __init__(self, call: Any, settings: TransferSettings) -> None:
        self._call = call
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._failure: TransferError | None = None
        self._filling: Outgoing | None = None
        self._queue: deque[_Queued] = deque()
        self._writing: list[asyncio.Future[None]] = []
        self._queued_bytes = 0
        self._to_write = asyncio.Event()
        self._taken = asyncio.Event()
        self._shared: SharedPayload | None = None

    def offer_shared_memory(self) -> None:
        self._shared = SharedPayload.offered(self._settings.shared_bytes)
        if self._shared is not None:
            self.put(pb.HandOffFrame(segment=self._shared.offer()))

    def put(self, frame: pb.HandOffFrame) -> "asyncio.Future[None]":
        """Queues a frame behind the KV bytes before it; done when it is written."""
        self.flush()
        return self._enqueue(frame)

    def add(
        self,
        layer: int,
        planes: Sequence[KVBytes],
        widths: Sequence[int],
        placed: Sequence[StreamRows],
        encoding: Encoding,
    ) -> None:
        """A pass's rows of one layer; widths: the bytes of a row in each plane."""
        views = [memoryview(plane).cast("B") for plane in planes]
        for piece in _cut(placed, max(1, self._settings.frame_bytes // sum(widths))):
            named = tuple(Rows(r.whose, r.first_token, r.token_count) for r in piece)
            if self._filling is None or not self._filling.goes_on_with(layer, named, encoding):
                self.flush()
                self._filling = Outgoing(layer, named, encoding)
            runs = _runs(piece)
            self._filling.add(
                [
                    plane[a * width : b * width]
                    for plane, width in zip(views, widths, strict=True)
                    for a, b in runs
                ]
            )
            if self._filling.size >= self._settings.frame_bytes:
                self.flush()

    def flush(self) -> None:
        """The KV frame that is being filled may go out as it is."""
        if self._filling is not None:
            frame, self._filling = self._filling, None
            self._queued_bytes += frame.size
            self._enqueue(frame)

    async def wait_for_room(self) -> None:
        """Waits while decode takes no more KV bytes."""
        while self._queued_bytes > _AHEAD * self._settings.frame_bytes and self._failure is None:
            self._taken.clear()
            await self._taken.wait()

    def mapped(self, nonce: bytes) -> None:
        """Decode's answer to the offer. Raises ProtocolError if there was none."""
        if not self._offer().confirm(nonce):
            self._close_shared()

    def taken(self, frames: int) -> None:
        """Decode has taken so many frames out of shared memory. Raises ProtocolError if it can't have."""
        self._offer().free(frames)

    async def write(self) -> None:
        """Writes what is due, for ever. Raises TransferError when the stream ends."""
        while True:
            await self._to_write.wait()
            self._to_write.clear()
            while self._queue:
                await self._write_next()

    def fail(self, error: TransferError) -> None:
        """Whoever waits hears of `error`."""
        self._failure = error
        for written in (*self._writing, *(written for _, written in self._queue)):
            if not written.done():
                written.set_exception(error)
        self._writing.clear()
        self._queue.clear()
        self._filling = None
        self._taken.set()
        self._close_shared()

    def _enqueue(self, frame: pb.HandOffFrame | Outgoing) -> "asyncio.Future[None]":
        written = self._loop.create_future()
        written.add_done_callback(lambda future: future.cancelled() or future.exception())
        if self._failure is not None:
            written.set_exception(self._failure)
        else:
            self._queue.append((frame, written))
            self._to_write.set()
        return written

    async def _write_next(self) -> None:
        """One message: frames that are due, up to the first with KV bytes, or enough of request state."""
        message, state_bytes = pb.HandOffFrames(), 0
        written: bytes | None = None
        async with translated(self._call, self._settings.send_timeout_s, "a message"):
            while (
                self._queue and len(message.frames) < _TOGETHER and state_bytes < self._settings.frame_bytes
            ):
                frame, done = self._queue.popleft()
                self._writing.append(done)
                if isinstance(frame, Outgoing):
                    written = await self._with_kv(message, frame)
                    self._queued_bytes -= frame.size
                    break
                message.frames.append(frame)
                state_bytes += len(frame.state.data)
            await self._call.write(message.SerializeToString() if written is None else written)
        self._taken.set()
        for done in self._writing:
            if not done.done():
                done.set_result(None)
        self._writing.clear()

    async def _with_kv(self, message: pb.HandOffFrames, frame: Outgoing) -> bytes:
        """The message with the frame behind what it has."""
        placed = None if self._shared is None else await self._shared.place(frame)
        if placed is None:
            return with_data(message, frame.head(), frame.chunks, frame.size)
        message.frames.append(pb.HandOffFrame(kv=placed))
        return bytes(message.SerializeToString())

    def _offer(self) -> SharedPayload:
        if self._shared is None:
            raise ProtocolError("decode speaks of shared memory that it was not offered")
        return self._shared

    def _close_shared(self) -> None:
        if self._shared is not None:
            self._shared.close()
            self._shared = None


def _cut(placed: Sequence[StreamRows], most: int) -> list[list[StreamRows]]:
    """The rows in pieces of at most `most` tokens."""
    pieces: list[list[StreamRows]] = [[]]
    room = most
    for rows in placed:
        done = 0
        while done < rows.token_count:
            if room == 0:
                pieces.append([])
                room = most
            count = min(room, rows.token_count - done)
            pieces[-1].append(PlacedRows(rows.whose, rows.start + done, rows.first_token + done, count))
            done, room = done + count, room - count
    return pieces


def _runs(placed: Iterable[StreamRows]) -> list[tuple[int, int]]:
    """The (start, end) of rows that lie side by side in the pass."""
    runs: list[tuple[int, int]] = []
    for rows in placed:
        end = rows.start + rows.token_count
        if runs and runs[-1][1] == rows.start:
            runs[-1] = runs[-1][0], end
        else:
            runs.append((rows.start, end))
    return runs
