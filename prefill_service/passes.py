"""Runs prompt passes in a thread of their own, while their layers go out to decode."""

import asyncio
import os
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

from prad.lm import Draw, LanguageModel
from prad.lm.paged import Pools
from prefill_service.chunks import Chunk
from prefill_service.hand_over import ComputedPiece, HandOver
from prefill_service.job import Job
from prefill_service.layers import PassLayers
from prefill_service.prompt_pass import FirstTokens, PassChunk, PassItem, run_prompt_pass


class PassRunner:
    """One pass at a time. `nice`: how far its threads step back for others on the same cores."""

    def __init__(self, model: LanguageModel, pools: Pools, nice: int) -> None:
        self._model = model
        self._pools = pools
        self._computing = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="prompt-pass", initializer=_step_back, initargs=(nice,)
        )
        self._sending: deque[list[asyncio.Event]] = deque()

    def close(self) -> None:
        """Starts no further pass."""
        self._computing.shutdown(wait=False, cancel_futures=True)

    async def run(self, chunks: Sequence[Chunk[Job]], hand_overs: Mapping[Job, HandOver]) -> FirstTokens:
        """Computes the chunks; a job with a hand-over sends its own. Raises what the pass raises."""
        while len(self._sending) > 1:  # at most two passes' KV is in memory: one goes out, one computes
            for sent in self._sending.popleft():
                await sent.wait()
        layers = PassLayers(self._model.num_layers, asyncio.get_running_loop())
        self._sending.append(_send(chunks, layers, hand_overs))
        packed = [PassChunk(c.job.item, c.start, c.end, c.prompt.table, c.stored) for c in chunks]
        try:
            draws = await self._compute(packed, layers)
        except BaseException:
            layers.fail()
            raise
        layers.finish(draws)
        return draws

    async def probe(self, item: PassItem) -> list[Draw] | None:
        """The first tokens of a prompt that goes nowhere."""
        return (await self._compute([PassChunk.whole(item)], None))[item]

    async def _compute(self, chunks: Sequence[PassChunk], layers: PassLayers | None) -> FirstTokens:
        return await asyncio.get_running_loop().run_in_executor(
            self._computing,
            run_prompt_pass,
            self._model,
            self._pools,
            chunks,
            None if layers is None else layers.put,
        )


def _send(
    chunks: Sequence[Chunk[Job]], layers: PassLayers, hand_overs: Mapping[Job, HandOver]
) -> list[asyncio.Event]:
    """Lets the hand-overs send the chunks as their layers come; each event says that one has gone."""
    events = []
    starts = accumulate((chunk.end - chunk.start for chunk in chunks[:-1]), initial=0)
    for chunk, start in zip(chunks, starts, strict=True):
        if (hand_over := hand_overs.get(chunk.job)) is not None:
            sent = asyncio.Event()
            piece = ComputedPiece(layers, start, chunk.end - chunk.start, chunk.start, chunk.is_last)
            hand_over.send(piece, sent.set)
            events.append(sent)
    return events


def _step_back(nice: int) -> None:
    """Lowers the calling thread's priority, and so that of the computing threads that it will start.

    Linux only, where niceness belongs to a thread: elsewhere it would slow down the event loop, which passes
    the tokens on.
    """
    if nice and sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
