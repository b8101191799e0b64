"""What goes wrong with one line, one batch, one key or the disk costs the others nothing."""

import threading
from typing import Any

import pytest

from prefill_service.batches import BatchLimits, answers
from tests.prefill_api.batching import Serving, jsonl, line


async def test_a_line_is_bounded_as_a_request_is(serving: Serving, engine: Any) -> None:
    long, brackets = line("long", user="x" * 50_000), line("many", user=[[]] * 101_000)
    async with serving(most=BatchLimits(body_bytes=20_000)) as service:
        ended = await service.ended((await service.create(jsonl(long, line("one"), [], long)))["id"])
        assert [fault["line"] for fault in ended["errors"]["data"]] == [1, 3, 4]
        assert "expected up to 36384" in ended["errors"]["data"][0]["message"]
    async with serving() as service:
        ended = await service.ended((await service.create(jsonl(brackets)))["id"])
        assert "too many of [ and {" in ended["errors"]["data"][0]["message"]
    assert engine.requests == []


async def test_lines_are_read_beside_the_event_loop(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_body, loop = answers.read_body, threading.get_ident()

    def read(file: Any, offset: int) -> bytes:
        assert threading.get_ident() != loop
        return read_body(file, offset)

    monkeypatch.setattr(answers, "read_body", read)
    async with serving() as service:
        ended = await service.ended((await service.create(jsonl(line("one"))))["id"])
        assert ended["status"] == "completed"
