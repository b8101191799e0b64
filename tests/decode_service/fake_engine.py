"""An engine that decodes nothing: the service's tests see what it is asked, and say what it answers."""

from collections.abc import Sequence

from decode_service.reservations import FrameRows, Reservation
from decode_service.scheduler import EngineStatus
from kvtransfer.errors import FencedError, RejectedError
from kvtransfer.frames import Incoming
from kvtransfer.messages import Ask, Cancel, Open
from prad.core.sampling import Token, TokenEvent


class FakeReservation(Reservation):
    """Of 7 blocks. What was done with it, in order; `held` False: its room was taken away."""

    def __init__(self, session: str, request: Open) -> None:
        super().__init__(session, request, blocks=(tuple(range(7)),), shared=0)
        self.room = self
        self.held = True
        self.calls: list[str] = []
        self.written: list[tuple[int, int, bytes]] = []  # layer, first token, keys
        self.first_tokens: tuple[Token, ...] = ()


class FakeEngine:
    """What the service asks of a `PagedEngine`, nothing else. `refusal`: what admit raises, if anything."""

    def __init__(self) -> None:
        self.reservations: list[FakeReservation] = []
        self.cancelled: list[tuple[str, Cancel]] = []
        self.asked: list[tuple[str, Ask]] = []
        self.gone: list[str] = []
        self.refusal: RejectedError | None = None

    def admit(self, session: str, request: Open) -> FakeReservation:
        if self.refusal is not None:
            raise self.refusal
        self.reservations.append(FakeReservation(session, request))
        return self.reservations[-1]

    def require_held(self, reservation: Reservation) -> None:
        if not _ours(reservation).held:
            raise FencedError("taken over")

    def write(self, frame: Incoming, rows: Sequence[FrameRows]) -> None:
        for row in rows:
            reservation = _ours(row.whose)
            for layer, (keys, _) in enumerate(frame.layers, frame.first_layer):
                width = reservation.request.model.layout.key_bytes(layer)
                mine = keys[row.start * width : (row.start + row.token_count) * width]
                reservation.written.append((layer, row.first_token, bytes(mine)))

    def put_state(self, reservation: Reservation, site: str, data: bytes) -> None:
        _ours(reservation).calls.append(f"state {site}")

    def commit(
        self, reservation: Reservation, first_tokens: Sequence[Token], text_ids: Sequence[int], alike: int
    ) -> None:
        self.require_held(reservation)
        _ours(reservation).first_tokens = tuple(first_tokens)
        _ours(reservation).calls.append("commit")

    def release(self, reservation: Reservation) -> None:
        _ours(reservation).calls.append("release")

    def cancel(self, session: str, cancel: Cancel) -> None:
        self.cancelled.append((session, cancel))

    def missing(self, session: str, ask: Ask) -> list[TokenEvent]:
        self.asked.append((session, ask))
        return [TokenEvent(*name, 0, (), "error", "not here") for name in ask.sequences]

    def cancel_session(self, session: str) -> None:
        self.gone.append(session)

    def status(self) -> EngineStatus:
        return EngineStatus(16, 100, 60, 32, 3, 5)


def _ours(reservation: Reservation) -> FakeReservation:
    assert isinstance(reservation, FakeReservation)
    return reservation
