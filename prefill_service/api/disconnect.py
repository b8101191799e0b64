"""A client that goes away ends its request at once, streaming or not."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.types import Receive

CLIENT_GONE = 499
"""The status that logs and metrics show for it, as nginx has it."""


class ClientGoneError(Exception):
    """The connection closed before the answer was complete; nobody is left to be told."""


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncGenerator[None, None]:
    """Cancels the block when the client disconnects, and turns that into ClientGoneError.

    The block runs in the caller's own task (as under `asyncio.timeout`), so generators that it advances are
    closed there too. The body must have been read. Servers also report a disconnect after a complete
    response: the last byte has to be sent outside.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientGoneError from None
        raise
    finally:
        watcher.cancel()
