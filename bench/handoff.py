"""What the hand-off of a burst of prompts costs, beside the prompt pass that it follows.

A real decode process takes the KV through messages, through shared memory, and as 8-bit numbers. The prompts
run as one pass: alone, with the hand-off under way, and with the hand-off behind it, in turn. The first token
is each time one that ends the request, so decode steps do not count. Cost is counted in CPU seconds of both
processes as well, because they share the cores: waiting costs nothing, work does.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from bench.flags import Handoff
from bench.model import load, model_flags
from kvtransfer.errors import LostError
from kvtransfer.frames import Encoding, keep_freed_memory, plane_bytes
from kvtransfer.messages import Open
from kvtransfer.sender import DecodeClient, HandOff
from kvtransfer.settings import TransferSettings
from local_stack.stack import Stack, free_ports
from prad.core.sampling import SamplingParams, Token
from prad.lm import LanguageModel, PackedBatch
from prefill_service.passes import PassLayers

STOP = 5  # the token that every request gets first, and that ends it
SEGMENT = TransferSettings().shared_bytes

PAYLOADS: dict[str, tuple[int, Encoding]] = {
    "messages": (0, Encoding.RAW),
    "shared memory": (SEGMENT, Encoding.RAW),
    "int8 in messages": (0, Encoding.INT8),
}


@dataclass(frozen=True)
class Cost:
    """Seconds of one burst: on the clock, and of CPU in both processes."""

    wall: float
    prefill: float
    decode: float

    @property
    def cpu(self) -> float:
        return self.prefill + self.decode


class Burst:
    """Prompts of one length, and the ways to run and to hand them over."""

    def __init__(self, model: LanguageModel, decode: psutil.Process, prompts: int, tokens: int) -> None:
        self._model = model
        self._spec = model.spec
        self._decode = decode
        generator = torch.Generator().manual_seed(0)
        high = min(40_000, model.vocab_size)
        self._ids = torch.randint(6, high, (prompts, tokens), generator=generator).tolist()
        self._count = 0
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._forward(lambda _, key, value: self._kept.append((key.contiguous(), value.contiguous())))

    async def run(
        self, client: DecodeClient | None, encoding: Encoding, *, compute: bool, overlap: bool = True
    ) -> Cost:
        """The pass and the hand-off through `client` (None: the pass alone). compute False: the hand-off
        alone, of layers that are there. `overlap`: as for `PassLayers`."""
        loop = asyncio.get_running_loop()
        before = time.perf_counter(), time.process_time(), _cpu_s(self._decode)
        hand_offs = [] if client is None else await self._opened(client)
        length = len(self._ids[0])
        rows = [hand_off.rows(i * length, 0, length) for i, hand_off in enumerate(hand_offs)]
        layers = PassLayers(self._model.num_layers, rows, encoding, overlap=overlap, after=None)
        if compute:
            await loop.run_in_executor(None, self._forward, layers.put)
        else:
            await loop.run_in_executor(None, self._put_all, layers)
        await layers.sent()
        await asyncio.gather(*(hand_off.commit([Token(STOP)]) for hand_off in hand_offs))
        after = time.perf_counter(), time.process_time(), _cpu_s(self._decode)
        return Cost(*(b - a for a, b in zip(before, after, strict=True)))

    def mib(self, encoding: Encoding) -> float:
        """Of its KV on the wire."""
        layers = range(self._model.num_layers)
        token = sum(sum(plane_bytes(self._spec.layout, layer, encoding)) for layer in layers)
        return round(sum(map(len, self._ids)) * token / 2**20, 1)

    async def _opened(self, client: DecodeClient) -> list[HandOff]:
        self._count += 1
        length = len(self._ids[0])
        sampling = SamplingParams(max_tokens=2, stop_ids=frozenset({STOP}))
        names = [f"{length}-{self._count}-{i}" for i in range(len(self._ids))]
        return await asyncio.gather(
            *(client.open(Open(name, self._spec, length, length, length, sampling)) for name in names)
        )

    def _forward(self, layer_done: Callable[[int, Tensor, Tensor], None]) -> None:
        with torch.inference_mode():
            self._model.forward(
                PackedBatch.of_sequences(
                    self._ids,
                    device=self._model.device,
                    layer_done=layer_done,
                    kernels=self._model.kernels,
                )
            )

    def _put_all(self, layers: PassLayers) -> None:
        for layer, (key, value) in enumerate(self._kept):
            layers.put(layer, key, value)


def run(arguments: Handoff) -> dict[str, Any]:
    keep_freed_memory()  # as a prefill service does
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as folder, Stack(Path(folder)) as stack:
        stack.start("decode", [*model_flags(arguments), "--port", str(port), "--kv-cache-mib", "256"])
        (decode,) = (p for p in psutil.Process().children() if str(port) in p.cmdline())
        model, told = load(arguments), (arguments.bursts, arguments.rounds)
        rows = asyncio.run(_measure(model, decode, port, stack, *told))
    return {"model": arguments.model, "rows": rows}


def plot(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    rows = result["rows"][::-1]
    names = [f"{row['burst']}: {row['payload']}" for row in rows]
    at = range(len(rows))
    axes.barh([y + 0.2 for y in at], [100 * r["cpu_of_pass"] for r in rows], 0.4, label="CPU, alone")
    behind = [100 * r["behind_wall_of_pass"] for r in rows]
    axes.barh([y - 0.2 for y in at], behind, 0.4, label="time added, behind the pass")
    axes.axvline(15, linestyle="--", color="gray", label="target over gRPC")
    axes.set_yticks(list(at), names)
    axes.set(xlabel="% of the prompt pass", title="The hand-off of a burst")
    figure.legend(loc="outside lower center", ncols=3)


async def _measure(
    model: LanguageModel,
    decode: psutil.Process,
    port: int,
    stack: Stack,
    shapes: list[tuple[int, int]],
    rounds: int,
) -> list[dict[str, Any]]:
    async with AsyncExitStack() as open_clients:
        clients = {}
        for payload, (shared_bytes, _) in PAYLOADS.items():
            client = DecodeClient(f"127.0.0.1:{port}", TransferSettings(shared_bytes=shared_bytes))
            clients[payload] = await open_clients.enter_async_context(client)
            await open_clients.enter_async_context(await _attached(client, stack))
        rows = []
        for prompts, tokens in shapes:
            burst = Burst(model, decode, prompts, tokens)
            figures = await _figures(burst, clients, rounds)
            rows += [{"burst": f"{prompts} x {tokens} tokens"} | row for row in figures]
    return rows


@dataclass(frozen=True, slots=True)
class _Pair:
    """A pass without a hand-off, and what was measured right behind it: the machine's speed changes, but
    less from one to the next than within a round."""

    plain: Cost
    other: Cost


async def _figures(burst: Burst, clients: dict[str, DecodeClient], rounds: int) -> list[dict[str, Any]]:
    """A row for each payload."""
    kinds: dict[tuple[str, str], Callable[[], Awaitable[Cost]]] = {}
    for payload, client in clients.items():
        run = partial(burst.run, client, PAYLOADS[payload][1])
        kinds["overlapped", payload] = partial(run, compute=True)
        kinds["behind", payload] = partial(run, compute=True, overlap=False)
        kinds["alone", payload] = partial(run, compute=False)
        await kinds["alone", payload]()  # warms up; the pass was run once to keep its layers
    beside: dict[tuple[str, str], list[_Pair]] = {kind: [] for kind in kinds}
    for number in range(rounds):  # each begins with another
        for kind in (*list(kinds)[number % len(kinds) :], *list(kinds)[: number % len(kinds)]):
            alone = await burst.run(None, Encoding.RAW, compute=True)
            beside[kind].append(_Pair(alone, await kinds[kind]()))
    return [
        {"payload": payload, "mib": burst.mib(PAYLOADS[payload][1])}
        | _row(*(beside[what, payload] for what in ("alone", "overlapped", "behind")))
        for payload in clients
    ]


def _row(alone: list[_Pair], overlapped: list[_Pair], behind: list[_Pair]) -> dict[str, Any]:
    passes = [pair.plain for pair in (*alone, *overlapped, *behind)]
    return {
        "pass_wall_ms": _ms(c.wall for c in passes),
        "pass_cpu_ms": _ms(c.cpu for c in passes),
        # of the hand-off alone, whose CPU time the pass does not blur
        "cpu_of_pass": _median(pair.other.cpu / pair.plain.cpu for pair in alone),
        "overlapped_wall_of_pass": _median(pair.other.wall / pair.plain.wall - 1 for pair in overlapped),
        "behind_wall_of_pass": _median(pair.other.wall / pair.plain.wall - 1 for pair in behind),
        "overlapped_cpu_of_pass": _median(pair.other.cpu / pair.plain.cpu - 1 for pair in overlapped),
        "cpu_ms": _ms(pair.other.cpu for pair in alone),
        "cpu_prefill_ms": _ms(pair.other.prefill for pair in alone),
        "cpu_decode_ms": _ms(pair.other.decode for pair in alone),
        "wall_ms": _ms(pair.other.wall for pair in alone),
        "rounds_wall_ms": {
            what: [[round(1000 * c.wall, 1) for c in (pair.plain, pair.other)] for pair in pairs]
            for what, pairs in (("overlapped", overlapped), ("behind", behind))
        },
    }


async def _attached(client: DecodeClient, stack: Stack) -> Any:
    while True:
        stack.check()
        try:
            return await client.attach(_name(client))
        except LostError:
            await asyncio.sleep(0.2)


def _name(client: DecodeClient) -> str:
    return f"bench-{id(client)}"


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _median(values: Any) -> float:
    return round(float(statistics.median(values)), 4)


def _ms(seconds: Any) -> float:
    return round(1000 * float(statistics.median(seconds)), 1)
