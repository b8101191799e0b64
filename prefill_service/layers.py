"""Where the computing thread leaves a pass's layers, and from where they go to decode."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from kvtransfer import Encoding, PassRows, send_layer
from prad.core.tokens import Token
from prad.lm import Site, SiteVectors
from prefill_service.prompt_pass import FirstTokens, PassItem
from prefill_service.wire import planes, raw

T = TypeVar("T")


class PassLayers:
    """One pass's keys and values, sent layer by layer, then its first tokens.

    `put` and `put_state` are called from the computing thread, all others in the event loop.
    """

    def __init__(
        self,
        num_layers: int,
        rows: Sequence[PassRows],
        encoding: Encoding,
        *,
        overlap: bool,
        after: "PassLayers | None",
    ) -> None:
        """rows: which rows of the pass are handed over, and with which hand-off. `overlap`: whether a layer
        goes out while later ones compute, or all of them behind the last. `after`: the pass before, whose
        layers go first: a hand-off's tokens go out in order."""
        self._loop = asyncio.get_running_loop()
        self._rows = rows
        self._encoding = encoding
        self._layers: list[asyncio.Future[list[memoryview]]] = [
            self._loop.create_future() for _ in range(num_layers)
        ]
        self._states: dict[PassItem, dict[Site, memoryview]] = {}
        self._draws: asyncio.Future[FirstTokens] = self._loop.create_future()
        self._sending = self._loop.create_task(self._send(overlap, after))

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        """key, value [T, kv_heads, dim] of the whole pass; brought to the CPU, each in one piece."""
        data = planes(key, value, self._encoding) if self._rows else []
        self._loop.call_soon_threadsafe(_settle, self._layers[layer], data)

    def put_state(self, item: PassItem, state: SiteVectors) -> None:
        """The item's request state; comes before the pass ends."""
        self._states[item] = {site: raw(vectors) for site, vectors in state.items()}

    def state(self, item: PassItem) -> Mapping[Site, memoryview]:
        """As the wire has it; complete once the draws are there."""
        return self._states.get(item, {})

    def finish(self, draws: FirstTokens) -> None:
        _settle(self._draws, draws)

    def fail(self) -> None:
        """The pass broke off: whoever waits is cancelled."""
        self._sending.cancel()
        self._draws.cancel()

    async def draws(self, item: PassItem) -> list[Token] | None:
        return (await asyncio.shield(self._draws))[item]

    async def sent(self) -> None:
        """Returns when every layer is on its way. Raises what kept one from it."""
        await asyncio.shield(self._sending)

    async def settled(self) -> None:
        """Returns when every layer is on its way, or the pass or its sending has failed."""
        await asyncio.wait([self._sending])

    async def _send(self, overlap: bool, after: "PassLayers | None") -> None:
        if after is not None:
            await after.settled()
        if not overlap:
            await asyncio.wait(self._layers)
        for layer, data in enumerate(self._layers):
            await send_layer(layer, await data, self._rows, self._encoding)
        self._layers.clear()


def _settle(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)
