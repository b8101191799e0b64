"""The book of one hand-off: every order that is not allowed, without gRPC and without bytes."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_service.reservations import Reservation, read_open
from kvtransfer.errors import ProtocolError, RejectedError, RejectReason
from kvtransfer.frames import Encoding, Incoming, Rows, plane_bytes
from kvtransfer.messages import Open, encode
from kvtransfer.proto import handoff_pb2 as pb
from prad.core.kv import KVLayout, LayerKV, ModelSpec
from prad.core.sampling import SamplingParams

MODEL = ModelSpec("f", KVLayout((LayerKV(1, 2, 2), LayerKV(1, 2, 3)), "float16"))


def request(kv_len: int = 6, choices: int = 1) -> Open:
    return Open("r", MODEL, kv_len, kv_len, kv_len, SamplingParams(9), choices=choices)


def reservation() -> Reservation:
    return Reservation("c", request(), blocks=((0,),), shared=0)


def receive(book: Reservation, layer: int, first_token: int, tokens: int, layers: int = 1) -> None:
    named = range(layer, layer + layers)
    rows = Rows(1, first_token, tokens)
    token_bytes = sum(sum(plane_bytes(MODEL.layout, i, Encoding.RAW)) for i in named)
    book.receive(Incoming(layer, (rows,), Encoding.RAW, token_bytes, ((),) * layers), rows)


def commit(total: int = 6 * MODEL.layout.bytes_per_token, tokens: int = 1) -> pb.Commit:
    return pb.Commit(first_tokens=[pb.Token(id=4)] * tokens, total_bytes=total)


@given(st.data())
def test_in_any_pieces(data: st.DataObject) -> None:
    """Layers may interleave as they like, as long as each one's tokens are in order."""
    book = reservation()
    arrived = [0, 0]
    while arrived != [6, 6]:
        layer = data.draw(st.sampled_from([i for i in (0, 1) if arrived[i] < 6]))
        tokens = data.draw(st.integers(1, 6 - arrived[layer]))
        receive(book, layer, arrived[layer], tokens)
        arrived[layer] += tokens
    assert [t.id for t in book.complete(commit())] == [4]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([(0, 1, 5)], "goes on at token 0, the frame starts at 1"),
        ([(0, 0, 4), (0, 3, 2)], "goes on at token 4, the frame starts at 3"),
        ([(0, 0, 6), (0, 6, 1)], "kv_len is 6"),
        ([(0, 0, 2**32 - 1)], "kv_len is 6"),
    ],
)
def test_rows_that_are_not_due(frames: list[tuple[int, int, int]], message: str) -> None:
    book = reservation()
    for frame in frames[:-1]:
        receive(book, *frame)
    with pytest.raises(ProtocolError, match=message):
        receive(book, *frames[-1])


@pytest.mark.parametrize(
    ("layers", "last", "message"),
    [
        (1, commit(), "0 of 6 tokens of layer 1"),
        (2, commit(total=1), "says 1 bytes"),
        (2, commit(tokens=2), "2 first tokens, choices: 1"),
    ],
)
def test_a_commit_that_does_not_add_up(layers: int, last: pb.Commit, message: str) -> None:
    book = reservation()
    receive(book, 0, 0, 6, layers)
    with pytest.raises(ProtocolError, match=message):
        book.complete(last)


def test_open() -> None:
    assert read_open(encode(request()), MODEL) == request()


@pytest.mark.parametrize("name", ["", "x" * 257, "two\nlines"])
def test_a_request_that_no_line_of_a_log_can_name_is_refused(name: str) -> None:
    with pytest.raises(RejectedError, match="request_id must be 1 to 256 printable") as caught:
        read_open(encode(replace(request(), request_id=name)), MODEL)
    assert caught.value.reason is RejectReason.INVALID


def test_a_mismatch_names_both_sides() -> None:
    other = replace(MODEL, layout=replace(MODEL.layout, dtype="float32"))
    with pytest.raises(RejectedError, match="decode has dtype float16, the hand-off has float32") as caught:
        read_open(encode(replace(request(), model=other)), MODEL)
    assert caught.value.reason is RejectReason.WRONG_MODEL


def test_an_unknown_dtype_is_a_wrong_model() -> None:
    message = encode(request())
    message.model.layout.dtype = "int4"
    with pytest.raises(RejectedError) as caught:
        read_open(message, MODEL)
    assert caught.value.reason is RejectReason.WRONG_MODEL
