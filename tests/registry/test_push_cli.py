"""`prad adapter push` and `push_all` at a real registry, with a prefill that reports in the background."""

import re
import threading

import pytest

from local_stack.pushing import push_all
from prad.artefact import read_artefact, write_record
from tests.registry.test_adapter_cli import failed


@pytest.fixture
def prefill(registry):
    """prefill(ok=..., reason=...) starts a replica that reports this on every pushed version."""
    stopped = threading.Event()
    threads = []

    def follow(ok, reason):
        revision = -1
        while not stopped.is_set():
            params = {"after": revision, "wait": 0.2, "replica": "prefill-1"}
            response = registry.http.get("/v1/changes", params=params)
            if response.status_code == 204:
                continue
            state = response.json()
            revision = state["revision"]
            for task in state["tasks"]:
                for version in task["versions"]:
                    if version["state"] == "pushed":
                        registry.probe(f"{task['task']}@{version['version']}", ok=ok, reason=reason)

    def start(ok=True, reason=""):
        threads.append(threading.Thread(target=follow, args=(ok, reason)))
        threads[-1].start()

    yield start
    stopped.set()
    for thread in threads:
        thread.join()


def test_a_folder_that_cannot_be_served_stops_no_other(registry, prefill, adapter, tmp_path):
    prefill()
    folder = tmp_path / "adapters"
    folder.mkdir()
    adapter(1).rename(folder / "good")
    baseline = adapter(2)
    record = read_artefact(baseline).record
    write_record(baseline, record.model_copy(update={"positions": "all"}))
    baseline.rename(folder / "baseline")
    (folder / "empty").mkdir()
    adapter(3).rename(folder / "A Name")
    failed = push_all(folder, registry.url)
    assert failed.keys() == {"A Name", "baseline", "empty"}
    assert "'A Name' is no task name" in failed["A Name"]
    assert "was trained on all positions" in failed["baseline"]
    assert "holds no prad.json" in failed["empty"]
    assert [task["task"] for task in registry.http.get("/v1/tasks").json()["tasks"]] == ["good"]


def test_a_folder_that_failed_or_is_retired_is_pushed_again_or_named(
    registry, prefill, adapter, tmp_path, prad
):
    registry.push(adapter(1))
    registry.probe("support@1", ok=False, reason="another model was served then")
    folder = tmp_path / "adapters"
    folder.mkdir()
    adapter(1).rename(folder / "support")
    prefill()
    assert push_all(folder, registry.url) == {}
    (task,) = registry.http.get("/v1/tasks").json()["tasks"]
    name = f"support@{max(map(int, task['routing']['split']))}"
    assert prad("retire", name).exit_code == 0
    assert push_all(folder, registry.url) == {
        name: f"it is retired (prad adapter unretire {name} brings it back)"
    }


def test_push_waits_and_says_what_next(prad, prefill, adapter, monkeypatch):
    prefill()
    first = prad("push", str(adapter(1)), "--task", "support")
    assert first.exit_code == 0, first.output
    assert "support@1 pushed" in first.stdout
    assert '"model": "support"' in first.stdout
    second = prad("push", str(adapter(2)), "--task", "support")
    assert '"model": "support@2"' in second.stdout
    assert re.search(r"prad adapter promote support@2 --registry http://127\.0\.0\.1:\d+", second.stdout)
    assert "http://API:PORT" in second.stdout, "whose address the registry does not know"
    monkeypatch.setenv("PRAD_API_URL", "https://api.example.com/v1")
    third = prad("push", str(adapter(3)), "--task", "support", "--promote")
    assert "curl https://api.example.com/v1/completions" in third.stdout
    assert "support@3 is verified, and what plain 'support' means" in third.stdout
    again = prad("push", str(adapter(3)), "--task", "support")
    assert (again.exit_code, "support@3 is there already" in again.stdout) == (0, True)


def test_push_prints_why_a_version_failed(prad, prefill, adapter):
    prefill(ok=False, reason="other base model [weights]")
    failed(
        prad("push", str(adapter(1)), "--task", "support"), "support@1 failed", "other base model [weights]"
    )


def test_push_without_a_prefill_says_so(prad, adapter):
    result = prad("push", str(adapter(1)), "--task", "support", "--connect-timeout", "0.1")
    failed(result, "no prefill service is connected", "prad serve")
    assert "support@1 is stored" in result.stderr


def test_push_with_a_silent_prefill_gives_up(prad, registry, adapter):
    registry.verified(adapter(1))  # heard of a moment ago
    result = prad("push", str(adapter(2)), "--task", "support", "--connect-timeout", "0", "--timeout", "0")
    failed(result, "no prefill service has reported on it")


def test_push_without_waiting(prad, adapter):
    result = prad("push", str(adapter(1)), "--task", "support", "--no-wait")
    assert (result.exit_code, "prad adapter show support@1" in result.stdout) == (0, True)
    assert prad("push", str(adapter(1)), "--task", "support", "--no-wait", "--promote").exit_code == 2


def test_push_of_what_is_no_adapter(prad, adapter, tmp_path):
    failed(prad("push", str(tmp_path / "nowhere"), "--task", "support"), "there is no folder")
    failed(prad("push", str(adapter(1)), "--task", "Support"), "is no task name")
    failed(prad("push", str(adapter(1, values=100_000)), "--task", "support"), "larger than the limit")


def test_push_of_a_uri(prad, prefill, registry, adapter):
    prefill()
    uri = adapter(1).as_uri()
    pushed = prad("push", uri, "--task", "support")
    assert pushed.exit_code == 0, pushed.output
    assert f"fetched from {uri}" in pushed.stdout
    assert "support@1 is verified" in pushed.stdout
    assert f"fetched from  {uri}" in prad("show", "support@1").stdout
    assert uri in prad("events", "support").stdout
    failed(prad("push", "hf://org/repo", "--task", "support"), "fetches nothing from 'hf://org/repo'")
    failed(prad("push", "ftp://x", "--task", "support"), "expected one of file:///srv")
