"""Who is in, who runs the next step, whose blocks become free: pure policy over plain data.

Decode reserves a sequence's whole life at first, so everything that runs fits, and every running sequence
takes part in every step.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from decode_service.sequences import Ended, EngineStatus, FinishReason, HandOffId, Reserved, Running
from kvtransfer.errors import RejectedError, RejectReason
from kvtransfer.messages import Open
from prad.core.kv import BlockPool

_REMEMBERED_REQUESTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: who runs, and who ended since the last one and has yet to emit that."""

    batch: tuple[Running, ...]
    ended: tuple[Ended, ...]


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
        self._reserved: dict[HandOffId, Reserved] = {}
        self._running: dict[HandOffId, dict[int, Running]] = {}
        self._leaving: list[Running] = []
        self._ended: list[Ended] = []
        # the highest attempt let in, by (client, request), of the latest requests
        self._attempts: OrderedDict[tuple[str, str], int] = OrderedDict()

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

    def reserve(self, client_id: str, request: Open, deadline: float | None = None) -> Reserved:
        """Blocks for the whole life of all choices, which share those that the prompt fills; fences lower
        attempts of the client's request.

        Raises RejectedError: FENCED, TOO_LARGE (never fits) or FULL (with a retry hint).
        """
        self._fence(client_id, request)
        # the last token is drawn, but never fed
        tokens = request.kv_len + request.sampling.max_tokens - request.output_offset - 1
        shared = request.kv_len // self._blocks.block_size
        own = self._blocks.blocks_for(tokens) - shared
        assert own > 0, "a sequence that decodes nothing"
        needed = shared + own * request.choices
        if needed > self._blocks.total or request.choices > self._max_sequences:
            raise RejectedError(
                RejectReason.TOO_LARGE,
                f"{request.choices} sequences of {tokens} tokens need {needed} blocks; there are "
                f"{self._blocks.total} blocks for {self._max_sequences} sequences",
            )
        self._require_state_room(request)
        tables = None
        if self.sequence_count + request.choices <= self._max_sequences:
            tables = self._blocks.branch(request.choices, shared, own)
        if tables is None:
            raise RejectedError(
                RejectReason.FULL,
                f"{needed} blocks and {request.choices} sequences wanted, {self._blocks.free_count} blocks "
                f"and {self._max_sequences - self.sequence_count} sequences free",
                self._retry_after_s,
            )
        self._remember((client_id, request.request_id), request.attempt)
        reserved = Reserved(client_id, request, tables, shared, deadline)
        self._reserved[reserved.id] = reserved
        return reserved

    def holds(self, reserved: Reserved) -> bool:
        """Whether the reservation still stands."""
        return self._reserved.get(reserved.id) is reserved

    def release(self, reserved: Reserved) -> None:
        """Gives a reservation back; no effect if it does not stand any more."""
        if self.holds(reserved):
            del self._reserved[reserved.id]
            for table in reserved.blocks:
                self._blocks.free(table)

    def start(self, reserved: Reserved, sequences: Sequence[Running]) -> None:
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

    def schedule(self, now: float) -> Plan:
        """The next step; frees what left since the last one. now: in the time of the deadlines."""
        for hand_off, choices in list(self._running.items()):
            deadline = next(iter(choices.values())).deadline
            if deadline is not None and deadline <= now:
                self._end(hand_off, FinishReason.DEADLINE)
        for sequence in self._leaving:
            self._blocks.free(sequence.blocks)
        self._leaving.clear()
        ended, self._ended = tuple(self._ended), []
        return Plan(tuple(s for choices in self._running.values() for s in choices.values()), ended)

    def runs(self, sequence: Running) -> bool:
        """Whether nobody cancelled it meanwhile."""
        return self._running.get(sequence.id.hand_off, {}).get(sequence.id.choice) is sequence

    def finish(self, sequence: Running) -> None:
        """A running sequence is over, between two steps: its blocks are free at once."""
        self._remove(sequence)
        self._blocks.free(sequence.blocks)

    def cancel(self, hand_off: HandOffId, choice: int | None = None) -> None:
        """Ends running sequences (None: all choices) without an event; no effect on unknown ones."""
        for sequence in list(self._running.get(hand_off, {}).values()):
            if choice in (None, sequence.id.choice):
                self._remove(sequence)
                self._leaving.append(sequence)

    def cancel_client(self, client_id: str) -> None:
        """Ends everything of a client, reservations included, without an event."""
        for reserved in [r for r in self._reserved.values() if r.client_id == client_id]:
            self.release(reserved)
        for hand_off in list(self._running):
            if hand_off.client_id == client_id:
                self.cancel(hand_off)

    def end_all(self, message: str) -> None:
        """Ends everything with an error event."""
        for reserved in list(self._reserved.values()):
            self.release(reserved)
        for hand_off in list(self._running):
            self._end(hand_off, FinishReason.ERROR, message)

    def abandon(self, message: str) -> tuple[Ended, ...]:
        """Ends everything for good: no step follows. Returns who has yet to emit that it ended."""
        self.end_all(message)
        ended, self._ended = tuple(self._ended), []
        return ended

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

    def _fence(self, client_id: str, request: Open) -> None:
        name = client_id, request.request_id
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
