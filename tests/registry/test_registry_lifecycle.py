"""A version's life over real HTTP."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from adapter_registry.errors import (
    IllegalTransitionError,
    InvalidTaskNameError,
    TaskNotFoundError,
    VersionNotFoundError,
    VersionRoutedError,
)


def test_pushed_verified_promoted_retired(registry, adapter):
    first = registry.push(adapter(1))
    assert (first.name, first.state, first.created, first.current) == ("support@1", "pushed", True, False)
    assert registry.probe("support@1").json()["state"] == "routable"
    second = registry.verified(adapter(2))
    task = registry.client.task("support")
    assert (task.routing.default, [v.state for v in task.versions]) == (1, ["routable", "verified"])

    assert registry.client.promote("support", 2).routing.default == 2
    assert [v.state for v in registry.client.task("support").versions] == ["routable", "routable"]
    assert registry.client.retire("support", 1).versions[0].state == "retired"
    assert registry.client.task("support").routing.default == 2
    events = [line.event for line in registry.client.version("support", 1).history]
    assert (second, events) == ("support@2", ["push", "probe_ok", "promote", "retire"])


def test_the_record_tells_everything(registry, adapter):
    folder = adapter(1)
    pushed = registry.push(folder)
    record = registry.client.version("support", 1)
    assert record.record.config == {"rank": 4}
    assert (record.tensors, record.tensor_bytes) == (1, 64 * 4 * 4)
    assert {f.name for f in record.files} == {"prad.json", "adapter_model.safetensors"}
    assert record.digest == pushed.digest
    assert record.history[0].before is None
    got = registry.http.get("/v1/tasks/support/versions/1/files/prad.json")
    assert got.content == (folder / "prad.json").read_bytes()


def test_the_same_files_are_the_same_version_unless_retired(registry, adapter):
    first = registry.push(adapter(1))
    revision = registry.client.state().revision
    again = registry.push(adapter(1))
    assert (again.version, again.created, again.digest) == (1, False, first.digest)
    assert registry.client.state().revision == revision
    registry.client.retire("support", 1)
    third = registry.push(adapter(1))
    assert (third.version, third.created, third.digest) == (2, True, first.digest)


def test_tasks_count_on_their_own(registry, adapter):
    names = [registry.push(adapter(1), task).name for task in ("b", "a", "a.b-c_1")]
    assert names == ["b@1", "a@1", "a.b-c_1@1"]
    assert [task.task for task in registry.client.state().tasks] == ["a", "a.b-c_1", "b"]


def test_a_failed_version_says_why_and_is_probed_again_on_push(registry, adapter):
    registry.push(adapter(1))
    registry.probe("support@1", ok=False, reason="rank 4 does not fit")
    record = registry.client.version("support", 1)
    assert (record.state, record.reason) == ("failed", "rank 4 does not fit")
    with pytest.raises(IllegalTransitionError, match="its probe failed"):
        registry.client.promote("support", 1)
    again = registry.push(adapter(1))
    assert (again.version, again.state, again.reason) == (1, "pushed", "")
    registry.probe("support@1")
    assert registry.client.task("support").routing.default == 1


def test_a_verified_version_survives_another_replicas_failure(registry, adapter):
    registry.verified(adapter(1))
    revision = registry.client.state().revision
    refused = registry.probe("support@1", ok=False, reason="out of memory")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "illegal_transition")
    assert registry.probe("support@1").status_code == 200
    assert registry.client.state().revision == revision


def test_promoting_what_nobody_verified_is_refused(registry, adapter):
    registry.push(adapter(1))
    with pytest.raises(IllegalTransitionError, match="no prefill service has verified it yet"):
        registry.client.promote("support", 1)


def test_retiring_the_current_version(registry, adapter):
    registry.verified(adapter(1))
    registry.verified(adapter(2))
    registry.client.promote("support", 2)
    with pytest.raises(VersionRoutedError, match="promote another first"):
        registry.client.retire("support", 2)
    registry.client.retire("support", 2, force=True)
    assert registry.client.task("support").routing.default == 1
    registry.client.retire("support", 1)
    assert registry.client.task("support").routing.default is None
    registry.verified(adapter(3))
    assert registry.client.task("support").routing.default == 3


def test_what_is_not_there(registry, adapter):
    with pytest.raises(TaskNotFoundError, match="no task 'nobody'"):
        registry.client.task("nobody")
    registry.push(adapter(1))
    with pytest.raises(VersionNotFoundError, match="support has no version 9"):
        registry.client.version("support", 9)
    with pytest.raises(InvalidTaskNameError):
        registry.client.task("../x")
    got = registry.http.get("/v1/tasks/support/versions/1/files/README.md")
    assert (got.status_code, got.json()["error"]["code"]) == (404, "file_not_found")


def test_every_change_has_its_revision(registry, adapter):
    seen = [registry.client.state().revision]
    registry.push(adapter(1))
    seen.append(registry.client.state().revision)
    registry.probe("support@1")
    seen.append(registry.client.state().revision)
    registry.client.retire("support", 1)
    seen.append(registry.client.state().revision)
    assert seen == [0, 1, 3, 4]


def test_concurrent_pushes_get_distinct_numbers(registry, adapter):
    folders = [adapter(seed) for seed in range(12)]
    with ThreadPoolExecutor(6) as pool:
        numbers = list(pool.map(lambda folder: registry.push(folder).version, folders))
    assert sorted(numbers) == list(range(1, 13))


def test_concurrent_pushes_of_the_same_files_are_one_version(registry, adapter):
    folder = adapter(1)
    with ThreadPoolExecutor(6) as pool:
        pushed = list(pool.map(lambda _: registry.push(folder), range(12)))
    assert {p.version for p in pushed} == {1}
    assert [p.created for p in pushed].count(True) == 1
