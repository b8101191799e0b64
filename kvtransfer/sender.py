"""Prefill's door to one decode service, and its side of the hand-off: one channel, on it one stream with a
hand-off for each prompt, whose layers go out in order, then Commit or Abort. `rpc.py` writes what is
said here; tokens come back on the stream of `tokens.py`."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, Self

import grpc
import xxhash

from kvtransfer.errors import (
    LostError,
    ProtocolError,
    RejectedError,
    RejectReason,
    TimedOutError,
    TransferError,
    error_of,
)
from kvtransfer.frames import Encoding, KVBytes, PlacedRows, plane_bytes
from kvtransfer.messages import Description, Open, decode, encode
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.proto.handoff_pb2_grpc import DecodeStub
from kvtransfer.rpc import FrameQueue, StreamRows, error_behind, hand_offs_call, read, translated
from kvtransfer.settings import TransferSettings
from kvtransfer.tokens import TokenStream
from prad.core.sampling import Token

logger = logging.getLogger(__name__)


class DecodeClient:
    """Use it in the asyncio loop that made it, and `close` it (or `async with`)."""

    def __init__(self, address: str, settings: TransferSettings | None = None) -> None:
        """address: "host:port" or any gRPC target. Connects when first used."""
        self.address = address
        self._settings = settings or TransferSettings()
        self._channel = grpc.aio.insecure_channel(address, options=self._settings.channel_options())
        self._stub: Any = DecodeStub(self._channel)  # type: ignore[no-untyped-call]
        self._session = ""
        self._hand_offs: HandOffStream | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every stream of this client at once."""
        if self._hand_offs is not None:
            await self._hand_offs.close()
        await self._channel.close()

    async def describe(self) -> Description:
        """Which model decode serves, and how full it is. Raises LostError or TimedOutError."""
        try:
            reply = await self._stub.Describe(pb.DescribeRequest(), timeout=self._settings.describe_timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_behind(error.code(), error.details()) from error
        return decode(Description, reply)

    async def attach(self, client_id: str) -> TokenStream:
        """A new session and its token stream; what is opened from now on sends its tokens there.

        client_id is a name for people. Raises LostError or TimedOutError.
        """
        stream = TokenStream(self._stub, client_id, self._settings)
        await stream.attach()
        self._session = stream.session
        return stream

    async def open(self, request: Open) -> "HandOff":
        """Reserves room; call it before the prompt pass.

        Raises RejectedError (with a retry hint where the request itself is fine), LostError, TimedOutError,
        ProtocolError.
        """
        if not self._session:
            raise RejectedError(RejectReason.NOT_ATTACHED, "there is no token stream: attach first")
        stream = self._hand_offs
        if stream is not None and stream.session != self._session:
            stream.fail(LostError("this client has attached anew: its session before has ended"))
        if stream is None or stream.failure is not None:
            stream = HandOffStream(hand_offs_call(self._channel), self._session, self._settings)
            self._hand_offs = stream
        return await stream.open(request)


class HandOff:
    """One accepted hand-off (`DecodeClient.open` makes it). Use it in `async with`: leaving without
    `commit` aborts.

    After an error from any method it is over.
    """

    def __init__(self, stream: "HandOffStream", number: int, request: Open) -> None:
        self.stream = stream
        self.number = number
        self.request = request
        self.sent_bytes = 0
        loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()  # committed or aborted; or why it failed
        for told in (self.accepted, self.ended):  # decode may say so when nobody listens
            told.add_done_callback(lambda future: future.cancelled() or future.exception())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.abort("prefill left the hand-off")

    @property
    def over(self) -> bool:
        return self.ended.done()

    @property
    def failure(self) -> TransferError | None:
        """Why decode will not take it any more: known as soon as decode says so or the stream is lost, also
        between two chunks of a prompt, when nothing is being sent. `ended` is the same to wait for."""
        if not self.ended.done() or self.ended.cancelled():
            return None
        error = self.ended.exception()
        return error if isinstance(error, TransferError) else None

    def rows(self, start: int, first_token: int, token_count: int) -> "PassRows":
        """Rows start .. start + token_count of a pass are tokens first_token .. of this hand-off."""
        return PlacedRows((self.stream, self.number), start, first_token, token_count)

    async def send_state(self, site: str, data: KVBytes) -> None:
        """Sends the request state at one of the sites that Open names; returns when it is on its way.

        data [layers, width] in the model's dtype, C-contiguous. Raises ValueError for another size or site,
        and what ended the hand-off.
        """
        view = memoryview(data).cast("B")
        announced = {s.site for s in self.request.state}
        if site not in announced or view.nbytes != self.request.site_bytes(site):
            raise ValueError(f"{view.nbytes} bytes of request state at {site} are not what Open announces")
        self.require_running()
        state = pb.State(
            hand_off=self.number, site=site, data=bytes(view), checksum=xxhash.xxh3_64_intdigest(view)
        )
        await asyncio.shield(self.stream.put(pb.HandOffFrame(state=state)))

    async def commit(
        self, first_tokens: Sequence[Token], text_ids: Sequence[int] = (), alike: int = 0
    ) -> None:
        """Hands the request over: one already sampled first token per choice, in order. Drafts are looked up
        in the text in front of these, text_ids, and in recent answers of those `alike`, a number of 64 bits;
        0: in nobody's.

        Afterwards decode owns it, and its tokens come on the client's token stream: they may come before
        this returns. Raises LostError, TimedOutError, CorruptError, ProtocolError or FencedError; if one of
        the first two leaves open whether decode has it, a higher attempt settles that.
        """
        self.require_running()
        commit = pb.Commit(
            hand_off=self.number,
            first_tokens=map(encode, first_tokens),
            total_bytes=self.sent_bytes,
            text_ids=text_ids,
            alike=alike,
        )
        await asyncio.shield(self.stream.put(pb.HandOffFrame(commit=commit)))
        await self._end(self.stream.settings.commit_timeout_s, "Commit")

    async def abort(self, reason: str) -> None:
        """Gives the request up; decode has freed its blocks when this returns. Never raises for a peer that
        is gone; no effect after `commit` or an error."""
        if self.over:
            return
        self.stream.put(pb.HandOffFrame(abort=pb.Abort(hand_off=self.number, reason=reason)))
        with suppress(TransferError):
            await self._end(self.stream.settings.abort_timeout_s, "Abort")

    def require_running(self) -> None:
        """Raises what ended the hand-off."""
        if self.ended.done():
            self.ended.result()

    def fail(self, error: TransferError) -> None:
        """The hand-off is over, as far as it was not yet."""
        for told in (self.accepted, self.ended):
            if not told.done():
                told.set_exception(error)

    async def _end(self, timeout_s: float, what: str) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self.ended)
        except TimeoutError:
            self.fail(TimedOutError(f"no answer to {what} within {timeout_s} s"))
            self.ended.result()


PassRows = PlacedRows[tuple["HandOffStream", int]]
"""Of a pass: those of a stream's hand-off of this number (`HandOff.rows` makes it)."""


class HandOffStream:
    """All hand-offs of one session. Lives until it breaks or is closed; then every hand-off on it is over."""

    def __init__(self, call: Any, session: str, settings: TransferSettings) -> None:
        self.session = session
        self.settings = settings
        self.failure: TransferError | None = None
        self._call = call
        self._numbers = count(1)
        self._hand_offs: dict[int, HandOff] = {}
        self._queue = FrameQueue(call, settings)
        self.put(pb.HandOffFrame(begin=pb.Begin(session=session)))
        self._queue.offer_shared_memory()
        self._tasks = [asyncio.create_task(self._work(loop)) for loop in (self._queue.write, self._read)]

    async def open(self, request: Open) -> HandOff:
        """Raises as `DecodeClient.open`."""
        if self.failure is not None:
            raise self.failure
        message = encode(request)
        hand_off = HandOff(self, next(self._numbers), request)
        message.hand_off = hand_off.number
        self._hand_offs[hand_off.number] = hand_off
        self.put(pb.HandOffFrame(open=message))
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
        self, layer: int, planes: Sequence[KVBytes], rows: Iterable[StreamRows], encoding: Encoding
    ) -> None:
        """As `send_layer`, for hand-offs of this stream."""
        running = [(hand_off, r) for r in rows if (hand_off := self._running(r.whose)) is not None]
        if not running:
            return
        layout = running[0][0].request.model.layout
        widths = plane_bytes(layout, layer, encoding)
        rows_in_pass = max(r.start + r.token_count for _, r in running)
        sizes = [memoryview(plane).nbytes for plane in planes]
        if len(sizes) != len(widths) or any(
            size < rows_in_pass * width for size, width in zip(sizes, widths, strict=True)
        ):
            raise ValueError(
                f"layer {layer} has planes of {sizes} bytes; {rows_in_pass} rows of {widths} bytes per token"
            )
        for hand_off, r in running:
            hand_off.sent_bytes += r.token_count * sum(widths)
        self._queue.add(layer, planes, widths, [r for _, r in running], encoding)
        if layer == len(layout.layers) - 1:
            self._queue.flush()  # the rest of the pass, logits and sampling, brings no more to fill it with
        await self._queue.wait_for_room()

    def put(self, frame: pb.HandOffFrame) -> "asyncio.Future[None]":
        """Sends a frame behind the KV bytes before it; done when it is written."""
        return self._queue.put(frame)

    async def close(self) -> None:
        """Ends the stream; decode gives back the room of what is not committed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.fail(LostError("this client was closed"))

    def fail(self, error: TransferError) -> None:
        """The stream is over, and every hand-off on it; the first error is the one that counts."""
        if self.failure is None:
            self.failure = error
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        self._queue.fail(self.failure)
        for hand_off in self._hand_offs.values():
            hand_off.fail(self.failure)
        self._hand_offs.clear()

    def _running(self, number: int) -> HandOff | None:
        hand_off = self._hand_offs.get(number)
        return None if hand_off is None or hand_off.over else hand_off

    async def _work(self, loop: Callable[[], Awaitable[None]]) -> None:
        try:
            await loop()
        except TransferError as error:
            self.fail(error)
        except Exception as error:  # ours, but whoever waits must hear of it
            logger.exception("the stream of hand-offs fails")
            self.fail(LostError(f"the stream of hand-offs failed: {error}"))

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
            hand_off.fail(error_of(reply.failed.status, reply.failed.message))
        elif kind in ("committed", "aborted"):
            hand_off.ended.set_result(None)
        else:
            hand_off.fail(ProtocolError(f"decode answered a hand-off with {kind}"))

    def _hear_about_stream(self, kind: str | None, reply: pb.HandOffReply) -> None:
        if kind == "mapped":
            self._queue.mapped(reply.mapped.nonce)
        elif kind == "taken":
            self._queue.taken(reply.taken.frames)
        else:
            raise ProtocolError(f"decode said {kind} about the stream")


async def send_layer(
    layer: int, planes: Sequence[KVBytes], rows: Iterable[PassRows], encoding: Encoding = Encoding.RAW
) -> None:
    """Sends a pass's rows of one layer to all hand-offs that they belong to: each hand-off's tokens of a
    layer in order, layers in any.

    planes: as `Encoding` says, each [pass rows, bytes per token], C-contiguous; they must not change before
    the hand-offs are committed. Waits while decode takes no more. A hand-off that is over is passed over:
    its `commit` says why. Raises ValueError if the rows do not lie in the planes.
    """
    streams: dict[HandOffStream, list[StreamRows]] = {}
    for r in rows:
        stream, number = r.whose
        streams.setdefault(stream, []).append(PlacedRows(number, r.start, r.first_token, r.token_count))
    for stream, mine in streams.items():
        await stream.send(layer, planes, mine, encoding)
