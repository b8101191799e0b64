"""Trying a pushed version where it is to run: loaded, and one prompt computed, whose logits must be finite
and not the plain model's.

One version at a time, in one thread that steps back for whoever else computes on these cores (Linux), beside
prompt passes. Where torch computes the model, or its passes of many rows, there is one pass at a time: the
probe takes its turn among them with all threads, and steps back for none, since prompts would wait for it.

While requests are under way a probe rests before the next one, so that pushes in a row, each of which is work
for others besides, take a small and steady part of the cores.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import torch
from torch import Tensor

from prad.adapters import Adapter, AdapterError
from prad.artefact import AdapterRecord, Artefact, task_token_id
from prad.core.sampling import SamplingParams
from prad.lm import LanguageModel
from prad.lm.kv import Pools
from prefill_service.passes import prompt_logits, step_back
from prefill_service.prompt import Prompt, PromptRequest

_NICE = 10
"""A tenth of the time of who does not step back: a probe ends, and delays a decode step by less than that."""
_TOKENS = 16
_REST = 12
"""So many times as long as it computed: half a second for a model of 135 M. What registry and prefill do for
a push beside the probe costs a decode step more than the probe does."""


class Prober:
    """`load` makes an artefact's adapter. `live`: how many requests are under way. `allow_unmoved`: a version
    that changes nothing passes, too."""

    def __init__(
        self,
        model: LanguageModel,
        load: Callable[[Artefact], Adapter],
        live: Callable[[], int],
        *,
        allow_unmoved: bool,
    ) -> None:
        self._model = model.beside(threads=1)
        self._load = load
        self._live = live
        self._rests_until = 0.0
        self._allow_unmoved = allow_unmoved
        self._pools = Pools(model.layout, 1, _TOKENS, str(model.device), self._model.kernels)
        self._computing = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="probe",
            initializer=step_back,
            initargs=(0 if self._model is model else _NICE,),
        )

    def close(self) -> None:
        """Starts no further probe."""
        self._computing.shutdown(wait=False, cancel_futures=True)

    async def probe(self, artefact: Artefact) -> None:
        """Raises what loading raises, and AdapterError if it spoils the logits or leaves them as they are."""
        if self._live() and (left := self._rests_until - time.monotonic()) > 0:
            await asyncio.sleep(left)
        await asyncio.get_running_loop().run_in_executor(self._computing, self._timed, artefact)

    def _timed(self, artefact: Artefact) -> None:
        start = time.thread_time()
        try:
            self._try(artefact)
        finally:  # the thread's own time: it may have waited for the others
            self._rests_until = time.monotonic() + _REST * (time.thread_time() - start)

    def _try(self, artefact: Artefact) -> None:
        adapter = self._load(artefact)
        logits = self._logits(probe_prompt(self._model.vocab_size, artefact.record, adapter))
        if not torch.isfinite(logits).all():
            raise AdapterError("with this adapter the logits are not finite")
        if not self._allow_unmoved and torch.equal(logits, self._plain):
            raise AdapterError(
                "this adapter changes nothing: with it the logits are the plain model's, bit for bit. Was it "
                "trained, and are these the files that training wrote? If it is to change nothing, as before "
                "a first step of training: start prefill with PRAD_PREFILL_ALLOW_UNMOVED=1"
            )

    @cached_property
    def _plain(self) -> Tensor:
        return self._logits(probe_prompt(self._model.vocab_size))

    def _logits(self, prompt: Prompt) -> Tensor:
        """Of its last token [1, vocab]."""
        with torch.inference_mode():
            return prompt_logits(self._model, self._pools, [prompt.as_chunk()])[0]


def probe_prompt(
    vocabulary: int, record: AdapterRecord | None = None, adapter: Adapter | None = None
) -> Prompt:
    """What a version is tried on: each of its task tokens, then some of the vocabulary, from all over it."""
    own = [task_token_id(row) for row in range(0 if record is None else len(record.task_tokens))]
    known = [number * vocabulary // _TOKENS for number in range(_TOKENS)]
    request = PromptRequest("probe", None, (*own, *known), SamplingParams(max_tokens=1))
    return Prompt(request, adapter)
