"""Everything that ends a request early, and everything that is refused: afterwards all blocks are free."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from handing_over import Prefill, all_free, decode_settings, prefilling, prompt, prompt_pass, quick, send

from decode_service.server import DecodeServer, serving
from kvtransfer.errors import CorruptError, FencedError, LostError, ProtocolError, RejectedError, RejectReason
from kvtransfer.frames import Outgoing
from kvtransfer.messages import Open
from kvtransfer.sender import DecodeClient, send_layer
from prad.core.rules import Before, Rules
from prad.core.sampling import SamplingParams, Token
from prad.lm import LanguageModel

LONG = SamplingParams(max_tokens=100)
SHORT = SamplingParams(max_tokens=8)


async def test_describe(prefill: Prefill, server: DecodeServer, model: LanguageModel) -> None:
    described = await prefill.client.describe()
    assert described.model == model.spec
    assert described.free_blocks == described.total_blocks == server.engine.status().total_blocks


async def test_room_is_reserved_before_bytes_move(prefill: Prefill, server: DecodeServer) -> None:
    before = server.engine.status().free_blocks
    async with await prefill.client.open(prefill.request(17, LONG, choices=2)):
        # 17 + 100 - 1 tokens of 16 in a block, twice but for the prompt's full one
        assert server.engine.status().free_blocks == before - 15
    await all_free(server)


async def test_abort_frees(prefill: Prefill, server: DecodeServer) -> None:
    hand_off = await prefill.client.open(prefill.request(17, LONG))
    await prefill.send(hand_off, prompt_pass(prefill.model, prompt(17)))
    await hand_off.abort("the first token ended it")
    await hand_off.abort("twice is once")
    assert server.engine.status().sequences == 0
    await all_free(server)


async def test_a_broken_hand_off_is_known_before_its_next_chunk(prefill: Prefill) -> None:
    """Of a prompt in chunks the first was sent, the second is computed: nothing is sent meanwhile."""
    refused, lost = [await prefill.client.open(prefill.request(17, LONG)) for _ in range(2)]
    first = [(key[:8], value[:8]) for key, value in prompt_pass(prefill.model, prompt(17)).layers]
    for hand_off in (refused, lost, refused):  # the second time these are tokens that decode has
        assert hand_off.failure is None
        for layer, (key, value) in enumerate(first):
            await send(hand_off, layer, key, value)
    with pytest.raises(ProtocolError, match="goes on at token 8"):
        await refused.ended
    assert isinstance(refused.failure, ProtocolError)
    assert lost.failure is None
    lost.stream.fail(LostError("the connection broke"))
    assert isinstance(lost.failure, LostError)
    done = await prefill.client.open(prefill.request(5, SHORT))
    await done.abort("enough")
    assert (done.over, done.failure) == (True, None)


async def test_a_prefill_that_dies_frees(model: LanguageModel, server: DecodeServer) -> None:
    async with prefilling(model, server.port) as dying:
        await dying.client.open(dying.request(17, LONG))
        await dying.client.close()
        await all_free(server)


async def test_cancel_in_mid_stream_frees(prefill: Prefill, server: DecodeServer) -> None:
    request, _ = await prefill.hand_over(prompt(20), LONG, choices=2)
    other, _ = await prefill.hand_over(prompt(9), LONG)
    await prefill.got.until(request.request_id, count=3)
    prefill.stream.cancel(request.request_id, request.attempt)
    await prefill.got.until(other.request_id)  # the neighbour is not disturbed
    assert len(prefill.got.events[request.request_id, 0]) < 99
    await all_free(server)


async def test_cancel_one_choice(prefill: Prefill, server: DecodeServer) -> None:
    request, _ = await prefill.hand_over(prompt(20), LONG, choices=2)
    prefill.stream.cancel(request.request_id, request.attempt, 0)
    assert len(await prefill.got.until(request.request_id, 1)) == 99
    assert len(prefill.got.events.get((request.request_id, 0), [])) < 99
    await all_free(server)


async def test_a_deadline_ends_it(prefill: Prefill, server: DecodeServer) -> None:
    request, _ = await prefill.hand_over(prompt(20), LONG, timeout_ms=0)
    (event,) = await prefill.got.until(request.request_id)
    assert (event.finish_reason, event.tokens, event.index) == ("deadline", (), 1)
    await all_free(server)


async def test_a_full_decoder_rejects_with_a_hint(model: LanguageModel) -> None:
    settings = decode_settings(max_sequences=2, retry_after_s=0.25)
    async with serving(settings, model) as server, prefilling(model, server.port) as client:
        async with await client.client.open(client.request(5, SHORT, choices=2)):
            with pytest.raises(RejectedError, match="sequences free") as caught:
                await client.client.open(client.request(5, SHORT))
            assert (caught.value.reason, caught.value.retry_after_s) == (RejectReason.FULL, 0.25)
        assert len(await client.generate(prompt(5), SHORT)) == 8
        with pytest.raises(RejectedError) as caught:
            await client.client.open(client.request(5, SHORT, choices=3))
        assert caught.value.reason is RejectReason.TOO_LARGE
        await all_free(server)


async def test_full_blocks_reject_and_later_fit(model: LanguageModel) -> None:
    async with serving(decode_settings(), model) as server, prefilling(model, server.port) as client:
        total = server.engine.status().total_blocks
        choices = total // 7  # each takes 7 of the blocks: 10 + 100 - 1 tokens
        async with await client.client.open(client.request(10, LONG, choices=choices)):
            with pytest.raises(RejectedError, match="blocks and") as caught:
                await client.client.open(client.request(10, LONG))
            assert caught.value.reason is RejectReason.FULL
        assert len(await client.generate(prompt(10), LONG)) == 100


async def test_another_model_is_refused(prefill: Prefill) -> None:
    spec = prefill.model.spec
    layout = spec.layout
    changed = replace(layout.layers[0], key_dim=4)
    for wrong in (
        replace(spec, fingerprint="other"),
        replace(spec, layout=replace(layout, dtype="bfloat16")),
        replace(spec, layout=replace(layout, layers=layout.layers[:-1])),
        replace(spec, layout=replace(layout, layers=(changed, *layout.layers[1:]))),
    ):
        with pytest.raises(RejectedError) as caught:
            await prefill.client.open(prefill.request(5, SHORT, model=wrong))
        assert caught.value.reason is RejectReason.WRONG_MODEL


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kv_len": 0, "prompt_len": 0}, "kv_len"),
        ({"request_id": ""}, "request_id"),
        ({"attempt": 0}, "attempt"),
        ({"choices": 0}, "choices"),
        ({"choices": 2**32 - 1}, "absurd"),
        ({"prompt_len": 6}, "prompt_len"),
        ({"next_position": 0}, "next_position"),
        ({"tokens_per_event": 0}, "tokens_per_event 0 is not in 1 to 32"),
        ({"tokens_per_event": 33}, "tokens_per_event 33 is not in 1 to 32"),
        ({"next_position": 160}, "context ends at 159"),
        ({"next_position": 154}, "reaches position 160"),
        ({"output_offset": 7}, "nothing to decode"),
        ({"sampling": replace(SHORT, stop_ids=frozenset({97}))}, "stop id"),
        ({"sampling": replace(SHORT, temperature=float("nan"))}, "temperature"),
        ({"sampling": replace(SHORT, temperature=-1.0)}, "temperature"),
        ({"sampling": replace(SHORT, top_p=0.0)}, "top_p"),
        ({"sampling": replace(SHORT, min_p=1.5)}, "min_p"),
        ({"sampling": replace(SHORT, logprobs=65)}, "logprobs 65"),
        ({"sampling": SamplingParams(max_tokens=2**32 - 1)}, "absurd"),
        ({"sampling": replace(SHORT, rules=Rules())}, "what stands before"),
        ({"before": Before()}, "what stands before"),
        ({"sampling": replace(SHORT, rules=Rules(repetition_penalty=0)), "before": Before()}, "repetition"),
        ({"sampling": replace(SHORT, rules=Rules()), "before": Before(output_ids=(97,))}, "outside the"),
    ],
)
async def test_nonsense_is_refused(prefill: Prefill, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(RejectedError, match=message) as caught:
        await prefill.client.open(prefill.request(**({"kv_len": 5, "sampling": SHORT} | wrong)))  # type: ignore[arg-type]
    assert caught.value.reason is RejectReason.INVALID


async def test_a_grammar_that_does_not_compile_ends_its_sequence_alone(prefill: Prefill) -> None:
    """Prefill compiles it first; another client may not."""
    ruled = replace(SHORT, rules=Rules(grammar="start: nowhere"))
    request, _ = await prefill.hand_over(prompt(9), ruled, before=Before())
    beside = prefill.generate(prompt(12), SHORT)
    (event,) = await prefill.got.until(request.request_id)
    assert event.finish_reason == "error"
    assert "the grammar does not compile" in (event.error or "")
    assert len(await beside) == 8


async def test_who_is_not_attached_is_refused(server: DecodeServer, model: LanguageModel) -> None:
    async with DecodeClient(f"127.0.0.1:{server.port}") as stranger:
        with pytest.raises(RejectedError, match="attach first") as caught:
            await stranger.open(Open("r", model.spec, 5, 5, 5, SHORT))
        assert caught.value.reason is RejectReason.NOT_ATTACHED


async def test_a_lower_or_equal_attempt_is_fenced(prefill: Prefill, server: DecodeServer) -> None:
    async with await prefill.client.open(prefill.request(5, SHORT, request_id="x", attempt=3)):
        for attempt in (1, 2, 3):
            with pytest.raises(RejectedError) as caught:
                await prefill.client.open(prefill.request(5, SHORT, request_id="x", attempt=attempt))
            assert caught.value.reason is RejectReason.FENCED
    await all_free(server)


async def test_a_higher_attempt_ends_a_running_lower_one(prefill: Prefill, server: DecodeServer) -> None:
    await prefill.hand_over(prompt(20), LONG, request_id="x")
    async with await prefill.client.open(prefill.request(5, SHORT, request_id="x", attempt=2)):
        event = (await prefill.got.until("x"))[-1]
        assert (event.attempt, event.finish_reason, event.error) == (1, "error", "fenced by attempt 2")
    await all_free(server)


async def test_a_higher_attempt_takes_the_room_of_a_lower_one(prefill: Prefill, server: DecodeServer) -> None:
    late = await prefill.client.open(prefill.request(5, SHORT, request_id="x"))
    output = await prefill.generate(prompt(5), SHORT, request_id="x", attempt=2)
    await prefill.send(late, prompt_pass(prefill.model, prompt(5)))  # into a frame that is not yet sent
    with pytest.raises(FencedError):
        await late.commit([Token(1)])
    assert output == await prefill.generate(prompt(5), SHORT)
    await all_free(server)


async def test_a_broken_hand_off_tells_what_was_wrong(prefill: Prefill, server: DecodeServer) -> None:
    prompted = prompt_pass(prefill.model, prompt(5))
    incomplete = await prefill.client.open(prefill.request(6, SHORT))
    await prefill.send(incomplete, prompted)
    with pytest.raises(ProtocolError, match="5 of 6 tokens of layer 0"):
        await incomplete.commit([Token(1)])
    outside = await prefill.client.open(prefill.request(5, SHORT))
    await prefill.send(outside, prompted)
    with pytest.raises(ProtocolError, match="outside the vocabulary"):
        await outside.commit([Token(97)])
    short = await prefill.client.open(prefill.request(5, SHORT))
    for planes in ([bytes(3), bytes(3)], [bytes(1000)]):
        with pytest.raises(ValueError, match="bytes per token"):
            await send_layer(0, planes, [short.rows(0, 0, 1)])
    await short.abort("nothing was sent")
    await all_free(server)


async def test_corruption_is_told(
    model: LanguageModel, server: DecodeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = Outgoing.head

    def flipped(outgoing: Outgoing) -> Any:
        frame = head(outgoing)
        outgoing.chunks[0] = memoryview(bytes([outgoing.chunks[0][0] ^ 1]) + outgoing.chunks[0][1:])
        return frame

    monkeypatch.setattr(Outgoing, "head", flipped)
    async with prefilling(model, server.port, settings=quick(shared_bytes=0)) as client:
        hand_off = await client.client.open(client.request(5, SHORT))
        await client.send(hand_off, prompt_pass(model, prompt(5)))
        with pytest.raises(CorruptError, match="checksum"):
            await hand_off.commit([Token(1)])
        await all_free(server)


async def test_a_silent_hand_off_gives_its_room_back(model: LanguageModel) -> None:
    async with (
        serving(decode_settings(hand_off_idle_s=0.05), model) as server,
        prefilling(model, server.port) as client,
    ):
        hand_off = await client.client.open(client.request(5, SHORT))
        await all_free(server)
        with pytest.raises(LostError):
            await hand_off.commit([Token(1)])


async def test_a_step_that_raises_ends_its_sequences_only(
    prefill: Prefill, server: DecodeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("boom")

    with monkeypatch.context() as patched:
        patched.setattr(prefill.model, "forward", explode)
        request = prefill.request(5, SHORT)
        hand_off = await prefill.client.open(request)
        patched.undo()
        prompted = prompt_pass(prefill.model, prompt(5))
        patched.setattr(prefill.model, "forward", explode)
        await prefill.send(hand_off, prompted)
        await hand_off.commit([Token(1)])
        (event,) = await prefill.got.until(request.request_id)
    assert event.finish_reason == "error"
    assert "boom" in (event.error or "")
    assert len(await prefill.generate(prompt(5), SHORT)) == 8
    await all_free(server)


async def test_nan_stays_with_its_own_request(prefill: Prefill, server: DecodeServer) -> None:
    alone = await prefill.generate(prompt(30), LONG)

    async def broken() -> None:
        request = prefill.request(3, LONG)
        hand_off = await prefill.client.open(request)
        for layer, (key, value) in enumerate(prompt_pass(prefill.model, prompt(3)).layers):
            await send(hand_off, layer, key * float("nan"), value * float("nan"))
        await hand_off.commit([Token(1)])
        (event,) = await prefill.got.until(request.request_id)
        assert "not finite" in (event.error or "")

    together = await asyncio.gather(prefill.generate(prompt(30), LONG), broken(), broken())
    assert together[0] == alone
    # and whoever gets the blocks next finds none of it
    assert await prefill.generate(prompt(30), LONG) == alone
    await all_free(server)


async def test_a_kv_cache_longer_than_its_positions_is_taken(prefill: Prefill, model: LanguageModel) -> None:
    """kv_len may run ahead of next_position; output indices count on as ever."""
    prompted = prompt_pass(model, prompt(8))
    request = prefill.request(16, SHORT, prompt_len=8, next_position=8)
    hand_off = await prefill.client.open(request)
    for layer, (key, value) in enumerate(prompted.layers):
        await send(hand_off, layer, key, value)
        await send(hand_off, layer, key, value, first_token=8)
    await hand_off.commit([Token(int(prompted.logits.argmax()))])
    assert [e.index for e in await prefill.got.until(request.request_id)] == list(range(1, 8))
