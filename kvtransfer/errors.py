"""What can go wrong between prefill and decode: one tree, the same on both sides of the wire.

`RejectedError` is an answer to Open; every other one ends a hand-off or a stream. On the wire it is a gRPC
status code, by the one table below, read in both directions.
"""

from enum import IntEnum

from prad.core.errors import PradError


class TransferError(PradError):
    """Base of everything `kvtransfer` raises on purpose."""


class RejectReason(IntEnum):
    """Why decode did not accept an Open; the numbers are the proto's."""

    FULL = 1
    TOO_LARGE = 2
    WRONG_MODEL = 3
    FENCED = 4
    INVALID = 5
    DRAINING = 6
    UNSUPPORTED = 7
    NOT_ATTACHED = 8


class RejectedError(TransferError):
    """Decode did not accept the request; nothing is reserved.

    `retry_after_s` is a hint for FULL and DRAINING (seconds; 0: none), where the request itself is fine.
    """

    def __init__(self, reason: RejectReason, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(f"{reason.name.lower()}: {message}")
        self.reason = reason
        self.message = message
        self.retry_after_s = retry_after_s


class CorruptError(TransferError):
    """Bytes arrived that are not what was sent: checksum or size is wrong."""


class ProtocolError(TransferError):
    """A well-formed message that is not allowed here: out of order, missing, or repeated."""


class FencedError(TransferError):
    """Someone newer took this over: a higher attempt of the request, or a newer stream of the client."""


class LostError(TransferError):
    """The peer or the stream is gone, and with it whatever was not confirmed."""


class GoneError(LostError):
    """Trying again cannot help: decode has given up what the client had there, or this end was closed."""


class TimedOutError(LostError):
    """The peer may be alive, but did not answer within a named timeout."""


_UNKNOWN = 2
_STATUS: dict[type[TransferError], int] = {  # gRPC's numbers
    ProtocolError: 3,  # INVALID_ARGUMENT
    TimedOutError: 4,  # DEADLINE_EXCEEDED
    FencedError: 10,  # ABORTED
    LostError: 14,  # UNAVAILABLE
    CorruptError: 15,  # DATA_LOSS
}
_ERRORS = {status: error for error, status in _STATUS.items()}


def status_of(error: TransferError) -> int:
    """The number of the gRPC status code that stands for `error`."""
    return _STATUS.get(type(error), _UNKNOWN)


def error_of(status: int, details: str) -> TransferError:
    """The error behind a status code; a code that is not ours means that the stream is lost."""
    kind = _ERRORS.get(status)
    return LostError(f"the stream ended: {details}") if kind is None else kind(details)
