"""Runs prompt passes in a thread of their own, while their layers go out to decode."""

import asyncio
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import torch

from kvtransfer import Encoding, PassRows
from prad.core.tokens import Token
from prad.lm import LanguageModel
from prad.lm.paged import Pools
from prefill_service.chunks import Chunk
from prefill_service.hand_over import HandOver
from prefill_service.job import Job
from prefill_service.layers import PassLayers
from prefill_service.prompt_pass import FirstTokens, PassChunk, PassItem, run_prompt_pass


def a_core_is_left(model: LanguageModel) -> bool:
    """Whether sending could use one while a pass computes. Without, the pass would wait for whichever of its
    threads the sender keeps from a core, and decode would not take what is sent at the same time."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return model.device.type != "cpu" or cores > torch.get_num_threads()


class PassRunner:
    """One pass at a time. `overlap`: see `PassLayers`. `nice`: how far its threads step back for others on
    the same cores."""

    def __init__(
        self, model: LanguageModel, pools: Pools, encoding: Encoding, *, overlap: bool, nice: int
    ) -> None:
        self._model = model
        self._pools = pools
        self._encoding = encoding
        self._overlap = overlap
        self._computing = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="prompt-pass", initializer=_step_back, initargs=(nice,)
        )
        self._sending: deque[PassLayers] = deque()

    def close(self) -> None:
        """Starts no further pass."""
        self._computing.shutdown(wait=False, cancel_futures=True)

    async def run(self, chunks: Sequence[Chunk[Job]], hand_overs: Mapping[Job, HandOver]) -> FirstTokens:
        """Computes the chunks; a job with a hand-over sends its own. Raises what the pass raises."""
        if len(self._sending) > 1:  # at most two passes' KV is in memory: one goes out, one computes
            await self._sending.popleft().settled()
        rows, before = list(_rows(chunks, hand_overs)), self._sending[-1] if self._sending else None
        layers = PassLayers(self._model.num_layers, rows, self._encoding, overlap=self._overlap, after=before)
        self._sending.append(layers)
        for chunk in chunks:
            if chunk.is_last and chunk.job in hand_overs:
                hand_overs[chunk.job].finish_with(layers)
        packed = [PassChunk(c.job.item, c.start, c.end, c.prompt.table, c.stored) for c in chunks]
        try:
            draws = await self._compute(packed, layers)
        except BaseException:
            layers.fail()
            raise
        layers.finish(draws)
        return draws

    async def probe(self, item: PassItem) -> list[Token] | None:
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
            None if layers is None else layers.put_state,
        )


def _rows(chunks: Sequence[Chunk[Job]], hand_overs: Mapping[Job, HandOver]) -> Iterator[PassRows]:
    """Which rows of the pass go to which hand-off."""
    starts = accumulate((chunk.end - chunk.start for chunk in chunks[:-1]), initial=0)
    for chunk, start in zip(chunks, starts, strict=True):
        if (hand_over := hand_overs.get(chunk.job)) is not None:
            yield hand_over.rows(start, chunk.start, chunk.end - chunk.start)


def _step_back(nice: int) -> None:
    """Lowers the calling thread's priority, and so that of the computing threads that it will start.

    Linux only, where niceness belongs to a thread: elsewhere it would slow down the event loop, which passes
    the tokens on.
    """
    if nice and sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
