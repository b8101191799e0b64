"""What goes onto the wire comes off it; what was damaged on the way is found."""

from dataclasses import dataclass, replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.errors import CorruptError, ProtocolError
from kvtransfer.frames import Encoding, Outgoing, Rows, plane_bytes, unpack
from kvtransfer.messages import Cancel, Description, Open, StateSite, TokenFrame, decode, encode
from kvtransfer.proto import handoff_pb2 as pb
from prad.core.kv import KVLayout, LayerKV, ModelSpec
from prad.core.rules import Before, Rules, Word
from prad.core.sampling import SamplingParams, Token, TokenEvent
from prad.core.search import Beams

MODEL = ModelSpec("abc", KVLayout((LayerKV(2, 4, 4), LayerKV(1, 8, 2), LayerKV(2, 4, 4)), "bfloat16"))
U32 = st.integers(0, 2**32 - 1)
TOKENS = st.builds(
    Token, U32, st.floats(width=32, allow_nan=False), st.lists(st.tuples(U32, st.just(-1.5))).map(tuple)
) | st.builds(Token, U32)
FLOATS = st.floats(allow_nan=False)
RULES = st.builds(
    Rules,
    presence_penalty=FLOATS,
    repetition_penalty=FLOATS,
    logit_bias=st.lists(st.tuples(U32, FLOATS)).map(tuple),
    bad_words=st.lists(st.builds(Word, st.lists(U32).map(tuple))).map(tuple),
    allowed_ids=st.frozensets(U32),
    grammar=st.text(),
)
SAMPLINGS = st.builds(
    SamplingParams,
    max_tokens=U32,
    temperature=st.floats(allow_nan=False),
    seed=st.integers(0, 2**64 - 1),
    stop_ids=st.frozensets(U32),
    logprobs=st.none() | U32,
    rules=st.none() | RULES,
)


def over_the_wire(message: object) -> object:
    return type(message).FromString(message.SerializeToString())  # type: ignore[attr-defined]


def there_and_back(value: object) -> object:
    return decode(type(value), over_the_wire(encode(value)))


BEAMS = st.builds(Beams, U32, st.floats(allow_nan=False), early_stopping=st.sampled_from([None, False, True]))


@given(SAMPLINGS, st.none() | st.integers(0, 2**40), st.none() | BEAMS)
def test_open(sampling: SamplingParams, timeout_ms: int | None, beams: Beams | None) -> None:
    state = (StateSite("q", 8), StateSite("up", 30))
    before = None if sampling.rules is None else Before(frozenset({1, 5}), (7, 7, 2))
    request = Open("r", MODEL, 20, 17, 18, sampling, 3, 2, 1, 4, timeout_ms, state, 16, before, beams)
    assert [request.site_bytes("up"), request.state_bytes] == [3 * 30 * 2, 3 * 38 * 2]
    assert there_and_back(request) == request


def test_a_negative_seed_keeps_its_64_bits() -> None:
    assert encode(SamplingParams(1, seed=-1)).seed == 2**64 - 1


@given(st.lists(TOKENS).map(tuple), st.sampled_from([None, "stop", "length"]))
def test_frames(tokens: tuple[Token, ...], reason: str | None) -> None:
    frame = TokenFrame(
        7, (TokenEvent("r", 1, 2, 3, tokens, reason), TokenEvent("r", 1, 0, 4, (), "error", "boom"))
    )
    assert there_and_back(frame) == frame


@pytest.mark.parametrize("choice", [None, 0, 3])
def test_cancel(choice: int | None) -> None:
    assert there_and_back(Cancel("r", 2, choice)) == Cancel("r", 2, choice)


def test_description() -> None:
    description = Description(MODEL, 16, 100, 50, 9)
    assert there_and_back(description) == description


@dataclass(frozen=True)
class Commit:
    """As the proto's, but for a field that is not there."""

    total_bytes: int
    colour: str


@dataclass(frozen=True)
class Abort:
    hand_off: int
    reason: dict[str, str]


def test_a_field_that_cannot_travel_is_an_error_and_not_silently_dropped() -> None:
    with pytest.raises(TypeError, match="the message Commit has no colour"):
        encode(Commit(1, "red"))
    with pytest.raises(TypeError, match="no message holds dict"):
        encode(Abort(1, {}))


def test_bytes_per_token() -> None:
    assert [sum(plane_bytes(MODEL.layout, i, Encoding.RAW)) for i in range(3)] == [32, 20, 32]
    assert MODEL.layout.bytes_per_token == 84
    assert plane_bytes(MODEL.layout, 1, Encoding.INT8) == (8, 4, 2, 4)


def outgoing(
    first_layer: int, layers: int, rows: tuple[Rows, ...], encoding: Encoding = Encoding.RAW
) -> tuple[Outgoing, list[tuple[bytes, ...]]]:
    """A frame of random bytes, and its planes."""
    generator = Random(1)
    tokens = sum(r.token_count for r in rows)
    frame, planes = Outgoing(first_layer, rows, encoding), []
    for layer in range(first_layer, first_layer + layers):
        planes.append(
            tuple(generator.randbytes(tokens * w) for w in plane_bytes(MODEL.layout, layer, encoding))
        )
        frame.add([memoryview(plane) for plane in planes[-1]])
    return frame, planes


def inline(frame: Outgoing) -> pb.KV:
    """The frame with its bytes inside, as protobuf's own code has it."""
    kv = frame.head()
    kv.data = b"".join(frame.chunks)
    return kv


ROWS = st.lists(st.builds(Rows, st.integers(1, 9), st.integers(0, 1000), st.integers(1, 20)), min_size=1)


@given(ROWS.map(tuple), st.integers(0, 2), st.sampled_from(Encoding), st.booleans())
def test_kv_frames(rows: tuple[Rows, ...], first_layer: int, encoding: Encoding, shared: bool) -> None:
    frame, planes = outgoing(first_layer, 3 - first_layer, rows, encoding)
    segment = memoryview(bytearray(frame.size + 100))
    sent = frame.placed(segment, 64) if shared else inline(frame)
    got = unpack(over_the_wire(sent), MODEL, segment)  # type: ignore[arg-type]
    assert (got.first_layer, got.rows, got.encoding) == (first_layer, rows, encoding)
    assert [tuple(map(bytes, layer)) for layer in got.layers] == planes
    assert got.token_bytes * sum(r.token_count for r in rows) == frame.size


@pytest.mark.parametrize("shared", [False, True])
@given(data=st.data())
def test_any_flipped_bit_is_found(shared: bool, data: st.DataObject) -> None:
    frame, _ = outgoing(0, 2, (Rows(1, 0, 2), Rows(2, 0, 1)))
    segment = bytearray(frame.size)
    sent = frame.placed(memoryview(segment), 0) if shared else inline(frame)
    damaged = segment if shared else bytearray(sent.data)
    damaged[data.draw(st.integers(0, frame.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if not shared:
        sent.data = bytes(damaged)
    with pytest.raises(CorruptError, match="checksum"):
        unpack(sent, MODEL, memoryview(segment))


@pytest.mark.parametrize(
    "change", [{"layer_count": 0}, {"first_layer": 3}, {"layer_count": 4}, {"layer_count": 1}]
)
def test_layers_that_are_not_the_models(change: dict[str, int]) -> None:
    frame = inline(outgoing(0, 2, (Rows(1, 0, 3),))[0])
    for name, value in change.items():
        setattr(frame, name, value)
    with pytest.raises(CorruptError):
        unpack(frame, MODEL)


@pytest.mark.parametrize("tokens", [0, 2, 4, 2**32 - 1])
def test_rows_that_are_not_there(tokens: int) -> None:
    frame = inline(outgoing(0, 2, (Rows(1, 0, 3),))[0])
    frame.rows[0].token_count = tokens
    with pytest.raises(CorruptError):
        unpack(frame, MODEL)


def test_places_outside_the_segment() -> None:
    frame, _ = outgoing(0, 2, (Rows(1, 0, 3),))
    segment = memoryview(bytearray(1000))
    for offset in (1000 - frame.size + 1, 1000, 2**64 - 1 - frame.size):
        sent = frame.placed(segment, 0)
        sent.place.offset = offset
        with pytest.raises(CorruptError, match="of 1000 bytes of shared memory"):
            unpack(sent, MODEL, segment)
    sent.place.offset, sent.place.size = 0, frame.size - 1
    with pytest.raises(CorruptError, match="its ranges make"):
        unpack(sent, MODEL, segment)
    with pytest.raises(ProtocolError, match="none is mapped"):
        unpack(frame.placed(segment, 0), MODEL)


def test_an_unknown_encoding() -> None:
    frame = inline(outgoing(0, 2, (Rows(1, 0, 3),))[0])
    frame.encoding = 7  # type: ignore[assignment]
    with pytest.raises(ProtocolError, match="unknown encoding 7"):
        unpack(over_the_wire(frame), MODEL)  # type: ignore[arg-type]


def test_a_dtype_that_does_not_travel() -> None:
    with pytest.raises(ValueError, match="int4"):
        replace(MODEL.layout, dtype="int4")
    with pytest.raises(ValueError, match="layers"):
        decode(ModelSpec, pb.ModelSpec(fingerprint="x", layout=pb.KVLayout(dtype="float32")))
