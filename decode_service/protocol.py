"""The engine as the service sees it, so that another one can take its place: admit, step, cancel, status."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from decode_service.sequences import EngineStatus
from kvtransfer.frames import Incoming
from kvtransfer.messages import Cancel, Open
from prad.core.sampling import Token, TokenEvent

Deliver = Callable[[Mapping[str, Sequence[TokenEvent]]], None]
"""Receives one step's events, by client id; called in the engine's thread.

An event holds at most its request's `tokens_per_event` tokens, the one that ends a sequence all that were
pending; a cancelled one's are dropped.
"""


class Reservation(Protocol):
    """Room for one hand-off, until it is committed or released. `DecodeEngine.write` fills it."""

    @property
    def block_count(self) -> int:
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


class DecodeEngine(Protocol):
    """All methods but `step` are called in one thread, the service's."""

    def admit(self, client_id: str, request: Open) -> Reservation:
        """Reserves room for a client's request. Raises RejectedError."""
        ...

    def write(self, frame: Incoming, rows: Sequence[PlacedRows]) -> None:
        """Puts the bytes of a KV frame into reservations, which still hold their room."""
        ...

    def step(self) -> None:
        """One step of everything that runs."""
        ...

    def cancel(self, client_id: str, cancel: Cancel) -> None:
        """Frees the sequences of a client's request without an event; no effect on unknown ones."""
        ...

    def cancel_client(self, client_id: str) -> None:
        """Frees everything of a client that is gone."""
        ...

    def end_all(self, message: str) -> None:
        """Ends everything with an error event."""
        ...

    def status(self) -> EngineStatus: ...
