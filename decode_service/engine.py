"""Continuous batching in one thread: schedule -> run -> deliver.

Sequences join and leave between steps; a step is one forward pass and one call of the sampler for all.
"""

import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from decode_service.protocol import Deliver, EngineStatus
from decode_service.reservation import PagedReservation
from decode_service.scheduler import Plan, Scheduler
from decode_service.sequences import Ended, FinishReason, HandOffId, Reserved, Running, SequenceId
from decode_service.validation import Limits
from kvtransfer import Cancel, Open
from prad.core.sampling import SampleKey
from prad.core.tokens import Token, TokenEvent
from prad.lm import LanguageModel, PackedBatch, RowScaling, SiteVectors, sample
from prad.lm.paged import Pools

logger = logging.getLogger(__name__)

Observe = Callable[[float, int], None]
"""Takes a step's seconds and its number of tokens."""


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A sequence's outcome of a step."""

    sequence: Running
    token: Token


class PagedEngine:
    """The decode engine over prad.lm and paged KV."""

    def __init__(
        self, model: LanguageModel, pools: Pools, scheduler: Scheduler, deliver: Deliver, observe: Observe
    ) -> None:
        self._model = model
        self._limits = Limits(
            model.max_context, model.vocab_size, {str(s): w for s, w in model.state_widths.items()}
        )
        self._pools = pools
        self._scheduler = scheduler
        self._deliver = deliver
        self._observe = observe
        self._phases = itertools.count()
        self._changed = threading.Condition()  # guards the scheduler; never held during a pass
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="decode-engine", daemon=True)

    # ---- the loop, in its own thread

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finishes the step in flight and what must still be told; waits for the thread."""
        with self._wake():
            self._stopping = True
        self._thread.join()

    def step(self) -> None:
        with self._changed:
            plan = self._scheduler.schedule(time.time_ns() // 1_000_000)
        outcomes: list[_Drawn | Ended] = []
        if plan.batch:
            started = time.perf_counter()
            outcomes = self._run(plan.batch)
            self._observe(time.perf_counter() - started, len(outcomes))
        self._finish(plan, outcomes)

    def _loop(self) -> None:
        with torch.inference_mode():
            while self._work_comes():
                self.step()

    def _work_comes(self) -> bool:
        """Waits, passively, for work; False when the engine stops and nothing is left to tell."""
        with self._changed:
            while not self._scheduler.has_work and not self._stopping:
                self._changed.wait()
            return self._scheduler.has_work

    def _run(self, batch: Sequence[Running]) -> list[_Drawn | Ended]:
        try:
            return self._forward(batch)
        except Exception as error:  # whatever it was: these sequences end, the service goes on
            logger.exception("a decode step of %d sequences failed", len(batch))
            return [Ended(s, FinishReason.ERROR, f"the decode step failed: {error}") for s in batch]

    def _forward(self, batch: Sequence[Running]) -> list[_Drawn | Ended]:
        device = self._model.device
        logits = self._model.forward(
            PackedBatch(
                ids=torch.tensor([s.token for s in batch], device=device),
                positions=torch.tensor([s.position for s in batch], device=device),
                kv=self._pools.step(batch),
                logit_rows=torch.arange(len(batch), device=device),
            ),
            RowScaling.of([s.state for s in batch]),
        )
        # NaN or infinity in a sequence's hidden state reaches all of its logits: one column tells
        sound = torch.isfinite(logits[:, 0]).tolist()
        rows = [i for i, ok in enumerate(sound) if ok]
        if len(rows) < len(batch):
            logits = logits[rows]
        kept = [batch[i] for i in rows]
        drawn = []
        if kept:
            drawn = sample(
                logits, [s.request.sampling for s in kept], [_key(s) for s in kept], self._model.argmax
            )
        broken = [s for s, ok in zip(batch, sound, strict=True) if not ok]
        return [
            *(_Drawn(s, token) for s, token in zip(kept, drawn, strict=True)),
            *(Ended(s, FinishReason.ERROR, "the logits are not finite") for s in broken),
        ]

    def _finish(self, plan: Plan, outcomes: Sequence[_Drawn | Ended]) -> None:
        """Books the step and delivers its events, one message per client."""
        events: defaultdict[str, list[TokenEvent]] = defaultdict(list)
        for ended in plan.ended:
            events[ended.sequence.request.client_id].append(ended.tell())
        with self._changed:
            for outcome in outcomes:
                sequence = outcome.sequence
                if not self._scheduler.runs(sequence):  # it was cancelled during the pass
                    continue
                if (event := self._book(outcome)) is not None:
                    events[sequence.request.client_id].append(event)
        if events:
            self._deliver(events)

    def _book(self, outcome: _Drawn | Ended) -> TokenEvent | None:
        """The sequence's event, if one is due."""
        sequence = outcome.sequence
        if isinstance(outcome, Ended):
            self._scheduler.finish(sequence)
            return outcome.tell()
        sequence.advance(outcome.token)
        reason = sequence.request.sampling.finish_reason(outcome.token.id, sequence.index + 1)
        if reason is not None:
            self._scheduler.finish(sequence)
        elif not sequence.due:
            return None
        return sequence.tell(reason)

    # ---- what the service asks, in the service's thread

    def admit(self, request: Open) -> PagedReservation:
        self._limits.check(request)
        with self._changed:
            reserved = self._scheduler.reserve(request)
        return PagedReservation(self, self._pools, self._model.vocab_size, reserved)

    def holds(self, reserved: Reserved) -> bool:
        with self._changed:
            return self._scheduler.holds(reserved)

    def begin(self, reserved: Reserved, first_tokens: Sequence[Token], state: SiteVectors) -> None:
        """The reservation's KV is complete: it runs, but for choices that their first token ends."""
        request = reserved.request
        sequences = [
            Running(
                id=SequenceId(reserved.id, choice),
                request=request,
                blocks=reserved.blocks[choice],
                token=token.id,
                index=request.output_offset,
                position=request.next_position,
                kv_len=request.kv_len,
                state=state,
                phase=next(self._phases),
            )
            for choice, token in enumerate(first_tokens)
            if request.sampling.finish_reason(token.id, request.output_offset + 1) is None
        ]
        with self._wake():
            self._scheduler.start(reserved, sequences)

    def release(self, reserved: Reserved) -> None:
        with self._changed:
            self._scheduler.release(reserved)

    def cancel(self, cancel: Cancel) -> None:
        with self._wake():
            self._scheduler.cancel(HandOffId(cancel.request_id, cancel.attempt), cancel.choice)

    def cancel_client(self, client_id: str) -> None:
        with self._wake():
            self._scheduler.cancel_client(client_id)

    def end_all(self, message: str) -> None:
        with self._wake():
            self._scheduler.end_all(message)

    def status(self) -> EngineStatus:
        with self._changed:
            return self._scheduler.status()

    @contextmanager
    def _wake(self) -> Iterator[None]:
        with self._changed:
            yield
            self._changed.notify()


def _key(sequence: Running) -> SampleKey:
    """The random number of the token that this step draws."""
    request = sequence.request
    return SampleKey(request.sampling.seed, request.prompt_index, sequence.id.choice, sequence.index + 1)
