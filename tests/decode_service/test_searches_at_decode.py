"""Beam searches at decode: their blocks by plain data, and their whole life over the wire."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from handing_over import VOCAB, Prefill, all_free, prompt, prompt_pass
from hypothesis import given
from hypothesis import strategies as st

from decode_service.beams import Hypothesis, Searching
from decode_service.reservations import Reservation
from decode_service.runner import ModelRunner
from decode_service.scheduler import Running, Scheduler, SequenceId
from decode_service.server import DecodeServer
from kvtransfer.errors import ProtocolError, RejectedError, RejectReason
from kvtransfer.messages import Open
from prad.core.kv import BlockPool, KVLayout, LayerKV, ModelSpec
from prad.core.sampling import FinishReason, SamplingParams, Token
from prad.core.search import Beams, Child, Limits
from prad.lm import LanguageModel, likeliest
from tests.generation import recomputing, search

MODEL = ModelSpec("f", KVLayout((LayerKV(1, 2, 2),), "float32"))
SIZE = 4
STOPS = frozenset({3, 50, 71})
SEARCHED, LONG = SamplingParams(30, stop_ids=STOPS), SamplingParams(100)


def candidates(count: int, first: int = 0) -> Token:
    return Token(first, None, tuple((first + i, -1.0 - i) for i in range(count)))


def reserved(
    scheduler: Scheduler, kv_len: int, max_tokens: int, beams: Beams, choices: int = 1
) -> Reservation:
    sampling = SamplingParams(max_tokens)
    request = Open("r", MODEL, kv_len, kv_len, kv_len, sampling, choices=choices, beams=beams)
    return scheduler.reserve("c", request)


def begun(scheduler: Scheduler, reservation: Reservation) -> Searching:
    beams = reservation.request.beams
    assert beams is not None
    searching = Searching.begin(reservation, candidates(2 * beams.width), 1000)
    scheduler.start(reservation, searching.live)
    return searching


class Cells:
    """What blocks hold: a name for each token's keys and values."""

    def __init__(self, blocks: int) -> None:
        self._cells = [[""] * SIZE for _ in range(blocks)]

    def write(self, table: Sequence[int], at: int, name: str) -> None:
        self._cells[table[at // SIZE]][at % SIZE] = name

    def copy(self, copied: tuple[int, int]) -> None:
        self._cells[copied[1]][:] = self._cells[copied[0]]

    def read(self, table: Sequence[int], tokens: int) -> list[str]:
        return [self._cells[table[at // SIZE]][at % SIZE] for at in range(tokens)]


@given(st.integers(1, 13), st.integers(2, 5), st.integers(1, 14), st.randoms())
def test_every_hypothesis_reads_its_own_past_in_the_blocks_it_began_with(
    kv_len: int, width: int, steps: int, random: Random
) -> None:
    shared = kv_len // SIZE
    total = shared + width * (-(-(kv_len + steps) // SIZE) - shared)
    blocks, cells = BlockPool(total, SIZE), Cells(total)
    scheduler = Scheduler(blocks, max_sequences=width)
    reservation = reserved(scheduler, kv_len, steps + 1, Beams(width))
    assert blocks.free_count == 0
    for at in range(kv_len):
        for table in reservation.blocks:
            cells.write(table, at, f"prompt {at}")
    searching = begun(scheduler, reservation)
    pasts = [[f"prompt {at}" for at in range(kv_len)] for _ in range(width)]
    for step in range(steps):
        ran = scheduler.schedule(0)
        assert sorted(s.id.choice for s in ran) == list(range(width))
        for each in searching.live:
            if each.copied is not None:
                cells.copy(each.copied)
        for past, each in zip(pasts, searching.live, strict=True):
            assert cells.read(each.blocks, each.kv_len) == past
            assert blocks.exclusive(each.blocks[each.kv_len // SIZE :])
            assert (each.kv_len, each.index) == (kv_len + step, step)
            past.append(f"{step}: {each.token}")
            cells.write(each.blocks, each.kv_len, past[-1])
        if step + 1 < steps:
            children = [Child(random.randrange(width), 10 * step + i) for i in range(width)]
            in_use = blocks.in_use
            searching.inherit(children, blocks)
            assert blocks.in_use <= in_use
            pasts = [list(pasts[child.parent]) for child in children]
            assert [each.token for each in searching.live] == [child.token for child in children]
    for each in list(searching.live):
        scheduler.finish(each)
    assert blocks.free_count == total


def test_what_forsaken_hypotheses_had_is_free_for_others() -> None:
    blocks = BlockPool(13, SIZE)
    scheduler = Scheduler(blocks, max_sequences=9)
    searching = begun(scheduler, reserved(scheduler, 4, 17, Beams(3)))
    assert blocks.free_count == 0
    for _ in range(9):  # 13 tokens: two blocks are full behind the prompt's, and one is begun
        searching.inherit([Child(i, i) for i in range(3)], blocks)
    assert blocks.free_count == 0
    searching.inherit([Child(1, 7), Child(1, 8), Child(1, 9)], blocks)
    assert blocks.free_count == 4
    one = searching.live[0].blocks
    assert [each.blocks[:3] for each in searching.live] == [one[:3]] * 3
    assert searching.live[0].copied is None
    assert [(each.copied or (0, 0))[0] for each in searching.live[1:]] == [one[3]] * 2


def test_a_search_is_as_many_sequences_as_hypotheses_and_ends_as_one() -> None:
    blocks = BlockPool(40, SIZE)
    scheduler = Scheduler(blocks, max_sequences=4)
    searching = begun(scheduler, reserved(scheduler, 6, 9, Beams(3), choices=2))
    assert (scheduler.running_count, scheduler.sequence_count) == (3, 3)
    with pytest.raises(RejectedError, match="2 sequences wanted") as caught:
        scheduler.reserve("c", Open("s", MODEL, 4, 4, 4, SamplingParams(9), beams=Beams(2)))
    assert caught.value.reason is RejectReason.FULL
    with pytest.raises(RejectedError, match="5 sequences of 12 tokens") as caught:
        scheduler.reserve("c", Open("s", MODEL, 4, 4, 4, SamplingParams(9), beams=Beams(5)))
    assert caught.value.reason is RejectReason.TOO_LARGE
    name = searching.live[0].id.hand_off
    assert [scheduler.knows(SequenceId(name, choice)) for choice in (0, 1)] == [True, True]
    scheduler.cancel(name, 1)  # the other answer may still be one of its hypotheses
    assert scheduler.running_count == 3
    scheduler.cancel(name)
    assert (scheduler.schedule(0), blocks.free_count) == ([], 40)


def test_nothing_is_drafted_for_a_hypothesis() -> None:
    scheduler = Scheduler(BlockPool(40, SIZE), max_sequences=4)
    searching = begun(scheduler, reserved(scheduler, 6, 30, Beams(2)))
    assert [each.draft_room for each in searching.live] == [0, 0]


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (candidates(3), "begins with 4 candidates, not 3"),
        (candidates(4, 998), "begins with 4 candidates"),  # 1000 is outside the vocabulary
        (replace(candidates(4), top=((1, -1.0),) * 4), "begins with 4 candidates"),
        (replace(candidates(4), top=((1, float("nan")), (2, -1.0), (3, -1.0), (4, -1.0))), "begins with 4"),
    ],
)
def test_first_candidates_that_are_none_are_refused(first: Token, message: str) -> None:
    scheduler = Scheduler(BlockPool(40, SIZE), max_sequences=4)
    with pytest.raises(ProtocolError, match=message):
        Searching.begin(reserved(scheduler, 6, 30, Beams(2)), first, 1000)


# ---- over the wire --------------------------------------------------------------------------------


def first_candidates(model: LanguageModel, ids: Sequence[int], request: Open) -> Token:
    assert request.beams is not None
    logprobs = prompt_pass(model, ids).logits.log_softmax(-1)
    (top,) = likeliest(logprobs[None], request.beams.candidates(request.sampling.stop_ids))
    return Token(top[0][0], None, tuple(top))


async def hand_over(
    prefill: Prefill, ids: Sequence[int], beams: Beams, sampling: SamplingParams = SEARCHED, **more: object
) -> Open:
    request = prefill.request(len(ids), sampling, **({"choices": beams.width, "beams": beams} | more))
    async with await prefill.client.open(request) as hand_off:
        await prefill.send(hand_off, prompt_pass(prefill.model, ids))
        await hand_off.commit([first_candidates(prefill.model, ids, request)])
    return request


async def answers(prefill: Prefill, request: Open) -> list[tuple[int, ...]]:
    found = []
    for choice in range(request.choices):
        events = await prefill.got.until(request.request_id, choice)
        assert all(len(event.tokens) <= request.tokens_per_event for event in events)
        assert [event.index for event in events] == [
            sum(len(event.tokens) for event in events[:i]) for i in range(len(events))
        ]
        found.append(tuple(token.id for event in events for token in event.tokens))
        assert events[-1].finish_reason == ("stop" if found[-1][-1] in STOPS else "length")
    return found


async def test_the_best_are_told_at_the_end_in_full(prefill: Prefill, server: DecodeServer) -> None:
    asked = [(17, Beams(3)), (16, Beams(2, 0.5)), (31, Beams(4, 1.5, None)), (5, Beams(3, 1.0, True))]
    requests = [await hand_over(prefill, prompt(n), beams, tokens_per_event=7) for n, beams in asked]
    plain = await prefill.generate(prompt(9), SamplingParams(40))
    for request, (tokens, beams) in zip(requests, asked, strict=True):
        expected = search(recomputing(prefill.model), prompt(tokens), Limits(30, STOPS), beams).hypotheses
        assert await answers(prefill, request) == list(expected)
    await all_free(server)
    assert plain == await prefill.generate(prompt(9), SamplingParams(40))


async def test_a_search_may_be_cancelled_and_may_run_out_of_time(
    prefill: Prefill, server: DecodeServer
) -> None:
    cancelled = await hand_over(prefill, prompt(20), Beams(3), LONG)
    late = await hand_over(prefill, prompt(20), Beams(3), LONG, timeout_ms=0)
    prefill.stream.cancel(cancelled.request_id, cancelled.attempt)
    (event,) = await prefill.got.until(late.request_id)
    assert (event.finish_reason, event.tokens) == (FinishReason.DEADLINE, ())
    await all_free(server)


async def test_a_later_attempt_begins_anew(prefill: Prefill, server: DecodeServer) -> None:
    first = await hand_over(prefill, prompt(20), Beams(3), LONG)
    await hand_over(prefill, prompt(20), Beams(3), request_id=first.request_id, attempt=2)
    told = prefill.got.events.setdefault((first.request_id, 0), [])
    async with prefill.got.changed:
        await prefill.got.changed.wait_for(lambda: any(e.attempt == 2 and e.finish_reason for e in told))
    await all_free(server)
    assert [(e.finish_reason, e.error) for e in told if e.attempt == 1] == [("error", "fenced by attempt 2")]
    found = search(recomputing(prefill.model), prompt(20), Limits(30, STOPS), Beams(3))
    assert tuple(t.id for event in told if event.attempt == 2 for t in event.tokens) == found.hypotheses[0]


async def test_what_breaks_one_hypothesis_ends_its_search_alone(
    prefill: Prefill, server: DecodeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ModelRunner.run

    def breaking(self: ModelRunner, batch: Sequence[Running], drafts: object) -> object:
        results = run(self, batch, drafts)  # type: ignore[arg-type]
        return [
            None if isinstance(each, Hypothesis) and each.id.choice == 1 and each.index == 4 else result
            for each, result in zip(batch, results, strict=True)
        ]

    monkeypatch.setattr(ModelRunner, "run", breaking)
    request = await hand_over(prefill, prompt(20), Beams(3), LONG)
    assert len(await prefill.generate(prompt(9), SamplingParams(40))) == 40
    for choice in range(3):
        (event,) = await prefill.got.until(request.request_id, choice)
        assert (event.finish_reason, event.error) == ("error", "the logits are not finite")
    await all_free(server)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beams": Beams(0)}, "without beams"),
        ({"beams": Beams(65), "choices": 1}, "65 beams, 64 at most"),
        ({"beams": Beams(2, 11.0)}, "length_penalty 11.0 is not in -10.0 to 10.0"),
        ({"beams": Beams(2), "choices": 3}, "3 choices of 2 beams"),
        ({"beams": Beams(49), "choices": 1}, f"49 beams look at 98 ids: expected up to {VOCAB}"),
        ({"beams": Beams(2), "output_offset": 3}, "output_offset is not 0"),
        ({"beams": Beams(2), "sampling": SamplingParams(30, temperature=0.5)}, "takes no temperature"),
        ({"beams": Beams(2), "sampling": SamplingParams(30, logprobs=1)}, "takes no temperature"),
    ],
)
async def test_a_search_that_makes_no_sense_is_refused(
    wrong: dict[str, object], message: str, prefill: Prefill, server: DecodeServer
) -> None:
    values = {"sampling": SamplingParams(30), "choices": 2} | wrong
    sampling = values.pop("sampling")
    assert isinstance(sampling, SamplingParams)
    with pytest.raises(RejectedError, match=message) as caught:
        await prefill.client.open(prefill.request(5, sampling, **values))
    assert caught.value.reason is RejectReason.INVALID
    await all_free(server)


def test_first_candidates_that_end_the_search_are_prefills_to_see() -> None:
    scheduler = Scheduler(BlockPool(40, SIZE), max_sequences=4)
    sampling = SamplingParams(9, stop_ids=frozenset({0, 1}))
    reservation = scheduler.reserve("c", Open("r", MODEL, 6, 6, 6, sampling, beams=Beams(2)))
    with pytest.raises(ProtocolError, match="its first candidates end"):
        Searching.begin(reservation, candidates(6), 1000)
