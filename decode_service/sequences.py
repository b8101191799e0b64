"""The life of a sequence, a type per state: reserved -> running -> ended.

Plain data: neither torch nor gRPC.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from kvtransfer.messages import Open
from prad.core.sampling import Token, TokenEvent

State = Mapping[Any, Any]
"""Request state as the engine's hands hold it (vectors by site): it is carried here, never looked into."""


class HandOffId(NamedTuple):
    """One attempt of one client's request. Clients choose their request ids: without the client's own one
    client could fence or cancel what is another's. client_id is the session's: nobody else knows it."""

    client_id: str
    request_id: str
    attempt: int


class SequenceId(NamedTuple):
    """One choice of it."""

    hand_off: HandOffId
    choice: int


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """How full the engine is. `sequences` counts running and reserved ones."""

    block_size: int
    total_blocks: int
    free_blocks: int
    max_sequences: int
    running_sequences: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Reserved:
    """Blocks wait for KV bytes: blocks[choice] is that choice's block table.

    All tables begin with the same `shared` blocks, those that the prompt's KV fills; behind them each choice
    has its own, because it goes on writing there. deadline: in the time of the engine's monotonic clock.
    """

    client_id: str
    request: Open
    blocks: tuple[tuple[int, ...], ...]
    shared: int
    deadline: float | None = None

    @property
    def id(self) -> HandOffId:
        return HandOffId(self.client_id, self.request.request_id, self.request.attempt)

    @property
    def block_count(self) -> int:
        """Blocks that it occupies, each counted once."""
        return self.shared + sum(len(table) - self.shared for table in self.blocks)


@dataclass(slots=True)
class Running:
    """A sequence between two steps.

    The next step feeds `token` (output index `index`) at `position` and stores its keys and values as the
    `kv_len`-th token of `blocks`. Its rows are scaled by `state`, if it has any. `pending`: the latest
    tokens, which no event has carried yet; `phase` is its own, so that sequences that began together do not
    emit in the same step.
    """

    id: SequenceId
    request: Open
    blocks: tuple[int, ...]
    token: int
    index: int
    position: int
    kv_len: int
    state: State | None = None
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
