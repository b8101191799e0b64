"""KV through messages, through shared memory, and as 8-bit numbers: the same sequences, and faults that stay
with the hand-offs they hit."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from handing_over import (
    Prefill,
    all_free,
    decode_settings,
    llama,
    memory_files,
    prefilling,
    prompt,
    prompt_pass,
    quick,
    raw,
)

from decode_service.reservations import HandOffId
from decode_service.server import DecodeServer, serving
from kvtransfer import frames
from kvtransfer.errors import CorruptError, FencedError, LostError, ProtocolError
from kvtransfer.frames import Encoding, Outgoing, Segment
from kvtransfer.int8 import quantise
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.sender import HandOff, PassRows, send_layer
from prad.core.sampling import SamplingParams, Token
from prad.lm import LanguageModel, PackedBatch

SHORT = SamplingParams(max_tokens=8)
LENGTHS = (9, 16, 1, 33)


@pytest.fixture(params=["messages", "shared", "refused", "tiny ring"])
async def payload(
    request: pytest.FixtureRequest, model: LanguageModel
) -> AsyncIterator[tuple[DecodeServer, Prefill]]:
    """Every way for the bytes; the segment's file is closed as soon as decode has answered."""
    size = {"messages": 0, "tiny ring": 6000}.get(request.param, 1 << 20)
    settings = decode_settings(shared_memory=request.param != "refused")
    async with (
        serving(settings, model) as server,
        prefilling(model, server.port, settings=quick(shared_bytes=size, frame_bytes=3000)) as client,
    ):
        await (await client.client.open(client.request(5, SHORT))).abort("a first one, until all is agreed")
        yield server, client


@pytest.fixture
async def shared(
    model: LanguageModel, server: DecodeServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Prefill]:
    """Whose frames all go through shared memory."""

    async with prefilling(model, server.port) as client:
        await (await client.client.open(client.request(5, SHORT))).abort("a first one, until all is agreed")
        monkeypatch.delattr(Outgoing, "head")
        yield client


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Whatever happened: no shared memory is held when all that took part is gone."""
    yield
    assert memory_files() == []


def packed(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    layers: list[tuple[torch.Tensor, torch.Tensor]] = []
    batch = PackedBatch.of_sequences(prompts, layer_done=lambda _, k, v: layers.append((k, v)))
    with torch.inference_mode():
        model.forward(batch)
    return layers


async def opened(
    client: Prefill, lengths: Sequence[int], **more: Any
) -> tuple[list[HandOff], list[PassRows]]:
    hand_offs = await asyncio.gather(*(client.client.open(client.request(n, SHORT, **more)) for n in lengths))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return hand_offs, [h.rows(s, 0, n) for h, s, n in zip(hand_offs, starts, lengths, strict=True)]


def stored(server: DecodeServer, hand_off: HandOff, layer: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per choice the keys and values of a reservation, as they lie in the pools."""
    engine: Any = server.engine
    request, session = hand_off.request, hand_off.stream.session
    held = engine._scheduler._reserved[HandOffId(session, request.request_id, request.attempt)]
    pools, out = engine._runner._pools, []
    for table in held.blocks:
        slots = pools.slots(table, hand_off.request.kv_len)
        out.append((pools.keys[layer].flatten(0, 1)[slots], pools.values[layer].flatten(0, 1)[slots]))
    return out


async def arrived(hand_off: HandOff) -> None:
    """Whatever was sent before has been taken: a neighbour's answer comes behind it."""
    request = replace(hand_off.request, request_id="behind", kv_len=1, prompt_len=1)
    await (await hand_off.stream.open(request)).abort("that was all")


@pytest.mark.parametrize("choices", [1, 3])
async def test_bytes_arrive_equal(
    payload: tuple[DecodeServer, Prefill], model: LanguageModel, choices: int
) -> None:
    server, client = payload
    prompts = [prompt(n) for n in LENGTHS]
    layers = packed(model, prompts)
    hand_offs, rows = await opened(client, LENGTHS, choices=choices)
    for layer, (key, value) in enumerate(layers):
        await send_layer(layer, [raw(key), raw(value)], rows)
    await arrived(hand_offs[0])
    for layer, (key, value) in enumerate(layers):
        for hand_off, r in zip(hand_offs, rows, strict=True):
            mine = slice(r.start, r.start + r.token_count)
            for k, v in stored(server, hand_off, layer):
                assert torch.equal(k, key[mine])
                assert torch.equal(v, value[mine])
    await asyncio.gather(*(hand_off.abort("seen") for hand_off in hand_offs))
    await all_free(server)


async def test_int8_arrives_close(payload: tuple[DecodeServer, Prefill], model: LanguageModel) -> None:
    server, client = payload
    layers = packed(model, [prompt(n) for n in LENGTHS])
    hand_offs, rows = await opened(client, LENGTHS)
    for layer, pair in enumerate(layers):
        planes = [raw(part) for states in pair for part in quantise(states)]
        await send_layer(layer, planes, rows, Encoding.INT8)
    await arrived(hand_offs[0])
    for layer, pair in enumerate(layers):
        for hand_off, r in zip(hand_offs, rows, strict=True):
            for got, sent in zip(stored(server, hand_off, layer)[0], pair, strict=True):
                exact = sent[r.start : r.start + r.token_count]
                step = exact.abs().amax(dim=-1, keepdim=True) / 127
                assert ((got - exact).abs() <= 0.501 * step).all()
                assert not torch.equal(got, exact)
    await asyncio.gather(*(hand_off.commit([Token(1)]) for hand_off in hand_offs))
    await all_free(server)


async def test_a_pass_generates_what_one_at_a_time_does(
    payload: tuple[DecodeServer, Prefill], model: LanguageModel
) -> None:
    _, client = payload
    alone = [await client.generate(prompt(n), SHORT) for n in LENGTHS]
    hand_offs, rows = await opened(client, LENGTHS)
    for layer, (key, value) in enumerate(packed(model, [prompt(n) for n in LENGTHS])):
        await send_layer(layer, [raw(key), raw(value)], rows)
    await asyncio.gather(*(h.commit([Token(t[0])]) for h, t in zip(hand_offs, alone, strict=True)))
    for hand_off, tokens in zip(hand_offs, alone, strict=True):
        events = await client.got.until(hand_off.request.request_id)
        assert [t.id for e in events for t in e.tokens] == tokens[1:]


async def test_a_neighbour_that_ends_leaves_the_rest_of_the_pass(
    payload: tuple[DecodeServer, Prefill], model: LanguageModel
) -> None:
    """Its blocks may be someone else's by then: none of its later rows may be written."""
    server, client = payload
    layers = packed(model, [prompt(n) for n in LENGTHS])
    hand_offs, rows = await opened(client, LENGTHS)
    (first, *rest), gone = layers, hand_offs[1]
    await send_layer(0, [raw(first[0]), raw(first[1])], rows)
    fenced = await client.client.open(replace(gone.request, attempt=2))
    for layer, (key, value) in enumerate(rest, 1):
        await send_layer(layer, [raw(key), raw(value)], rows)
    await arrived(hand_offs[0])
    for layer, (key, _) in enumerate(layers):
        for i in (0, 2, 3):
            mine = slice(rows[i].start, rows[i].start + rows[i].token_count)
            assert torch.equal(stored(server, hand_offs[i], layer)[0][0], key[mine])
    assert not stored(server, fenced, 2)[0][0].any()
    with pytest.raises(FencedError):
        await gone.commit([Token(1)])
    await asyncio.gather(fenced.abort("seen"), *(hand_off.abort("seen") for hand_off in hand_offs))
    await all_free(server)


def flip_checksum(frame: pb.KV) -> None:
    frame.checksum ^= 1


def beyond(frame: pb.KV) -> None:
    frame.place.offset = 1 << 40


def shorter(frame: pb.KV) -> None:
    frame.place.size -= 1


def other_encoding(frame: pb.KV) -> None:
    frame.encoding = 7  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (flip_checksum, CorruptError, "checksum"),
        (beyond, CorruptError, "of shared memory"),
        (shorter, CorruptError, "its ranges make"),
        (other_encoding, ProtocolError, "unknown encoding 7"),
    ],
)
async def test_a_bad_frame_fails_its_hand_offs_only(
    shared: Prefill,
    server: DecodeServer,
    monkeypatch: pytest.MonkeyPatch,
    damage: Any,
    error: type[Exception],
    message: str,
) -> None:
    placed = Outgoing.placed

    def damaged(outgoing: Outgoing, memory: memoryview, offset: int) -> pb.KV:
        frame = placed(outgoing, memory, offset)
        damage(frame)
        return frame

    bystander = await shared.client.open(shared.request(9, SHORT))
    hit = await shared.client.open(shared.request(5, SHORT))
    with monkeypatch.context() as patched:
        patched.setattr(Outgoing, "placed", damaged)
        await shared.send(hit, prompt_pass(shared.model, prompt(5)))
        with pytest.raises(error, match=message):
            await hit.commit([Token(1)])
    await shared.send(bystander, prompt_pass(shared.model, prompt(9)))
    await bystander.commit([Token(1)])
    assert len(await shared.got.until(bystander.request.request_id)) == 7
    await all_free(server)


async def test_rows_of_a_hand_off_that_never_was_end_the_stream(
    shared: Prefill, server: DecodeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = Outgoing.placed

    def misnamed(outgoing: Outgoing, memory: memoryview, offset: int) -> pb.KV:
        frame = placed(outgoing, memory, offset)
        frame.rows[0].hand_off += 1
        return frame

    hand_off = await shared.client.open(shared.request(5, SHORT))
    monkeypatch.setattr(Outgoing, "placed", misnamed)
    await shared.send(hand_off, prompt_pass(shared.model, prompt(5)))
    with pytest.raises(ProtocolError, match="never opened"):
        await hand_off.commit([Token(1)])
    await all_free(server)
    monkeypatch.undo()
    assert len(await shared.generate(prompt(5), SHORT)) == 8, "the next hand-off opens a new stream"


async def test_a_segment_that_vanishes_before_decode_looks(
    model: LanguageModel, server: DecodeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanishing(size: int) -> Segment:
        segment = Segment(size)
        segment.close_file()
        return segment

    monkeypatch.setattr(frames, "Segment", vanishing)
    async with prefilling(model, server.port) as client:
        assert len(await client.generate(prompt(9), SHORT)) == 8


async def test_another_memory_of_the_same_name_is_not_used(
    model: LanguageModel, server: DecodeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As between two containers: the nonce tells."""

    def replaced(size: int) -> Segment:
        segment, other = Segment(size), Segment(size)
        os.dup2(int(other.name.split("/")[-1]), int(segment.name.split("/")[-1]), inheritable=False)
        other.close()
        return segment

    monkeypatch.setattr(frames, "Segment", replaced)
    monkeypatch.delattr(Outgoing, "placed")
    async with prefilling(model, server.port) as client:
        assert len(await client.generate(prompt(9), SHORT)) == 8


async def test_a_decode_that_dies_leaves_nothing() -> None:
    model = llama()
    async with serving(decode_settings(), model) as server:
        client = prefilling(model, server.port)
        prefill = await client.__aenter__()
        hand_off = await prefill.client.open(prefill.request(5, SHORT))
    with pytest.raises(LostError):
        await hand_off.commit([Token(1)])
    assert memory_files() == []
    await client.__aexit__(None, None, None)
