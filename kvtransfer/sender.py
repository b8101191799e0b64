"""Prefill's side of one hand-off: layers go out while later ones still compute, then Commit or Abort."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Self

import grpc

from kvtransfer import codec, kv_frame
from kvtransfer.errors import (
    LostError,
    ProtocolError,
    RejectedError,
    RejectReason,
    TimedOutError,
    TransferError,
)
from kvtransfer.kv_frame import KVBytes
from kvtransfer.messages import Open, Token
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.settings import TransferSettings
from kvtransfer.status import error_of, failure_from_proto


class HandOff:
    """One accepted hand-off (`DecodeClient.open` makes it). Use it in `async with`: leaving without
    `commit` aborts.

    One task at a time may call it. After an error from any method it is over.
    """

    def __init__(self, call: Any, request: Open, settings: TransferSettings) -> None:
        self.request = request
        self._call = call
        # decode may say at any time that it failed
        self._answer = asyncio.create_task(_answer(call))
        self._answer.add_done_callback(lambda task: task.cancelled() or task.exception())
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
        async with self._unless_failed(self._settings.commit_timeout_s, "Commit"):
            await self._call.write(pb.HandOffFrame(commit=commit))
            await self._answer
            self._over = True
            await self._call.done_writing()

    async def abort(self, reason: str) -> None:
        """Gives the request up; decode has freed its blocks when this returns. Never raises for a peer that
        is gone; no effect after `commit` or an error."""
        if self._over:
            return
        self._over = True
        with suppress(TransferError):
            async with self._unless_failed(self._settings.abort_timeout_s, "Abort"):
                await self._call.write(pb.HandOffFrame(abort=pb.Abort(reason=reason)))
                await self._call.done_writing()
                await self._answer  # decode ends the stream when the blocks are free
        self._call.cancel()

    async def _flush(self) -> None:
        pending = self._pending
        if not pending.layers:
            return
        self._pending = _Pending(0, 0, 0)
        frame = kv_frame.encode(pending.first_layer, pending.layers, pending.first_token, pending.token_count)
        async with self._unless_failed(self._settings.send_timeout_s, "a KV frame"):
            await self._call.write(pb.HandOffFrame(kv=frame))
        self._sent_bytes += pending.bytes

    @asynccontextmanager
    async def _unless_failed(self, timeout_s: float, what: str) -> AsyncIterator[None]:
        """What decode has said about the hand-off comes before what gRPC says about the stream."""
        try:
            if self._answer.done():
                self._answer.result()
            async with translated(self._call, timeout_s, what):
                yield
        except LostError as error:
            self._over = True
            told = self._answer.exception() if self._answer.done() and not self._answer.cancelled() else None
            raise (told or error) from error
        except TransferError:
            self._over = True
            self._call.cancel()
            raise


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


async def _answer(call: Any) -> None:
    """Returns when decode has committed; raises what it says has failed, or that the stream has ended."""
    async with translated(call, None, "an answer"):
        reply = await read(call)
    kind = reply.WhichOneof("reply")
    if kind == "failed":
        raise failure_from_proto(reply.failed)
    if kind != "committed":
        raise ProtocolError(f"decode answered a hand-off with {kind}")


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
