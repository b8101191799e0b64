"""One job's way to decode: its KV goes out with the passes that compute it, then Commit or Abort."""

import asyncio
import logging

from kvtransfer import Encoding, PassRows, send_layer
from kvtransfer.errors import TransferError
from kvtransfer.sender import HandOff
from prad.lm.paged import Pools
from prefill_service.decode_link import DecodeLink
from prefill_service.errors import DecodeUnavailableError, InternalError
from prefill_service.job import Job, Stage, deliver_first_tokens
from prefill_service.layers import PassLayers
from prefill_service.wire import planes

logger = logging.getLogger(__name__)


class HandOver:
    """Commits a job, in a task of its own, once its last chunk's pass has gone out.

    The first tokens reach the client as soon as they are drawn; what the client cancelled before decode had
    confirmed is cancelled there afterwards.
    """

    def __init__(self, job: Job, hand_off: HandOff, link: DecodeLink) -> None:
        self._job = job
        self._hand_off = hand_off
        self._link = link
        self._last_pass: asyncio.Future[PassLayers | None] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(self._run())

    def rows(self, start: int, first_token: int, count: int) -> PassRows:
        """Rows start .. of a pass are the job's tokens first_token .. ."""
        return PassRows(self._hand_off, start, first_token, count)

    def finish_with(self, layers: PassLayers) -> None:
        """The job's last token is in this pass."""
        if not self._last_pass.done():
            self._last_pass.set_result(layers)

    def give_up(self) -> None:
        """The job has ended early: aborts, if it waits for more of it."""
        if not self._last_pass.done():
            self._last_pass.set_result(None)

    async def _run(self) -> None:
        job, link = self._job, self._link
        request_id, attempt = job.request.request_id, job.attempt
        try:
            async with self._hand_off:
                if not await self._commit():
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

    async def _commit(self) -> bool:
        """Whether decode goes on with it."""
        layers = await self._last_pass
        if layers is None:
            return False
        draws = await layers.draws(self._job.item)
        if not deliver_first_tokens(self._job, draws):
            return False
        await layers.sent()
        for site, data in layers.state(self._job.item).items():
            await self._hand_off.send_state(site, data)
        await self._hand_off.commit(draws or ())
        return True


async def send_cached(hand_over: HandOver, pools: Pools, blocks: tuple[int, ...], encoding: Encoding) -> None:
    """Sends a prefix that earlier prompts have computed; the blocks may change afterwards."""
    tokens = len(blocks) * pools.block_size
    slots = pools.slots(blocks, tokens)
    for layer, stored in enumerate(zip(pools.keys, pools.values, strict=True)):
        key, value = (pool.flatten(0, 1).index_select(0, slots) for pool in stored)
        await send_layer(layer, planes(key, value, encoding), [hand_over.rows(0, 0, tokens)], encoding)
