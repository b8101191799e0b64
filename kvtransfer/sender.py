"""Prefill's side of one hand-off: layers go out in order, then Commit or Abort."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import xxhash

from kvtransfer import codec
from kvtransfer.errors import TimedOutError, TransferError
from kvtransfer.kv_frame import KVBytes
from kvtransfer.layout import Encoding, plane_bytes
from kvtransfer.messages import Open
from kvtransfer.proto import handoff_pb2 as pb
from prad.core.tokens import Token

if TYPE_CHECKING:
    from kvtransfer.hand_off_stream import HandOffStream


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

    async def send(self, layer: int, key: KVBytes, value: KVBytes, first_token: int = 0) -> None:
        """Sends tokens first_token .. of `layer` alone; `send_layer` is for all hand-offs of a pass.

        key [tokens, kv_heads, key_dim] and value [tokens, kv_heads, value_dim], C-contiguous, in the model's
        dtype. Raises ValueError if the sizes are not whole tokens of this layer, and as `send_layer`.
        """
        sizes = memoryview(key).nbytes, memoryview(value).nbytes
        key_bytes, value_bytes = plane_bytes(self.request.model.layout, layer, Encoding.RAW)
        tokens = sizes[0] // key_bytes
        if tokens == 0 or sizes != (tokens * key_bytes, tokens * value_bytes):
            raise ValueError(
                f"layer {layer} takes {key_bytes} + {value_bytes} bytes per token; "
                f"got {sizes[0]} and {sizes[1]}"
            )
        self.require_running()
        await self.stream.send(layer, [key, value], [PassRows(self, 0, first_token, tokens)], Encoding.RAW)

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

    async def commit(self, first_tokens: Sequence[Token]) -> None:
        """Hands the request over: one already sampled first token per choice, in order.

        Afterwards decode owns it, and its tokens come on the client's token stream: they may come before
        this returns. Raises LostError, TimedOutError, CorruptError, ProtocolError or FencedError; if one of
        the first two leaves open whether decode has it, a higher attempt settles that.
        """
        self.require_running()
        tokens = [codec.token_to_proto(t) for t in first_tokens]
        commit = pb.Commit(hand_off=self.number, first_tokens=tokens, total_bytes=self.sent_bytes)
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


@dataclass(frozen=True, slots=True)
class PassRows:
    """Rows start .. start + token_count of a pass are tokens first_token .. of a hand-off."""

    hand_off: HandOff
    start: int
    first_token: int
    token_count: int
