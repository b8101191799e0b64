"""`prad adapter ...` against a real registry. What `push` does: test_push_cli.py."""

import json
import re
import threading

import pytest
from typer.testing import CliRunner

from adapter_registry.client import RegistryClient
from prad.artefact import read_artefact
from prad_cli.adapter import app


def failed(result, *says: str) -> None:
    """One line on stderr, exit code 1, no traceback."""
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    for words in says:
        assert words in result.stderr


def test_list_and_show(prad, registry, adapter):
    assert "prad adapter push" in prad("list").stdout
    registry.verified(adapter(1))
    registry.push(adapter(2))
    listed = prad("list").stdout
    assert "support@1" in listed
    assert "@2 pushed" in listed
    shown = prad("show", "support").stdout
    assert re.search(r"support@1 +routable +support ", shown)
    assert "plain 'support' means support@1\nrouting at revision 3\n" in shown
    digest = registry.client.version("support", 2).digest
    assert digest in prad("show", "support@2").stdout
    assert "probe_ok → verified by prefill-1" in prad("show", "support@1").stdout
    assert json.loads(prad("list", "--json").stdout)["tasks"][0]["routing"]["default"] == 1
    assert len(json.loads(prad("show", "support", "--json").stdout)["versions"]) == 2
    assert json.loads(prad("show", "support@2", "--json").stdout)["record"]["licence"] == "MIT"


def test_promote_and_retire(prad, registry, adapter):
    registry.verified(adapter(1))
    registry.verified(adapter(2))
    assert "support@2 is now what plain 'support' means" in prad("promote", "support@2").stdout
    failed(prad("retire", "support@2"), "promote another first")
    assert "plain 'support' means support@1" in prad("retire", "support@2", "--force").stdout
    assert "'support' has no version now" in prad("retire", "support@1").stdout


def test_split_alias_and_rollback(prad, registry, adapter):
    for seed in (1, 2, 3):
        registry.verified(adapter(seed))
    seen = registry.client.task("support").routing.revision
    divided = prad("split", "support", "1=90", "2=10", "--if-revision", str(seen))
    assert "plain 'support' means 90% support@1, 10% support@2" in divided.stdout
    failed(prad("split", "support", "1=1", "--if-revision", str(seen)), "somebody changed it meanwhile")
    assert "@1=90 @2=10" in prad("list").stdout
    assert "support (10 of 100)" in prad("show", "support").stdout
    pointed = prad("alias", "support", "canary=3")
    assert "support@canary is support@3 now" in pointed.stdout
    assert "support@3" in prad("show", "support@canary").stdout
    failed(prad("show", "support@nobody"), "has no alias 'nobody'")
    failed(prad("retire", "support@canary"), "support@3 is what support@canary means")
    failed(prad("rm", "support@2"), "it answers requests: retire it first")
    assert "means nothing any more" in prad("alias", "support", "--remove", "canary").stdout
    assert "support@2 is now" in prad("promote", "support@2").stdout
    back = prad("rollback", "support").stdout
    assert "90% support@1, 10% support@2" in back
    assert "support@canary is support@3" in prad("rollback", "support").stdout
    events = prad("events", "support", "--latest", "2").stdout
    assert len(re.findall("rollback", events)) == 2
    assert re.search(r"\w@\w", events), "who typed it"
    told = json.loads(prad("events", "support", "--json").stdout)["events"]
    assert (told[-1]["event"], told[-1]["routing"]["split"]) == ("rollback", {"1": 90, "2": 10})
    failed(prad("events", "nobody"), "there is no task 'nobody'")
    registry.verified(adapter(1), task="other")
    every = prad("events", "--latest", "6").stdout
    assert "rollback support" in every
    assert "push other@1" in every
    assert json.loads(prad("events", "--latest", "1", "--json").stdout)["events"][0]["task"] == "other"


def test_every_change_is_told_as_json_to_scripts(prad, registry, adapter):
    pushed = json.loads(prad("push", str(adapter(1)), "--task", "support", "--no-wait", "--json").stdout)
    assert (pushed["version"], pushed["state"]) == (1, "pushed")
    registry.probe("support@1")
    registry.verified(adapter(2))
    for command, said in (
        (["split", "support", "1=90", "2=10"], {"split": {"1": 90, "2": 10}}),
        (["promote", "support@1"], {"split": {"1": 100}}),
        (["alias", "support", "canary=2"], {"aliases": {"canary": 2}}),
        (["shadow", "support", "2=5%"], {"shadow": {"2": 5.0}}),
        (["rollback", "support"], {"shadow": {}}),
        (["retire", "support@2", "--force"], {"aliases": {}}),
    ):
        told = json.loads(prad(*command, "--json").stdout)
        assert said.items() <= told["routing"].items(), command
        assert told["pending"] == []
    assert json.loads(prad("unretire", "support@2", "--json").stdout)["state"] == "pushed"
    assert prad("retire", "support@2").exit_code == 0
    assert json.loads(prad("rm", "support@2", "--json").stdout)["state"] == "deleted"


def test_a_shadow_is_set_shown_and_ended(prad, registry, adapter):
    for seed in (1, 2):
        registry.verified(adapter(seed))
    seen = registry.client.task("support").routing.revision
    unseen = "5% of them also run under support@2, unseen"
    assert unseen in prad("shadow", "support", "2=5%", "--if-revision", str(seen)).stdout
    failed(prad("shadow", "support", "2=1%", "--if-revision", str(seen)), "somebody changed it meanwhile")
    assert unseen in prad("show", "support").stdout
    assert "shadow @2=5%" in prad("events", "support").stdout
    assert "0.5% of them" in prad("shadow", "support", "2=0.5").stdout
    assert "unseen" not in prad("shadow", "support", "--off").stdout
    assert "0.5% of them" in prad("rollback", "support").stdout
    failed(prad("shadow", "support", "3=5%"), "support has no version 3: it has 1, 2")


@pytest.mark.parametrize(
    "command",
    [
        ["split", "support", "1"],
        ["split", "support", "1=0"],
        ["split", "support", "1=1", "1=2"],
        ["split", "support", "one=1"],
        ["shadow", "support"],
        ["shadow", "support", "2"],
        ["shadow", "support", "2=0%"],
        ["shadow", "support", "2=101"],
        ["shadow", "support", "1=60%", "2=60%"],
        ["shadow", "support", "2=5%", "--off"],
        ["alias", "support"],
        ["alias", "support", "canary"],
        ["alias", "support", "canary=2", "--remove", "canary"],
    ],
)
def test_what_cannot_be_read_is_refused_before_it_is_sent(prad, command):
    refused = prad(*command)
    assert refused.exit_code == 2
    assert "expected" in refused.stderr


def test_warm_says_where_a_version_is_in_memory(prad, registry, adapter):
    for seed in (1, 2):
        registry.verified(adapter(seed))
    failed(prad("warm", "support@2"), "support@2: not in memory everywhere")
    assert "no prefill service follows" in prad("warm", "support@2").stdout
    stopped = threading.Event()

    def follow(name, trouble):
        revision = 0
        while not stopped.is_set():
            told = {"replica": name, "wait": 0.1, "after": revision, "trouble": trouble if revision else []}
            answer = registry.http.get("/v1/changes", params=told)
            revision = answer.json()["revision"] if answer.status_code == 200 else revision

    replicas = [threading.Thread(target=follow, args=each) for each in (("a", []), ("b", []))]
    for replica in replicas:
        replica.start()
    try:
        while len(registry.client.warm("support", 1).ready) < 2:
            pass
        warm = prad("warm", "support@2")
        assert (warm.exit_code, "support@2 is in memory at a, b" in warm.stdout) == (0, True)
        assert "support@1 is in memory at a, b" in prad("warm", "support").stdout
        told = json.loads(prad("warm", "support", "--json").stdout)
        assert told == [{"task": "support", "version": 1, "ready": ["a", "b"], "failed": {}, "pending": []}]
        replicas.append(threading.Thread(target=follow, args=("c", ["support@2: no room", "support@1: x"])))
        replicas[-1].start()
        while "c" not in registry.client.warm("support", 2).failed:
            pass
        cold = prad("warm", "support@2")
        failed(cold, "support@2: not in memory everywhere")
        assert "support@2 is not in memory at c: no room" in cold.stdout
    finally:
        stopped.set()
        for replica in replicas:
            replica.join()
    events = prad("events", "support", "--latest", "1").stdout
    assert "warm support@2" in events
    failed(prad("warm", "support@3"), "support has no version 3")
    registry.push(adapter(3))
    failed(prad("warm", "support@3"), "no prefill service has verified it yet")
    failed(prad("warm", "nobody"), "there is no task 'nobody'")


def test_status_says_how_far_each_replica_is(prad, registry, adapter):
    assert "no prefill service follows it" in prad("status").stdout
    registry.verified(adapter(1))
    at = registry.client.state().revision
    ask = {"wait": 0, "replica": "ready"}
    registry.http.get("/v1/changes", params=ask | {"after": at})
    registry.http.get("/v1/changes", params=ask | {"after": at, "in_force": 1, "replica": "announced"})
    registry.http.get("/v1/changes", params=ask | {"after": 1, "replica": "loading"})
    trouble = ["support@2: no disk", "x" * 20]
    registry.http.get("/v1/changes", params=ask | {"after": at, "replica": "broken", "trouble": trouble})
    told = json.loads(prad("status", "--json").stdout)
    states = {replica["name"]: replica["state"] for replica in told["replicas"]}
    assert states == {
        "prefill-1": "announced",
        "ready": "ready",
        "announced": "announced",
        "loading": "loading",
        "broken": "failed",
    }
    assert told["revision"] == at
    assert "support@2: no disk" in prad("status").stdout


def test_status_waits_as_long_as_it_is_told_to(prad, registry, adapter, monkeypatch):
    registry.verified(adapter(1))
    registry.http.get("/v1/changes", params={"wait": 0, "replica": "slow", "after": 1})
    ask, asked, at = RegistryClient.replicas, [], registry.client.state().revision

    def cut_short(client, revision, wait):
        asked.append(wait)
        if len(asked) == 3:
            registry.http.get("/v1/changes", params={"wait": 0, "replica": "slow", "after": at})
        return ask(client, revision, 0)

    monkeypatch.setattr(RegistryClient, "replicas", cut_short)
    assert prad("status", "--wait", "300").exit_code == 0
    assert len(asked) == 3, "the registry is asked again until all are ready"
    assert 300 >= asked[0] > asked[1] > asked[2] > 0
    registry.verified(adapter(2))
    failed(prad("status", "--wait", "0.3"), "not ready after 0.3 s: slow")
    late = prad("status", "--wait", "0.3", "--json")
    assert (late.exit_code, json.loads(late.stdout)["pending"]) == (1, ["slow"])
    assert prad("status").exit_code == 0, "who does not wait only looks"


def test_a_replica_that_has_not_heard_yet_is_named(prad, registry, adapter):
    registry.verified(adapter(1))
    registry.verified(adapter(2))
    registry.http.get("/v1/changes", params={"after": 0, "replica": "busy"})
    for command in (("promote", "support@2"), ("retire", "support@1")):
        assert "not yet at busy" in prad(*command).stdout


def test_rm_unretire_and_pull(prad, registry, adapter, tmp_path):
    registry.verified(adapter(1))
    failed(prad("rm", "support@1"), "it answers requests: retire it first")
    prad("retire", "support@1")
    assert "support@1 is pushed again" in prad("unretire", "support@1").stdout
    back = tmp_path / "back"
    assert f"support@1 is in {back}" in prad("pull", "support@1", str(back)).stdout
    assert read_artefact(back).digest == registry.client.version("support", 1).digest
    failed(prad("pull", "support@1", str(back)), "not an empty folder")
    failed(prad("pull", "support@1", str(back / "prad.json" / "x")), "cannot write")
    assert "support@1 is deleted" in prad("rm", "support@1").stdout
    failed(prad("pull", "support@1", str(tmp_path / "more")), "were deleted")
    failed(prad("unretire", "support@1"), "its files are gone")


def test_list_leaves_out_what_failed(prad, registry, adapter):
    registry.push(adapter(1))
    registry.probe("support@1", ok=False, reason="no")
    assert "--all lists" in prad("list").stdout
    assert "@1 failed" in prad("list", "--all").stdout


def test_errors_are_one_line(prad):
    failed(prad("show", "nobody"), "there is no task 'nobody'")
    failed(prad("promote", "support"), "Say support@N")
    failed(prad("retire", "support@X"), "after '@' comes a version number")
    for url in ("http://127.0.0.1:1", "nonsense", "http://[", ""):
        failed(
            CliRunner().invoke(app, ["list", "--registry", url]), "no adapter registry answers", "prad serve"
        )


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["push"],
        ["list"],
        ["show"],
        ["promote"],
        ["split"],
        ["alias"],
        ["shadow"],
        ["sign"],
        ["rollback"],
        ["events"],
        ["status"],
        ["warm"],
        ["diff"],
        ["retire"],
        ["unretire"],
        ["rm"],
        ["pull"],
    ],
)
def test_help_has_examples(command):
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert not command or "Example" in result.stdout
