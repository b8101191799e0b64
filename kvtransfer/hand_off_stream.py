"""Prefill's one stream of hand-offs to a decode service.

Frames are queued and written by one task: what is due together goes out together. A KV frame is filled
until it is large enough, or until somebody waits for it.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import count
from typing import Any

from kvtransfer import codec
from kvtransfer.calls import read, translated
from kvtransfer.errors import (
    LostError,
    ProtocolError,
    RejectedError,
    RejectReason,
    TimedOutError,
    TransferError,
)
from kvtransfer.kv_frame import KVBytes, Outgoing, Rows
from kvtransfer.layout import Encoding, plane_bytes
from kvtransfer.messages import Open
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.sender import HandOff, PassRows
from kvtransfer.settings import TransferSettings
from kvtransfer.shared_payload import SharedPayload
from kvtransfer.status import failure_from_proto

logger = logging.getLogger(__name__)

_AHEAD = 4  # full KV frames that wait to be written before a sender has to wait
_TOGETHER = 64  # frames of one message

_Queued = tuple[pb.HandOffFrame | Outgoing, "asyncio.Future[None]"]


class HandOffStream:
    """Lives until it breaks or is closed; then every hand-off on it is over."""

    def __init__(self, call: Any, settings: TransferSettings) -> None:
        self.settings = settings
        self.failure: TransferError | None = None
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._numbers = count(1)
        self._hand_offs: dict[int, HandOff] = {}
        self._filling: Outgoing | None = None
        self._queue: deque[_Queued] = deque()
        self._writing: list[asyncio.Future[None]] = []
        self._queued_bytes = 0
        self._due = asyncio.Event()
        self._taken = asyncio.Event()
        self._shared = SharedPayload.offered(settings.shared_bytes)
        if self._shared is not None:
            self.put(pb.HandOffFrame(segment=self._shared.offer()))
        self._tasks = [asyncio.create_task(self._work(loop)) for loop in (self._write, self._read)]

    async def open(self, request: Open) -> HandOff:
        """Raises as `DecodeClient.open`."""
        if self.failure is not None:
            raise self.failure
        hand_off = HandOff(self, next(self._numbers), request)
        self._hand_offs[hand_off.number] = hand_off
        self.put(pb.HandOffFrame(open=codec.open_to_proto(request, hand_off.number)))
        try:
            async with asyncio.timeout(self.settings.open_timeout_s):
                await asyncio.shield(hand_off.accepted)
        except BaseException as error:
            self._hand_offs.pop(hand_off.number, None)
            if self.failure is None and not isinstance(error, TransferError):
                self.put(pb.HandOffFrame(abort=pb.Abort(hand_off=hand_off.number, reason="nobody waits")))
            if isinstance(error, TimeoutError):
                raise TimedOutError(f"no answer to Open within {self.settings.open_timeout_s} s") from error
            raise
        return hand_off

    async def send(
        self, layer: int, planes: Sequence[KVBytes], rows: Iterable[PassRows], encoding: Encoding
    ) -> None:
        """As `send_layer`, for hand-offs of this stream."""
        running = [r for r in rows if not r.hand_off.over]
        if not running:
            return
        views = [memoryview(plane).cast("B") for plane in planes]
        layout = running[0].hand_off.request.model.layout
        widths = plane_bytes(layout, layer, encoding)
        most = max(1, self.settings.frame_bytes // sum(widths))
        for piece in _cut(running, most):
            named = tuple(Rows(r.hand_off.number, r.first_token, r.token_count) for r in piece)
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
            for r in piece:
                r.hand_off.sent_bytes += r.token_count * sum(widths)
            if self._filling.size >= self.settings.frame_bytes:
                self.flush()
        if layer == len(layout.layers) - 1:
            self.flush()  # the rest of the pass, logits and sampling, brings no more to fill it with
        while self._queued_bytes > _AHEAD * self.settings.frame_bytes and self.failure is None:
            self._taken.clear()
            await self._taken.wait()

    def flush(self) -> None:
        """The KV frame that is being filled may go out as it is."""
        if self._filling is not None:
            frame, self._filling = self._filling, None
            self._queued_bytes += frame.size
            self._enqueue(frame)

    def put(self, frame: pb.HandOffFrame) -> "asyncio.Future[None]":
        """Queues a frame behind the KV bytes before it; done when it is written."""
        self.flush()
        return self._enqueue(frame)

    async def close(self) -> None:
        """Ends the stream; decode gives back the room of what is not committed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail(LostError("this client was closed"))

    def _enqueue(self, frame: pb.HandOffFrame | Outgoing) -> "asyncio.Future[None]":
        written = self._loop.create_future()
        written.add_done_callback(lambda future: future.cancelled() or future.exception())
        if self.failure is not None:
            written.set_exception(self.failure)
        else:
            self._queue.append((frame, written))
            self._due.set()
        return written

    async def _work(self, loop: Callable[[], Awaitable[None]]) -> None:
        try:
            await loop()
        except TransferError as error:
            self._fail(error)
        except Exception as error:  # ours, but whoever waits must hear of it
            logger.exception("the stream of hand-offs fails")
            self._fail(LostError(f"the stream of hand-offs failed: {error}"))

    async def _write(self) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            while self._queue:
                await self._write_next()

    async def _write_next(self) -> None:
        """One message: frames that are due, up to the first with KV bytes, or enough of request state."""
        message, state_bytes = pb.HandOffFrames(), 0
        async with translated(self._call, self.settings.send_timeout_s, "a message"):
            while self._queue and len(message.frames) < _TOGETHER and state_bytes < self.settings.frame_bytes:
                frame, written = self._queue.popleft()
                self._writing.append(written)
                if isinstance(frame, Outgoing):
                    message.frames.append(pb.HandOffFrame(kv=await self._kv(frame)))
                    self._queued_bytes -= frame.size
                    break
                message.frames.append(frame)
                state_bytes += len(frame.state.data)
            await self._call.write(message)
        self._taken.set()
        for written in self._writing:
            if not written.done():
                written.set_result(None)
        self._writing.clear()

    async def _kv(self, frame: Outgoing) -> pb.KV:
        if self._shared is None:
            return frame.inline()
        return await self._shared.place(frame)

    async def _read(self) -> None:
        while True:
            async with translated(self._call, None, "an answer"):
                message = await read(self._call)
            for reply in message.replies:
                self._hear(reply)

    def _hear(self, reply: pb.HandOffReply) -> None:
        kind = reply.WhichOneof("reply")
        if reply.hand_off == 0:
            self._hear_about_stream(kind, reply)
            return
        if kind == "accepted":
            hand_off = self._hand_offs.get(reply.hand_off)
            if hand_off is not None and not hand_off.accepted.done():
                hand_off.accepted.set_result(None)
            return
        hand_off = self._hand_offs.pop(reply.hand_off, None)
        if hand_off is None or hand_off.over:
            return  # nobody waits for it any more
        if kind == "rejected":
            rejected = reply.rejected
            reason, after_s = RejectReason(rejected.reason), rejected.retry_after_ms / 1000
            hand_off.fail(RejectedError(reason, rejected.message, after_s))
        elif kind == "failed":
            hand_off.fail(failure_from_proto(reply.failed))
        elif kind in ("committed", "aborted"):
            hand_off.ended.set_result(None)
        else:
            hand_off.fail(ProtocolError(f"decode answered a hand-off with {kind}"))

    def _hear_about_stream(self, kind: str | None, reply: pb.HandOffReply) -> None:
        if self._shared is None or kind not in ("mapped", "taken"):
            raise ProtocolError(f"decode said {kind} about the stream")
        if kind == "taken":
            self._shared.free(reply.taken.frames)
        elif not self._shared.confirm(reply.mapped.nonce):
            self._shared.close()
            self._shared = None

    def _fail(self, error: TransferError) -> None:
        if self.failure is None:
            self.failure = error
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        for written in (*self._writing, *(written for _, written in self._queue)):
            if not written.done():
                written.set_exception(self.failure)
        self._writing.clear()
        self._queue.clear()
        for hand_off in self._hand_offs.values():
            hand_off.fail(self.failure)
        self._hand_offs.clear()
        self._filling = None
        self._taken.set()
        if self._shared is not None:
            self._shared.close()
            self._shared = None


async def send_layer(
    layer: int, planes: Sequence[KVBytes], rows: Iterable[PassRows], encoding: Encoding = Encoding.RAW
) -> None:
    """Sends a pass's rows of one layer to all hand-offs that they belong to: each hand-off's tokens of a
    layer in order, layers in any.

    planes: as `Encoding` says, each [pass rows, bytes per token], C-contiguous; they must not change before
    the hand-offs are committed. Waits while decode takes no more. A hand-off that is over is passed over:
    its `commit` says why.
    """
    streams: dict[HandOffStream, list[PassRows]] = {}
    for r in rows:
        streams.setdefault(r.hand_off.stream, []).append(r)
    for stream, mine in streams.items():
        await stream.send(layer, planes, mine, encoding)


def _cut(rows: Sequence[PassRows], most: int) -> list[list[PassRows]]:
    """The rows in pieces of at most `most` tokens."""
    pieces: list[list[PassRows]] = [[]]
    room = most
    for r in rows:
        done = 0
        while done < r.token_count:
            if room == 0:
                pieces.append([])
                room = most
            count = min(room, r.token_count - done)
            pieces[-1].append(PassRows(r.hand_off, r.start + done, r.first_token + done, count))
            done, room = done + count, room - count
    return pieces


def _runs(rows: Iterable[PassRows]) -> list[tuple[int, int]]:
    """The (start, end) of rows that lie side by side in the pass."""
    runs: list[tuple[int, int]] = []
    for r in rows:
        if runs and runs[-1][1] == r.start:
            runs[-1] = runs[-1][0], r.start + r.token_count
        else:
            runs.append((r.start, r.start + r.token_count))
    return runs
