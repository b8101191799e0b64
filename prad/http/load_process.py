"""A light HTTP client in a process of its own, so that its CPU time is known and can be subtracted.

One line of JSON each way, until stdin ends:

    {"url": u, "path": p, "headers": {...}, "timeout_s": t, "at_once": n,
     "requests": [{"at_s": offset or null, "body": {...}}, ...]}
    {"answers": [...], "cpu_s": c, "wall_s": w}

A request is sent at its offset, however many are still running (open loop), or without one as soon as fewer
than `at_once` run (closed loop). It reads bare bytes and looks for the start of each event: parsing JSON for
64 streams would take the CPU that the server needs. A request that fails says how, and the others go on.
"""

import asyncio
import json
import re
import ssl
import sys
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_EVENTS = {
    "completions": re.compile(rb'"choices":\s*\[\s*\{'),  # the usage at the end has no choices
    "chat": re.compile(rb'"content":\s*"[^"]'),  # nor a chat's opening any text
}
_LONGEST_MARK = 32
"""Bytes of what is looked for, at most: it may lie across two reads."""
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
_DONE, _END = b"[DONE]", 100
"""What ends a stream, in so many of its last bytes: of a server that tells no usage each event is a token."""


@dataclass(frozen=True)
class _Place:
    """Whom requests go to, and what stands in their heads."""

    host: str
    port: int
    tls: ssl.SSLContext | None
    head: str
    event: re.Pattern[bytes]
    timeout_s: float | None

    @classmethod
    def of(cls, asked: dict[str, Any]) -> "_Place":
        url = urlsplit(asked["url"])
        secure = url.scheme == "https"
        host, port = url.hostname or "", url.port or (443 if secure else 80)
        lines = "".join(f"{name}: {value}\r\n" for name, value in asked["headers"].items())
        head = (
            f"POST {url.path}{asked['path']} HTTP/1.1\r\nhost: {url.netloc.rpartition('@')[2]}\r\n"
            f"connection: close\r\naccept-encoding: identity\r\ncontent-type: application/json\r\n{lines}"
        )
        kind = "chat" if "/chat/" in asked["path"] else "completions"
        tls = ssl.create_default_context() if secure else None
        return cls(host, port, tls, head, _EVENTS[kind], asked["timeout_s"])


async def _ask(
    place: _Place, request: dict[str, Any], began: float, slots: asyncio.Semaphore
) -> dict[str, Any]:
    if request["at_s"] is not None:
        await asyncio.sleep(began + request["at_s"] - time.perf_counter())
        return await _exchange(place, request["body"], began)
    async with slots:
        return await _exchange(place, request["body"], began)


async def _exchange(place: _Place, body: dict[str, Any], began: float) -> dict[str, Any]:
    """Times are seconds since the run began; `events_s` holds when each event arrived."""
    sent = time.perf_counter()
    events: list[float] = []
    received = bytearray()
    try:
        async with asyncio.timeout(place.timeout_s):
            await _read(place, body, began, events, received)
        said = ""
    except (OSError, TimeoutError) as error:
        said = str(error) or f"no answer within {place.timeout_s} s"
    counted = _USAGE.findall(received)
    whole = len(events) if _DONE in received[-_END:] else 0
    tokens = int(counted[-1]) if counted else whole
    return {
        "status": int(received.split(b" ", 2)[1]) if received.startswith(b"HTTP/") else 0,
        "sent_s": sent - began,
        "done_s": time.perf_counter() - began,
        "events_s": events,
        "tokens": tokens,
        "said": "" if tokens else said or _said(received),
    }


def _said(received: bytearray) -> str:
    """What a server answers instead of tokens: the message of an error, so that those alike are counted
    together, else the last of it."""
    body = bytes(received).partition(b"\r\n\r\n")[2]
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[-300:].decode(errors="replace")


async def _read(
    place: _Place, body: dict[str, Any], began: float, events: list[float], received: bytearray
) -> None:
    payload = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(place.host, place.port, ssl=place.tls)
    try:
        writer.write(f"{place.head}content-length: {len(payload)}\r\n\r\n".encode() + payload)
        seen = 0
        while data := await reader.read(1 << 16):
            now = time.perf_counter() - began
            received += data
            for found in place.event.finditer(received, seen):
                events.append(now)
                seen = found.end()
            seen = max(seen, len(received) - _LONGEST_MARK)
    finally:
        writer.close()


async def _run(asked: dict[str, Any]) -> dict[str, Any]:
    place, slots = _Place.of(asked), asyncio.Semaphore(asked["at_once"])
    began, cpu = time.perf_counter(), time.process_time()
    answers = await asyncio.gather(*(_ask(place, request, began, slots) for request in asked["requests"]))
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"answers": answers, "wall_s": wall, "cpu_s": cpu}


def main() -> None:
    for line in sys.stdin:
        sys.stdout.write(json.dumps(asyncio.run(_run(json.loads(line)))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
