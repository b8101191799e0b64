"""Decode's side of one hand-off: Open was accepted, KV frames arrive, Commit or Abort ends it.

Knows neither gRPC nor torch: frames go in, bytes go to a `KVSink`, the state says what comes next.
"""

from dataclasses import dataclass
from typing import Protocol

from kvtransfer import codec, kv_frame
from kvtransfer.errors import ProtocolError, RejectedError, RejectReason
from kvtransfer.layout import ModelSpec
from kvtransfer.messages import Open, Token
from kvtransfer.proto import handoff_pb2 as pb


class KVSink(Protocol):
    """Where the KV bytes of one hand-off go."""

    def write(self, layer: int, first_token: int, key: memoryview, value: memoryview) -> None:
        """Stores tokens first_token .. of `layer`.

        key [tokens, kv_heads, key_dim] and value [tokens, kv_heads, value_dim] as raw bytes in the model's
        dtype, valid during the call. Raises FencedError if the reservation was taken away meanwhile.
        """
        ...


@dataclass(frozen=True, slots=True)
class Receiving:
    """Blocks are reserved; KV frames, Commit or Abort may come."""


@dataclass(frozen=True, slots=True)
class Committed:
    """Everything arrived; first_tokens has one token per choice."""

    first_tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Aborted:
    """Prefill gave the request up."""

    reason: str


HandOffState = Receiving | Committed | Aborted


def read_open(frame: pb.HandOffFrame, model: ModelSpec) -> Open:
    """The Open that must be a hand-off's first frame.

    Raises ProtocolError if it is another frame, RejectedError if it is for another model (WRONG_MODEL) or
    names no request, no tokens or no choices (INVALID).
    """
    if frame.WhichOneof("frame") != "open":
        raise ProtocolError(f"a hand-off begins with Open, not {frame.WhichOneof('frame') or 'nothing'}")
    try:
        request = codec.open_from_proto(frame.open)
    except ValueError as error:
        raise RejectedError(RejectReason.WRONG_MODEL, str(error)) from error
    model.require_same(request.model)
    for name, value in (
        ("request_id", request.request_id),
        ("client_id", request.client_id),
        ("attempt", request.attempt),
        ("kv_len", request.kv_len),
        ("choices", request.choices),
    ):
        if not value:
            raise RejectedError(RejectReason.INVALID, f"{name} must not be empty or 0")
    return request


class Receiver:
    """The state machine of one accepted hand-off; `state` says whether it goes on."""

    def __init__(self, request: Open, sink: KVSink) -> None:
        self.state: HandOffState = Receiving()
        self._request = request
        self._sink = sink
        self._arrived = [0] * len(request.model.layers)  # tokens of each layer, always a prefix
        self._bytes = 0

    def receive(self, frame: pb.HandOffFrame) -> None:
        """Takes the next frame.

        Raises CorruptError (size, checksum) or ProtocolError (not allowed in this state; a token of a layer
        missing or repeated; totals or first tokens that do not add up); the hand-off is then over.
        """
        kind = frame.WhichOneof("frame")
        if not isinstance(self.state, Receiving):
            raise ProtocolError(f"{kind} after the hand-off was {type(self.state).__name__.lower()}")
        if kind == "kv":
            self._write(frame.kv)
        elif kind == "commit":
            self.state = self._commit(frame.commit)
        elif kind == "abort":
            self.state = Aborted(frame.abort.reason)
        else:
            raise ProtocolError(f"{kind or 'an empty frame'} within a hand-off")

    def _write(self, frame: pb.KV) -> None:
        for part in kv_frame.decode(frame, self._request.model):
            arrived = self._arrived[part.layer]
            if part.first_token != arrived:
                raise ProtocolError(
                    f"layer {part.layer} goes on at token {arrived}, the frame starts at {part.first_token}"
                )
            if arrived + part.token_count > self._request.kv_len:
                raise ProtocolError(
                    f"layer {part.layer} gets {arrived + part.token_count} tokens, "
                    f"kv_len is {self._request.kv_len}"
                )
            self._sink.write(part.layer, part.first_token, part.key, part.value)
            self._arrived[part.layer] += part.token_count
            self._bytes += len(part.key) + len(part.value)

    def _commit(self, commit: pb.Commit) -> Committed:
        kv_len, choices = self._request.kv_len, self._request.choices
        for layer, arrived in enumerate(self._arrived):
            if arrived != kv_len:
                raise ProtocolError(f"Commit with {arrived} of {kv_len} tokens of layer {layer}")
        if commit.total_bytes != self._bytes:
            raise ProtocolError(f"Commit says {commit.total_bytes} bytes were sent, {self._bytes} arrived")
        if len(commit.first_tokens) != choices:
            raise ProtocolError(f"Commit with {len(commit.first_tokens)} first tokens, choices: {choices}")
        return Committed(tuple(codec.token_from_proto(t) for t in commit.first_tokens))
