"""The engine as the service sees it, so that another one can take its place: admit, step, cancel, status."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtransfer import Cancel, Open, Token, TokenEvent

Deliver = Callable[[Mapping[str, Sequence[TokenEvent]]], None]
"""Takes one step's events, by client id; called in the engine's thread."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """How full the engine is. `sequences` counts running and reserved ones."""

    block_size: int
    total_blocks: int
    free_blocks: int
    max_sequences: int
    running_sequences: int
    sequences: int


class Reservation(Protocol):
    """Room for one hand-off: a KVSink, until it is committed or released."""

    @property
    def blocks(self) -> int:
        """How many KV blocks are reserved."""
        ...

    def write(self, layer: int, first_token: int, key: memoryview, value: memoryview) -> None:
        """As kvtransfer's KVSink. Raises FencedError if the room was taken away."""
        ...

    def commit(self, first_tokens: Sequence[Token]) -> None:
        """Everything is there: the sequences run from the next step on.

        Raises FencedError as `write`, ProtocolError for a first token outside the vocabulary.
        """
        ...

    def release(self) -> None:
        """Gives the room back; no effect after `commit`."""
        ...


class DecodeEngine(Protocol):
    """All methods but `step` are called in one thread, the service's."""

    def admit(self, request: Open) -> Reservation:
        """Reserves room. Raises RejectedError."""
        ...

    def step(self) -> None:
        """One step of everything that runs."""
        ...

    def cancel(self, cancel: Cancel) -> None:
        """Frees a request's sequences without a word; no effect on unknown ones."""
        ...

    def cancel_client(self, client_id: str) -> None:
        """Frees everything of a client that is gone."""
        ...

    def end_all(self, message: str) -> None:
        """Ends everything with an error event."""
        ...

    def status(self) -> EngineStatus: ...
