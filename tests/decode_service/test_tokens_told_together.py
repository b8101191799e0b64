"""`tokens_per_event` changes when a token is told, and nothing else: not which, not the order, none lost."""

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from handing_over import Prefill, all_free, all_logits, prompt, prompt_pass, raw

from decode_service import DecodeServer, model_spec
from decode_service.blocks import BlockAllocator
from decode_service.engine import PagedEngine
from decode_service.scheduler import Scheduler
from kvtransfer import Open, Sampling, Token, TokenEvent
from prad.lm import LanguageModel
from prad.lm.paged import Pools

DRAWN = Sampling(max_tokens=24, temperature=1.0, seed=5, logprobs=2)
_NOON_MS = 1_900_000_000_000


@pytest.mark.parametrize(
    ("each", "sizes"),
    [(2, [2] * 11 + [1]), (16, [16, 7]), (23, [23]), (1000, [23])],
)
async def test_the_same_tokens_in_fewer_events(prefill: Prefill, each: int, sizes: list[int]) -> None:
    one, _ = await prefill.hand_over(prompt(12), DRAWN)
    alone = await prefill.got.until(one.request_id)
    assert [len(e.tokens) for e in alone] == [1] * 23
    many, _ = await prefill.hand_over(prompt(12), DRAWN, tokens_per_event=each)
    together = await prefill.got.until(many.request_id)
    assert [t for e in together for t in e.tokens] == [t for e in alone for t in e.tokens]
    assert [len(e.tokens) for e in together] == sizes
    assert [e.index for e in together] == [1 + sum(sizes[:i]) for i in range(len(sizes))]
    assert [e.finish_reason for e in together] == [None] * (len(sizes) - 1) + ["length"]


async def test_a_stop_id_tells_at_once(prefill: Prefill) -> None:
    greedy = await prefill.generate(prompt(12), Sampling(max_tokens=16))
    stop = greedy[9]
    sampling = Sampling(max_tokens=16, stop_ids=frozenset({stop}))
    request, _ = await prefill.hand_over(prompt(12), sampling, tokens_per_event=100)
    (event,) = await prefill.got.until(request.request_id)
    assert [t.id for t in event.tokens] == greedy[1 : greedy.index(stop) + 1]
    assert event.finish_reason == "stop"


async def test_choices_and_neighbours_have_their_own(prefill: Prefill, server: DecodeServer) -> None:
    one, _ = await prefill.hand_over(prompt(19), DRAWN, choices=3)
    alone = [await prefill.got.until(one.request_id, c) for c in range(3)]
    sizes = (1, 5, 16)
    requests = [
        request
        for request, _ in await asyncio.gather(
            *(prefill.hand_over(prompt(19), DRAWN, choices=3, tokens_per_event=each) for each in sizes)
        )
    ]
    for request in requests:
        for choice in range(3):
            events = await prefill.got.until(request.request_id, choice)
            assert [t for e in events for t in e.tokens] == [t for e in alone[choice] for t in e.tokens]
    await all_free(server)


async def test_a_replay_counts_on(prefill: Prefill) -> None:
    sampling = Sampling(max_tokens=14, temperature=1.0, seed=11)
    whole = await prefill.generate(prompt(21), sampling)
    request, _ = await prefill.hand_over(
        [*prompt(21), *whole[:5]],
        sampling,
        first=[whole[5]],
        prompt_len=21,
        output_offset=5,
        tokens_per_event=6,
    )
    events = await prefill.got.until(request.request_id)
    assert [(e.index, len(e.tokens)) for e in events] == [(6, 6), (12, 2)]
    assert [t.id for e in events for t in e.tokens] == whole[6:]


@pytest.mark.parametrize("why", ["deadline", "error", "fenced"])
def test_an_end_from_outside_tells_what_was_held(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """An engine that is stepped by hand: three steps, then the end."""
    told: list[TokenEvent] = []
    pools = Pools(model.layout, 20, 16, "cpu")
    engine = PagedEngine(
        model,
        pools,
        Scheduler(BlockAllocator(20, 16), 4),
        deliver=lambda events: told.extend(events["client"]),
        observe=lambda *_: None,
    )
    request = Open(
        request_id="r",
        client_id="client",
        model=model_spec(model),
        kv_len=12,
        prompt_len=12,
        next_position=12,
        sampling=Sampling(max_tokens=100),
        deadline_unix_ms=_NOON_MS if why == "deadline" else 0,
        tokens_per_event=1000,
    )
    clock = SimpleNamespace(time_ns=lambda: (_NOON_MS - 1) * 1_000_000, perf_counter=time.perf_counter)
    monkeypatch.setattr("decode_service.engine.time", clock)
    reservation = engine.admit(request)
    prompted = prompt_pass(model, prompt(12))
    for layer, (key, value) in enumerate(prompted.layers):
        pools.write(layer, reservation.slots[0], raw(key), raw(value))
    first = int(prompted.logits.argmax())
    reservation.commit([Token(first)])
    for _ in range(3):
        engine.step()
    assert told == []
    if why == "deadline":
        clock.time_ns = lambda: _NOON_MS * 1_000_000
    elif why == "error":
        engine.end_all("over")
    else:
        engine.admit(replace(request, attempt=2))
    engine.step()
    (event,) = told
    assert event.finish_reason == ("deadline" if why == "deadline" else "error")
    assert (event.index, len(event.tokens)) == (1, 3)
    output = [first, *(t.id for t in event.tokens)]
    logits = all_logits(model, [*prompt(12), *output])[11:-1]
    assert logits.argmax(-1).tolist() == output


async def test_a_cancelled_one_is_never_told(prefill: Prefill, server: DecodeServer) -> None:
    request, _ = await prefill.hand_over(prompt(20), Sampling(max_tokens=100), tokens_per_event=1000)
    prefill.stream.cancel(request.request_id, request.attempt)
    await all_free(server)
    await prefill.generate(prompt(9), Sampling(max_tokens=4))
    assert (request.request_id, 0) not in prefill.got.events
