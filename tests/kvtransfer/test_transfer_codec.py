"""What goes onto the wire comes off it; what was damaged on the way is found."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import (
    Cancel,
    CorruptError,
    Description,
    LayerSpec,
    ModelSpec,
    Open,
    RejectedError,
    RequestState,
    Sampling,
    Token,
    TokenEvent,
    TokenFrame,
    codec,
    kv_frame,
)
from kvtransfer.proto import handoff_pb2 as pb

MODEL = ModelSpec("abc", "bfloat16", (LayerSpec(2, 4, 4), LayerSpec(1, 8, 2), LayerSpec(2, 4, 4)))
U32 = st.integers(0, 2**32 - 1)
TOKENS = st.builds(
    Token, U32, st.floats(width=32, allow_nan=False), st.lists(st.tuples(U32, st.just(-1.5))).map(tuple)
) | st.builds(Token, U32)
SAMPLINGS = st.builds(
    Sampling,
    max_tokens=U32,
    temperature=st.floats(allow_nan=False),
    seed=st.integers(0, 2**64 - 1),
    stop_ids=st.frozensets(U32),
    logprobs=st.none() | U32,
)


def over_the_wire(message: object) -> object:
    return type(message).FromString(message.SerializeToString())  # type: ignore[attr-defined]


@given(SAMPLINGS, st.lists(U32).map(tuple))
def test_open(sampling: Sampling, prompt_ids: tuple[int, ...]) -> None:
    state = RequestState("ffn_in", 1, "float32", (2, 3), b"x" * 24)
    request = Open("r", "c", MODEL, 20, 17, 18, sampling, 3, 2, 1, 4, prompt_ids, 1_900_000_000_000, (state,))
    assert codec.open_from_proto(over_the_wire(codec.open_to_proto(request))) == request  # type: ignore[arg-type]


def test_a_negative_seed_keeps_its_64_bits() -> None:
    assert codec.sampling_to_proto(Sampling(1, seed=-1)).seed == 2**64 - 1


@given(TOKENS, st.sampled_from([None, "stop", "length"]))
def test_frames(token: Token, reason: str | None) -> None:
    frame = TokenFrame(
        7, (TokenEvent("r", 1, 2, 3, token, reason), TokenEvent("r", 1, 0, 4, None, "error", "boom"))
    )
    reply = over_the_wire(codec.frame_to_proto(frame))
    assert codec.frame_from_proto(reply.frame) == frame  # type: ignore[attr-defined]


@pytest.mark.parametrize("choice", [None, 0, 3])
def test_cancel(choice: int | None) -> None:
    cancel = Cancel("r", 2, choice)
    assert codec.cancel_from_proto(codec.cancel_to_proto(cancel).cancel) == cancel


def test_description() -> None:
    description = Description(MODEL, 16, 100, 50, 8, 3, "i")
    assert codec.description_from_proto(codec.description_to_proto(description)) == description


def kv(tokens: int, layer: int, fill: int) -> tuple[bytes, bytes]:
    return bytes([fill]) * tokens * MODEL.key_bytes(layer), bytes([fill + 1]) * tokens * MODEL.value_bytes(
        layer
    )


def test_bytes_per_token() -> None:
    assert [MODEL.layer_bytes(i) for i in range(3)] == [32, 20, 32]
    assert MODEL.bytes_per_token == 84


@given(st.integers(1, 40), st.integers(0, 2), st.integers(0, 1000))
def test_kv_frames(tokens: int, first_layer: int, first_token: int) -> None:
    layers = [kv(tokens, layer, 10 * layer) for layer in range(first_layer, 3)]
    frame = kv_frame.encode(first_layer, layers, first_token, tokens)
    parts = list(kv_frame.decode(over_the_wire(frame), MODEL))  # type: ignore[arg-type]
    assert [(p.layer, p.first_token, p.token_count) for p in parts] == [
        (layer, first_token, tokens) for layer in range(first_layer, 3)
    ]
    assert [(bytes(p.key), bytes(p.value)) for p in parts] == layers
    assert not any(p.key.readonly for p in parts)


@given(st.data())
def test_any_flipped_bit_is_found(data: st.DataObject) -> None:
    frame = kv_frame.encode(0, [kv(3, 0, 1), kv(3, 1, 2)], 0, 3)
    damaged = bytearray(frame.data)
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    frame.data = bytes(damaged)
    with pytest.raises(CorruptError, match="checksum"):
        list(kv_frame.decode(frame, MODEL))


@pytest.mark.parametrize(
    "change",
    [{"layer_count": 0}, {"first_layer": 3}, {"layer_count": 4}, {"token_count": 0}, {"token_count": 4}],
)
def test_ranges_that_are_not_the_models(change: dict[str, int]) -> None:
    frame = kv_frame.encode(0, [kv(3, 0, 1), kv(3, 1, 2)], 0, 3)
    for name, value in change.items():
        setattr(frame, name, value)
    with pytest.raises(CorruptError):
        kv_frame.decode(frame, MODEL)


def test_a_dtype_that_does_not_travel() -> None:
    with pytest.raises(ValueError, match="int4"):
        replace(MODEL, dtype="int4")
    with pytest.raises(ValueError, match="layers"):
        ModelSpec.from_proto(pb.ModelSpec(fingerprint="x", dtype="float32"))


def test_a_mismatch_names_both_sides() -> None:
    with pytest.raises(RejectedError, match="decode has dtype bfloat16, the hand-off has float32"):
        MODEL.require_same(replace(MODEL, dtype="float32"))
