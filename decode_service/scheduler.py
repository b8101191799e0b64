"""Who is in, who runs the next step, whose blocks become free: pure policy over plain data. A sequence has a
type for each state: reserved -> running -> ended.

Decode reserves a sequence's whole life at first, so everything that runs fits, and every running sequence
takes part in every step.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from decode_service.reservations import HandOffId, Reservation
from kvtransfer.errors import RejectedError, RejectReason
from kvtransfer.messages import Open
from prad.core.kv import BlockPool
from prad.core.sampling import FinishReason, Token, TokenEvent, Written

_REMEMBERED_REQUESTS = 1 << 16


class SequenceId(NamedTuple):
    """One choice of a hand-off, or one hypothesis of a beam search."""

    hand_off: HandOffId
    choice: int


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """How full the engine is. `sequences` counts running and reserved ones."""

    block_size: int
    total_blocks: int
    free_blocks: int
    max_sequences: int
    running_sequences: int
    sequences: int


@dataclass(slots=True)
class Running:
    """A sequence between two steps.

    The next step feeds `token` (output index `index`) at `position` and stores its keys and values as the
    `kv_len`-th token of `blocks`. Its rows are scaled by `state`, if it has any. `pending`: the latest
    tokens, which no event has carried yet; `phase` is its own, so that sequences that began together do not
    emit in the same step. `written`: what drafts of it are looked up in, kept by the `Drafter`. `shaping`:
    its rules at work, if it has any; of the engine's hands, as `state`.
    """

    id: SequenceId
    request: Open
    blocks: tuple[int, ...]
    token: int
    index: int
    position: int
    kv_len: int
    written: Written
    state: Mapping[Any, Any] | None = None
    shaping: Any = None
    phase: int = 0
    deadline: float | None = None
    pending: list[Token] = field(default_factory=list)

    def advance(self, token: Token) -> None:
        """A step is done and drew `token`."""
        self.token = token.id
        self.pending.append(token)
        self.index += 1
        self.position += 1
        self.kv_len += 1

    @property
    def draft_room(self) -> int:
        """How many tokens of a draft a step may check: if all are right, it draws one more, its last. None
        where rules look at each token."""
        if self.shaping is not None:
            return 0
        return self.request.sampling.max_tokens - self.index - 2

    @property
    def emits(self) -> bool:
        """Whether what is pending goes out after this step, by `tokens_per_event`."""
        return (self.index + self.phase) % self.request.tokens_per_event == 0

    def emit(self, reason: str | None, error: str = "") -> TokenEvent:
        """An event with what was pending, and why the sequence ends, if it does."""
        tokens = tuple(self.pending)
        self.pending.clear()
        (_, request_id, attempt), choice = self.id
        first = self.index + 1 - len(tokens)
        return TokenEvent(request_id, attempt, choice, first, tokens, reason, error or None)


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence that ended without a further token, and why."""

    sequence: Running
    reason: FinishReason
    message: str = ""

    def emit(self) -> TokenEvent:
        return self.sequence.emit(self.reason.value, self.message)


class Scheduler:
    """Owns the blocks. Not thread-safe: the engine calls it under its lock.

    A running sequence's blocks become free only in `schedule` or `finish`, between two steps: a step in
    flight still writes to them.
    """

    def __init__(
        self,
        blocks: BlockPool,
        max_sequences: int,
        retry_after_s: float = 0.0,
        state_bytes: int = 256 << 20,
    ) -> None:
        """state_bytes: what all requests' state together may take."""
        self._blocks = blocks
        self._max_sequences = max_sequences
        self._retry_after_s = retry_after_s
        self._state_bytes = state_bytes
        self._reserved: dict[HandOffId, Reservation] = {}
        self._running: dict[HandOffId, dict[int, Running]] = {}
        self._leaving: list[Running] = []
        self._ended: list[Ended] = []
        # the highest attempt let in, by (client, request), of the latest requests
        self._attempts: OrderedDict[tuple[str, str], int] = OrderedDict()

    @property
    def blocks(self) -> BlockPool:
        """A running search shares its own among its hypotheses, between two steps."""
        return self._blocks

    def status(self) -> EngineStatus:
        return EngineStatus(
            block_size=self._blocks.block_size,
            total_blocks=self._blocks.total,
            free_blocks=self._blocks.free_count,
            max_sequences=self._max_sequences,
            running_sequences=self.running_count,
            sequences=self.sequence_count,
        )

    @property
    def running_count(self) -> int:
        return sum(len(choices) for choices in self._running.values())

    @property
    def sequence_count(self) -> int:
        """Running and reserved."""
        return self.running_count + sum(len(r.blocks) for r in self._reserved.values())

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._leaving or self._ended)

    def reserve(self, session: str, request: Open, deadline: float | None = None) -> Reservation:
        """Blocks for the whole life of all choices, or hypotheses, which share those that the prompt fills;
        fences lower attempts of the client's request.

        Raises RejectedError: FENCED, TOO_LARGE (never fits) or FULL (with a retry hint).
        """
        self._fence(session, request)
        # the last token is drawn, but never fed
        tokens = request.kv_len + request.sampling.max_tokens - request.output_offset - 1
        shared = request.kv_len // self._blocks.block_size
        own = self._blocks.blocks_for(tokens) - shared
        assert own > 0, "a sequence that decodes nothing"
        needed = shared + own * request.sequences
        if needed > self._blocks.total or request.sequences > self._max_sequences:
            raise RejectedError(
                RejectReason.TOO_LARGE,
                f"{request.sequences} sequences of {tokens} tokens need {needed} blocks; there are "
                f"{self._blocks.total} blocks for {self._max_sequences} sequences",
            )
        self._require_state_room(request)
        tables = None
        if self.sequence_count + request.sequences <= self._max_sequences:
            tables = self._blocks.branch(request.sequences, shared, own)
        if tables is None:
            raise RejectedError(
                RejectReason.FULL,
                f"{needed} blocks and {request.sequences} sequences wanted, {self._blocks.free_count} blocks "
                f"and {self._max_sequences - self.sequence_count} sequences free",
                self._retry_after_s,
            )
        self._remember((session, request.request_id), request.attempt)
        reserved = Reservation(session, request, tables, shared, deadline)
        self._reserved[reserved.id] = reserved
        return reserved

    def holds(self, reserved: Reservation) -> bool:
        """Whether the reservation still stands."""
        return self._reserved.get(reserved.id) is reserved

    def release(self, reserved: Reservation) -> None:
        """Gives a reservation back; no effect if it does not stand any more."""
        if self.holds(reserved):
            del self._reserved[reserved.id]
            for table in reserved.blocks:
                self._blocks.free(table)

    def start(self, reserved: Reservation, sequences: Sequence[Running]) -> None:
        """The reservation becomes running sequences; blocks of choices that do not run become free."""
        assert self.holds(reserved), "a reservation is started that does not stand"
        del self._reserved[reserved.id]
        starting = {s.id.choice: s for s in sequences}
        for sequence in sequences:  # a step writes at kv_len and never before: no neighbour's block
            behind = sequence.blocks[sequence.kv_len // self._blocks.block_size :]
            assert self._blocks.exclusive(behind), "a choice would write to a block that another one reads"
        for choice, table in enumerate(reserved.blocks):
            if choice not in starting:
                self._blocks.free(table)
        if starting:
            self._running[reserved.id] = starting

    def schedule(self, now: float) -> list[Running]:
        """Who runs the next step; frees what left since the last one. now: in the time of the deadlines."""
        for hand_off, choices in list(self._running.items()):
            deadline = next(iter(choices.values())).deadline
            if deadline is not None and deadline <= now:
                self._end(hand_off, FinishReason.DEADLINE)
        for sequence in self._leaving:
            self._blocks.free(sequence.blocks)
        self._leaving.clear()
        return [s for choices in self._running.values() for s in choices.values()]

    def take_ended(self) -> list[Ended]:
        """Who ended since the last call and has yet to emit that."""
        ended, self._ended = self._ended, []
        return ended

    def runs(self, sequence: Running) -> bool:
        """Whether nobody cancelled it meanwhile."""
        return self._running.get(sequence.id.hand_off, {}).get(sequence.id.choice) is sequence

    def knows(self, sequence: SequenceId) -> bool:
        """Whether it runs, or has yet to emit that it ended."""
        running = sequence.choice in self._running.get(sequence.hand_off, {})
        return running or any(ended.sequence.id == sequence for ended in self._ended)

    def finish(self, sequence: Running) -> None:
        """A running sequence is over, between two steps: its blocks are free at once."""
        self._remove(sequence)
        self._blocks.free(sequence.blocks)

    def cancel(self, hand_off: HandOffId, choice: int | None = None) -> None:
        """Ends running sequences (None: all choices) without an event; no effect on unknown ones, nor on a
        beam search of which one choice is not wanted."""
        for sequence in list(self._running.get(hand_off, {}).values()):
            if choice is None or (choice == sequence.id.choice and sequence.request.beams is None):
                self._remove(sequence)
                self._leaving.append(sequence)

    def cancel_session(self, session: str) -> None:
        """Ends everything of a client, reservations included, without an event."""
        for reserved in [r for r in self._reserved.values() if r.session == session]:
            self.release(reserved)
        for hand_off in list(self._running):
            if hand_off.session == session:
                self.cancel(hand_off)

    def cancel_all(self) -> None:
        """Ends everything without an event: that the stream ends says it."""
        for reserved in list(self._reserved.values()):
            self.release(reserved)
        for hand_off in list(self._running):
            self.cancel(hand_off)

    def _require_state_room(self, request: Open) -> None:
        """Choices share the state of their prompt."""
        if not request.state:
            return
        needed = request.state_bytes
        if needed > self._state_bytes:
            raise RejectedError(
                RejectReason.TOO_LARGE,
                f"{needed} bytes of request state; there is room for {self._state_bytes}",
            )
        running = [next(iter(choices.values())).request for choices in self._running.values()]
        held = sum(r.state_bytes for r in (*running, *(each.request for each in self._reserved.values())))
        if held + needed > self._state_bytes:
            raise RejectedError(
                RejectReason.FULL,
                f"{needed} bytes of request state wanted, {self._state_bytes - held} free",
                self._retry_after_s,
            )

    def _fence(self, session: str, request: Open) -> None:
        name = session, request.request_id
        known = self._attempts.get(name, 0)
        if request.attempt <= known:
            raise RejectedError(
                RejectReason.FENCED,
                f"attempt {known} of {request.request_id} is known, not {request.attempt}",
            )
        self._remember(name, request.attempt - 1)  # if it is refused, it may try again
        lower = HandOffId(*name, known)
        if lower in self._reserved:
            self.release(self._reserved[lower])
        self._end(lower, FinishReason.ERROR, f"fenced by attempt {request.attempt}")

    def _remember(self, name: tuple[str, str], attempt: int) -> None:
        self._attempts[name] = attempt
        self._attempts.move_to_end(name)
        if len(self._attempts) > _REMEMBERED_REQUESTS:
            self._attempts.popitem(last=False)

    def _end(self, hand_off: HandOffId, reason: FinishReason, message: str = "") -> None:
        self._ended += [Ended(s, reason, message) for s in self._running.get(hand_off, {}).values()]
        self.cancel(hand_off)

    def _remove(self, sequence: Running) -> None:
        choices = self._running[sequence.id.hand_off]
        del choices[sequence.id.choice]
        if not choices:
            del self._running[sequence.id.hand_off]
