"""What lies on the registry's disk: bounded, deleted on request, fetched back; and a disk that is full."""

import errno
import shutil
import sqlite3
from collections import namedtuple

import pytest

from adapter_registry import artefacts, storage
from adapter_registry.errors import (
    DigestMismatchError,
    FileNotStoredError,
    FolderInUseError,
    IllegalTransitionError,
    QuotaExceededError,
    StorageFullError,
)
from adapter_registry.retention import surplus
from adapter_registry.settings import RegistrySettings
from adapter_registry.sources import arrival
from adapter_registry.sqlite_store import SqliteStore
from adapter_registry.store import Idle
from prad.artefact import files_digest, read_artefact
from tests.registry.conftest import BUCKET

FOLDER = pytest.mark.parametrize("registry", ["sqlite+folder"], indirect=True)


@pytest.fixture(params=["folder", "bucket"])
def place(request):
    """Settings of where the files lie, and a client of an S3 if it is one."""
    if request.param == "folder":
        return {}, None
    return {"files": BUCKET}, request.getfixturevalue("bucket")


def settings(data_dir, **more):
    return RegistrySettings(port=0, data_dir=data_dir, log_level="warning", **more)


def test_what_is_deleted_leaves_the_disk_and_its_record_stays(registry, adapter):
    registry.verified(adapter(1))
    with pytest.raises(IllegalTransitionError, match="it answers requests: retire it first"):
        registry.client.delete("support", 1)
    registry.client.retire("support", 1)
    record = registry.client.delete("support", 1)
    assert (record.state, registry.stored, registry.staged) == (
        "deleted",
        set(),
        [],
    )
    assert [line.event for line in registry.client.version("support", 1).history][-1] == "delete"
    with pytest.raises(FileNotStoredError, match="support@1 were deleted"):
        registry.client.pull("support", 1, registry.data / "back")
    assert registry.client.delete("support", 1).state == "deleted", "once more is no mistake"
    again = registry.push(adapter(1))
    assert (again.version, again.created, registry.stored) == (2, True, {again.digest})


def test_a_version_that_fails_its_probe_may_be_deleted_at_once(registry, adapter):
    registry.push(adapter(1))
    registry.probe("support@1", ok=False, reason="too wide")
    record = registry.client.delete("support", 1)
    assert (record.state, record.reason, registry.stored) == ("deleted", "too wide", set())


def test_files_that_another_version_has_stay(registry, adapter):
    digest = registry.push(adapter(1), "a").digest
    registry.push(adapter(1), "b")
    registry.client.delete("a", 1)
    assert registry.stored == {digest}
    registry.client.delete("b", 1)
    assert registry.stored == set()


def test_a_retired_version_comes_back_through_a_probe(registry, adapter):
    registry.verified(adapter(1))
    registry.client.retire("support", 1)
    with pytest.raises(IllegalTransitionError, match="unretire it first"):
        registry.client.promote("support", 1)
    assert registry.client.unretire("support", 1).state == "pushed"
    assert registry.probe("support@1").json()["current"]
    registry.client.retire("support", 1)
    registry.client.delete("support", 1)
    with pytest.raises(IllegalTransitionError, match="its files are gone"):
        registry.client.unretire("support", 1)


def test_lists_leave_out_what_failed_unless_asked(registry, adapter):
    registry.push(adapter(1), "broken")
    registry.probe("broken@1", ok=False, reason="no")
    registry.verified(adapter(2))
    assert [task.task for task in registry.client.tasks().tasks] == ["support"]
    assert [task.task for task in registry.client.tasks(everything=True).tasks] == ["broken", "support"]
    assert len(registry.client.state().tasks) == 2, "who follows sees everything"


def test_retired_versions_are_bounded_the_longest_retired_goes_first(data_dir, serving, adapter, place):
    with serving(settings(data_dir, retired_mib=1, **place[0]), place[1]) as registry:
        sizes = 40_000  # x 16 bytes: one fits into a MiB, two do not
        for seed in (1, 2, 3):
            registry.verified(adapter(seed, values=sizes))
        registry.client.promote("support", 3)
        for version in (2, 1):
            registry.client.retire("support", version)
        states = [v.state for v in registry.client.task("support").versions]
        assert states == ["retired", "deleted", "routable"]
        assert len(registry.stored) == 2
        assert registry.client.version("support", 2).history[-1].reason == "made room for others"
    with serving(settings(data_dir, retired_mib=0, **place[0]), place[1]) as registry:
        assert [v.state for v in registry.client.task("support").versions] == [
            "deleted",
            "deleted",
            "routable",
        ]
        assert len(registry.stored) == 1
        registry.push(adapter(4))
        record = registry.probe("support@4", ok=False, reason="too wide").json()
        assert record["reason"] == "too wide"
        record = registry.client.version("support", 4)
        assert (record.state, record.reason) == ("deleted", "too wide"), "it still says why"


def test_what_goes_is_as_much_as_needs_to():
    a, b, c = Idle("t", 1, "a", 5), Idle("t", 2, "b", 4), Idle("u", 1, "a", 5)
    assert surplus([a, b, c], 9) == ()
    assert surplus([a, b, c], 8) == (a, b), "the files of the first are the third's as well"
    assert surplus([a, b, c], 4) == (a, b, c)


def test_files_are_fetched_back(registry, adapter, tmp_path):
    folder = adapter(1)
    pushed = registry.push(folder)
    back = tmp_path / "deep" / "back"
    registry.client.pull("support", 1, back)
    assert (files_digest(back), read_artefact(back).record.licence) == (pushed.digest, "MIT")
    assert list(back.parent.iterdir()) == [back]
    with pytest.raises(FolderInUseError, match="not an empty folder"):
        registry.client.pull("support", 1, back)


@FOLDER
def test_damaged_files_are_not_fetched_back(registry, adapter, tmp_path):
    pushed = registry.push(adapter(1))
    weights = registry.data / "artefacts" / pushed.digest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DigestMismatchError):
        registry.client.pull("support", 1, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("where", "name"), [(arrival.Arrival, "_new"), (shutil, "copyfileobj")])
def test_a_full_disk_is_said(registry, adapter, monkeypatch, where, name):
    refuses_full(registry, adapter, monkeypatch, where, name)


@FOLDER
def test_a_full_disk_is_said_as_files_are_flushed(registry, adapter, monkeypatch):
    refuses_full(registry, adapter, monkeypatch, artefacts, "_flush")


def refuses_full(registry, adapter, monkeypatch, where, name):
    folder = adapter(1)
    files = [("files", (p.name, p.read_bytes())) for p in folder.iterdir()]
    sending = {"json": {"path": str(folder)}} if name == "_new" else {"files": files}
    with monkeypatch.context() as patch:
        patch.setattr(where, name, full)
        response = registry.http.post("/v1/tasks/support/versions", **sending)
    assert (response.status_code, response.json()["error"]["code"]) == (507, "storage_full")
    assert "disk is full" in response.json()["error"]["message"]
    assert (registry.stored, registry.client.state().revision) == (set(), 0)
    assert registry.staged == []
    assert registry.push(folder).created, "with room again it works again"


@FOLDER
def test_a_full_disk_is_said_by_the_database_too(registry, adapter, monkeypatch):
    def no_room(*_, **__):
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(SqliteStore, "push", no_room)
        with pytest.raises(StorageFullError, match="disk is full"):
            registry.push(adapter(1))
    registry.verified(adapter(1))
    with monkeypatch.context() as patch:
        patch.setattr(SqliteStore, "change", no_room)
        with pytest.raises(StorageFullError):
            registry.client.promote("support", 1)


def test_with_hardly_any_disk_left_it_is_not_ready(registry, adapter, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage(5 << 20))
    response = registry.http.get("/ready")
    assert (response.status_code, response.json()["error"]["code"]) == (507, "storage_full")
    assert "5 MiB free, less than the 64 MiB" in response.json()["error"]["message"]
    with pytest.raises(StorageFullError, match="min_free_mib"):
        registry.push(adapter(1))
    assert registry.http.get("/health").status_code == 200
    monkeypatch.undo()
    assert registry.http.get("/ready").status_code == 200


def test_a_task_has_no_more_versions_than_it_may(data_dir, serving, adapter):
    settings = RegistrySettings(port=0, data_dir=data_dir, task_versions=2, log_level="warning")
    with serving(settings) as registry:
        for seed in (1, 2):
            registry.verified(adapter(seed))
        before = registry.client.state()
        with pytest.raises(QuotaExceededError, match=r"'support' has 2 versions .* retire support@1"):
            registry.push(adapter(3))
        assert registry.client.state() == before
        assert list((data_dir / "staging").iterdir()) == [], "nothing of it is left behind"
        assert len(list((data_dir / "artefacts").iterdir())) == 2
        assert registry.push(adapter(2)).version == 2, "what is there may be pushed again"
        assert registry.push(adapter(3), task="other").version == 1
        registry.client.promote("support", 2)
        registry.client.retire("support", 1)
        assert registry.push(adapter(3)).version == 3


def test_a_tasks_versions_are_no_larger_together_than_they_may(data_dir, serving, adapter):
    settings = RegistrySettings(port=0, data_dir=data_dir, task_mib=1, log_level="warning")
    with serving(settings) as registry:
        registry.push(adapter(1, values=1 << 15))  # half a MiB, and a header
        with pytest.raises(QuotaExceededError, match=r"over 1048576, what a task may \(task_mib\)"):
            registry.push(adapter(2, values=1 << 15))
        assert registry.push(adapter(3)).version == 2


def test_what_comes_back_counts_as_what_is_pushed(data_dir, serving, adapter):
    settings = RegistrySettings(port=0, data_dir=data_dir, task_versions=2, log_level="warning")
    with serving(settings) as registry:
        for seed in (1, 2):
            registry.verified(adapter(seed))
        registry.client.retire("support", 2)
        registry.push(adapter(3))
        with pytest.raises(QuotaExceededError, match="'support' has 2 versions"):
            registry.client.unretire("support", 2)
        with pytest.raises(IllegalTransitionError):
            registry.client.unretire("support", 3)
        registry.client.retire("support", 3)
        assert registry.client.unretire("support", 2).state == "pushed"
