"""One client's stream of hand-offs: frames in, answers out. Knows the contract, not gRPC."""

import logging
import mmap
import time
from collections.abc import Callable

from decode_service.engine import PagedEngine
from decode_service.reservations import FrameRows, Reservation, read_open
from kvtransfer.errors import (
    CorruptError,
    ProtocolError,
    RejectedError,
    TimedOutError,
    TransferError,
    status_of,
)
from kvtransfer.frames import NONCE_BYTES, map_segment, unpack
from kvtransfer.messages import Frame, Open
from kvtransfer.proto import handoff_pb2 as pb
from prad.core.kv import ModelSpec

logger = logging.getLogger(__name__)

_MOST_ROWS = 1 << 14  # of a KV frame, far more than prompts that run in one pass

Replies = list[pb.HandOffReply]


class HandOffs:
    """A stream is one session's: its first frame says whose. `close` gives back what is not committed."""

    def __init__(
        self,
        model: ModelSpec,
        engine: PagedEngine,
        admit: Callable[[str, Open], Reservation],
        *,
        idle_s: float,
        shared_memory: bool,
    ) -> None:
        """`admit` reserves room for a session's request or raises RejectedError. idle_s: how long a hand-off
        may be silent before its room is given back."""
        self._model = model
        self._engine = engine
        self._admit = admit
        self._idle_s = idle_s
        self._shared_memory = shared_memory
        self._receiving: dict[int, Reservation] = {}
        self._last = 0
        self._session: str | None = None
        self._map: mmap.mmap | None = None
        self._segment: memoryview | None = None

    def receive(self, received: Frame) -> Replies:
        """The answers to a frame. Raises ProtocolError for what breaks the stream's own rules."""
        frame = received.message
        kind = frame.WhichOneof("frame")
        if (kind == "begin") != (self._session is None):
            raise ProtocolError("a stream of hand-offs begins with Begin, and only once")
        if kind == "begin":
            self._session = frame.begin.session
            return []
        if kind == "open":
            return [self._open(frame.open)]
        if kind == "kv":
            return self._receive_kv(frame.kv, received.data)
        if kind == "state":
            return self._receive_state(frame.state)
        if kind == "commit":
            return self._ended(frame.commit.hand_off, lambda it: self._commit(it, frame.commit))
        if kind == "abort":
            return self._ended(frame.abort.hand_off, lambda _: pb.HandOffReply(aborted=pb.Aborted()))
        if kind == "segment":
            return [self._offered(frame.segment)]
        raise ProtocolError("an empty frame among hand-offs")

    def expire(self) -> Replies:
        """Fails the hand-offs that have been silent for too long."""
        now = time.monotonic()
        late = [n for n, it in self._receiving.items() if now - it.last_frame_at >= self._idle_s]
        error = TimedOutError(f"the hand-off was silent for {self._idle_s} s")
        return [self._fail(number, error) for number in late]

    def expires_in(self) -> float | None:
        """Seconds until `expire` has something to do; None while nothing is being received."""
        first = min((it.last_frame_at for it in self._receiving.values()), default=None)
        return None if first is None else max(0.0, first + self._idle_s - time.monotonic())

    def close(self) -> None:
        for it in self._receiving.values():
            self._engine.release(it)
        self._receiving.clear()
        if self._segment is not None and self._map is not None:
            self._segment.release()
            self._map.close()
            self._segment = self._map = None

    def _open(self, message: pb.Open) -> pb.HandOffReply:
        number = message.hand_off
        if number <= self._last:
            raise ProtocolError(f"hand-off {number} is opened after {self._last}")
        self._last = number
        try:
            request = read_open(message, self._model)
            reservation = self._admit(self._session or "", request)
        except RejectedError as error:
            rejected = pb.Rejected(
                reason=pb.Rejected.Reason.ValueType(error.reason),
                message=error.message,
                retry_after_ms=round(error.retry_after_s * 1000),
            )
            return pb.HandOffReply(hand_off=number, rejected=rejected)
        reservation.last_frame_at = time.monotonic()
        self._receiving[number] = reservation
        return pb.HandOffReply(hand_off=number, accepted=pb.Accepted())

    def _receive_kv(self, message: pb.KV, data: memoryview | None) -> Replies:
        if len(message.rows) > _MOST_ROWS:
            raise ProtocolError(f"a KV frame names {len(message.rows)} ranges of rows, {_MOST_ROWS} at most")
        named = {r.hand_off for r in message.rows}
        if not named or 0 in named or max(named) > self._last:
            raise ProtocolError("a KV frame names a hand-off that was never opened, or none")
        in_segment = message.WhichOneof("payload") == "place"
        replies = [pb.HandOffReply(taken=pb.Taken(frames=1))] if in_segment else []
        try:
            frame = unpack(message, self._model, self._segment, data)
        except (CorruptError, ProtocolError) as error:
            return replies + [self._fail(number, error) for number in named if number in self._receiving]
        start, now = 0, time.monotonic()
        placed: dict[int, list[FrameRows]] = {}
        for rows in frame.rows:
            number = rows.hand_off
            it = self._receiving.get(number)
            if it is not None:
                try:
                    self._engine.require_held(it)
                    it.receive(frame, rows)
                    placed.setdefault(number, []).append(it.placed(start, rows))
                    it.last_frame_at = now
                except TransferError as error:
                    replies.append(self._fail(number, error))
                    placed.pop(number, None)
            start += rows.token_count
        if placed:
            self._engine.write(frame, sorted((r for each in placed.values() for r in each), key=_start))
        return replies

    def _receive_state(self, message: pb.State) -> Replies:
        it = self._known(message.hand_off)
        if it is None:
            return []
        try:
            self._engine.require_held(it)
            it.receive_state(message)
            self._engine.put_state(it, message.site, message.data)
        except TransferError as error:
            return [self._fail(message.hand_off, error)]
        it.last_frame_at = time.monotonic()
        return []

    def _known(self, number: int) -> Reservation | None:
        """None for one that has failed already: its client was answered so; what crossed that is dropped.

        Raises ProtocolError for one that never was.
        """
        if not 0 < number <= self._last:
            raise ProtocolError(f"hand-off {number} was never opened")
        return self._receiving.get(number)

    def _commit(self, it: Reservation, commit: pb.Commit) -> pb.HandOffReply:
        self._engine.commit(it, it.complete(commit), commit.text_ids, commit.alike)
        return pb.HandOffReply(committed=pb.Committed())

    def _ended(self, number: int, end: Callable[[Reservation], pb.HandOffReply]) -> Replies:
        it = self._known(number)
        if it is None:
            return []
        try:
            reply = end(it)
        except TransferError as error:
            return [self._fail(number, error)]
        del self._receiving[number]
        self._engine.release(it)
        reply.hand_off = number
        return [reply]

    def _fail(self, number: int, error: TransferError) -> pb.HandOffReply:
        it = self._receiving.pop(number)
        self._engine.release(it)
        logger.info("hand-off %s fails: %s", it.request.request_id, error)
        return pb.HandOffReply(hand_off=number, failed=pb.Failed(status=status_of(error), message=str(error)))

    def _offered(self, offer: pb.Segment) -> pb.HandOffReply:
        if self._map is not None:
            raise ProtocolError("a second segment")
        nonce = b""
        if self._shared_memory:
            try:
                self._map = map_segment(offer.name, offer.size)
                self._segment = memoryview(self._map)
                nonce = bytes(self._segment[:NONCE_BYTES])
            except (OSError, ValueError) as error:
                logger.info("shared memory that prefill offers is not used: %s", error)
        return pb.HandOffReply(mapped=pb.Mapped(nonce=nonce))


def _start(rows: FrameRows) -> int:
    return rows.start
