"""What a long prompt does to others, and what a repeated instruction costs: the whole stack, through HTTP.

long prompt   some streams run; while a long prompt is computed, short ones come one after another. Their
              time to first token, and the streams' inter-token latency before and meanwhile: the prompt in
              one pass, in chunks, and in chunks with each way of stepping back for decode.
instruction   requests that begin with the same instruction, with and without the prefix cache.

Each variant is a prefill service of its own on the same decode service; they take turns within a round.
"""

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from bench.flags import Chunking, Variant
from bench.model import model_flags
from local_stack.stack import Stack, answers

_STREAM = 2000  # tokens; a stream is closed before it ends
_REGISTRY, _DECODE, _PREFILL = 18101, 18151, 18110
_NO_CHUNKS = ["--pass-tokens", "65536", "--chunk-tokens", "65536", "--chunked-kv-mib", "0"]
_NO_CACHE = ["--prefix-cache-mib", "0"]
LONG_PROMPT: dict[Variant, list[str]] = {
    "one pass": [*_NO_CHUNKS, *_NO_CACHE],
    "chunks": _NO_CACHE,
    "chunks of 256": ["--chunk-tokens", "256", *_NO_CACHE],
    "chunks, one thread": ["--threads", "1", *_NO_CACHE],
    "chunks, nice 10": ["--nice", "10", *_NO_CACHE],
    "chunks, rest of 50 ms": ["--yield-s", "0.05", *_NO_CACHE],
}
INSTRUCTION = {"no cache": _NO_CACHE, "cache": ["--prefix-cache-mib", "256"]}


def run(arguments: Chunking) -> dict[str, Any]:
    chosen = arguments.only or list(LONG_PROMPT)
    variants = {name: LONG_PROMPT[name] for name in chosen} | INSTRUCTION
    ports = {name: _PREFILL + i for i, name in enumerate(variants)}
    with tempfile.TemporaryDirectory() as folder, Stack(Path(folder) / "logs") as stack:
        registry = f"http://127.0.0.1:{_REGISTRY}"
        stack.start("registry", ["--port", str(_REGISTRY), "--data-dir", str(Path(folder) / "registry")])
        room = ["--kv-cache-mib", "2048"]  # for all streams' reserved lengths and the long prompt
        stack.start("decode", [*model_flags(arguments), "--port", str(_DECODE), *room])
        where = ["--decode", f"127.0.0.1:{_DECODE}", "--registry", registry, *model_flags(arguments)]
        for name, flags in variants.items():
            stack.start("prefill", [*where, "--port", str(ports[name]), *flags])
        for port in ports.values():
            ready = f"http://127.0.0.1:{port}/ready"
            stack.wait_until(lambda url=ready: answers(url), "prefill")  # type: ignore[misc]
        return asyncio.run(_measure(ports, chosen, arguments))


async def _measure(ports: dict[str, int], chosen: Sequence[str], arguments: Chunking) -> dict[str, Any]:
    disturbed: dict[str, list[dict[str, list[float]]]] = {name: [] for name in chosen}
    repeated: dict[str, list[list[float]]] = {name: [] for name in INSTRUCTION}
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        for number in range(arguments.rounds + 1):  # the first round warms up
            for name in chosen:
                print(f"round {number}: {name}", flush=True)
                disturbed[name].append(await _Client(client, ports[name]).long_prompt(arguments))
            for name in INSTRUCTION:
                repeated[name].append(await _Client(client, ports[name]).instruction(arguments))
    return {
        "model": arguments.model,
        "long_prompt": [_long_prompt_row(name, rounds[1:]) for name, rounds in disturbed.items()],
        "instruction": [_instruction_row(name, rounds[1:]) for name, rounds in repeated.items()],
    }


def plot(result: dict[str, Any], figure: Any) -> None:
    rows = result["long_prompt"][::-1]
    names = [row["name"] for row in rows]
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(names, [row["short_ttft_p99_ms"] for row in rows])
    left.set(xlabel="ms", title="short prompt: first token, p99")
    right.barh(names, [row["itl_p99_ratio"] for row in rows])
    right.set(xlabel="times undisturbed", title="between tokens, p99")


class _Client:
    """Asks one prefill service."""

    def __init__(self, client: httpx.AsyncClient, port: int) -> None:
        self._client = client
        self._url = f"http://127.0.0.1:{port}/v1/completions"

    async def long_prompt(self, arguments: Chunking) -> dict[str, list[float]]:
        """Seconds: of the streams' tokens before and meanwhile, and to the first tokens of the prompts."""
        times: list[list[float]] = [[] for _ in range(arguments.streams)]
        running = [asyncio.create_task(self._stream(_ids(arguments.short), _STREAM, each)) for each in times]
        await self.first_token(_ids(arguments.short))  # behind the streams' prompts: they all run now
        probe: list[float] = []
        await self._stream(_ids(arguments.short), arguments.undisturbed, probe)
        started = probe[2]  # its own prompt pass and hand-off are over: undisturbed from here on
        sent = time.perf_counter()
        long = asyncio.create_task(self.first_token(_ids(arguments.long)))
        short = []
        while not long.done():
            short.append(await self.first_token(_ids(arguments.short)))
        await self.first_token(_ids(arguments.short))  # whoever was held up has said something by now
        over = time.perf_counter()
        for task in running:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        return {
            "before": [g for each in times for g in _gaps(each, started, sent)],
            "meanwhile": [g for each in times for g in _gaps(each, sent, over)],
            "short": short,
            "long": [long.result()],
        }

    async def instruction(self, arguments: Chunking) -> list[float]:
        """Seconds to the first token of requests one after another; the first has a new instruction."""
        instruction = _ids(arguments.instruction)
        return [
            await self.first_token([*instruction, *_ids(arguments.short)])
            for _ in range(arguments.repeats + 1)
        ]

    async def first_token(self, prompt: list[int]) -> float:
        times: list[float] = []
        sent = time.perf_counter()
        await self._stream(prompt, 2, times)
        return times[0] - sent

    async def _stream(self, prompt: list[int], max_tokens: int, times: list[float]) -> None:
        """Notes when each token came."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True, "logprobs": 0}
        async with self._client.stream("POST", self._url, json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    tokens = json.loads(line[6:])["choices"][0]["logprobs"]["tokens"]
                    times.extend([time.perf_counter()] * len(tokens))


def _gaps(times: Sequence[float], start: float, end: float) -> list[float]:
    """Inter-token latencies of the tokens that came from `start` to `end`."""
    return [later - earlier for earlier, later in pairwise(times) if start <= later < end]


_RANDOM = random.Random(0)


def _ids(count: int) -> list[int]:
    return [_RANDOM.randrange(100, 40_000) for _ in range(count)]


def _long_prompt_row(name: str, rounds: Sequence[dict[str, list[float]]]) -> dict[str, Any]:
    every = {kind: [s for r in rounds for s in r[kind]] for kind in rounds[0]}
    slower = [_percentile(r["meanwhile"], 99) / _percentile(r["before"], 99) for r in rounds]
    return {
        "name": name,
        "short_ttft_p50_ms": _ms(_percentile(every["short"], 50)),
        "short_ttft_p99_ms": _ms(_percentile(every["short"], 99)),
        "long_ttft_ms": _ms(statistics.median(every["long"])),
        "itl_before_p50_ms": _ms(_percentile(every["before"], 50)),
        "itl_before_p99_ms": _ms(_percentile(every["before"], 99)),
        "itl_meanwhile_p50_ms": _ms(_percentile(every["meanwhile"], 50)),
        "itl_meanwhile_p99_ms": _ms(_percentile(every["meanwhile"], 99)),
        "itl_p99_ratio": round(statistics.median(slower), 2),
        "short_prompts": len(every["short"]),
    }


def _instruction_row(name: str, rounds: Sequence[list[float]]) -> dict[str, Any]:
    return {
        "name": name,
        "first_ttft_ms": _ms(statistics.median(r[0] for r in rounds)),
        "repeated_ttft_ms": _ms(statistics.median(s for r in rounds for s in r[1:])),
    }


def _percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 1)
