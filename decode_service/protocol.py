"""The engine as the service sees it, so that another one can take its place: admit, step, cancel, status."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.kv_frame import Incoming
from kvtransfer.messages import Cancel, Open
from prad.core.tokens import Token, TokenEvent

Deliver = Callable[[Mapping[str, Sequence[TokenEvent]]], None]
"""Takes one step's events, by client id; called in the engine's thread.

An event holds at most its request's `tokens_per_event` tokens, the one that ends a sequence all that were
not told; a cancelled one's are never told.
"""


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
    """Room for one hand-off, until it is committed or released. A `KVWriter` fills it."""

    @property
    def blocks(self) -> int:
        """How many KV blocks are reserved."""
        ...

    def require_held(self) -> None:
        """Raises FencedError if the room was taken away."""
        ...

    def put_state(self, site: str, data: bytes) -> None:
        """The request state at a site that the Open names: [layers, width] in the model's dtype.

        Raises ProtocolError if it holds numbers that are not finite.
        """
        ...

    def commit(self, first_tokens: Sequence[Token]) -> None:
        """Everything is there: the sequences run from the next step on.

        Raises FencedError as `require_held`, ProtocolError for a first token outside the vocabulary.
        """
        ...

    def release(self) -> None:
        """Gives the room back; no effect after `commit`."""
        ...


@dataclass(frozen=True, slots=True)
class PlacedRows:
    """Rows start .. start + token_count of a KV frame are tokens first_token .. of a reservation."""

    reservation: Reservation
    start: int
    first_token: int
    token_count: int


class KVWriter(Protocol):
    """Puts the bytes of a KV frame into the room of reservations of its engine, which still hold it."""

    def write(self, frame: Incoming, rows: Sequence[PlacedRows]) -> None: ...


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
