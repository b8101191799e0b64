"""Where the computing thread leaves a pass's layers, and the hand-offs pick up their rows."""

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

from torch import Tensor

from prad.lm import Draw
from prefill_service.prompt_pass import FirstTokens, PassItem
from prefill_service.wire import raw_rows

T = TypeVar("T")


class PassLayers:
    """One pass's keys and values, layer by layer while later layers still compute, then its first tokens.

    `put` is called from the computing thread, all others in the event loop.
    """

    def __init__(self, num_layers: int, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._layers: list[asyncio.Future[tuple[Tensor, Tensor]]] = [
            loop.create_future() for _ in range(num_layers)
        ]
        self._draws: asyncio.Future[FirstTokens] = loop.create_future()

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        """key, value [T, kv_heads, dim] of the whole pass; brought to the CPU, each sequence in one piece."""
        pair = key.cpu().contiguous(), value.cpu().contiguous()
        self._loop.call_soon_threadsafe(_settle, self._layers[layer], pair)

    def finish(self, draws: FirstTokens) -> None:
        _settle(self._draws, draws)

    def fail(self) -> None:
        """The pass broke off: whoever waits is cancelled."""
        for layer in self._layers:
            layer.cancel()
        self._draws.cancel()

    async def rows(self, start: int, length: int) -> AsyncIterator[tuple[int, memoryview, memoryview]]:
        """(layer, keys, values) of rows [start, start + length), in the order of layers."""
        for layer, future in enumerate(self._layers):
            key, value = await asyncio.shield(future)
            yield layer, raw_rows(key, start, length), raw_rows(value, start, length)

    async def draws(self, item: PassItem) -> list[Draw] | None:
        return (await asyncio.shield(self._draws))[item]


def _settle(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)
