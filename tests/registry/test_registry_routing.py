"""If-Match on a routing over HTTP; a database of an older or newer program; the registry in one file."""

import io
import sqlite3
import tarfile

import pytest
from typer.testing import CliRunner

from adapter_registry.errors import CannotStartError, RoutingChangedError
from adapter_registry.schema import SCHEMA
from adapter_registry.server import RegistryServer
from adapter_registry.settings import RegistrySettings
from adapter_registry.sqlite import SqliteStore
from adapter_registry.versions import Event
from prad_cli.app import app

OLDEST = """
CREATE TABLE tasks (task TEXT PRIMARY KEY, current INTEGER) STRICT;
CREATE TABLE adapters (
    digest TEXT PRIMARY KEY, method TEXT NOT NULL, base TEXT NOT NULL, record TEXT NOT NULL,
    files TEXT NOT NULL, tensors INTEGER NOT NULL, tensor_bytes INTEGER NOT NULL
) STRICT;
CREATE TABLE versions (
    task TEXT NOT NULL REFERENCES tasks, version INTEGER NOT NULL, digest TEXT NOT NULL REFERENCES adapters,
    state TEXT NOT NULL, reason TEXT NOT NULL, pushed_at TEXT NOT NULL, PRIMARY KEY (task, version)
) STRICT;
CREATE TABLE history (
    revision INTEGER PRIMARY KEY AUTOINCREMENT, task TEXT NOT NULL, version INTEGER NOT NULL,
    event TEXT NOT NULL, before TEXT, after TEXT NOT NULL, current INTEGER, at TEXT NOT NULL,
    replica TEXT NOT NULL, reason TEXT NOT NULL, FOREIGN KEY (task, version) REFERENCES versions
) STRICT;
CREATE INDEX history_of_version ON history (task, version);
"""
COLUMNS = {"tasks": "task, current", "adapters": "*", "versions": "*", "history": "*"}


def test_a_change_is_made_only_to_the_routing_that_was_seen(registry, adapter):
    for seed in (1, 2):
        registry.verified(adapter(seed))
    seen = registry.http.get("/v1/tasks/support")
    assert seen.headers["etag"] == f'"{seen.json()["routing_revision"]}"' == '"3"'
    path = "/v1/tasks/support/versions/{}/{}"
    won = registry.http.post(path.format(2, "promote"), headers={"If-Match": seen.headers["etag"]})
    assert (won.status_code, won.headers["etag"]) == (200, f'"{won.json()["routing_revision"]}"')
    assert registry.http.get("/v1/tasks/support").headers["etag"] == won.headers["etag"]
    for verb in ("promote", "retire"):
        lost = registry.http.post(path.format(1, verb), headers={"If-Match": seen.headers["etag"]})
        assert (lost.status_code, lost.json()["error"]["code"]) == (412, "routing_changed")
        assert lost.json()["error"]["param"] == "if-match"
    with pytest.raises(RoutingChangedError, match="is at revision 6, not 3"):
        registry.client.retire("support", 1, seen=3)
    assert registry.client.retire("support", 1, seen=6).routing_revision == 7
    assert registry.http.post(path.format(2, "promote"), headers={"If-Match": "*"}).status_code == 200


def test_an_operator_says_what_was_seen(registry, adapter):
    for seed in (1, 2):
        registry.verified(adapter(seed))
    at = ["--registry", registry.url]
    assert "routing at revision 3\n" in prad("adapter", "show", "support", *at).output
    lost = prad("adapter", "promote", "support@2", "--if-revision", 2, *at)
    assert (lost.exit_code, "at revision 3, not 2: somebody changed it" in lost.output) == (1, True)
    assert prad("adapter", "promote", "support@2", "--if-revision", 3, *at).exit_code == 0
    assert prad("adapter", "retire", "support@1", "--if-revision", 3, *at).exit_code == 1
    assert registry.client.task("support").current == 2


@pytest.mark.parametrize("value", ["", "soon", 'W/"3"', '"3", "4"', "-1", "9" * 40])
def test_a_condition_that_cannot_be_read_is_refused(registry, adapter, value):
    registry.verified(adapter(1))
    refused = registry.http.post("/v1/tasks/support/versions/1/promote", headers={"If-Match": value})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request")
    assert 'such as "41"' in refused.json()["error"]["message"]


def older(path, stored_adapter):
    """A database as the first schema had it, and what a store of today says of the same changes."""
    now = SqliteStore(path.with_name("now.sqlite3"))
    for task, seed in (("a", 1), ("a", 2), ("b", 1)):
        number, _ = now.push(task, stored_adapter(seed))
        now.apply(task, number, Event.PROBE_OK)
    now.apply("a", 2, Event.PROMOTE)
    now.push("c", stored_adapter(3))
    with sqlite3.connect(path) as old:
        old.executescript(OLDEST)
        old.execute("ATTACH ? AS now", (str(path.with_name("now.sqlite3")),))
        for table, columns in COLUMNS.items():
            old.execute(f"INSERT INTO {table} SELECT {columns} FROM now.{table}")
        old.execute("PRAGMA user_version = 1")
    old.close()
    return now


def test_a_database_of_the_first_schema_becomes_todays(tmp_path, stored_adapter):
    now = older(tmp_path / "old.sqlite3", stored_adapter)
    migrated = SqliteStore(tmp_path / "old.sqlite3")
    assert migrated.dump() == now.dump()
    assert [task.routing_revision for task in migrated.state().tasks] == [9, 8, 0]
    assert migrated.push("c", stored_adapter(4)) == now.push("c", stored_adapter(4)) == (2, True)
    assert migrated.revision() == now.revision()
    for store in (migrated, now):
        store.close()


def test_a_newer_schema_is_refused_and_the_way_out_named(data_dir):
    data_dir.mkdir()
    with sqlite3.connect(data_dir / "registry.sqlite3") as newer:
        newer.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    newer.close()
    with pytest.raises(CannotStartError, match=r"has schema 3, this program knows 2 .*registry export FILE"):
        RegistryServer(RegistrySettings(port=0, data_dir=data_dir))


def prad(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_a_registry_goes_into_a_file_and_out_of_it(data_dir, serving, adapter, redis, tmp_path):
    with serving(RegistrySettings(port=0, data_dir=data_dir, log_level="warning")) as registry:
        registry.verified(adapter(1))
        registry.verified(adapter(2))
        registry.push(adapter(3), "other")
        registry.client.retire("support", 2)
        registry.client.delete("support", 2)
        before = registry.client.state()
        file = tmp_path / "all.tar"
        refused = prad("registry", "export", file, "--data-dir", data_dir)
        assert f"another registry uses {data_dir}" in str(refused.exception)
    exported = prad("registry", "export", file, "--data-dir", data_dir)
    assert exported.output == f"2 tasks with 3 versions, at revision {before.revision}, are in {file}\n"

    there = ["--data-dir", tmp_path / "there", "--redis-url", redis.url]
    imported = prad("registry", "import", file, *there)
    assert (imported.exit_code, "2 tasks with 3 versions" in imported.output) == (0, True), imported.exception
    again = prad("registry", "import", file, *there)
    assert "has 2 tasks already" in str(again.exception)
    with serving(
        RegistrySettings(port=0, data_dir=tmp_path / "there", redis_url=redis.url, log_level="warning")
    ) as registry:
        assert registry.client.state() == before
        registry.client.pull("support", 1, tmp_path / "pulled")
        assert (tmp_path / "pulled" / "prad.json").read_bytes() == (adapter(1) / "prad.json").read_bytes()
        assert registry.push(adapter(4)).name == "support@3"


def tar(path, **files):
    with tarfile.open(path, "w") as written:
        for name, content in files.items():
            member = tarfile.TarInfo(name.replace("__", "/").replace("_dot_", "."))
            member.size = len(content)
            written.addfile(member, io.BytesIO(content))
    return path


def test_what_is_no_export_is_refused_whole(data_dir, serving, adapter, tmp_path):
    with serving(RegistrySettings(port=0, data_dir=data_dir, log_level="warning")) as registry:
        registry.push(adapter(1))
    whole = tmp_path / "whole.tar"
    prad("registry", "export", whole, "--data-dir", data_dir)
    with tarfile.open(whole) as written:
        index, *files = ((m.name, written.extractfile(m).read()) for m in written)
    (record,) = [each for each in files if each[0].endswith("prad.json")]
    (weights,) = [each for each in files if each not in [record]]
    damaged = (weights[0], weights[1][:-4] + b"\0\0\0\1")
    (tmp_path / "text").write_text("no tar", encoding="utf-8")
    cases = {
        tmp_path / "nothing": "cannot read",
        tmp_path / "text": "is no export of a registry",
        tar(tmp_path / "a", something=b"{}"): "does not begin with registry.json",
        tar(
            tmp_path / "b", registry_dot_json=b"{}"
        ): "registry.json cannot be read (revision: Field required",
        tar(tmp_path / "c", registry_dot_json=index[1]): "lacks the files of adapter",
        tar(
            tmp_path / "d", registry_dot_json=index[1], artefacts__x__evil=b""
        ): "which no export of a registry",
        tar(tmp_path / "e", registry_dot_json=index[1], **{record[0]: record[1], damaged[0]: damaged[1]}): (
            "have digest"
        ),
    }
    empty = tmp_path / "empty"
    for path, said in cases.items():
        refused = prad("registry", "import", path, "--data-dir", empty)
        assert refused.exit_code != 0
        assert said in str(refused.exception)
    with serving(RegistrySettings(port=0, data_dir=empty, log_level="warning")) as registry:
        assert registry.client.state().revision == 0
        assert list((empty / "artefacts").iterdir()) == list((empty / "staging").iterdir()) == []
