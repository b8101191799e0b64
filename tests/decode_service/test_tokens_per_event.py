"""`tokens_per_event` changes when a token is told, and nothing else: not which, not the order, none lost."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from handing_over import Prefill, all_free, all_logits, prompt, prompt_pass, raw

from decode_service.engine import PagedEngine
from decode_service.runner import ModelRunner
from decode_service.scheduler import Scheduler
from decode_service.server import DecodeServer
from kvtransfer.messages import Cancel, Open
from prad.core.kv import BlockPool
from prad.core.sampling import SamplingParams, Token, TokenEvent
from prad.lm import LanguageModel
from prad.lm.kv import Pools

DRAWN = SamplingParams(max_tokens=24, temperature=1.0, seed=5, logprobs=2)


@pytest.mark.parametrize("each", [2, 16, 32])
async def test_the_same_tokens_in_fewer_events(prefill: Prefill, each: int) -> None:
    one, _ = await prefill.hand_over(prompt(12), DRAWN)
    alone = await prefill.got.until(one.request_id)
    assert [len(e.tokens) for e in alone] == [1] * 23
    many, _ = await prefill.hand_over(prompt(12), DRAWN, tokens_per_event=each)
    together = await prefill.got.until(many.request_id)
    _assert_same(_tokens(together), _tokens(alone))
    sizes = _sizes(together, each)
    assert [e.index for e in together] == [1 + sum(sizes[:i]) for i in range(len(sizes))]
    assert [e.finish_reason for e in together] == [None] * (len(sizes) - 1) + ["length"]


async def test_who_began_together_is_told_in_different_steps(prefill: Prefill) -> None:
    request, _ = await prefill.hand_over(prompt(12), DRAWN, choices=4, tokens_per_event=16)
    firsts = {len((await prefill.got.until(request.request_id, c))[0].tokens) for c in range(4)}
    assert len(firsts) == 4


async def test_a_stop_id_tells_at_once(prefill: Prefill) -> None:
    greedy = await prefill.generate(prompt(12), SamplingParams(max_tokens=16))
    stop = greedy[9]
    sampling = SamplingParams(max_tokens=16, stop_ids=frozenset({stop}))
    request, _ = await prefill.hand_over(prompt(12), sampling, tokens_per_event=32)
    events = await prefill.got.until(request.request_id)
    assert [t.id for t in _tokens(events)] == greedy[1 : greedy.index(stop) + 1]
    assert len(events) <= 2
    assert events[-1].finish_reason == "stop"


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
            _assert_same(_tokens(events), _tokens(alone[choice]))
            _sizes(events, request.tokens_per_event)
    await all_free(server)


async def test_a_replay_counts_on(prefill: Prefill) -> None:
    sampling = SamplingParams(max_tokens=14, temperature=1.0, seed=11)
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
    assert events[0].index == 6
    _sizes(events, 6)
    assert [t.id for t in _tokens(events)] == whole[6:]


@pytest.mark.parametrize("why", ["deadline", "fenced", "cancelled", "failed step", "not finite"])
def test_an_early_end_tells_what_was_held(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """An engine that is stepped by hand: three steps, then the end. Only a cancel loses what was held."""
    told: list[TokenEvent] = []
    pools = Pools(model.layout, 20, 16, "cpu")
    engine = PagedEngine(
        ModelRunner(model, pools),
        Scheduler(BlockPool(20, 16), 4),
        deliver=lambda events: told.extend(events["client"]),
        observe=lambda *_: None,
    )
    request = Open(
        request_id="r",
        model=model.spec,
        kv_len=12,
        prompt_len=12,
        next_position=12,
        sampling=SamplingParams(max_tokens=100),
        timeout_ms=1000 if why == "deadline" else None,
        tokens_per_event=32,
    )
    clock = SimpleNamespace(monotonic=lambda: 99.0, perf_counter=time.perf_counter)
    monkeypatch.setattr("decode_service.engine.time", clock)
    reservation = engine.admit("client", request)
    prompted = prompt_pass(model, prompt(12))
    for layer, (key, value) in enumerate(prompted.layers):
        pools.write(layer, reservation.room.first, raw(key), raw(value))
    first = int(prompted.logits.argmax())
    engine.commit(reservation, [Token(first)])
    for _ in range(3):
        engine.step()
    assert told == []
    reason, error = "error", None
    if why == "deadline":
        clock.monotonic = lambda: 100.0
        reason = "deadline"
    elif why == "fenced":
        engine.admit("client", replace(request, attempt=2))
        error = "fenced by attempt 2"
    elif why == "cancelled":
        engine.cancel("client", Cancel("r", 1))
    elif why == "failed step":
        monkeypatch.setattr(model, "forward", _burnt)
        error = "the decode step failed: burnt"
    else:
        monkeypatch.setattr(model, "forward", lambda *_: torch.full((1, model.vocab_size), torch.nan))
        error = "the logits are not finite"
    engine.step()
    if why == "cancelled":
        assert told == []
        return
    (event,) = told
    assert (event.finish_reason, event.error) == (reason, error)
    assert (event.index, len(event.tokens)) == (1, 3)
    monkeypatch.undo()
    output = [first, *(t.id for t in event.tokens)]
    logits = all_logits(model, [*prompt(12), *output])[11:-1]
    assert logits.argmax(-1).tolist() == output


def _burnt(*_: object) -> torch.Tensor:
    raise RuntimeError("burnt")


def _sizes(events: Sequence[TokenEvent], each: int) -> list[int]:
    """How many tokens each event has: `each`, but the first and the last may have fewer."""
    sizes = [len(e.tokens) for e in events]
    assert all(size == each for size in sizes[1:-1])
    assert all(1 <= size <= each for size in sizes)
    return sizes


def _assert_same(tokens: Sequence[Token], others: Sequence[Token]) -> None:
    """Steps of other sizes round differently on some CPUs: log-probabilities may be off by that much."""
    for token, other in zip(tokens, others, strict=True):
        assert (token.id, [i for i, _ in token.top]) == (other.id, [i for i, _ in other.top])
        logprobs, expected = ([t.logprob, *(p for _, p in t.top)] for t in (token, other))
        assert logprobs == pytest.approx(expected, abs=1e-5)


def _tokens(events: Sequence[TokenEvent]) -> list[Token]:
    return [token for event in events for token in event.tokens]
