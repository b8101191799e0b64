"""What gRPC's calls raise, in our words, and our errors in gRPC's."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from kvtransfer.errors import LostError, TimedOutError, TransferError, error_of, status_of

_CODES = {code.value[0]: code for code in grpc.StatusCode}


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
