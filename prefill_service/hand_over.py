"""One job's way to decode: cached blocks and computed chunks go out as they come, then Commit or Abort."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.errors import TransferError
from kvtransfer.sender import HandOff
from prad.lm.paged import Pools
from prefill_service.decode_link import DecodeLink
from prefill_service.errors import DecodeUnavailableError, InternalError
from prefill_service.job import Job, Stage, deliver_first_tokens
from prefill_service.layers import PassLayers
from prefill_service.wire import raw_rows, token

logger = logging.getLogger(__name__)

LayerRows = AsyncIterator[tuple[int, memoryview, memoryview]]


class Piece(Protocol):
    """KV of a job's tokens first_token .. , layer by layer."""

    @property
    def first_token(self) -> int: ...
    def rows(self) -> LayerRows: ...


@dataclass(frozen=True, slots=True)
class CachedPiece:
    """A prefix that earlier prompts have computed, in blocks that stay pinned until it is sent."""

    pools: Pools
    blocks: tuple[int, ...]
    first_token: int = 0

    async def rows(self) -> LayerRows:
        tokens = len(self.blocks) * self.pools.block_size
        slots = self.pools.slots(self.blocks, tokens)
        for layer, pools in enumerate(zip(self.pools.keys, self.pools.values, strict=True)):
            key, value = (pool.flatten(0, 1).index_select(0, slots).cpu() for pool in pools)
            yield layer, raw_rows(key, 0, tokens), raw_rows(value, 0, tokens)


@dataclass(frozen=True, slots=True)
class ComputedPiece:
    """A chunk: `count` rows of a pass from `start` on; the first tokens come with the prompt's last one."""

    layers: PassLayers
    start: int
    count: int
    first_token: int
    is_last: bool

    def rows(self) -> LayerRows:
        return self.layers.rows(self.start, self.count)


class _GivenUp:
    """In the place of a piece: nobody wants it any more."""


class HandOver:
    """Sends what it is given, in order, in a task of its own.

    The first tokens come with the last chunk and reach the client as soon as they are drawn; what the client
    cancelled before decode had confirmed is cancelled there afterwards.
    """

    def __init__(self, job: Job, hand_off: HandOff, link: DecodeLink) -> None:
        self._job = job
        self._hand_off = hand_off
        self._link = link
        self._pieces: asyncio.Queue[tuple[Piece, Callable[[], None]] | _GivenUp] = asyncio.Queue()
        self.task = asyncio.create_task(self._run())
        self.task.add_done_callback(lambda _: self._leave_rest())

    def send(self, piece: Piece, then: Callable[[], None]) -> None:
        """Calls `then` once the piece has been sent, or never will be."""
        if self.task.done():
            then()
        else:
            self._pieces.put_nowait((piece, then))

    def give_up(self) -> None:
        """The job has ended early: aborts, if it waits for more of it."""
        self._pieces.put_nowait(_GivenUp())

    async def _run(self) -> None:
        job, link = self._job, self._link
        request_id, attempt = job.request.request_id, job.attempt
        try:
            async with self._hand_off:
                if not await self._send_all():
                    return
        except TransferError as error:
            job.fail(DecodeUnavailableError(f"the hand-off to the decode service broke off: {error}"))
            link.cancel(request_id, attempt)  # decode may have it all the same
            return
        except Exception:
            logger.exception("the hand-off of %s failed", request_id)
            job.fail(InternalError("the hand-off failed; the server's log says why"))
            link.cancel(request_id, attempt)
            return
        if job.stage is Stage.FINISHED:
            link.cancel(request_id, attempt)
            return
        job.stage = Stage.DECODING
        for choice in set(range(job.request.choices)) - job.running:
            link.cancel(request_id, attempt, choice)

    async def _send_all(self) -> bool:
        """Whether decode goes on with it."""
        job = self._job
        while True:
            given = await self._pieces.get()
            if isinstance(given, _GivenUp):
                return False
            piece, then = given
            try:
                async for layer, key, value in piece.rows():
                    if job.stage is Stage.FINISHED:
                        return False
                    await self._hand_off.send(layer, key, value, piece.first_token)
                if isinstance(piece, ComputedPiece) and piece.is_last:
                    draws = await piece.layers.draws(job.item)
                    if not deliver_first_tokens(job, draws):
                        return False
                    await self._hand_off.commit([token(d) for d in draws or ()])
                    return True
            finally:
                then()

    def _leave_rest(self) -> None:
        while not self._pieces.empty():
            given = self._pieces.get_nowait()
            if not isinstance(given, _GivenUp):
                given[1]()
