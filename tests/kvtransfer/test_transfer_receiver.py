"""The receiver's state machine: every order that is not allowed, without gRPC."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import (
    LayerSpec,
    ModelSpec,
    Open,
    ProtocolError,
    RejectedError,
    RejectReason,
    Sampling,
    codec,
    kv_frame,
)
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.receiver import Aborted, Committed, Receiver, Receiving, read_open

MODEL = ModelSpec("f", "float16", (LayerSpec(1, 2, 2), LayerSpec(1, 2, 3)))


class Sink:
    def __init__(self) -> None:
        self.keys: dict[tuple[int, int], bytes] = {}
        self.values: dict[tuple[int, int], bytes] = {}

    def write(self, layer: int, first_token: int, key: memoryview, value: memoryview) -> None:
        tokens = len(key) // MODEL.key_bytes(layer)
        for i in range(tokens):
            at = layer, first_token + i
            assert at not in self.keys
            self.keys[at] = bytes(key[i * MODEL.key_bytes(layer) : (i + 1) * MODEL.key_bytes(layer)])
            self.values[at] = bytes(value[i * MODEL.value_bytes(layer) : (i + 1) * MODEL.value_bytes(layer)])


def request(kv_len: int = 6, choices: int = 1) -> Open:
    return Open("r", "c", MODEL, kv_len, kv_len, kv_len, Sampling(9), choices=choices)


def kv(layer: int, first_token: int, tokens: int, layers: int = 1) -> pb.HandOffFrame:
    parts = [
        (bytes([7]) * tokens * MODEL.key_bytes(i), bytes([8]) * tokens * MODEL.value_bytes(i))
        for i in range(layer, layer + layers)
    ]
    return pb.HandOffFrame(kv=kv_frame.encode(layer, parts, first_token, tokens))


def commit(total: int = 6 * MODEL.bytes_per_token, tokens: int = 1) -> pb.HandOffFrame:
    return pb.HandOffFrame(commit=pb.Commit(first_tokens=[pb.Token(id=4)] * tokens, total_bytes=total))


@pytest.fixture
def receiver() -> Receiver:
    return Receiver(request(), Sink())


def test_in_one_frame(receiver: Receiver) -> None:
    receiver.receive(kv(0, 0, 6, layers=2))
    assert isinstance(receiver.state, Receiving)
    receiver.receive(commit())
    assert isinstance(receiver.state, Committed)
    assert [t.id for t in receiver.state.first_tokens] == [4]


@given(st.data())
def test_in_any_pieces(data: st.DataObject) -> None:
    """Layers may interleave as they like, as long as each one's tokens are in order."""
    sink = Sink()
    receiver = Receiver(request(), sink)
    arrived = [0, 0]
    while arrived != [6, 6]:
        layer = data.draw(st.sampled_from([i for i in (0, 1) if arrived[i] < 6]))
        tokens = data.draw(st.integers(1, 6 - arrived[layer]))
        receiver.receive(kv(layer, arrived[layer], tokens))
        arrived[layer] += tokens
    receiver.receive(commit())
    assert isinstance(receiver.state, Committed)
    assert sink.keys.keys() == sink.values.keys() == {(la, t) for la in (0, 1) for t in range(6)}


def test_abort(receiver: Receiver) -> None:
    receiver.receive(kv(0, 0, 2))
    receiver.receive(pb.HandOffFrame(abort=pb.Abort(reason="why")))
    assert receiver.state == Aborted("why")
    with pytest.raises(ProtocolError, match="kv after the hand-off was aborted"):
        receiver.receive(kv(0, 2, 2))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([kv(0, 1, 5)], "goes on at token 0, the frame starts at 1"),
        ([kv(0, 0, 4), kv(0, 3, 2)], "goes on at token 4, the frame starts at 3"),
        ([kv(0, 0, 6), kv(0, 6, 1)], "kv_len is 6"),
        ([kv(0, 0, 6), commit()], "0 of 6 tokens of layer 1"),
        ([kv(0, 0, 6, layers=2), commit(total=1)], "says 1 bytes"),
        ([kv(0, 0, 6, layers=2), commit(tokens=2)], "2 first tokens, choices: 1"),
        ([kv(0, 0, 6, layers=2), commit(), commit()], "commit after the hand-off was committed"),
        ([pb.HandOffFrame()], "an empty frame"),
        ([pb.HandOffFrame(open=codec.open_to_proto(request()))], "open within a hand-off"),
    ],
)
def test_what_is_not_allowed(receiver: Receiver, frames: list[pb.HandOffFrame], message: str) -> None:
    for frame in frames[:-1]:
        receiver.receive(frame)
    with pytest.raises(ProtocolError, match=message):
        receiver.receive(frames[-1])


def test_open_comes_first() -> None:
    assert read_open(pb.HandOffFrame(open=codec.open_to_proto(request())), MODEL) == request()
    with pytest.raises(ProtocolError, match="begins with Open, not kv"):
        read_open(kv(0, 0, 1), MODEL)
    with pytest.raises(ProtocolError, match="not nothing"):
        read_open(pb.HandOffFrame(), MODEL)


def test_an_unknown_dtype_is_a_wrong_model() -> None:
    message = codec.open_to_proto(request())
    message.model.dtype = "int4"
    with pytest.raises(RejectedError) as caught:
        read_open(pb.HandOffFrame(open=message), MODEL)
    assert caught.value.reason is RejectReason.WRONG_MODEL
