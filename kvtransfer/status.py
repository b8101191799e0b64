"""The one table between our errors and gRPC status codes, read in both directions."""

from typing import Any

import grpc

from kvtransfer.errors import (
    CorruptError,
    FencedError,
    LostError,
    ProtocolError,
    TimedOutError,
    TransferError,
)
from kvtransfer.proto import handoff_pb2 as pb

_TABLE: dict[type[TransferError], grpc.StatusCode] = {
    CorruptError: grpc.StatusCode.DATA_LOSS,
    ProtocolError: grpc.StatusCode.INVALID_ARGUMENT,
    FencedError: grpc.StatusCode.ABORTED,
    TimedOutError: grpc.StatusCode.DEADLINE_EXCEEDED,
    LostError: grpc.StatusCode.UNAVAILABLE,
}
_ERRORS = {code: error for error, code in _TABLE.items()}
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def status_of(error: TransferError) -> Any:
    """The grpc.StatusCode with which a server ends a stream because of `error`."""
    return _TABLE.get(type(error), grpc.StatusCode.UNKNOWN)


def error_of(code: Any, details: str | None) -> TransferError:
    """The error behind a stream's status; a code that is not ours means that the stream is lost."""
    kind = _ERRORS.get(code)
    if kind is None:
        return LostError(f"the stream ended with {code.name}: {details or 'no details'}")
    return kind(details or code.name)


def failure_to_proto(error: TransferError) -> pb.HandOffReply:
    """`error` as the answer to a hand-off that was accepted."""
    return pb.HandOffReply(failed=pb.Failed(status=status_of(error).value[0], message=str(error)))


def failure_from_proto(message: pb.Failed) -> TransferError:
    return error_of(_CODES.get(message.status, grpc.StatusCode.UNKNOWN), message.message)
