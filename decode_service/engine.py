"""Continuous batching in one thread: schedule -> run -> deliver.

Sequences join and leave between steps; a step is one forward pass and one call of the sampler for all.
"""

import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from decode_service.protocol import Deliver, PlacedRows
from decode_service.runner import ModelRunner, Room, RoomRows
from decode_service.scheduler import Scheduler
from decode_service.sequences import (
    Ended,
    EngineStatus,
    FinishReason,
    HandOffId,
    Reserved,
    Running,
    SequenceId,
    State,
)
from kvtransfer.errors import FencedError, ProtocolError, RejectedError, RejectReason
from kvtransfer.frames import Incoming
from kvtransfer.messages import Cancel, Open
from prad.core.sampling import Token, TokenEvent

logger = logging.getLogger(__name__)

Observe = Callable[[float, int], None]
"""Called with a step's seconds and its number of tokens."""


class PagedEngine:
    """The decode engine over paged KV. A step that fails ends its sequences. Any other fault in the thread
    ends everything with an error event and calls `on_failure`: nothing is decoded after it."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        deliver: Deliver,
        observe: Observe,
        on_failure: Callable[[str], None] = logger.error,
    ) -> None:
        """on_failure is called with what it was, in the engine's thread, as `deliver` is."""
        self._runner = runner
        self._scheduler = scheduler
        self._deliver = deliver
        self._observe = observe
        self._on_failure = on_failure
        self._phases = itertools.count()
        self._changed = threading.Condition()  # guards the scheduler; never held during a pass
        self._stopping = False
        self._failure: str | None = None
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
            plan = self._scheduler.schedule(time.monotonic())
        results: list[Token | Ended] = []
        if plan.batch:
            started = time.perf_counter()
            results = self._run(plan.batch)
            self._observe(time.perf_counter() - started, len(results))
        with self._changed:
            events = [(ended.sequence, ended.emit()) for ended in plan.ended]
            for sequence, result in zip(plan.batch, results, strict=True):
                if self._scheduler.runs(sequence):  # else it was cancelled during the pass
                    events += self._book(sequence, result)
        self._send(events)

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

    def _run(self, batch: Sequence[Running]) -> list[Token | Ended]:
        try:
            tokens = self._runner.run(batch)
        except Exception as error:  # whatever it was: these sequences end, the service goes on
            logger.exception("a decode step of %d sequences failed", len(batch))
            return [Ended(s, FinishReason.ERROR, f"the decode step failed: {error}") for s in batch]
        return [
            Ended(s, FinishReason.ERROR, "the logits are not finite") if token is None else token
            for s, token in zip(batch, tokens, strict=True)
        ]

    def _book(self, sequence: Running, result: Token | Ended) -> Iterator[tuple[Running, TokenEvent]]:
        """What a step means for a sequence, and its event, if it emits one."""
        if isinstance(result, Ended):
            self._scheduler.finish(sequence)
            yield sequence, result.emit()
            return
        sequence.advance(result)
        reason = sequence.request.sampling.finish_reason(result.id, sequence.index + 1)
        if reason is not None:
            self._scheduler.finish(sequence)
        if reason is not None or sequence.emits:
            yield sequence, sequence.emit(reason)

    def _send(self, events: Iterable[tuple[Running, TokenEvent]]) -> None:
        """One message per client."""
        by_client: defaultdict[str, list[TokenEvent]] = defaultdict(list)
        for sequence, event in events:
            by_client[sequence.id.hand_off.client_id].append(event)
        if by_client:
            self._deliver(by_client)

    def _fail(self, message: str) -> None:
        try:
            with self._changed:
                self._failure = message
                ended = self._scheduler.abandon(message)
            self._send((each.sequence, each.emit()) for each in ended)
        except Exception:  # whoever was not reached hears it from the end of the stream
            logger.exception("not all clients got to know that the decode engine failed")
        finally:
            self._on_failure(message)

    # ---- what the service asks, in the service's thread

    def admit(self, client_id: str, request: Open) -> "PagedReservation":
        self._runner.limits.check(request)
        # what was left when it was sent counts from now: the clocks of two hosts differ
        left_ms = request.timeout_ms
        deadline = None if left_ms is None else time.monotonic() + left_ms / 1000
        with self._changed:
            if self._failure is not None:
                raise RejectedError(RejectReason.DRAINING, self._failure)
            reserved = self._scheduler.reserve(client_id, request, deadline)
        return PagedReservation(self, self._runner, reserved)

    def write(self, frame: Incoming, rows: Sequence[PlacedRows]) -> None:
        self._runner.write(
            frame, [RoomRows(_own(r).room, r.start, r.first_token, r.token_count) for r in rows]
        )

    def holds(self, reserved: Reserved) -> bool:
        with self._changed:
            return self._scheduler.holds(reserved)

    def begin(self, reserved: Reserved, first_tokens: Sequence[Token], state: State) -> None:
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
                deadline=reserved.deadline,
            )
            for choice, token in enumerate(first_tokens)
            if request.sampling.finish_reason(token.id, request.output_offset + 1) is None
        ]
        with self._wake():
            self._scheduler.start(reserved, sequences)

    def release(self, reserved: Reserved) -> None:
        with self._changed:
            self._scheduler.release(reserved)

    def cancel(self, client_id: str, cancel: Cancel) -> None:
        with self._wake():
            self._scheduler.cancel(HandOffId(client_id, cancel.request_id, cancel.attempt), cancel.choice)

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


class PagedReservation:
    """As protocol.Reservation. Lives in the service's thread; `room` is where its KV bytes go."""

    def __init__(self, engine: PagedEngine, runner: ModelRunner, reserved: Reserved) -> None:
        self.room: Room = runner.room(reserved)
        self._engine = engine
        self._runner = runner
        self._reserved = reserved
        self._state: dict[object, object] = {}

    @property
    def block_count(self) -> int:
        return self._reserved.block_count

    def put_state(self, site: str, data: bytes) -> None:
        key, vectors = self._runner.state(site, data)
        self._state[key] = vectors

    def commit(self, first_tokens: Sequence[Token]) -> None:
        self.require_held()
        outside = [t.id for t in first_tokens if t.id >= self._runner.limits.vocab_size]
        if outside:
            raise ProtocolError(f"first tokens {outside} are outside the vocabulary")
        self._engine.begin(self._reserved, first_tokens, self._state)

    def release(self) -> None:
        self._engine.release(self._reserved)

    def require_held(self) -> None:
        if not self._engine.holds(self._reserved):
            request = self._reserved.request
            raise FencedError(
                f"attempt {request.attempt} of {request.request_id} was taken over or cancelled"
            )


def _own(rows: PlacedRows) -> PagedReservation:
    assert isinstance(rows.reservation, PagedReservation), "a reservation of another engine"
    return rows.reservation
