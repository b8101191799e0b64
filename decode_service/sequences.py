"""The life of a sequence, a type per state: reserved -> running -> ended.

Pure data: neither torch nor gRPC.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from kvtransfer.messages import Open
from prad.core.tokens import Token, TokenEvent

if TYPE_CHECKING:  # the type alone: at run time it would bring torch along
    from prad.lm import SiteVectors


class HandOffId(NamedTuple):
    """One attempt of one request."""

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
class Reserved:
    """Blocks wait for KV bytes: blocks[choice] is that choice's block table."""

    request: Open
    blocks: tuple[tuple[int, ...], ...]

    @property
    def id(self) -> HandOffId:
        return HandOffId(self.request.request_id, self.request.attempt)


@dataclass(slots=True)
class Running:
    """A sequence between two steps.

    The next step feeds `token` (output index `index`) at `position` and stores its keys and values as the
    `kv_len`-th token of `blocks`. Its rows are scaled by `state`, if it has any. `untold`: the latest
    tokens, which its client has not been told yet; `phase` is its own, so that sequences that began together
    are not told in the same step.
    """

    id: SequenceId
    request: Open
    blocks: tuple[int, ...]
    token: int
    index: int
    position: int
    kv_len: int
    state: SiteVectors | None = None
    phase: int = 0
    untold: list[Token] = field(default_factory=list)

    def advance(self, token: Token) -> None:
        """A step is done and drew `token`."""
        self.token = token.id
        self.untold.append(token)
        self.index += 1
        self.position += 1
        self.kv_len += 1

    @property
    def due(self) -> bool:
        """Whether its client is to be told now, by `tokens_per_event`."""
        return (self.index + self.phase) % self.request.tokens_per_event == 0

    def tell(self, reason: str | None, error: str = "") -> TokenEvent:
        """What was untold, and why the sequence ends, if it does."""
        tokens = tuple(self.untold)
        self.untold.clear()
        (request_id, attempt), choice = self.id
        first = self.index + 1 - len(tokens)
        return TokenEvent(request_id, attempt, choice, first, tokens, reason, error or None)


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence that ended without a further token, and why."""

    sequence: Running
    reason: FinishReason
    message: str = ""

    def tell(self) -> TokenEvent:
        return self.sequence.tell(self.reason.value, self.message)
