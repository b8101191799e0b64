"""The packed prompt pass of many tasks, computed in a thread of its own while its KV goes out to decode."""

import asyncio
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvtransfer.frames import Encoding
from kvtransfer.int8 import quantise
from kvtransfer.sender import HandOff, PassRows, send_layer
from prad.adapters import PromptAdaptation, split_task_tokens
from prad.core.kv import Chunk
from prad.core.sampling import SampleKey, ScoredToken, Token
from prad.lm import LanguageModel, Shaping, Site, SiteVectors, begin_masks, sample
from prad.lm.kv import LayerDone, Pools, chunked_batch
from prad.lm.scoring import GivenTokens
from prefill_service.prompt import Prefilling, Prompt
from prefill_service.scored import given_in

_GATHERED_BYTES = 8 * 2**20  # of cached KV that is read at once

FirstTokens = dict[Prompt, list[Token] | None]
"""Of every prompt whose last token was computed: its first tokens, one per choice. None if its logits are not
finite, or its grammar is in trouble (`Prompt.trouble`): what is broken spoils its own request only."""

StateDone = Callable[[Prompt, SiteVectors], None]
"""Gets the request state of every prompt whose adapter makes some."""

ScoresDone = Callable[[Prompt, list[ScoredToken | None]], None]
"""Gets, of every prompt that is to be scored, what this pass's rows say of its tokens."""


def run_prompt_pass(
    model: LanguageModel,
    pools: Pools,
    chunks: Sequence[Chunk[Prompt]],
    layer_done: LayerDone | None = None,
    state_done: StateDone | None = None,
    scores_done: ScoresDone | None = None,
) -> FirstTokens:
    """Runs all chunks in one forward: adapters on prompt rows, the plain model everywhere else.

    `layer_done` gets every layer's keys and values [T, kv_heads, dim], chunks packed in order. `scores_done`:
    without it nothing is scored."""
    done = [chunk.prompt for chunk in chunks if chunk.prompt.ends_with(chunk)]
    shapings = {p: Shaping.of(p.request.sampling, b) for p in done if (b := p.request.before) is not None}
    if shapings:
        begin_masks(shapings.values())
    with torch.inference_mode():
        given = _given(chunks, model.device) if scores_done is not None else None
        logits, adaptation = prompt_logits(model, pools, chunks, layer_done, given)
        if given is not None and scores_done is not None:
            scores = iter(given.scores)
            for chunk in chunks:
                scores_done(chunk.prompt, [next(scores) for _ in given_in(chunk)])
        if adaptation is not None and state_done is not None:
            starts = accumulate((len(chunk) for chunk in chunks[:-1]), initial=0)
            by_start = dict(zip(starts, (chunk.prompt for chunk in chunks), strict=True))
            for start, state in adaptation.states().items():
                state_done(by_start[start], state)
        sound = torch.isfinite(logits).all(dim=-1).tolist()
        return {
            prompt: _first_tokens(model, row, prompt, shapings.get(prompt)) if ok else None
            for row, prompt, ok in zip(logits, done, sound, strict=True)
        }


def prompt_logits(
    model: LanguageModel,
    pools: Pools,
    chunks: Sequence[Chunk[Prompt]],
    layer_done: LayerDone | None = None,
    given: GivenTokens | None = None,
) -> tuple[Tensor, PromptAdaptation | None]:
    """Logits float32 [R, vocab] of the chunks that end their prompts, in order; and what adapted the pass."""
    prompts = [chunk.prompt for chunk in chunks]
    assert all(len(c) == c.prompt.tokens for c in chunks if c.prompt.whole), "a whole prompt was cut"
    lengths = [len(chunk) for chunk in chunks]
    adapted = [chunk.prompt.adapted_in(chunk) for chunk in chunks]
    ids, task_rows = split_task_tokens(
        [None if prompt.adapter is None else prompt.adapter.task_embeddings for prompt in prompts],
        [chunk.prompt.ids[chunk.start : chunk.end] for chunk in chunks],
        model.device,
    )
    adaptation = PromptAdaptation.of_prompts(
        [prompt.adapter if rows else None for prompt, rows in zip(prompts, adapted, strict=True)],
        lengths,
        adapted,
        model.device,
        model.kernels,
        [chunk.start for chunk in chunks],
        task_rows,
    )
    ends = zip(accumulate(lengths), chunks, strict=True)
    batch = chunked_batch(
        chunks,
        ids,
        pools,
        logit_rows=[end - 1 for end, chunk in ends if chunk.prompt.ends_with(chunk)],
        layer_done=layer_done,
        answered=[answered_in(chunk) for chunk in chunks],
    )
    return model.forward(replace(batch, given=given), adaptation), adaptation


def answered_in(chunk: Chunk[Prompt]) -> int:
    """How many of a chunk's tokens, from the last one back, are output that decode has computed before."""
    return max(0, chunk.end - max(chunk.start, chunk.prompt.tokens - chunk.prompt.request.output_offset))


def _given(chunks: Sequence[Chunk[Prompt]], device: torch.device) -> GivenTokens | None:
    """The tokens of the pass that are to be scored; None if there are none."""
    rows, tokens, alternatives = list[int](), list[int](), list[int]()
    starts = accumulate((len(chunk) for chunk in chunks[:-1]), initial=0)
    for chunk, start in zip(chunks, starts, strict=True):
        if (scoring := chunk.prompt.request.scoring) is not None:
            for row, token in given_in(chunk):
                rows.append(start + row)
                tokens.append(token)
                alternatives.append(scoring.alternatives)
    return GivenTokens(torch.tensor(rows, device=device), tokens, alternatives) if rows else None


def _first_tokens(
    model: LanguageModel, row: Tensor, prompt: Prompt, shaping: Shaping | None = None
) -> list[Token] | None:
    """row [vocab]: every choice draws, under its own key; none without output. None: its grammar is in
    trouble. Of a beam search a single token, whose `top` is what hypotheses may begin with."""
    request = prompt.request
    if request.sampling.max_tokens <= request.output_offset:
        return []
    if request.beams is not None:
        shown = replace(request.sampling, logprobs=request.beams.candidates(request.sampling.stop_ids))
        return sample(row[None], [shown], [SampleKey(0, 0, 0, 0)], model.argmax)
    keys = [
        SampleKey(request.sampling.seed, request.prompt_index, choice, request.output_offset)
        for choice in range(request.choices)
    ]
    rows, params = row.expand(len(keys), -1), [request.sampling] * len(keys)
    if shaping is None:
        return sample(rows, params, keys, model.argmax)
    if (trouble := shaping.trouble) is not None:
        prompt.trouble = trouble
        return None
    return sample(rows.clone(), params, keys, model.argmax, [shaping] * len(keys))


class PassBrokeError(Exception):
    """The pass whose layers were to be sent broke off."""


class PassLayers:
    """One pass's keys and values on their way to decode, layer by layer.

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
        """rows: which rows of the pass are handed over, and with which hand-off; if none, no layer is kept.
        `overlap`: whether a layer
        goes out while later ones compute, or all of them behind the last. `after`: the pass before, whose
        layers go first: a hand-off's tokens go out in order."""
        self._loop = asyncio.get_running_loop()
        self._num_layers = num_layers
        self._needed = bool(rows)
        self._encoding = encoding
        self._ready: asyncio.Queue[tuple[int, list[memoryview]] | PassBrokeError] = asyncio.Queue()
        self._states: dict[Prompt, dict[Site, memoryview]] = {}
        self._sending = self._loop.create_task(self._send(rows, overlap, after))
        self._sending.add_done_callback(lambda task: task.cancelled() or task.exception())  # if none asks

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        """key, value [T, kv_heads, dim] of the whole pass; brought to the CPU, each in one piece."""
        if self._needed:
            data = planes(key, value, self._encoding)
            self._loop.call_soon_threadsafe(self._ready.put_nowait, (layer, data))

    def put_state(self, prompt: Prompt, state: SiteVectors) -> None:
        """The prompt's request state; comes before the pass ends."""
        self._states[prompt] = {site: raw(vectors) for site, vectors in state.items()}

    def break_off(self) -> None:
        """The pass failed: no further layer comes."""
        self._ready.put_nowait(PassBrokeError("the prompt pass broke off"))

    def state(self, prompt: Prompt) -> Mapping[Site, memoryview]:
        """As the wire has it; complete once the pass has run."""
        return self._states.get(prompt, {})

    async def sent(self) -> None:
        """Returns when every layer is on its way. Raises what kept one from it: PassBrokeError if it was
        never computed."""
        await asyncio.shield(self._sending)

    async def settled(self) -> None:
        """Returns when every layer is on its way, or the pass or its sending has failed."""
        await asyncio.wait([self._sending])

    async def _send(self, rows: Sequence[PassRows], overlap: bool, after: "PassLayers | None") -> None:
        if after is not None:
            await after.settled()
        if not rows:
            return
        known = [] if overlap else [await self._next() for _ in range(self._num_layers)]
        for number in range(self._num_layers):
            layer, data = await self._next() if overlap else known[number]
            await send_layer(layer, data, rows, self._encoding)

    async def _next(self) -> tuple[int, list[memoryview]]:
        ready = await self._ready.get()
        if isinstance(ready, PassBrokeError):
            raise ready
        return ready


class PassResult(NamedTuple):
    """What a pass drew, its layers, which may still be on their way, and what it says of given tokens."""

    first_tokens: FirstTokens
    layers: PassLayers
    scores: Mapping[Prompt, list[ScoredToken | None]]


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
            max_workers=1, thread_name_prefix="prompt-pass", initializer=step_back, initargs=(nice,)
        )
        self._sending: deque[PassLayers] = deque()

    def close(self) -> None:
        """Starts no further pass."""
        self._computing.shutdown(wait=False, cancel_futures=True)

    async def send_cached(self, chunks: Sequence[Chunk[Prompt]]) -> dict[HandOff, Exception]:
        """Comes before `run`: sends what prompts that begin have from earlier ones, read in the computing
        thread, a few MB at a time of all prompts together. Returns the hand-offs that do not get theirs, and
        why."""
        if len(self._sending) > 1:  # at most two passes' KV is in memory: one goes out, one computes
            await self._sending.popleft().settled()
        rows, slots = _cached_rows(chunks, self._pools)
        step = max(1, _GATHERED_BYTES // self._model.layout.bytes_per_token)
        broken: dict[HandOff, Exception] = {}
        for start in range(0, len(slots), step):
            going = {hand_off: r for hand_off, r in rows.items() if hand_off not in broken}
            broken |= await self._send_slots(_cut(going, start, start + step), slots[start : start + step])
        return broken

    async def run(self, chunks: Sequence[Chunk[Prompt]]) -> PassResult:
        """Computes the chunks; a prompt with a hand-off sends its own. Raises what the pass raises."""
        layers = PassLayers(
            self._model.num_layers,
            list(_computed_rows(chunks)),
            self._encoding,
            overlap=self._overlap,
            after=self._sending[-1] if self._sending else None,
        )
        self._sending.append(layers)
        try:
            scores: dict[Prompt, list[ScoredToken | None]] = {}
            return PassResult(await self._compute(chunks, layers, scores.__setitem__), layers, scores)
        except BaseException:
            layers.break_off()
            raise

    async def _compute(
        self, chunks: Sequence[Chunk[Prompt]], layers: PassLayers, scores_done: ScoresDone
    ) -> FirstTokens:
        return await asyncio.get_running_loop().run_in_executor(
            self._computing,
            run_prompt_pass,
            self._model,
            self._pools,
            chunks,
            layers.put,
            layers.put_state,
            scores_done,
        )

    async def _send_slots(self, rows: Mapping[HandOff, PassRows], slots: Tensor) -> dict[HandOff, Exception]:
        """As `send_cached`, for rows of these slots. If reading fails, each hand-off's are read alone: only
        who cannot be read is to blame."""
        try:
            loop = asyncio.get_running_loop()
            layers = await loop.run_in_executor(self._computing, self._gather, slots)
        except Exception as error:
            if len(rows) <= 1:
                return dict.fromkeys(rows, error)
            broken: dict[HandOff, Exception] = {}
            for hand_off, r in rows.items():
                alone = slots[r.start : r.start + r.token_count]
                broken |= await self._send_slots({hand_off: replace(r, start=0)}, alone)
            return broken
        try:
            for layer, data in enumerate(layers):
                await send_layer(layer, data, rows.values(), self._encoding)
        except Exception as error:
            return dict.fromkeys(rows, error)
        return {}

    def _gather(self, slots: Tensor) -> list[list[memoryview]]:
        """The planes of every layer at these slots; the blocks may change afterwards."""
        return [
            planes(
                key.flatten(0, 1).index_select(0, slots),
                value.flatten(0, 1).index_select(0, slots),
                self._encoding,
            )
            for key, value in zip(self._pools.keys, self._pools.values, strict=True)
        ]


def a_core_is_left(model: LanguageModel) -> bool:
    """Whether sending could use one while a pass computes. Without, the pass would wait for whichever of its
    threads the sender keeps from a core, and decode would not take what is sent at the same time."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return model.device.type != "cpu" or cores > torch.get_num_threads()


def planes(key: Tensor, value: Tensor, encoding: Encoding) -> list[memoryview]:
    """A layer's keys and values [T, kv_heads, dim] as the wire has them: contiguous, on the CPU."""
    if encoding is Encoding.INT8:
        return [raw(part) for states in (key, value) for part in quantise(states)]
    return [raw(states) for states in (key, value)]


def raw(tensor: Tensor) -> memoryview:
    """Its bytes, contiguous, on the CPU."""
    here = tensor.cpu()
    if here.stride(-1) != 1:
        here = here.contiguous()
    # numpy's copy: torch's wakes its threads for it, beside those of the pass
    data: Any = np.ascontiguousarray(here.view(torch.uint8).numpy())
    return memoryview(data).cast("B")


def _computed_rows(chunks: Sequence[Chunk[Prompt]]) -> Iterator[PassRows]:
    """Which rows of the pass go to which hand-off."""
    starts = accumulate((len(chunk) for chunk in chunks[:-1]), initial=0)
    for chunk, start in zip(chunks, starts, strict=True):
        if chunk.prompt.hand_off is not None:
            yield chunk.prompt.hand_off.rows(start, chunk.start, len(chunk))


def _cached_rows(chunks: Sequence[Chunk[Prompt]], pools: Pools) -> tuple[dict[HandOff, PassRows], Tensor]:
    """Which of these slots [S] hold the cached beginnings of which hand-offs."""
    rows, slots = dict[HandOff, PassRows](), [torch.empty(0, dtype=torch.long, device=pools.device)]
    for chunk in chunks:
        state, hand_off = chunk.prompt.state, chunk.prompt.hand_off
        if hand_off is None or not isinstance(state, Prefilling) or not state.computed_none:
            continue
        if state.cached:
            rows[hand_off] = hand_off.rows(sum(map(len, slots)), 0, state.cached)
            slots.append(pools.slots(state.table, state.cached))
    return rows, torch.cat(slots)


def _cut(rows: Mapping[HandOff, PassRows], start: int, end: int) -> dict[HandOff, PassRows]:
    """What of the rows lies in start .. end, counted from start."""
    pieces = {}
    for hand_off, r in rows.items():
        first, last = max(r.start, start), min(r.start + r.token_count, end)
        if first < last:
            token = r.first_token + first - r.start
            pieces[hand_off] = replace(r, start=first - start, first_token=token, token_count=last - first)
    return pieces


def step_back(nice: int) -> None:
    """Lowers the calling thread's priority, and so that of the computing threads that it will start. On Linux
    only, where niceness is a thread's: elsewhere the event loop, which passes tokens on, would be slow."""
    if nice and sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
