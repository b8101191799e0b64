"""What is written past protobuf's objects is what protobuf reads, and the other way round."""

from collections.abc import Sized
from random import Random

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import messages
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
    frames = list(frames_of(written))
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
    assert list(frames_of(pb.HandOffFrames(frames=[frame]).SerializeToString())) == [Frame(frame)]
    assert list(frames_of(b"")) == []


def test_bytes_that_are_not_the_last_field_are_left_to_protobuf() -> None:
    """As is whatever else protobuf takes and we don't write: the last of two payloads counts."""
    data, place = pb.KV(data=b"abc"), pb.KV(place=pb.Place(offset=5, size=7))
    both = data.SerializeToString() + place.SerializeToString()
    frame = bytes((0x12, len(both))) + both
    (found,) = frames_of(bytes((0x0A, len(frame))) + frame)
    assert found == Frame(pb.HandOffFrame(kv=place))
    both = place.SerializeToString() + data.SerializeToString()
    frame = bytes((0x12, len(both))) + both
    assert list(frames_of(bytes((0x0A, len(frame))) + frame)) == [Frame(pb.HandOffFrame(kv=data))]
    twice = pb.HandOffFrame(kv=pb.KV(first_layer=2)).SerializeToString() * 2
    (found,) = frames_of(bytes((0x0A, len(twice))) + twice)
    assert found == Frame(pb.HandOffFrame(kv=pb.KV(first_layer=2)))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where numbers are read that are not left to protobuf."""
    read, known = messages._varint, list[int]()

    def counted(written: memoryview, at: int) -> tuple[int, int]:
        known.append(at)
        return read(written, at)

    monkeypatch.setattr(messages, "_varint", counted)
    return known


@pytest.mark.parametrize("field", [b"\x78\x00", b"\x7a\x00", b"\x79" + bytes(8), b"\x1a\x00"])
def test_a_frame_of_many_fields_is_left_to_protobuf(steps: list[int], field: bytes) -> None:
    """Three of them unknown, the other rows: a peer may send what it likes, but not hold up the others."""
    head = pb.KV.FromString(20_000 * field)
    written = with_data(pb.HandOffFrames(), head, [memoryview(b"de")], 2)
    (found,) = frames_of(written)
    assert [found.message] == list(pb.HandOffFrames.FromString(written).frames)
    assert (found.data, found.message.kv.data) == (None, b"de")
    assert len(steps) < 4 * 256 + 10


def test_a_message_of_many_frames_is_left_to_protobuf(steps: list[int]) -> None:
    """Which makes an object of each only as it is read."""
    whole = pb.HandOffFrames(frames=[pb.HandOffFrame(abort=pb.Abort(hand_off=n)) for n in range(20_000)])
    frames = frames_of(whole.SerializeToString())
    assert not isinstance(frames, Sized)
    assert [frame.message for frame in frames] == list(whole.frames)
    assert len(steps) < 4 * 256 + 10


def test_few_of_both_are_read_without_a_copy() -> None:
    head = pb.KV(rows=[pb.Rows(hand_off=n, token_count=1) for n in range(1, 200)])
    before = [pb.HandOffFrame(abort=pb.Abort(hand_off=n)) for n in range(200)]
    *_, last = frames_of(with_data(pb.HandOffFrames(frames=before), head, [memoryview(b"de")], 2))
    assert (last.message.kv, bytes(last.data or b"")) == (head, b"de")


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
