"""Continuous batching in one thread: schedule -> run -> deliver.

Sequences join and leave between steps; a step is one forward pass and one call of the sampler for all. What
touches tensors is `runner.py`'s: who asks the engine loads no torch.
"""

import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from decode_service.beams import Hypothesis, Searching
from decode_service.reservations import FrameRows, HandOffId, Reservation
from decode_service.scheduler import Ended, EngineStatus, Running, Scheduler, SequenceId
from kvtransfer.errors import FencedError, ProtocolError, RejectedError, RejectReason
from kvtransfer.frames import Incoming
from kvtransfer.messages import Ask, Cancel, Open
from prad.core.sampling import Drafter, FinishReason, Token, TokenEvent, Written

if TYPE_CHECKING:
    from decode_service.runner import ModelRunner

logger = logging.getLogger(__name__)

Deliver = Callable[[Mapping[str, Sequence[TokenEvent]]], None]
"""Receives one step's events, by client id; called in the engine's thread.

An event holds at most its request's `tokens_per_event` tokens, the one that ends a sequence all that were
pending; a cancelled one's are dropped.
"""

Observe = Callable[[float, int, int, int], None]
"""Called with a step's seconds, and how many tokens were drawn, drafted, and drawn as they were drafted."""

_MISSING = "the decode service does not have this sequence"
_UNREADY_S = 0.005
_STEP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)


class PagedEngine:
    """The decode engine over paged KV. A step that fails ends its sequences. Any other fault in the thread
    calls `on_failure`, and nothing is decoded after it: what it had ends without an event, as if killed, so
    that who waits for it lets it go on elsewhere, or later.

    `step` runs in the engine's thread; `stop` and `status` may be called from any other; all other methods
    are called in one, the service's.
    """

    def __init__(
        self,
        runner: "ModelRunner",
        scheduler: Scheduler,
        deliver: Deliver,
        observe: Observe,
        on_failure: Callable[[str], None] = logger.error,
        drafter: Drafter | None = None,
    ) -> None:
        """on_failure is called with what it was, in the engine's thread, as `deliver` is. drafter: guesses
        tokens; None: nobody does."""
        self._runner = runner
        self._scheduler = scheduler
        self._deliver = deliver
        self._observe = observe
        self._on_failure = on_failure
        self._drafter = drafter or Drafter(0, 0)
        self._phases = itertools.count()
        self._changed = threading.Condition()  # guards the scheduler; never held during a pass
        self._stopping = False
        self._over: str | None = None  # why nothing is decoded any more
        self._thread = threading.Thread(target=self._loop, name="decode-engine", daemon=True)

    # ---- the loop, in its own thread

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finishes the step in flight and the events that are left; waits for the thread."""
        with self._wake():
            self._stopping = True
        self._thread.join()

    def step(self) -> None:
        with self._changed:
            scheduled = self._scheduler.schedule(time.monotonic())
            batch = [s for s in scheduled if s.shaping is None or s.shaping.ready]
            if scheduled and not batch:  # all wait for their grammars, which compile in other threads
                self._changed.wait(_UNREADY_S)
        results: list[Sequence[Token] | Ended] = []
        if batch:
            results = self._timed(batch)
        with self._changed:
            events = [(ended.sequence, ended.emit()) for ended in self._scheduler.take_ended()]
            searched: defaultdict[Searching, dict[int, Sequence[Token] | Ended]] = defaultdict(dict)
            for sequence, result in zip(batch, results, strict=True):
                if not self._scheduler.runs(sequence):  # it was cancelled during the pass
                    self._drafter.ended(sequence.written)
                elif isinstance(sequence, Hypothesis):
                    searched[sequence.searching][sequence.id.choice] = result
                else:
                    events += self._book(sequence, result)
            for searching, its in searched.items():
                events += self._book_search(searching, [its[each.id.choice] for each in searching.live])
            self._send(events)  # under the lock: `missing` must not overtake the event that ends a sequence

    def _loop(self) -> None:
        try:
            while self._wait_for_work():
                self.step()
        except BaseException as error:
            logger.exception("the decode engine failed")
            self._fail(f"the decode engine failed: {error}")

    def _wait_for_work(self) -> bool:
        """Waits, passively; False when the engine stops and no event is left."""
        with self._changed:
            while not self._scheduler.has_work and not self._stopping:
                self._changed.wait()
            return self._scheduler.has_work

    def _timed(self, batch: Sequence[Running]) -> list[Sequence[Token] | Ended]:
        """A step with drafts, if any pay."""
        drafts = self._drafter.drafts([s.written for s in batch], [s.draft_room for s in batch])
        drafted = sum(map(len, drafts))
        started = time.perf_counter()
        results = self._run(batch, drafts)
        seconds = time.perf_counter() - started
        self._drafter.took(len(batch) + drafted, seconds)
        drawn = [len(result) for result in results if not isinstance(result, Ended)]
        self._observe(seconds, sum(drawn), drafted, sum(drawn) - len(drawn))
        return results

    def _run(
        self, batch: Sequence[Running], drafts: Sequence[Sequence[int]]
    ) -> list[Sequence[Token] | Ended]:
        copies = [s.copied for s in batch if isinstance(s, Hypothesis) and s.copied is not None]
        try:
            if copies:
                self._runner.copy(copies)
            drawn = self._runner.run(batch, drafts)
        except Exception as error:  # whatever it was: these sequences end, the service goes on
            logger.exception("a decode step of %d sequences failed", len(batch))
            return [Ended(s, FinishReason.ERROR, f"the decode step failed: {error}") for s in batch]
        return [
            Ended(s, FinishReason.ERROR, _why_none(s)) if tokens is None else tokens
            for s, tokens in zip(batch, drawn, strict=True)
        ]

    def _book(
        self, sequence: Running, result: Sequence[Token] | Ended
    ) -> Iterator[tuple[Running, TokenEvent]]:
        """What a step means for a sequence, and its events, if it emits any."""
        if isinstance(result, Ended):
            self._scheduler.finish(sequence)
            yield sequence, result.emit()
            return
        self._drafter.drew(sequence.written, [token.id for token in result])
        for token in result:
            sequence.advance(token)
            reason = sequence.request.sampling.finish_reason(token.id, sequence.index + 1)
            if reason is not None:
                self._scheduler.finish(sequence)
                self._drafter.ended(sequence.written)
            if reason is not None or sequence.emits:
                yield sequence, sequence.emit(reason)

    def _book_search(
        self, searching: Searching, results: Sequence[Sequence[Token] | Ended]
    ) -> Iterator[tuple[Running, TokenEvent]]:
        """The same for a beam search: it emits nothing before its end, and one hypothesis ends all."""
        drawn = [result[0] for result in results if not isinstance(result, Ended)]
        broken = next((result for result in results if isinstance(result, Ended)), None)
        if broken is None and (children := searching.advance(drawn)):
            searching.inherit(children, self._scheduler.blocks)
            return
        for hypothesis in searching.live:
            self._scheduler.finish(hypothesis)
            if broken is not None:
                yield hypothesis, Ended(hypothesis, broken.reason, broken.message).emit()
        if broken is None:
            first, request = searching.live[0], searching.live[0].request
            name = request.request_id, request.attempt, request.choices
            for event in searching.search.events(*name, request.tokens_per_event):
                yield first, event

    def _send(self, events: Iterable[tuple[Running, TokenEvent]]) -> None:
        """One message per client."""
        by_client: defaultdict[str, list[TokenEvent]] = defaultdict(list)
        for sequence, event in events:
            by_client[sequence.id.hand_off.session].append(event)
        if by_client:
            self._deliver(by_client)

    def _fail(self, message: str) -> None:
        try:
            self.cancel_all(message)
        except Exception:
            logger.exception("not all that the decode engine had was ended")
        finally:
            self._on_failure(message)

    # ---- what the service asks, in the service's thread

    def admit(self, session: str, request: Open) -> Reservation:
        """Reserves room for a client's request. Raises RejectedError."""
        self._runner.limits.check(request)
        # what was left when it was sent counts from now: the clocks of two hosts differ
        left_ms = request.timeout_ms
        deadline = None if left_ms is None else time.monotonic() + left_ms / 1000
        with self._changed:
            if self._over is not None:
                raise RejectedError(RejectReason.DRAINING, self._over)
            reservation = self._scheduler.reserve(session, request, deadline)
        try:
            reservation.room = self._runner.room(reservation)
            if request.sampling.rules is not None:
                reservation.grammar = self._runner.begin_grammar(request.sampling.rules)
        except BaseException:  # a device without memory, a grammar where none is taken
            self.release(reservation)
            raise
        return reservation

    def require_held(self, reservation: Reservation) -> None:
        """Raises FencedError if the room was taken away."""
        with self._changed:
            held = self._scheduler.holds(reservation)
        if not held:
            name, attempt = reservation.request.request_id, reservation.request.attempt
            raise FencedError(f"attempt {attempt} of {name} was taken over or cancelled")

    def write(self, frame: Incoming, rows: Sequence[FrameRows]) -> None:
        """Puts the bytes of a KV frame into reservations, which still hold their room."""
        self._runner.write(frame, rows)

    def put_state(self, reservation: Reservation, site: str, data: bytes) -> None:
        """The request state at a site that the Open names: [layers, width] in the model's dtype. Raises
        ProtocolError if it holds numbers that are not finite."""
        key, vectors = self._runner.state(site, data)
        reservation.state[key] = vectors

    def commit(
        self,
        reservation: Reservation,
        first_tokens: Sequence[Token],
        text_ids: Sequence[int] = (),
        alike: int = 0,
    ) -> None:
        """Its KV is complete: its sequences run from the next step on, but for choices that their first token
        ends. text_ids, alike: as `Written.of` takes them. Raises FencedError as `require_held`, ProtocolError
        for a first token outside the vocabulary, or as `Searching.begin`."""
        self.require_held(reservation)
        outside = [t.id for t in first_tokens if t.id >= self._runner.limits.vocab_size]
        if outside:
            raise ProtocolError(f"first tokens {outside} are outside the vocabulary")
        sequences: Sequence[Running]
        if reservation.request.beams is None:
            sequences = self._choices(reservation, first_tokens, text_ids, alike)
        else:
            vocab_size = self._runner.limits.vocab_size
            sequences = Searching.begin(reservation, first_tokens[0], vocab_size).live
        with self._wake():
            self._scheduler.start(reservation, sequences)

    def _choices(
        self, reservation: Reservation, first_tokens: Sequence[Token], text_ids: Sequence[int], alike: int
    ) -> list[Running]:
        request, ruled = reservation.request, reservation.request.sampling.rules is not None
        return [
            Running(
                id=SequenceId(reservation.id, choice),
                request=request,
                blocks=reservation.blocks[choice],
                token=token.id,
                index=request.output_offset,
                position=request.next_position,
                kv_len=request.kv_len,
                written=Written.of(text_ids, token.id, alike),
                state=reservation.state,
                shaping=self._runner.shaping(reservation, token.id) if ruled else None,
                phase=next(self._phases),
                deadline=reservation.deadline,
            )
            for choice, token in enumerate(first_tokens)
            if request.sampling.finish_reason(token.id, request.output_offset + 1) is None
        ]

    def release(self, reservation: Reservation) -> None:
        """Gives the room back; no effect after `commit`."""
        with self._changed:
            self._scheduler.release(reservation)

    def cancel(self, session: str, cancel: Cancel) -> None:
        """Frees the sequences of a client's request without an event; no effect on unknown ones."""
        with self._wake():
            self._scheduler.cancel(HandOffId(session, cancel.request_id, cancel.attempt), cancel.choice)

    def cancel_session(self, session: str) -> None:
        """Frees everything of a client that is gone."""
        with self._wake():
            self._scheduler.cancel_session(session)

    def missing(self, session: str, ask: Ask) -> list[TokenEvent]:
        """An event for each of a client's sequences that is not here: the event that ended it, if there was
        one, has been delivered before. None when all is over: the end of the stream says so."""
        with self._changed:
            if self._over is not None:
                return []
            return [
                TokenEvent(name, attempt, choice, 0, (), FinishReason.ERROR.value, _MISSING)
                for name, attempt, choice in ask.sequences
                if not self._scheduler.knows(SequenceId(HandOffId(session, name, attempt), choice))
            ]

    def cancel_all(self, why: str) -> None:
        """Ends everything without an event, and admits nothing more."""
        with self._wake():
            self._over = why
            self._scheduler.cancel_all()

    def status(self) -> EngineStatus:
        with self._changed:
            return self._scheduler.status()

    @contextmanager
    def _wake(self) -> Iterator[None]:
        with self._changed:
            yield
            self._changed.notify()


def _why_none(sequence: Running) -> str:
    """Why a step drew nothing for it."""
    trouble = None if sequence.shaping is None else sequence.shaping.trouble
    return trouble or "the logits are not finite"


class Metrics:
    """What an engine's steps say about it; one registry each, so that several may live in a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._tokens = Counter("prad_decode_tokens", "Tokens computed.", registry=self.registry)
        self._seconds = Histogram(
            "prad_decode_step_seconds",
            "Time of one decode step.",
            buckets=_STEP_BUCKETS,
            registry=self.registry,
        )
        self._drafted = Counter(
            "prad_decode_drafted_tokens", "Tokens of drafts that were computed.", registry=self.registry
        )
        self._accepted = Counter(
            "prad_decode_accepted_tokens",
            "Of these, those that were drawn, too.",
            registry=self.registry,
        )

    def watch(self, status: Callable[[], EngineStatus]) -> None:
        """Gauges read the engine when they are scraped."""
        for name, text, read in (
            ("prad_decode_blocks", "KV blocks.", lambda: status().total_blocks),
            ("prad_decode_free_blocks", "KV blocks that are free.", lambda: status().free_blocks),
            ("prad_decode_running_sequences", "Running sequences.", lambda: status().running_sequences),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    def step(self, seconds: float, tokens: int, drafted: int, accepted: int) -> None:
        self._seconds.observe(seconds)
        self._tokens.inc(tokens)
        self._drafted.inc(drafted)
        self._accepted.inc(accepted)
