"""The oracle: prefill, hand-off and paged decode give what one pass over [prompt, output] gives."""

import asyncio

import pytest
import torch
from handing_over import Prefill, all_free, all_logits, decode_settings, prefilling, prompt, prompt_pass

from decode_service.server import DecodeServer, serving
from prad.core.kv import BlockPool
from prad.core.sampling import SamplingParams, Token
from prad.lm import LanguageModel


def require_greedy(model: LanguageModel, ids: list[int], output: list[int]) -> None:
    logits = all_logits(model, [*ids, *output])[len(ids) - 1 : -1]
    best = logits.max(dim=-1).values
    chosen = logits[torch.arange(len(output)), torch.tensor(output)]
    scale = logits.max() - logits.min()
    assert ((best - chosen) <= 1e-4 * scale).all()


@pytest.mark.parametrize("kv_len", [1, 15, 16, 17, 31, 33])
async def test_at_block_edges(each_model: LanguageModel, kv_len: int) -> None:
    ids = prompt(kv_len)
    async with (
        serving(decode_settings(), each_model) as server,
        prefilling(each_model, server.port) as client,
    ):
        output = await client.generate(ids, SamplingParams(max_tokens=20))
        await all_free(server)
    assert len(output) == 20
    require_greedy(each_model, ids, output)


async def test_logprobs_are_the_reference(prefill: Prefill, model: LanguageModel) -> None:
    ids = prompt(17)
    request, first = await prefill.hand_over(ids, SamplingParams(max_tokens=24, logprobs=3))
    events = await prefill.got.until(request.request_id)
    output = [first[0], *(t.id for e in events for t in e.tokens)]
    expected = all_logits(model, [*ids, *output]).log_softmax(dim=-1)[len(ids) : -1]
    assert [e.index for e in events] == list(range(1, 24))
    for event, row in zip(events, expected, strict=True):
        (token,) = event.tokens
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        values, _ = row.topk(3)
        assert [v for _, v in token.top] == pytest.approx(values.tolist(), abs=1e-4)


async def test_mixed_lengths_that_join_at_different_times(prefill: Prefill, model: LanguageModel) -> None:
    async def one(length: int) -> None:
        ids = prompt(length, seed=5)
        output = await prefill.generate(ids, SamplingParams(max_tokens=10 + length % 23))
        assert len(output) == 10 + length % 23
        require_greedy(model, ids, output)

    async def later(length: int, after: int) -> None:
        while len(prefill.got.numbers) < after:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await one(length)

    await asyncio.gather(one(3), one(90), later(16, 2), later(40, 4), later(17, 8), later(120, 9))


async def test_sampled_alone_equals_sampled_in_a_mix(prefill: Prefill) -> None:
    def sampling(seed: int) -> SamplingParams:
        return SamplingParams(max_tokens=16, temperature=1.0, top_p=0.9, top_k=40, seed=seed)

    alone = [await prefill.generate(prompt(9 + 7 * i), sampling(i), prompt_index=i) for i in range(6)]
    mixed = await asyncio.gather(
        *(prefill.generate(prompt(9 + 7 * i), sampling(i), prompt_index=i) for i in range(6))
    )
    assert mixed == alone
    assert len({tuple(output) for output in alone}) == 6


async def test_choices_share_a_prompt_and_differ(prefill: Prefill, server: DecodeServer) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=1.2, seed=3)
    ids = prompt(19)
    request, first = await prefill.hand_over(ids, sampling, first=[5, 6, 5], choices=3)
    together = [
        [t.id for e in await prefill.got.until(request.request_id, c) for t in e.tokens] for c in range(3)
    ]
    assert [len(output) for output in together] == [11, 11, 11]
    assert together[0] != together[2]  # the same first token, another choice's random numbers
    alone = await prefill.generate(ids, sampling, first=[first[0]])
    assert alone[1:] == together[0]
    await all_free(server)


FIRSTS = (5, 6, 7, 11)


async def each_alone(prefill: Prefill, ids: list[int], sampling: SamplingParams) -> list[list[int]]:
    return [await prefill.generate(ids, sampling, first=[first]) for first in FIRSTS]


async def as_choices(prefill: Prefill, ids: list[int], sampling: SamplingParams) -> list[list[int]]:
    request, firsts = await prefill.hand_over(ids, sampling, first=FIRSTS, choices=len(FIRSTS))
    events = [await prefill.got.until(request.request_id, c) for c in range(len(FIRSTS))]
    return [
        [first, *(t.id for e in of_choice for t in e.tokens)]
        for first, of_choice in zip(firsts, events, strict=True)
    ]


@pytest.mark.parametrize("kv_len", [1, 15, 16, 17, 31, 32, 33])
async def test_choices_that_share_blocks_equal_each_alone(each_model: LanguageModel, kv_len: int) -> None:
    ids, sampling = prompt(kv_len), SamplingParams(max_tokens=20)
    async with (
        serving(decode_settings(), each_model) as server,
        prefilling(each_model, server.port) as client,
    ):
        together = await as_choices(client, ids, sampling)
        assert together == await each_alone(client, ids, sampling)
        await all_free(server)
    assert len({tuple(output) for output in together}) == len(FIRSTS)
    for output in together:
        require_greedy(each_model, [*ids, output[0]], output[1:])


@pytest.mark.parametrize("kv_len", [1, 15, 17, 33])
async def test_choices_that_share_their_partial_block_are_noticed(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, kv_len: int
) -> None:
    """The fault that the test above guards against: one block too many is shared."""
    branch = BlockPool.branch
    monkeypatch.setattr(BlockPool, "branch", lambda pool, n, full, own: branch(pool, n, full + own, 0))
    monkeypatch.setattr(BlockPool, "exclusive", lambda *_: True)  # else an assertion of ours is in the way
    ids, sampling = prompt(kv_len), SamplingParams(max_tokens=20)
    async with serving(decode_settings(), model) as server, prefilling(model, server.port) as client:
        assert await as_choices(client, ids, sampling) != await each_alone(client, ids, sampling)


async def test_a_choice_whose_first_token_stops_does_not_run(prefill: Prefill, server: DecodeServer) -> None:
    sampling = SamplingParams(max_tokens=4, stop_ids=frozenset({7}), min_tokens=4)
    request, _ = await prefill.hand_over(prompt(5), sampling, first=[7, 8], choices=2)
    assert len(await prefill.got.until(request.request_id, 1)) == 3
    assert (request.request_id, 0) not in prefill.got.events
    await all_free(server)


async def test_stop_ids_end_a_sequence(prefill: Prefill) -> None:
    plain = await prefill.generate(prompt(12), SamplingParams(max_tokens=16))
    stop = plain[9]
    request, first = await prefill.hand_over(
        prompt(12), SamplingParams(max_tokens=16, stop_ids=frozenset({stop}), min_tokens=0)
    )
    assert first[0] != stop, "the fixture's first token ends it: choose another prompt"
    events = await prefill.got.until(request.request_id)
    assert [t.id for e in events for t in e.tokens] == plain[1 : plain.index(stop) + 1]
    assert events[-1].finish_reason == "stop"


async def test_what_is_guessed_by_the_text_changes_nothing(each_model: LanguageModel) -> None:
    """Text and whose answers are alike come with the Commit; the same request again and again is guessed."""
    ids, sampling = prompt(20), SamplingParams(max_tokens=30, temperature=0.3, seed=4)
    answers = []
    async with (
        serving(decode_settings(speculate=8), each_model) as server,
        prefilling(each_model, server.port) as client,
    ):
        for _ in range(6):
            request = client.request(len(ids), sampling)
            async with await client.client.open(request) as hand_off:
                await client.send(hand_off, prompt_pass(each_model, ids))
                await hand_off.commit([Token(5)], ids, 2**64 - 1)
            events = await client.got.until(request.request_id)
            answers.append([t.id for e in events for t in e.tokens])
        drafter = server.engine._drafter
        assert len(drafter._answers) > 0
        await all_free(server)
    assert answers == [answers[0]] * 6
    async with (
        serving(decode_settings(), each_model) as server,
        prefilling(each_model, server.port) as client,
    ):
        assert (await client.generate(ids, sampling, first=[5]))[1:] == answers[0]


async def test_a_replay_goes_on_with_the_same_random_numbers(prefill: Prefill) -> None:
    sampling = SamplingParams(max_tokens=14, temperature=1.0, seed=11)
    ids = prompt(21)
    whole = await prefill.generate(ids, sampling)
    # 5 tokens were sent; the 6th is the replay's first
    again = await prefill.generate(
        [*ids, *whole[:5]], sampling, first=[whole[5]], prompt_len=21, output_offset=5
    )
    assert again == whole[5:]
