"""A client of an app with files and batches, which run."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Literal

import httpx

from adapter_registry.keys import NewKey, StoredKey, hashed, issued
from prefill_service.api import ApiAccess, ApiLimits
from prefill_service.batches import Batches, BatchLimits, FileLimits
from prefill_service.catalogue import KeyRing

COMPLETIONS: Final = "/v1/completions"


def line(name: str, **body: Any) -> dict[str, Any]:
    asked = {"model": "e2e", "prompt": f"food {name}", "max_tokens": 3, "ignore_eos": True, **body}
    return {"custom_id": name, "method": "POST", "url": COMPLETIONS, "body": asked}


def jsonl(*lines: Any) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def key(name: str) -> StoredKey:
    """One whose token is its name."""
    return issued(None, NewKey(name=name), hashed(name), 1, "2026-01-01T00:00:00.000+00:00", "")


class Service:
    """A client of an app with batches, which run."""

    def __init__(self, client: httpx.AsyncClient, batches: Batches) -> None:
        self.client = client
        self.batches = batches

    async def upload(self, content: bytes, token: str = "none", **fields: str) -> httpx.Response:
        return await self.client.post(
            "/v1/files",
            files={"file": ("in.jsonl", content)},
            data={"purpose": "batch", **fields},
            headers={"authorization": f"Bearer {token}"},
        )

    async def create(self, content: bytes, token: str = "none", **more: Any) -> dict[str, Any]:
        sent = await self.upload(content, token)
        assert sent.status_code == 200, sent.text
        asked = {
            "input_file_id": sent.json()["id"],
            "endpoint": COMPLETIONS,
            "completion_window": "24h",
            **more,
        }
        headers = {"authorization": f"Bearer {token}"}
        made = await self.client.post("/v1/batches", json=asked, headers=headers)
        assert made.status_code == 200, made.text
        return made.json()  # type: ignore[no-any-return]

    async def ended(self, name: str, token: str = "none") -> dict[str, Any]:
        while True:
            got = await self.client.get(f"/v1/batches/{name}", headers={"authorization": f"Bearer {token}"})
            if got.json()["status"] in ("completed", "failed", "expired", "cancelled"):
                return got.json()  # type: ignore[no-any-return]
            await asyncio.sleep(0.002)

    async def lines(self, name: str | None) -> dict[str, dict[str, Any]]:
        """Of an output file, by custom_id, of which each is there once."""
        if name is None:
            return {}
        content = (await self.client.get(f"/v1/files/{name}/content")).content
        found = [json.loads(each) for each in content.splitlines()]
        assert len({each["custom_id"] for each in found}) == len(found)
        return {each["custom_id"]: each for each in found}


async def until(true: Callable[[], object]) -> None:
    while not true():  # noqa: ASYNC110
        await asyncio.sleep(0.002)


Serving = Callable[..., Any]


def serving_in(folder: Path, app: Callable[..., Any]) -> Serving:
    """What serves an app of `app`'s, each time with what was kept in `folder` before."""

    @asynccontextmanager
    async def serve(
        files: FileLimits | None = None,
        most: BatchLimits | None = None,
        keys: KeyRing | None = None,
        unknown_fields: Literal["strict", "warn"] = "strict",
    ) -> AsyncIterator[Service]:
        keys = keys or KeyRing()
        most = most or BatchLimits(at_once=4)
        batches = Batches(folder, files or FileLimits(), most, keys)
        limits = ApiLimits(max_body_bytes=20_000, unknown_fields=unknown_fields)
        served = app(limits, access=ApiAccess(keys=keys), batches=batches)
        running = asyncio.create_task(batches.run(served))
        transport = httpx.ASGITransport(served)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield Service(client, batches)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    return serve
