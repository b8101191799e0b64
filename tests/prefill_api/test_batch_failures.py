"""What goes wrong with one line, one batch, one key or the disk costs the others nothing."""

import asyncio
import json
import os
import threading
from typing import Any

import pytest

from prefill_service.batches import BatchLimits, FileLimits, Files, answers
from prefill_service.batches.lines import read_body
from prefill_service.catalogue import KeyRing
from tests.prefill_api.batching import Serving, jsonl, key, line


async def test_a_line_is_bounded_as_a_request_is(serving: Serving, engine: Any) -> None:
    long, brackets = line("long", user="x" * 50_000), line("many", user=[[]] * 101_000)
    async with serving(most=BatchLimits(body_bytes=20_000)) as service:
        ended = await service.ended((await service.create(jsonl(long, line("one"), [], long)))["id"])
        assert [fault["line"] for fault in ended["errors"]["data"]] == [1, 3, 4]
        assert "expected up to 36384" in ended["errors"]["data"][0]["message"]
    async with serving() as service:
        ended = await service.ended((await service.create(jsonl(brackets)))["id"])
        assert "too many of [ and {" in ended["errors"]["data"][0]["message"]
        deep = jsonl(line("one"), line("two", user=json.loads("[" * 400 + "]" * 400)))
        ended = await service.ended((await service.create(deep))["id"])
        assert [(fault["line"], fault["param"]) for fault in ended["errors"]["data"]] == [(2, "body")]
    assert engine.requests == []


async def test_lines_are_read_beside_the_event_loop(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = threading.get_ident()

    def read(file: Any, offset: int) -> bytes:
        assert threading.get_ident() != loop
        return read_body(file, offset)

    monkeypatch.setattr(answers, "read_body", read)
    async with serving() as service:
        ended = await service.ended((await service.create(jsonl(line("one"))))["id"])
        assert ended["status"] == "completed"


async def test_what_is_answered_before_the_disk_is_full_is_kept(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = os.write, list[int]()

    def torn(file: int, data: bytes) -> int:
        written.append(len(data))
        return write(file, data[:9] if len(written) == 3 else data)

    async with serving(most=BatchLimits(at_once=1)) as service:
        monkeypatch.setattr("prefill_service.batches.lines.os.write", torn)
        ended = await service.ended((await service.create(jsonl(*map(line, "abcd"))))["id"])
        assert (ended["status"], ended["errors"]["data"][0]["code"]) == ("failed", "internal_error")
        assert ended["request_counts"] == {"total": 4, "completed": 2, "failed": 0}
        assert sorted(await service.lines(ended["output_file_id"])) == ["a", "b"]
        assert service.batches.files.taken == sum(file.bytes for file in service.batches.files.of(None))


async def test_a_disk_that_fails_ends_neither_the_service_nor_leaves_a_batch_that_never_runs(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError("input/output error")

    async def swept(*_: object) -> None:
        failing()

    monkeypatch.setattr(Files, "sweep", swept)
    async with serving(most=BatchLimits(most=1)) as service, asyncio.timeout(20):
        with monkeypatch.context() as broken:
            broken.setattr("prefill_service.batches.runner.write_record", failing)
            with pytest.raises(AssertionError, match="internal error"):
                await service.create(jsonl(line("one")))
        assert service.batches.of(None) == []
        ended = await service.ended((await service.create(jsonl(line("one"))))["id"])
        assert ended["status"] == "completed"


async def test_a_key_that_takes_all_it_can_stalls_no_other(serving: Serving, engine: Any) -> None:
    keys = KeyRing()
    keys.replace([key("greedy"), key("other")])
    size = FileLimits(file_bytes=5000, all_bytes=10_000, most=6)
    async with serving(size, BatchLimits(most=2, at_once=1), keys) as service:
        service.batches.files.promise(5000, "greedy")  # an upload that never says how long it is, nor comes
        refused = await service.upload(b"{}", "greedy")
        assert "5000 of 5000 are used" in refused.json()["error"]["message"]
        ended = await service.ended((await service.create(jsonl(line("one")), "other"))["id"], "other")
        assert ended["status"] == "completed"
        service.batches.files.settle(5000, "greedy")
        engine.pause_at = 0
        made = await service.create(jsonl(line("one")), "greedy")
        asked = {k: made[k] for k in ("input_file_id", "endpoint", "completion_window")}
        headers = {"authorization": "Bearer greedy"}
        second = await service.client.post("/v1/batches", json=asked, headers=headers)
        assert (second.status_code, second.json()["error"]["code"]) == (429, "overloaded")
        assert "1 batches of this key" in second.json()["error"]["message"]
        await service.create(jsonl(line("one")), "other")
        service.batches.files.count(5000, "greedy")
        assert [service.batches.files.full(name) for name in ("greedy", "other")] == [True, False]
        engine.pause_at = None
    async with serving(FileLimits(most=2), BatchLimits(most=2), keys) as service:
        assert (await service.upload(b"{}", "greedy")).status_code == 413
