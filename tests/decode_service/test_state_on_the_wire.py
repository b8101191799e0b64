"""Request state at the decode service: what is taken, what is refused, and what a step makes of it."""

import asyncio
from collections.abc import Mapping

import pytest
import torch
import xxhash
from handing_over import (
    Prefill,
    Prompted,
    all_free,
    decode_settings,
    prefilling,
    prompt,
    prompt_pass,
    raw,
)

from decode_service.scheduler import Running, Scheduler, SequenceId
from decode_service.server import DecodeServer, serving
from kvtransfer.errors import CorruptError, ProtocolError, RejectedError, RejectReason
from kvtransfer.messages import Open, StateSite
from kvtransfer.proto import handoff_pb2 as pb
from prad.core.kv import BlockPool
from prad.core.sampling import SamplingParams, Token, Written
from prad.lm import LanguageModel, PackedBatch, RowScaling, Site

SHORT = SamplingParams(max_tokens=8)
IDS = prompt(12)
State = Mapping[Site, torch.Tensor]


def random_state(model: LanguageModel, seed: int, *sites: Site) -> State:
    generator = torch.Generator().manual_seed(seed)
    widths = model.state_widths
    return {s: torch.randn(model.num_layers, widths[s], generator=generator) for s in sites or widths}


def announced(state: State) -> tuple[StateSite, ...]:
    return tuple(StateSite(str(site), vectors.shape[1]) for site, vectors in state.items())


async def hand_over(prefill: Prefill, ids: list[int], state: State) -> list[int]:
    request = prefill.request(len(ids), SHORT, state=announced(state))
    prompted = prompt_pass(prefill.model, ids)
    first = int(prompted.logits.argmax())
    async with await prefill.client.open(request) as hand_off:
        await prefill.send(hand_off, prompted)
        for site, vectors in state.items():
            await hand_off.send_state(str(site), raw(vectors))
        await hand_off.commit([Token(first)])
    events = await prefill.got.until(request.request_id)
    return [first, *(t.id for e in events for t in e.tokens)]


class OfPlainPrompt:
    """The monolithic pass: the prompt's rows are the plain model's, all later ones are scaled."""

    def __init__(self, state: State, prompt_len: int) -> None:
        self.sites = frozenset(state)
        self._state, self._start = state, prompt_len

    def apply(self, layer: int, site: Site, value: torch.Tensor, source: torch.Tensor) -> None:
        value[self._start :] *= 1 + self._state[site][layer]


def require_greedy(model: LanguageModel, ids: list[int], output: list[int], state: State) -> None:
    every = PackedBatch.of_sequences([[*ids, *output]], logit_rows=range(len(ids) - 1, len(ids) + 7))
    with torch.inference_mode():
        logits = model.forward(every, OfPlainPrompt(state, len(ids)))
    chosen = logits[torch.arange(len(output)), torch.tensor(output)]
    assert ((logits.max(dim=-1).values - chosen) <= 1e-4 * (logits.max() - logits.min())).all()


async def test_sequences_with_and_without_state_share_steps(each_model: LanguageModel) -> None:
    states = [
        random_state(each_model, 1),
        {},
        random_state(each_model, 2, Site.V),
        {},
        random_state(each_model, 3, Site.Q, Site.UP),
        random_state(each_model, 4),
    ]
    prompts = [prompt(3 + 9 * i) for i in range(len(states))]
    async with (
        serving(decode_settings(), each_model) as server,
        prefilling(each_model, server.port) as client,
    ):
        pairs = list(zip(prompts, states, strict=True))
        outputs = await asyncio.gather(*(hand_over(client, ids, state) for ids, state in pairs))
        await all_free(server)
    for (ids, state), output in zip(pairs, outputs, strict=True):
        require_greedy(each_model, ids, output, state)


@pytest.mark.parametrize(
    ("state", "reason", "message"),
    [
        ((StateSite("o", 32),), RejectReason.UNSUPPORTED, "'o'; this model takes it at q, k, v, gate, up"),
        ((StateSite("", 32), StateSite("q", 32)), RejectReason.UNSUPPORTED, "''"),
        ((StateSite("q", 33),), RejectReason.INVALID, "at q of width 33, the model's is 32"),
        ((StateSite("q", 0),), RejectReason.INVALID, "width 0"),
        ((StateSite("v", 2**32 - 1),), RejectReason.INVALID, "at v of width 4294967295, the model's is 16"),
        ((StateSite("q", 32), StateSite("q", 32)), RejectReason.INVALID, "named twice"),
    ],
)
async def test_what_does_not_fit_the_model_is_refused_before_the_prompt_pass(
    state: tuple[StateSite, ...], reason: RejectReason, message: str, prefill: Prefill
) -> None:
    with pytest.raises(RejectedError, match=message) as caught:
        await prefill.client.open(prefill.request(5, SHORT, state=state))
    assert caught.value.reason is reason


def test_memory_for_state_is_bounded(model: LanguageModel) -> None:
    scheduler = Scheduler(BlockPool(99, 16), max_sequences=9, retry_after_s=0.5, state_bytes=1000)

    def request(name: str, width: int, choices: int = 1) -> Open:
        state = (StateSite("q", width),) if width else ()
        return Open(name, model.spec, 5, 5, 5, SHORT, choices=choices, state=state)

    with pytest.raises(RejectedError, match="1008 bytes of request state; there is room for 1000") as caught:
        scheduler.reserve("c", request("too large", 84))
    assert caught.value.reason is RejectReason.TOO_LARGE
    first, second = (
        scheduler.reserve("c", request("a", 40, choices=3)),
        scheduler.reserve("c", request("b", 43)),
    )
    with pytest.raises(RejectedError, match="12 bytes of request state wanted, 4 free") as caught:
        scheduler.reserve("c", request("c", 1))
    assert (caught.value.reason, caught.value.retry_after_s) == (RejectReason.FULL, 0.5)
    scheduler.reserve("c", request("without", 0))
    running = Running(
        SequenceId(first.id, 1), first.request, first.blocks[1], 1, 0, 5, 5, Written.of((), 1, 0)
    )
    scheduler.start(first, [running])
    scheduler.release(second)
    with pytest.raises(RejectedError, match="520 free"):
        scheduler.reserve("c", request("c", 44))
    scheduler.finish(running)
    scheduler.reserve("c", request("c", 83))


async def test_a_service_may_take_no_state(model: LanguageModel) -> None:
    wide = announced(random_state(model, 1))
    async with (
        serving(decode_settings(request_state_mib=0), model) as server,
        prefilling(model, server.port) as client,
    ):
        with pytest.raises(RejectedError, match="there is room for 0") as caught:
            await client.client.open(client.request(5, SHORT, state=wide))
        assert caught.value.reason is RejectReason.TOO_LARGE
        assert len(await client.generate(IDS, SHORT)) == 8, "requests without state are served"
        await all_free(server)


def damaged(request: Open, state: State) -> dict[str, tuple[pb.State, type[Exception], str]]:
    def frame(data: bytes, site: str = "q", checksum: int | None = None) -> pb.State:
        return pb.State(
            hand_off=1,
            site=site,
            data=data,
            checksum=xxhash.xxh3_64_intdigest(data) if checksum is None else checksum,
        )

    data = bytes(raw(state[Site.Q]))
    broken = state[Site.Q].clone()
    broken[1, 3] = float("nan")
    endless = state[Site.Q].clone()
    endless[2, 0] = float("-inf")
    return {
        "too short": (frame(data[:-4]), CorruptError, f"{len(data) - 4} bytes, not {len(data)}"),
        "too long": (frame(data + b"\0"), CorruptError, "bytes, not"),
        "empty": (frame(b""), CorruptError, "0 bytes"),
        "flipped": (frame(data, checksum=5), CorruptError, "checksum of the request state at q"),
        "unannounced": (frame(data, site="k"), ProtocolError, "at 'k' was not announced"),
        "not a number": (frame(bytes(raw(broken))), ProtocolError, "at q holds numbers that are not finite"),
        "infinite": (frame(bytes(raw(endless))), ProtocolError, "not finite"),
    }


@pytest.mark.parametrize(
    "kind", ["too short", "too long", "empty", "flipped", "unannounced", "not a number", "infinite"]
)
async def test_damaged_state_ends_its_hand_off_alone(
    kind: str, prefill: Prefill, server: DecodeServer, model: LanguageModel
) -> None:
    state = random_state(model, 1, Site.Q)
    request = prefill.request(len(IDS), SHORT, state=announced(state))
    message, error, text = damaged(request, state)[kind]
    prompted = prompt_pass(model, IDS)
    neighbour = await prefill.client.open(prefill.request(len(IDS), SHORT))
    hand_off = await prefill.client.open(request)
    message.hand_off = hand_off.number
    hand_off.stream.put(pb.HandOffFrame(state=message))
    with pytest.raises(error, match=text):
        await asyncio.wait_for(asyncio.shield(hand_off.ended), 10)
    await prefill.send(neighbour, prompted)
    await neighbour.commit([Token(1)])
    await prefill.got.until(neighbour.request.request_id)
    await all_free(server)


async def test_state_must_be_there_before_commit_and_comes_once(
    prefill: Prefill, server: DecodeServer, model: LanguageModel
) -> None:
    state = random_state(model, 1, Site.Q, Site.V)
    prompted: Prompted = prompt_pass(model, IDS)
    for sent, text in (
        (("q",), "without request state at v"),
        (("q", "q"), "'q' was not announced, or comes"),
    ):
        hand_off = await prefill.client.open(prefill.request(len(IDS), SHORT, state=announced(state)))
        await prefill.send(hand_off, prompted)
        with pytest.raises(ProtocolError, match=text):  # noqa: PT012
            for site in sent:
                await hand_off.send_state(site, raw(state[Site(site)]))
            await hand_off.commit([Token(1)])
    with pytest.raises(ValueError, match="not what Open announces"):
        await (await prefill.client.open(prefill.request(5, SHORT))).send_state("q", b"")
    await prefill.client.close()
    await all_free(server)


async def test_state_of_a_hand_off_that_never_was_ends_the_stream(prefill: Prefill) -> None:
    hand_off = await prefill.client.open(prefill.request(5, SHORT))
    hand_off.stream.put(pb.HandOffFrame(state=pb.State(hand_off=99, site="q")))
    with pytest.raises(ProtocolError, match="99 was never opened"):
        await asyncio.wait_for(asyncio.shield(hand_off.ended), 10)


def test_a_step_without_state_has_nothing_to_scale(model: LanguageModel) -> None:
    assert RowScaling.of([None, {}, None]) is None
    some = RowScaling.of([None, random_state(model, 1, Site.V), {}])
    assert some is not None
    assert some.ordered == (Site.V,)
    assert (some.addresses != 0).tolist() == [[False, True, False]]
