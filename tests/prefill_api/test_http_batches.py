"""Files and batches over HTTP: OpenAI's shapes, bounds, keys, and a restart in the middle that loses
nothing and asks nothing twice."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefill_service.batches import Batches, BatchLimits, FileLimits
from prefill_service.batches.records import NewBatch
from prefill_service.batches.runner import FilesInUseError
from prefill_service.catalogue import KeyRing
from prefill_service.errors import OverloadedError
from tests.prefill_api.batching import COMPLETIONS, Serving, jsonl, key, line, until


async def test_a_batch_answers_every_line_as_the_endpoint_does(serving: Serving, engine: Any) -> None:
    good = [line(f"r{number}", seed=number) for number in range(9)]
    async with serving() as service:
        sent = (await service.upload(jsonl(*good))).json()
        assert {k: sent[k] for k in ("object", "filename", "purpose", "status")} == {
            "object": "file",
            "filename": "in.jsonl",
            "purpose": "batch",
            "status": "processed",
        }
        assert (await service.client.get(f"/v1/files/{sent['id']}/content")).content == jsonl(*good)
        direct = [(await service.client.post(COMPLETIONS, json=each["body"])).json() for each in good]
        assert not any(request.behind for request in engine.requests)
        made = await service.create(jsonl(*good, line("bad", temperature=-1)), metadata={"for": "me"})
        assert (made["object"], made["status"], made["metadata"]) == ("batch", "validating", {"for": "me"})
        ended = await service.ended(made["id"])
        assert ended["status"] == "completed"
        assert ended["request_counts"] == {"total": 10, "completed": 9, "failed": 1}
        assert all(request.behind for request in engine.requests[len(good) :])
        answered = await service.lines(ended["output_file_id"])
        assert [answered[f"r{n}"]["response"]["body"]["choices"] for n in range(9)] == [
            each["choices"] for each in direct
        ]
        assert {each["response"]["status_code"] for each in answered.values()} == {200}
        failed = await service.lines(ended["error_file_id"])
        assert failed["bad"]["response"]["status_code"] == 400
        assert failed["bad"]["response"]["body"]["error"]["param"] == "temperature"
        metrics = (await service.client.get("/metrics")).text
        assert 'route="batch /v1/completions",status="200",task="e2e"' in metrics


async def test_what_is_wrong_with_a_file_is_told_by_line_before_anything_is_asked(
    serving: Serving, engine: Any
) -> None:
    lines = [
        line("one"),
        line("one"),
        {**line("two"), "method": "GET"},
        {**line("three"), "url": "/v1/chat/completions"},
        line("four", stream=True),
        {**line("five"), "more": 1},
        {"custom_id": 6},
        [7],
    ]
    async with serving() as service:
        ended = await service.ended((await service.create(jsonl(*lines) + b"{torn"))["id"])
        assert ended["status"] == "failed"
        faults = ended["errors"]["data"]
        assert [(fault["line"], fault["param"]) for fault in faults] == [
            (2, "custom_id"),
            (3, "method"),
            (4, "url"),
            (5, "body.stream"),
            (6, None),
            (7, "custom_id"),
            (8, None),
            (9, None),
        ]
        assert "is there twice" in faults[0]["message"]
        empty = await service.ended((await service.create(b"\n"))["id"])
        assert empty["errors"]["data"][0]["code"] == "empty_file"
    assert engine.requests == []
    async with serving(most=BatchLimits(lines=1)) as service:
        many = await service.ended((await service.create(jsonl(line("one"), line("two"))))["id"])
        assert many["errors"]["data"][0]["message"] == "expected up to 1 lines: split the file"


async def test_a_restart_in_the_middle_loses_nothing_and_asks_nothing_twice(
    serving: Serving, engine: Any, tmp_path: Path
) -> None:
    lines = [line(f"r{number}") for number in range(12)]
    held: set[str] = set()

    def stuck(request: Any) -> bool:
        if len(engine.requests) > 8:
            held.add(request.answer)
        return request.answer in held

    engine.pause_at, engine.pauses = 1, stuck
    async with serving() as service:
        made = await service.create(jsonl(*lines))
        for _ in range(4):
            await engine.paused.acquire()
        counted = (await service.client.get(f"/v1/batches/{made['id']}")).json()
        done = counted["request_counts"]["completed"]
        assert (counted["status"], counted["request_counts"]["total"]) == ("in_progress", 12)
        assert 0 < done < 12
    assert not engine.open
    with (tmp_path / "kept" / "batches" / f"{made['id']}.answered").open("ab") as file:
        file.write(b'{"id": "torn", "custom_id": "r11", "resp')
    before = len(engine.requests)
    engine.pause_at = None
    async with serving() as service:
        ended = await service.ended(made["id"])
        assert ended["request_counts"] == {"total": 12, "completed": 12, "failed": 0}
        answered = await service.lines(ended["output_file_id"])
        assert sorted(answered) == sorted(each["custom_id"] for each in lines)
        assert len(engine.requests) - before == 12 - done
        assert [file["id"] for file in (await service.client.get("/v1/files")).json()["data"]].count(
            ended["output_file_id"]
        ) == 1
    async with serving() as service:  # what has ended stays so
        assert (await service.client.get(f"/v1/batches/{made['id']}")).json() == ended
        assert len(engine.requests) - before == 12 - done


async def test_a_cancelled_batch_keeps_what_is_answered(serving: Serving, engine: Any) -> None:
    engine.pause_at, engine.pauses = 0, lambda request: len(engine.requests) > 2
    async with serving(most=BatchLimits(at_once=1)) as service:
        made = await service.create(jsonl(*(line(f"r{number}") for number in range(5))))
        await engine.paused.acquire()
        cancelled = await service.client.post(f"/v1/batches/{made['id']}/cancel")
        assert cancelled.json()["status"] in ("cancelling", "cancelled")
        ended = await service.ended(made["id"])
        assert (ended["status"], ended["request_counts"]["completed"]) == ("cancelled", 2)
        assert sorted(await service.lines(ended["output_file_id"])) == ["r0", "r1"]
        again = await service.client.post(f"/v1/batches/{made['id']}/cancel")
        assert again.status_code == 400
        await engine.all_closed.wait()
        assert not engine.open


async def test_what_is_not_answered_in_time_is_named(serving: Serving, engine: Any) -> None:
    engine.pause_at, engine.pauses = 0, lambda request: len(engine.requests) > 1
    async with serving(most=BatchLimits(at_once=1)) as service:
        made = await service.create(jsonl(*(line(f"r{number}") for number in range(3))))
        await engine.paused.acquire()
    record = service.batches.find(made["id"], None)
    record.expires_at = 1
    await service.batches._write(record)
    async with serving() as service:
        ended = await service.ended(made["id"])
        assert (ended["status"], ended["request_counts"]["completed"]) == ("expired", 1)
        failed = await service.lines(ended["error_file_id"])
        assert sorted(failed) == ["r1", "r2"]
        assert {each["error"]["code"] for each in failed.values()} == {"batch_expired"}


async def test_what_expired_before_a_restart_is_expired_after_it(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, engine: Any
) -> None:
    reached = asyncio.Event()

    async def broken_off(*_: object) -> None:
        reached.set()
        raise asyncio.CancelledError

    engine.pause_at = 0
    async with serving() as service:
        made = await service.create(jsonl(line("one"), line("two")))
        await engine.paused.acquire()
    record = service.batches.find(made["id"], None)
    record.expires_at = 1
    await service.batches._write(record)
    with monkeypatch.context() as restart:
        restart.setattr(Batches, "_finalize", broken_off)
        async with serving():
            await reached.wait()
    async with serving() as service:
        ended = await service.ended(made["id"])
        assert (ended["status"], ended["request_counts"]["failed"]) == ("expired", 0)
        assert sorted(await service.lines(ended["error_file_id"])) == ["one", "two"]


async def test_a_line_says_what_was_ignored(serving: Serving) -> None:
    async with serving(unknown_fields="warn") as service:
        ended = await service.ended((await service.create(jsonl(line("a", foo=1), line("b"))))["id"])
        answered = await service.lines(ended["output_file_id"])
        assert answered["a"]["response"]["prad"] == {"ignored_fields": "foo"}
        assert "prad" not in answered["b"]["response"]


async def test_an_overloaded_service_is_waited_for(
    serving: Serving, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefill_service.batches.answers._LONGEST_WAIT_S", 0.0)
    engine.error, engine.fail_at = OverloadedError("full"), 0
    engine.fails = lambda request: len(engine.requests) < 9
    async with serving() as service:
        ended = await service.ended((await service.create(jsonl(line("one"), line("two"))))["id"])
        assert ended["request_counts"] == {"total": 2, "completed": 2, "failed": 0}


async def test_everybody_has_files_and_batches_of_their_own(serving: Serving) -> None:
    keys = KeyRing()
    keys.replace([key("alice"), key("bob")])
    async with serving(keys=keys) as service:
        made = await service.create(jsonl(line("one")), "alice")
        await service.ended(made["id"], "alice")
        for path in (f"/v1/batches/{made['id']}", f"/v1/files/{made['input_file_id']}"):
            for token, status in (("alice", 200), ("bob", 404)):
                got = await service.client.get(path, headers={"authorization": f"Bearer {token}"})
                assert got.status_code == status
        headers = {"authorization": "Bearer bob"}
        assert (await service.client.get("/v1/files", headers=headers)).json()["data"] == []
        assert (await service.client.get("/v1/batches", headers=headers)).json()["data"] == []
        asked = {"input_file_id": made["input_file_id"], "endpoint": COMPLETIONS, "completion_window": "24h"}
        stolen = await service.client.post("/v1/batches", json=asked, headers=headers)
        assert stolen.status_code == 404
        sent = (await service.upload(jsonl(line("one")), "bob")).json()
        keys.replace([key("alice")])
        wanted = NewBatch(input_file_id=sent["id"], endpoint=COMPLETIONS, completion_window="24h")
        revoked = await service.batches.create(wanted, "bob")
        await until(lambda: revoked.has_ended)
        assert (revoked.status, (revoked.errors or [])[0]["code"]) == ("failed", "invalid_api_key")


async def test_files_are_listed_in_pages_and_deleted(serving: Serving, engine: Any) -> None:
    async with serving() as service:
        names = [(await service.upload(jsonl(line(f"r{n}")))).json()["id"] for n in range(3)]
        page = (await service.client.get("/v1/files", params={"limit": 2})).json()
        assert (len(page["data"]), page["has_more"]) == (2, True)
        rest = (await service.client.get("/v1/files", params={"after": page["last_id"]})).json()
        found = [file["id"] for file in page["data"] + rest["data"]]
        assert (sorted(found), rest["has_more"]) == (sorted(names), False)
        wrong = await service.client.get("/v1/files", params={"limit": "many"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "limit")
        gone = await service.client.delete(f"/v1/files/{names[0]}")
        assert gone.json() == {"id": names[0], "object": "file", "deleted": True}
        assert (await service.client.get(f"/v1/files/{names[0]}")).status_code == 404
        engine.pause_at = 0
        made = await service.create(jsonl(line("one")))
        await engine.paused.acquire()
        used = await service.client.delete(f"/v1/files/{made['input_file_id']}")
        assert (used.status_code, made["id"] in used.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("fields", "content", "status", "code"),
    [
        ({"purpose": "fine-tune"}, b"{}", 400, None),
        ({"more": "1"}, b"{}", 400, None),
        ({"expires_after[seconds]": "soon"}, b"{}", 400, None),
        ({}, b"x" * 200_000, 413, "request_too_large"),
        ({}, b"x" * 2000, 413, "storage_full"),
    ],
)
async def test_what_is_no_file_for_us_is_refused(
    serving: Serving, fields: dict[str, str], content: bytes, status: int, code: str | None
) -> None:
    async with serving(FileLimits(file_bytes=100_000, all_bytes=1500)) as service:
        refused = await service.upload(content, **fields)
        assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
        assert service.batches.files.taken == 0


async def test_number_of_files_and_batches_are_bounded(serving: Serving, engine: Any) -> None:
    engine.pause_at = 0
    async with serving(FileLimits(most=2), BatchLimits(most=1)) as service:
        made = await service.create(jsonl(line("one")))
        asked = {k: made[k] for k in ("input_file_id", "endpoint", "completion_window")}
        second = await service.client.post("/v1/batches", json=asked)
        assert (second.status_code, second.json()["error"]["code"]) == (429, "overloaded")
        await service.upload(b"{}")
        assert (await service.upload(b"{}")).json()["error"]["code"] == "storage_full"


async def test_outputs_wait_for_room(serving: Serving) -> None:
    content = jsonl(line("one"), line("two"))
    async with serving(FileLimits(all_bytes=len(content) + 300), BatchLimits(at_once=1)) as service:
        other = (await service.upload(b" " * 10)).json()["id"]
        made = await service.create(content)
        batch = service.batches.find(made["id"], None)
        await until(lambda: batch.request_counts.completed)
        shown = (await service.client.get(f"/v1/batches/{made['id']}")).json()
        assert (shown["status"], shown["prad"]) == ("in_progress", {"waits_for_room": True})
        await service.client.delete(f"/v1/files/{other}")
        service.batches.files.count(-10_000, None)  # as if much were deleted
        assert (await service.ended(made["id"]))["status"] == "completed"


async def test_what_has_expired_is_deleted(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefill_service.batches.runner._SWEEP_S", 0.01)
    async with serving() as service:
        made = await service.create(jsonl(line("one")))
        await service.ended(made["id"])
    async with serving(FileLimits(keep_s=-10.0)) as service:
        await until(lambda: not service.batches.of(None))
        assert (await service.upload(jsonl(line("two")))).status_code == 200


async def test_a_folder_is_one_services(serving: Serving, tmp_path: Path) -> None:
    async with serving():
        with pytest.raises(FilesInUseError, match="another service keeps its files in"):
            Batches(tmp_path / "kept", FileLimits(), BatchLimits(), KeyRing())


async def test_without_a_folder_the_answer_says_how_to_get_one(client: httpx.AsyncClient) -> None:
    for method, path in (
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("GET", "/v1/batches"),
        ("GET", "/v1/batches/batch_1"),
    ):
        refused = await client.request(method, path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "files_off")
        assert "--files-dir" in refused.json()["error"]["message"]


async def test_embeddings_are_refused_by_name(client: httpx.AsyncClient) -> None:
    refused = await client.post("/v1/embeddings", json={"input": "food"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "not_supported")
    assert "embeddings are not served here" in refused.json()["error"]["message"]
