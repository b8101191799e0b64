"""An engine that decodes nothing: the service's tests see what it is asked, and say what it answers."""

from collections.abc import Sequence

from decode_service.protocol import PlacedRows
from decode_service.sequences import EngineStatus
from kvtransfer.errors import FencedError, RejectedError
from kvtransfer.frames import Incoming
from kvtransfer.messages import Cancel, Open
from prad.core.sampling import Token


class FakeReservation:
    """What was done with it, in order; `held` False: its room was taken away."""

    block_count = 7

    def __init__(self, client_id: str, request: Open) -> None:
        self.client_id = client_id
        self.request = request
        self.held = True
        self.calls: list[str] = []
        self.written: list[tuple[int, int, bytes]] = []  # layer, first token, keys
        self.first_tokens: tuple[Token, ...] = ()

    def require_held(self) -> None:
        if not self.held:
            raise FencedError("taken over")

    def put_state(self, site: str, data: bytes) -> None:
        self.calls.append(f"state {site}")

    def commit(self, first_tokens: Sequence[Token]) -> None:
        self.require_held()
        self.first_tokens = tuple(first_tokens)
        self.calls.append("commit")

    def release(self) -> None:
        self.calls.append("release")


class FakeEngine:
    """As protocol.DecodeEngine. `refusal`: what admit raises, if anything."""

    def __init__(self) -> None:
        self.reservations: list[FakeReservation] = []
        self.cancelled: list[tuple[str, Cancel]] = []
        self.gone: list[str] = []
        self.refusal: RejectedError | None = None

    def admit(self, client_id: str, request: Open) -> FakeReservation:
        if self.refusal is not None:
            raise self.refusal
        self.reservations.append(FakeReservation(client_id, request))
        return self.reservations[-1]

    def write(self, frame: Incoming, rows: Sequence[PlacedRows]) -> None:
        for row in rows:
            assert isinstance(row.reservation, FakeReservation)
            for layer, (keys, _) in enumerate(frame.layers, frame.first_layer):
                width = row.reservation.request.model.layout.key_bytes(layer)
                mine = keys[row.start * width : (row.start + row.token_count) * width]
                row.reservation.written.append((layer, row.first_token, bytes(mine)))

    def step(self) -> None:
        raise AssertionError("the service never steps")

    def cancel(self, client_id: str, cancel: Cancel) -> None:
        self.cancelled.append((client_id, cancel))

    def cancel_client(self, client_id: str) -> None:
        self.gone.append(client_id)

    def end_all(self, message: str) -> None:
        raise AssertionError("the service ends nothing by itself")

    def status(self) -> EngineStatus:
        return EngineStatus(16, 100, 60, 32, 3, 5)
