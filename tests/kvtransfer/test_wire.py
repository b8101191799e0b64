"""What is written past protobuf's objects is what protobuf reads, and the other way round."""

from random import Random

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.messages import Frame, frames_of, with_data
from kvtransfer.proto import handoff_pb2 as pb

HEADS = st.builds(
    pb.KV,
    first_layer=st.integers(0, 300),
    layer_count=st.integers(0, 300),
    rows=st.lists(st.builds(pb.Rows, hand_off=st.integers(0, 2**32 - 1), token_count=st.integers(0, 200))),
    checksum=st.integers(0, 2**64 - 1),
)
OTHERS = st.one_of(
    st.builds(lambda n: pb.HandOffFrame(abort=pb.Abort(hand_off=n, reason="gone")), st.integers(0, 9)),
    st.builds(lambda b: pb.HandOffFrame(state=pb.State(hand_off=1, data=b)), st.binary(max_size=300)),
    st.just(pb.HandOffFrame()),
)
SIZES = st.lists(st.sampled_from([0, 1, 127, 128, 16_383, 16_384, 70_000]), max_size=3)


def pieces(sizes: list[int]) -> list[memoryview]:
    generator = Random(len(sizes))
    return [memoryview(generator.randbytes(size)) for size in sizes]


@given(st.lists(OTHERS, max_size=3), HEADS, SIZES)
def test_protobuf_reads_what_is_written(before: list[pb.HandOffFrame], head: pb.KV, sizes: list[int]) -> None:
    chunks = pieces(sizes)
    written = with_data(pb.HandOffFrames(frames=before), head, chunks, sum(sizes))
    whole = pb.KV()
    whole.CopyFrom(head)
    whole.data = b"".join(chunks)
    expected = [*before, pb.HandOffFrame(kv=whole)]
    assert list(pb.HandOffFrames.FromString(written).frames) == expected
    frames = frames_of(written)
    assert [frame.message for frame in frames[:-1]] == before
    assert all(frame.data is None for frame in frames[:-1])
    last = frames[-1]
    assert (last.message, bytes(last.data or b"")) == (pb.HandOffFrame(kv=head), whole.data)


@given(HEADS, st.binary(max_size=300))
def test_what_protobuf_writes_is_read_without_a_copy(head: pb.KV, data: bytes) -> None:
    kv = pb.KV()
    kv.CopyFrom(head)
    kv.data = data
    written = pb.HandOffFrames(frames=[pb.HandOffFrame(kv=kv)]).SerializeToString()
    (frame,) = frames_of(written)
    assert frame.message == pb.HandOffFrame(kv=head)
    assert frame.data is not None
    assert (frame.data.obj, bytes(frame.data)) == (written, data)


@pytest.mark.parametrize(
    "frame",
    [
        pb.HandOffFrame(kv=pb.KV(layer_count=1, place=pb.Place(offset=5, size=7))),
        pb.HandOffFrame(kv=pb.KV()),
        pb.HandOffFrame(begin=pb.Begin(session="mine")),
    ],
)
def test_frames_without_bytes_are_protobufs(frame: pb.HandOffFrame) -> None:
    assert frames_of(pb.HandOffFrames(frames=[frame]).SerializeToString()) == [Frame(frame)]
    assert frames_of(b"") == []


def test_bytes_that_are_not_the_last_field_are_left_to_protobuf() -> None:
    """As is whatever else protobuf takes and we don't write: the last of two payloads counts."""
    data, place = pb.KV(data=b"abc"), pb.KV(place=pb.Place(offset=5, size=7))
    both = data.SerializeToString() + place.SerializeToString()
    frame = bytes((0x12, len(both))) + both
    (found,) = frames_of(bytes((0x0A, len(frame))) + frame)
    assert found == Frame(pb.HandOffFrame(kv=place))
    both = place.SerializeToString() + data.SerializeToString()
    frame = bytes((0x12, len(both))) + both
    assert frames_of(bytes((0x0A, len(frame))) + frame) == [Frame(pb.HandOffFrame(kv=data))]
    twice = pb.HandOffFrame(kv=pb.KV(first_layer=2)).SerializeToString() * 2
    assert frames_of(bytes((0x0A, len(twice))) + twice) == [Frame(pb.HandOffFrame(kv=pb.KV(first_layer=2)))]


@given(st.binary(max_size=60))
def test_garbage_is_what_it_is_to_protobuf(garbage: bytes) -> None:
    try:
        expected = list(pb.HandOffFrames.FromString(garbage).frames)
    except DecodeError:
        with pytest.raises(DecodeError):
            frames_of(garbage)
        return
    for frame, known in zip(frames_of(garbage), expected, strict=True):
        if frame.data is not None:
            frame.message.kv.data = bytes(frame.data)
        assert frame.message == known


@given(HEADS, st.data())
def test_a_cut_message_is_none(head: pb.KV, data: st.DataObject) -> None:
    written = with_data(pb.HandOffFrames(), head, pieces([50]), 50)
    cut = written[: data.draw(st.integers(1, len(written) - 1))]
    with pytest.raises(DecodeError):
        frames_of(cut)
