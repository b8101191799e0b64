"""A pass's layers go out while it runs or behind it, once and in order; one that breaks off says so."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kvtransfer.frames import Encoding, PlacedRows
from kvtransfer.sender import PassRows
from prad.core.kv import BlockPool
from prad.core.sampling import SamplingParams
from prad.lm import LanguageModel
from prad.lm.kv import Pools
from prefill_service import passes
from prefill_service.passes import PassBrokeError, PassLayers, PassRunner
from prefill_service.prompt import Prefilling, Prompt, Queued
from prefill_service.scheduler import PromptScheduler
from tests.prefill.fakes import request

SIZE = 4


class Wire:
    """What went out: for each hand-off and layer the keys' and values' bytes, token by token."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.sent: dict[tuple[Any, int], list[tuple[bytes, ...]]] = {}

    async def send(self, layer: int, planes: list[memoryview], rows: Any, encoding: Encoding) -> None:
        self.order.append(layer)
        for r in rows:
            tokens = self.sent.setdefault((r.whose[1], layer), [])
            assert r.first_token == len(tokens), "a token is missing or comes twice"
            for row in range(r.start, r.start + r.token_count):
                total = [len(plane) // self.rows(planes) for plane in planes]
                tokens.append(
                    tuple(bytes(p[row * n : (row + 1) * n]) for p, n in zip(planes, total, strict=True))
                )

    def rows(self, planes: list[memoryview]) -> int:
        return len(planes[0]) // self.token_bytes

    token_bytes = 1


@dataclass(frozen=True)
class Room:
    """As a hand-off; the same name is the same one."""

    name: str

    def rows(self, *where: int) -> PassRows:
        stream: Any = self.name
        return PlacedRows((stream, stream), *where)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    made = Wire()
    monkeypatch.setattr(passes, "send_layer", made.send)
    return made


def layer(value: float) -> torch.Tensor:
    """One token's keys, of a model with a single head of one number."""
    return torch.full((1, 1, 1), value, dtype=torch.uint8)


def layers(*, overlap: bool, after: PassLayers | None = None, name: str = "room") -> PassLayers:
    rows = [Room(name).rows(0, 0, 1)]
    return PassLayers(3, rows, Encoding.RAW, overlap=overlap, after=after)


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("overlap", "early"), [(True, [0, 1]), (False, [])])
async def test_layers_go_out_as_they_are_computed_or_behind_the_pass(
    wire: Wire, overlap: bool, early: list[int]
) -> None:
    pass_layers = layers(overlap=overlap)
    for i in range(2):
        pass_layers.put(i, layer(i), layer(i + 10))
    await turns()
    assert wire.order == early
    pass_layers.put(2, layer(2), layer(12))
    await pass_layers.sent()
    assert wire.order == [0, 1, 2]
    assert wire.sent["room", 1] == [(b"\x01", b"\x0b")]


async def test_a_pass_goes_out_behind_the_one_before(wire: Wire) -> None:
    first = layers(overlap=True, name="first")
    second = layers(overlap=True, after=first, name="second")
    for i in range(3):
        second.put(i, layer(i), layer(i))
    await turns()
    assert wire.order == []
    for i in range(3):
        first.put(i, layer(i), layer(i))
    await second.sent()
    assert [name for name, _ in wire.sent] == ["first"] * 3 + ["second"] * 3


@pytest.mark.parametrize("overlap", [True, False])
async def test_a_pass_that_breaks_off_says_so_and_holds_up_nobody(wire: Wire, overlap: bool) -> None:
    broken = layers(overlap=overlap)
    behind = layers(overlap=overlap, after=broken, name="behind")
    broken.put(0, layer(0), layer(0))
    broken.break_off()
    with pytest.raises(PassBrokeError):
        await broken.sent()
    await broken.settled()
    for i in range(3):
        behind.put(i, layer(i), layer(i))
    await behind.sent()


async def test_what_keeps_a_layer_from_decode_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: object) -> None:
        raise ValueError("not whole tokens")

    monkeypatch.setattr(passes, "send_layer", refuse)
    pass_layers = layers(overlap=True)
    pass_layers.put(0, layer(0), layer(0))
    with pytest.raises(ValueError, match="whole"):
        await pass_layers.sent()


# ---- with a model


class Service:
    """Scheduler and passes of one service; every prompt has room at decode, under its own name."""

    def __init__(self, model: LanguageModel, overlap: bool) -> None:
        blocks = BlockPool(40, SIZE, keep=20)
        self.scheduler = PromptScheduler(
            blocks, pass_tokens=99, chunk_tokens=8, pass_prompts=9, max_waiting=9
        )
        pools = Pools(model.layout, 40, SIZE, "cpu")
        self.passes = PassRunner(model, pools, Encoding.RAW, overlap=overlap, nice=0)
        self.drawn: dict[str, Any] = {}

    async def run(self, *prompts: Prompt) -> int:
        """To the end of each; returns how many tokens were computed, and keeps what was drawn."""
        for prompt in prompts:
            prompt.state = Queued()
            self.scheduler.add(prompt)
        computed, result = 0, None
        while chunks := self.scheduler.next_pass(0.0):
            for chunk in chunks:
                assert isinstance(chunk.prompt.state, Prefilling)
                room: Any = Room(chunk.prompt.request.request_id)
                chunk.prompt.hand_off = room
            assert not await self.passes.send_cached(chunks)
            result = await self.passes.run(chunks)
            self.scheduler.computed()
            self.drawn |= {p.request.request_id: drawn for p, drawn in result.first_tokens.items()}
            computed += sum(map(len, chunks))
        assert result is not None
        await result.layers.sent()
        return computed


def asked(name: str, ids: list[int]) -> Prompt:
    return Prompt(request(name, ids, sampling=SamplingParams(2)))


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("gathered", [1, 3 * 2**10, 2**30])
async def test_cached_tokens_and_chunks_go_out_once_and_in_order(
    wire: Wire,
    load_tiny: Callable[[str], LanguageModel],
    monkeypatch: pytest.MonkeyPatch,
    overlap: bool,
    gathered: int,
) -> None:
    """A prompt that was cut, and one that begins with cached blocks, send what one pass would send."""
    monkeypatch.setattr(passes, "_GATHERED_BYTES", gathered)
    model = load_tiny("llama")
    wire.token_bytes = model.layout.key_bytes(0)
    service, text = Service(model, overlap), [(7 * i) % 100 for i in range(21)]
    assert await service.run(asked("cut", text)) == 21
    assert await service.run(asked("again", text), asked("beside", text[:13])) == 1 + 1
    for index in range(model.num_layers):
        cut = wire.sent["cut", index]
        assert len(cut) == 21
        assert wire.sent["again", index][:20] == cut[:20]
        assert wire.sent["beside", index][:12] == cut[:12]
        assert (len(wire.sent["again", index]), len(wire.sent["beside", index])) == (21, 13)
    service.passes.close()


@pytest.mark.parametrize("gathered", [1, 2**30])
async def test_who_cannot_be_read_from_the_cache_is_named_and_others_are_sent_whole(
    wire: Wire,
    load_tiny: Callable[[str], LanguageModel],
    monkeypatch: pytest.MonkeyPatch,
    gathered: int,
) -> None:
    monkeypatch.setattr(passes, "_GATHERED_BYTES", gathered)
    model = load_tiny("llama")
    wire.token_bytes = model.layout.key_bytes(0)
    service, text = Service(model, False), [(7 * i) % 100 for i in range(21)]
    await service.run(asked("first", text))
    original = Pools.slots
    asks: list[int] = []

    def astray(pools: Pools, table: Any, count: int) -> torch.Tensor:
        asks.append(count)
        return original(pools, table, count) + (10**6 if len(asks) == 2 else 0)

    rows = [asked(name, text) for name in ("before", "astray", "behind")]
    with monkeypatch.context() as context:
        context.setattr(passes.Pools, "slots", astray)
        for prompt in rows:
            service.scheduler.add(prompt)
        chunks = service.scheduler.next_pass(0.0)
        for chunk in chunks:
            room: Any = Room(chunk.prompt.request.request_id)
            chunk.prompt.hand_off = room
        broken = await service.passes.send_cached(chunks)
    assert list(broken) == [Room("astray")]
    service.scheduler.remove(rows[1])
    service.scheduler.put_back(chunks[1])
    result = await service.passes.run([chunks[0], chunks[2]])
    assert [drawn and drawn[0].id for drawn in result.first_tokens.values()] == [
        service.drawn["first"][0].id
    ] * 2
    await result.layers.sent()
    for index in range(model.num_layers):
        for name in ("before", "behind"):
            assert wire.sent[name, index][:20] == wire.sent["first", index][:20]
            assert len(wire.sent[name, index]) == 21
    service.passes.close()


async def test_cached_blocks_are_read_beside_the_event_loop(
    wire: Wire, load_tiny: Callable[[str], LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_tiny("llama")
    wire.token_bytes = model.layout.key_bytes(0)
    service, text = Service(model, False), list(range(9))
    await service.run(asked("first", text))
    threads = set()
    original = torch.Tensor.index_select

    def watched(self: torch.Tensor, *rest: Any) -> torch.Tensor:
        threads.add(threading.current_thread())
        return original(self, *rest)

    monkeypatch.setattr(torch.Tensor, "index_select", watched)
    await service.run(asked("second", text))
    assert threads
    assert threading.main_thread() not in threads
    service.passes.close()


async def test_a_failing_pass_raises_and_its_layers_break_off(
    wire: Wire, load_tiny: Callable[[str], LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, made = Service(load_tiny("llama"), True), list[PassLayers]()

    def fail(*_: object) -> None:
        raise RuntimeError("burnt")

    def kept(*given: Any, **more: Any) -> PassLayers:
        made.append(PassLayers(*given, **more))
        return made[0]

    monkeypatch.setattr(passes, "run_prompt_pass", fail)
    monkeypatch.setattr(passes, "PassLayers", kept)
    with pytest.raises(RuntimeError):
        await service.run(asked("r", [1, 2, 3]))
    with pytest.raises(PassBrokeError):
        await made[0].sent()
    service.passes.close()
