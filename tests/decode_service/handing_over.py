"""Tiny random models, and a stand-in for the prefill service: a real prompt pass, a real hand-off."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from decode_service.server import DecodeServer
from decode_service.settings import DecodeSettings
from kvtransfer.errors import LostError
from kvtransfer.messages import Open
from kvtransfer.sender import DecodeClient, HandOff, send_layer
from kvtransfer.settings import TransferSettings
from kvtransfer.tokens import TokenStream
from prad.core.sampling import SamplingParams, Token, TokenEvent
from prad.lm import LanguageModel, PackedBatch
from prad.lm.attention import NAME, register

VOCAB = 97


@dataclass(frozen=True)
class Prompted:
    """A prompt pass's outcome: per layer keys and values [tokens, kv_heads, dim], logits [vocab]."""

    ids: tuple[int, ...]
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    logits: torch.Tensor


def prompt_pass(model: LanguageModel, ids: Sequence[int]) -> Prompted:
    layers: list[tuple[torch.Tensor, torch.Tensor]] = []
    batch = PackedBatch.of_sequences([ids], layer_done=lambda _, k, v: layers.append((k, v)))
    with torch.inference_mode():
        logits = model.forward(batch)[0]
    return Prompted(tuple(ids), layers, logits)


def all_logits(model: LanguageModel, ids: Sequence[int]) -> torch.Tensor:
    """The monolithic pass: logits [tokens, vocab]."""
    with torch.inference_mode():
        return model.forward(PackedBatch.of_sequences([ids], logit_rows=range(len(ids))))


def raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().clone().view(torch.uint8).numpy())


@dataclass
class Collected:
    """What came back for each (request_id, choice), and every frame's number."""

    events: dict[tuple[str, int], list[TokenEvent]] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    lost: LostError | None = None

    async def read(self, stream: TokenStream) -> None:
        try:
            async for frame in stream:
                async with self.changed:
                    self.numbers.append(frame.number)
                    for event in frame.events:
                        self.events.setdefault((event.request_id, event.choice), []).append(event)
                    self.changed.notify_all()
        except LostError as error:
            async with self.changed:
                self.lost = error
                self.changed.notify_all()
            raise

    async def until(self, request_id: str, choice: int = 0, count: int | None = None) -> list[TokenEvent]:
        """A sequence's events, once it has finished (or has `count` of them); LostError if it never will."""

        def there() -> bool:
            events = self.events.get((request_id, choice), [])
            return bool(events) and (
                events[-1].finish_reason is not None or (count is not None and len(events) >= count)
            )

        async with self.changed:
            await self.changed.wait_for(lambda: there() or self.lost is not None)
        if not there():
            assert self.lost is not None
            raise self.lost
        return self.events[request_id, choice]


async def send(
    hand_off: HandOff, layer: int, key: torch.Tensor, value: torch.Tensor, first_token: int = 0
) -> None:
    """A layer's keys and values [tokens, kv_heads, dim] of one hand-off alone."""
    await send_layer(layer, [raw(key), raw(value)], [hand_off.rows(0, first_token, len(key))])


class Prefill:
    """One client of a decode service."""

    def __init__(self, model: LanguageModel, client: DecodeClient, stream: TokenStream) -> None:
        self.model = model
        self.client = client
        self.stream = stream
        self.got = Collected()
        self._names = (f"{stream.client_id}-{i}" for i in itertools.count())

    def request(self, kv_len: int, sampling: SamplingParams, **more: object) -> Open:
        values = {
            "request_id": next(self._names),
            "model": self.model.spec,
            "kv_len": kv_len,
            "prompt_len": kv_len,
            "next_position": kv_len,
            "sampling": sampling,
        }
        return Open(**(values | more))  # type: ignore[arg-type]

    async def send(self, hand_off: HandOff, prompted: Prompted) -> None:
        for layer, (key, value) in enumerate(prompted.layers):
            await send(hand_off, layer, key, value)

    async def hand_over(
        self, ids: Sequence[int], sampling: SamplingParams, first: Sequence[int] | None = None, **more: object
    ) -> tuple[Open, list[int]]:
        """Prompt pass and hand-off; the greedy token is first unless `first` says else."""
        request = self.request(len(ids), sampling, **more)
        async with await self.client.open(request) as hand_off:
            prompted = prompt_pass(self.model, ids)
            await self.send(hand_off, prompted)
            tokens = list(first or [int(prompted.logits.argmax())] * request.choices)
            await hand_off.commit([Token(t) for t in tokens])
        return request, tokens

    async def generate(self, ids: Sequence[int], sampling: SamplingParams, **more: object) -> list[int]:
        """All output tokens of choice 0."""
        request, first = await self.hand_over(ids, sampling, **more)
        events = await self.got.until(request.request_id)
        return [first[0], *(t.id for e in events for t in e.tokens)]


def quick(**changes: object) -> TransferSettings:
    return TransferSettings(**({"backoff_max_s": 0.1, "acknowledge_every": 3, "silence_s": 30.0} | changes))  # type: ignore[arg-type]


def decode_settings(**changes: object) -> DecodeSettings:
    """Without drafts, which have tests of their own: what is to run for a while would be over too soon."""
    values = {"port": 0, "kv_cache_mib": 1, "drain_s": 0, "speculate": 0}
    return DecodeSettings(**(values | changes))  # type: ignore[arg-type]


@asynccontextmanager
async def prefilling(
    model: LanguageModel, port: int, client_id: str = "prefill", settings: TransferSettings | None = None
) -> AsyncIterator[Prefill]:
    async with (
        DecodeClient(f"127.0.0.1:{port}", settings or quick()) as client,
        await client.attach(client_id) as stream,
    ):
        prefill = Prefill(model, client, stream)
        reader = asyncio.create_task(prefill.got.read(stream))
        try:
            yield prefill
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)


class Proxy:
    """A TCP connection in two halves, so that a test can cut it."""

    def __init__(self) -> None:
        self.port = 0
        self._writers: list[asyncio.StreamWriter] = []
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._target = 0

    @asynccontextmanager
    async def to(self, target: int) -> AsyncIterator["Proxy"]:
        self._target = target
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.cut()

    def freeze(self) -> None:
        """Takes what is sent, and passes nothing on, until `cut`."""
        self._thawed.clear()

    def cut(self) -> None:
        self._thawed.set()
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, far_writer]
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                await self._thawed.wait()
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


async def all_free(server: DecodeServer) -> None:
    """Waits until nothing is reserved and nothing runs; then every block must be free."""
    while (s := server.engine.status()).sequences or s.free_blocks != s.total_blocks:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def memory_files() -> list[str]:
    """This process's files of shared memory, its mappings included."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return [link for link in links if link.startswith("/memfd:prad-kv")]


def llama() -> LanguageModel:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=160,
        initializer_range=0.2,
        attn_implementation=NAME,
    )
    register()
    return LanguageModel(LlamaForCausalLM(config), "llama")


def gpt2() -> LanguageModel:
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=160,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        attn_implementation=NAME,
    )
    register()
    return LanguageModel(GPT2LMHeadModel(config), "gpt2")


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()
