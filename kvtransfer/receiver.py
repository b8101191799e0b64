"""Decode's book about one accepted hand-off: what has arrived, and whether Commit adds up.

Knows neither gRPC nor torch.
"""

import xxhash

from kvtransfer import codec
from kvtransfer.errors import CorruptError, ProtocolError, RejectedError, RejectReason
from kvtransfer.frames import Incoming, Rows
from kvtransfer.messages import Open
from kvtransfer.proto import handoff_pb2 as pb
from prad.core.kv import ModelSpec
from prad.core.sampling import Token


def read_open(message: pb.Open, model: ModelSpec) -> Open:
    """Raises RejectedError if it is for another model (WRONG_MODEL) or names no request, no tokens or no
    choices (INVALID)."""
    try:
        request = codec.decode(Open, message)
    except ValueError as error:
        raise RejectedError(RejectReason.WRONG_MODEL, str(error)) from error
    if (difference := model.difference(request.model, "decode", "the hand-off")) is not None:
        raise RejectedError(RejectReason.WRONG_MODEL, difference)
    for name, value in (
        ("request_id", request.request_id),
        ("attempt", request.attempt),
        ("kv_len", request.kv_len),
        ("choices", request.choices),
    ):
        if not value:
            raise RejectedError(RejectReason.INVALID, f"{name} must not be empty or 0")
    return request


class Receiver:
    """Each layer's tokens arrive in order, layers in any. After an error the hand-off is over."""

    def __init__(self, request: Open) -> None:
        self._request = request
        self._arrived = [0] * len(request.model.layout.layers)  # tokens of each layer, always a prefix
        self._bytes = 0
        self._missing_state = {announced.site for announced in request.state}

    def receive(self, frame: Incoming, rows: Rows) -> None:
        """Books this hand-off's rows of a frame.

        Raises ProtocolError if a token of a layer is missing, repeated or one too many.
        """
        for layer in range(frame.first_layer, frame.first_layer + len(frame.layers)):
            arrived = self._arrived[layer]
            if rows.first_token != arrived:
                raise ProtocolError(
                    f"layer {layer} goes on at token {arrived}, the frame starts at {rows.first_token}"
                )
            if arrived + rows.token_count > self._request.kv_len:
                raise ProtocolError(
                    f"layer {layer} gets {arrived + rows.token_count} tokens, "
                    f"kv_len is {self._request.kv_len}"
                )
            self._arrived[layer] = arrived + rows.token_count
        self._bytes += rows.token_count * frame.token_bytes

    def receive_state(self, state: pb.State) -> None:
        """Books the request state at one site.

        Raises ProtocolError if it was not announced or comes twice, CorruptError if its size or checksum is
        wrong.
        """
        if state.site not in self._missing_state:
            raise ProtocolError(f"request state at {state.site!r} was not announced, or comes twice")
        expected = self._request.site_bytes(state.site)
        if len(state.data) != expected:
            raise CorruptError(f"request state at {state.site} has {len(state.data)} bytes, not {expected}")
        if xxhash.xxh3_64_intdigest(state.data) != state.checksum:
            raise CorruptError(f"the checksum of the request state at {state.site} differs")
        self._missing_state.remove(state.site)

    def commit(self, commit: pb.Commit) -> tuple[Token, ...]:
        """The first tokens, one per choice. Raises ProtocolError if anything is missing."""
        kv_len, choices = self._request.kv_len, self._request.choices
        for layer, arrived in enumerate(self._arrived):
            if arrived != kv_len:
                raise ProtocolError(f"Commit with {arrived} of {kv_len} tokens of layer {layer}")
        if self._missing_state:
            raise ProtocolError(f"Commit without request state at {', '.join(sorted(self._missing_state))}")
        if commit.total_bytes != self._bytes:
            raise ProtocolError(f"Commit says {commit.total_bytes} bytes were sent, {self._bytes} arrived")
        if len(commit.first_tokens) != choices:
            raise ProtocolError(f"Commit with {len(commit.first_tokens)} first tokens, choices: {choices}")
        return tuple(codec.decode(Token, t) for t in commit.first_tokens)
