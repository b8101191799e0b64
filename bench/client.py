"""A light HTTP client in a process of its own, so that its CPU time is known and can be subtracted.

One line of JSON each way, until stdin ends:

    {"port": p, "requests": [{"at_s": offset or null, "body": {...}}, ...], "at_once": n}
    {"answers": [...], "cpu_s": c, "wall_s": w}

A request is sent at its offset, however many are still running (open loop), or without one as soon as fewer
than `at_once` run (closed loop). It reads bare bytes and looks for the start of each event: parsing JSON for
64 streams would take the CPU that the server needs.
"""

import asyncio
import json
import re
import sys
import time
from typing import Any

_EVENT = b'"choices":[{'  # the usage at the end has no choices
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')


async def _ask(port: int, request: dict[str, Any], began: float, slots: asyncio.Semaphore) -> dict[str, Any]:
    if request["at_s"] is not None:
        await asyncio.sleep(began + request["at_s"] - time.perf_counter())
        return await _exchange(port, request["body"], began)
    async with slots:
        return await _exchange(port, request["body"], began)


async def _exchange(port: int, body: dict[str, Any], began: float) -> dict[str, Any]:
    """Times are seconds since the run began; `events_s` holds when each event arrived."""
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
    )
    sent = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + payload)
    events: list[float] = []
    received = bytearray()
    while data := await reader.read(1 << 16):
        now = time.perf_counter() - began
        unseen = max(len(received) - len(_EVENT) + 1, 0)  # an event may lie across two reads
        received += data
        events.extend([now] * received.count(_EVENT, unseen))
    writer.close()
    tokens = _USAGE.findall(received)
    return {
        "status": int(received.split(b" ", 2)[1]) if received else 0,
        "sent_s": sent - began,
        "done_s": time.perf_counter() - began,
        "events_s": events,
        "tokens": int(tokens[-1]) if tokens else 0,
        "said": "" if tokens else received[-300:].decode(errors="replace"),
    }


async def _run(asked: dict[str, Any]) -> dict[str, Any]:
    slots = asyncio.Semaphore(asked["at_once"])
    began, cpu = time.perf_counter(), time.process_time()
    answers = await asyncio.gather(*(_ask(asked["port"], r, began, slots) for r in asked["requests"]))
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"answers": answers, "wall_s": wall, "cpu_s": cpu}


def main() -> None:
    for line in sys.stdin:
        sys.stdout.write(json.dumps(asyncio.run(_run(json.loads(line)))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
