"""Prefill's side of one hand-off: layers go out while later ones still compute, then Commit or Abort."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

import grpc

from kvtransfer import codec, kv_frame
from kvtransfer.errors import LostError, ProtocolError, RejectedError, RejectReason, TimedOutError
from kvtransfer.kv_frame import KVBytes
from kvtransfer.messages import Open, Token
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.settings import TransferSettings
from kvtransfer.status import error_of


class HandOff:
    """One accepted hand-off (`DecodeClient.open` makes it). Use it in `async with`: leaving without
    `commit` aborts.

    One task at a time may call it. After an error from any method it is over.
    """

    def __init__(self, call: Any, request: Open, settings: TransferSettings) -> None:
        self.request = request
        self._call = call
        self._settings = settings
        self._pending = _Pending(0, 0, 0)
        self._sent_bytes = 0
        self._over = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.abort("prefill left the hand-off")

    async def send(self, layer: int, key: KVBytes, value: KVBytes, first_token: int = 0) -> None:
        """Sends tokens first_token .. of `layer`; each layer's tokens in order, layers in any.

        key [tokens, kv_heads, key_dim] and value [tokens, kv_heads, value_dim], C-contiguous, in the model's
        dtype. The buffers may be kept until `commit` returns: they must not change before. Waits while
        decode takes no more. Raises LostError, TimedOutError, CorruptError, ProtocolError or FencedError;
        ValueError if the sizes are not whole tokens of this layer.
        """
        model = self.request.model
        keys, values = memoryview(key).cast("B"), memoryview(value).cast("B")
        key_bytes, value_bytes = model.key_bytes(layer), model.value_bytes(layer)
        tokens = len(keys) // key_bytes
        if tokens == 0 or (len(keys), len(values)) != (tokens * key_bytes, tokens * value_bytes):
            raise ValueError(
                f"layer {layer} takes {key_bytes} + {value_bytes} bytes per token; "
                f"got {len(keys)} and {len(values)}"
            )
        most = max(1, self._settings.frame_bytes // (key_bytes + value_bytes))
        for start in range(0, tokens, most):
            count = min(most, tokens - start)
            end = start + count
            if not self._pending.goes_on_with(layer, first_token + start, count):
                await self._flush()
                self._pending = _Pending(layer, first_token + start, count)
            self._pending.add(
                keys[start * key_bytes : end * key_bytes], values[start * value_bytes : end * value_bytes]
            )
            if self._pending.bytes >= self._settings.frame_bytes:
                await self._flush()

    async def commit(self, first_tokens: Sequence[Token]) -> None:
        """Hands the request over: one already sampled first token per choice, in order.

        Afterwards decode owns it, and its tokens come on the client's token stream: they may come before
        this returns. Raises as `send`; if LostError or TimedOutError leaves open whether decode has it, a
        higher attempt settles that.
        """
        await self._flush()
        commit = pb.Commit(
            first_tokens=[codec.token_to_proto(t) for t in first_tokens], total_bytes=self._sent_bytes
        )
        async with translated(self._call, self._settings.commit_timeout_s, "Commit"):
            await self._call.write(pb.HandOffFrame(commit=commit))
            reply = await read(self._call)
            if reply.WhichOneof("reply") != "committed":
                raise ProtocolError(f"decode answered Commit with {reply.WhichOneof('reply')}")
            await self._call.done_writing()
            self._over = True

    async def abort(self, reason: str) -> None:
        """Gives the request up; decode has freed its blocks when this returns. Never raises for a peer that
        is gone; no effect after `commit` or an error."""
        if self._over or self._call.done():
            return
        self._over = True
        try:
            async with translated(self._call, self._settings.abort_timeout_s, "Abort"):
                await self._call.write(pb.HandOffFrame(abort=pb.Abort(reason=reason)))
                await self._call.done_writing()
                await self._call.code()
        except LostError:
            self._call.cancel()

    async def _flush(self) -> None:
        pending = self._pending
        if not pending.layers:
            return
        self._pending = _Pending(0, 0, 0)
        frame = kv_frame.encode(pending.first_layer, pending.layers, pending.first_token, pending.token_count)
        async with translated(self._call, self._settings.send_timeout_s, "a KV frame"):
            await self._call.write(pb.HandOffFrame(kv=frame))
        self._sent_bytes += pending.bytes


class _Pending:
    """The frame being filled: consecutive layers of one token range."""

    def __init__(self, first_layer: int, first_token: int, token_count: int) -> None:
        self.first_layer = first_layer
        self.first_token = first_token
        self.token_count = token_count
        self.layers: list[tuple[memoryview, memoryview]] = []
        self.bytes = 0

    def goes_on_with(self, layer: int, first_token: int, token_count: int) -> bool:
        expected = (self.first_layer + len(self.layers), self.first_token, self.token_count)
        return bool(self.layers) and expected == (layer, first_token, token_count)

    def add(self, key: memoryview, value: memoryview) -> None:
        self.layers.append((key, value))
        self.bytes += len(key) + len(value)


async def open_hand_off(call: Any, request: Open, settings: TransferSettings) -> HandOff:
    """Sends Open on a fresh stream and awaits the answer. Raises RejectedError, or as `HandOff.send`."""
    async with translated(call, settings.open_timeout_s, "Open"):
        await call.write(pb.HandOffFrame(open=codec.open_to_proto(request)))
        reply = await read(call)
        kind = reply.WhichOneof("reply")
        if kind == "rejected":
            rejected = reply.rejected
            raise RejectedError(
                RejectReason(rejected.reason), rejected.message, rejected.retry_after_ms / 1000
            )
        if kind != "accepted":
            raise ProtocolError(f"decode answered Open with {kind}")
    return HandOff(call, request, settings)


async def read(call: Any) -> Any:
    """The next message of a stream. Raises the error behind its status if it has ended, LostError if it
    ended in order where a message was due."""
    message = await call.read()
    if message is not grpc.aio.EOF:
        return message
    if await call.code() is grpc.StatusCode.OK:
        raise LostError("decode ended the stream")
    raise error_of(await call.code(), await call.details())


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
        raise error_of(error.code(), error.details()) from error
    except asyncio.InvalidStateError as error:  # grpc.aio's word for writing to a stream that has ended
        raise error_of(await call.code(), await call.details()) from error
    except BaseException:
        call.cancel()
        raise
