"""Registries with their files in a bucket: several at once, killed, with the bucket away or damaged."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from adapter_registry import bucket as bucket_module
from adapter_registry import client_calls
from adapter_registry.bucket import Bucket, Entry
from adapter_registry.bucket_files import ArtefactBucket
from adapter_registry.errors import CannotStartError, StoredFilesDamagedError, StoreUnavailableError
from adapter_registry.redis_store import RedisStore
from adapter_registry.server import RegistryServer
from adapter_registry.settings import RegistrySettings
from adapter_registry.sources.places import parse
from adapter_registry.sqlite_store import SqliteStore
from prad.artefact import WEIGHTS, files_digest
from prad_cli.app import app
from tests.registry.conftest import BUCKET
from tests.source_servers import Gate, ToldServer

pytestmark = pytest.mark.filterwarnings("ignore:The .* attribute with value:UserWarning")
"""FastAPI hides it while it builds a field, which the threads of two servers undo for each other."""

PROGRAM = """
from adapter_registry.server import RegistryServer
from adapter_registry.settings import RegistrySettings
server = RegistryServer(RegistrySettings(port=0, log_level="warning"))
print(server.url, flush=True)
server.run()
"""


def settings(data_dir, **more):
    return RegistrySettings(port=0, data_dir=data_dir, files=BUCKET, log_level="warning", **more)


@contextmanager
def process(data_dir, program=PROGRAM):
    """A registry in a process of its own, and its URL."""
    given = {"PRAD_REGISTRY_DATA_DIR": str(data_dir), "PRAD_REGISTRY_FILES": BUCKET}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, **given},
    ) as running:
        try:
            yield running, running.stdout.readline().strip()
        finally:
            running.kill()


@pytest.fixture
def gate(bucket, s3_url, monkeypatch):
    """gate(mode): whether the registry's way to its bucket is open; nobody waits long where it is not."""
    leading = Gate(s3_url)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", leading.url)

    def lead(mode):
        monkeypatch.setattr(bucket_module, "_START_S", 60.0 if mode == "open" else 0.1)
        monkeypatch.setattr(client_calls, "BUCKET_SECONDS", 60.0 if mode == "open" else 1.0)
        leading.set(mode)

    lead("open")
    yield lead
    leading.close()


def test_a_life_with_restarts_and_without_copies(data_dir, bucket, adapter, serving, tmp_path):
    with serving(settings(data_dir), bucket) as registry:
        name = registry.verified(adapter(1))
        assert registry.stored == {registry.client.version("support", 1).digest}
        assert registry.files == {path.name for path in adapter(1).iterdir()}
        assert registry.http.get("/ready").status_code == 200
        assert not registry.push(adapter(1)).created
        assert len(bucket.find("adapters")) == 2, "the same files again take no more room"
    for path in (data_dir / "copies").rglob("*.*"):
        path.unlink()
    with serving(settings(data_dir), bucket) as registry:
        registry.client.pull("support", 1, tmp_path / "pulled")
        assert (tmp_path / "pulled" / WEIGHTS).read_bytes() == (adapter(1) / WEIGHTS).read_bytes()
        part = registry.http.get(
            "/v1/tasks/support/versions/1/files/prad.json", headers={"range": "bytes=0-9"}
        )
        assert (part.status_code, part.content) == (206, (adapter(1) / "prad.json").read_bytes()[:10])
        assert name == "support@1"
        registry.client.retire("support", 1)
        registry.client.delete("support", 1)
        assert bucket.find("adapters") == []


def test_two_registries_on_one_redis_and_one_bucket(tmp_path, redis, bucket, adapter, serving):
    one, two = (settings(tmp_path / name, redis_url=redis.url) for name in ("one", "two"))
    with serving(one, bucket) as first, serving(two, bucket) as second:
        pushed = first.verified(adapter(1))
        second.client.pull("support", 1, tmp_path / "pulled")
        assert files_digest(tmp_path / "pulled") == second.client.version("support", 1).digest
        assert second.push(adapter(2)).name == "support@2"
        assert first.stored == second.stored == {v.digest for v in first.client.task("support").versions}
        second.client.retire("support", 1)
        first.client.delete("support", 1)
        assert len(second.stored) == 1
        assert second.http.get("/v1/tasks/support/versions/1/files/prad.json").status_code == 404
        assert pushed == "support@1"


def test_a_push_that_enters_nothing_leaves_nothing(data_dir, bucket, adapter, serving, monkeypatch):
    with serving(settings(data_dir), bucket) as registry:
        with monkeypatch.context() as patch:
            patch.setattr(SqliteStore, "push", lambda *_, **__: 1 / 0)
            alone = {"connection": "close"}  # a fault of ours may end its connection
            version = {"path": str(adapter(1))}
            response = registry.http.post("/v1/tasks/support/versions", json=version, headers=alone)
        assert response.status_code == 500
        assert (bucket.find("adapters"), registry.staged) == ([], [])
        refused = registry.http.post("/v1/tasks/support/versions", files=[("files", ("prad.json", b"{"))])
        assert refused.status_code == 400
        assert (bucket.find("adapters"), registry.staged) == ([], [])


def test_a_commit_of_unknown_outcome_keeps_its_files(
    data_dir, redis, bucket, adapter, serving, monkeypatch, tmp_path
):
    push = RedisStore.push

    def push_and_break(*arguments, **more):
        push(*arguments, **more)
        raise StoreUnavailableError("may have been made")

    with serving(settings(data_dir, redis_url=redis.url), bucket) as registry:
        with monkeypatch.context() as patch:
            patch.setattr(RedisStore, "push", push_and_break)
            with pytest.raises(StoreUnavailableError):
                registry.push(adapter(1))
        registry.client.pull("support", 1, tmp_path / "pulled")


def away(*_, **__):
    raise StoreUnavailableError("gone again")


def test_nothing_is_sent_that_cannot_be_entered(data_dir, bucket, adapter, serving, monkeypatch):
    with serving(settings(data_dir), bucket) as registry:
        monkeypatch.setattr(SqliteStore, "revision", away)
        monkeypatch.setattr(Bucket, "send", lambda *_: pytest.fail("it was sent"))
        with pytest.raises(StoreUnavailableError, match="gone again"):
            registry.push(adapter(1))
        assert (bucket.find("adapters"), registry.staged) == ([], [])


def test_what_was_not_entered_is_removed_without_a_restart(data_dir, bucket, adapter, serving, monkeypatch):
    monkeypatch.setattr("adapter_registry.bucket_files._UNSURE_S", -5.0)  # as if some minutes went by
    monkeypatch.setattr("adapter_registry.registry.TIDY_S", 0.1)
    with serving(settings(data_dir), bucket) as registry:
        kept = registry.push(adapter(1)).digest
        with monkeypatch.context() as patch:
            patch.setattr(SqliteStore, "push", away)
            with pytest.raises(StoreUnavailableError):
                registry.push(adapter(2))
        while registry.stored != {kept}:
            pass
        assert registry.files == {WEIGHTS, "prad.json"}


@pytest.mark.parametrize("entered", [False, True])
def test_a_kill_in_the_middle_of_a_push(data_dir, bucket, adapter, serving, entered, tmp_path):
    """Killed once everything is sent: before, or after, the version is entered."""
    stop = "ArtefactBucket._settle" if entered else "SqliteStore.push"
    program = f"""
import os, signal
from adapter_registry.sqlite_store import SqliteStore
from adapter_registry.bucket_files import ArtefactBucket
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
{stop} = die
"""
    with process(data_dir, program + PROGRAM) as (running, url):
        with pytest.raises(httpx.TransportError):
            httpx.post(f"{url}/v1/tasks/support/versions", json={"path": str(adapter(1))}, timeout=30)
        assert running.wait() == -signal.SIGKILL
    left = bucket.find("adapters")
    assert [key.rpartition("/")[2] for key in sorted(left)] == [".pushing", WEIGHTS, "prad.json"]
    with serving(settings(data_dir), bucket) as registry:
        if entered:
            registry.client.pull("support", 1, tmp_path / "pulled")
            assert registry.files == {WEIGHTS, "prad.json"}
        else:
            assert (registry.client.state().revision, bucket.find("adapters")) == (0, [])
        assert registry.staged == []


@pytest.mark.parametrize("mode", ["closed", "silent"])
def test_a_bucket_that_goes_away_and_comes_back(data_dir, gate, bucket, adapter, serving, mode, tmp_path):
    with serving(settings(data_dir), bucket) as registry:
        registry.verified(adapter(1))
        registry.push(adapter(2))
        registry.client.retire("support", 2)
        second = registry.client.version("support", 2).digest
        shutil.rmtree(data_dir / "copies" / second)
        revision = registry.client.state().revision
        gate(mode)
        for method, path, more in (
            ("GET", "/ready", {}),
            ("GET", "/v1/tasks/support/versions/2/files/prad.json", {}),
            ("POST", "/v1/tasks/support/versions", {"json": {"path": str(adapter(3))}}),
        ):
            response = registry.http.request(method, path, **more)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "store_unavailable")
            assert f"the registry's bucket {BUCKET}/" in response.json()["error"]["message"]
        assert registry.client.state().revision == revision
        assert registry.http.get("/health").status_code == 200
        registry.client.pull("support", 1, tmp_path / "copied")
        with pytest.raises(StoreUnavailableError):
            registry.client.delete("support", 2)

        gate("open")
        assert registry.http.get("/ready").status_code == 200
        assert registry.client.delete("support", 2).state == "deleted"
        assert registry.push(adapter(3)).name == "support@3"
        assert registry.stored == {v.digest for v in registry.client.task("support").versions} - {second}


def test_a_bucket_that_goes_away_in_the_middle_of_a_push(
    data_dir, gate, bucket, adapter, serving, monkeypatch
):
    send = Bucket.send

    def send_and_lose(self, file, key):
        send(self, file, key)
        gate("closed")

    with serving(settings(data_dir), bucket) as registry:
        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "send", send_and_lose)
            with pytest.raises(StoreUnavailableError):
                registry.push(adapter(1))
        assert (registry.client.state().revision, registry.staged) == (0, [])
        gate("open")
        digest = registry.push(adapter(2)).digest
        assert registry.stored == {digest}, "what was left of the other is gone"


def test_a_bucket_that_cannot_be_used_at_the_start(data_dir, gate, bucket, monkeypatch):
    gate("closed")
    with pytest.raises(CannotStartError, match=f"bucket {BUCKET}/.* cannot be used"):
        RegistryServer(settings(data_dir))
    gate("open")
    nowhere = RegistrySettings(port=0, data_dir=data_dir, files="s3://nowhere/x")
    with pytest.raises(CannotStartError, match="there is no such bucket; create it"):
        RegistryServer(nowhere)
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with pytest.raises(CannotStartError, match="no credentials for it: set AWS_ACCESS_KEY_ID"):
            RegistryServer(settings(data_dir))
    large = settings(data_dir, max_upload_mib=6000)
    with pytest.raises(CannotStartError, match="takes objects of at most 5120 MiB"):
        RegistryServer(large)
    server = RegistryServer(settings(data_dir))  # the refused ones left the folder free
    server.stop()
    server.run()


def test_credentials_that_are_refused(s3):
    told = ToldServer()
    try:
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        told.answers = dict.fromkeys(("/adapters/of/prad", "/adapters"), (403, {}, body))
        client = Bucket(parse(BUCKET), "x", told.url)
        with pytest.raises(
            StoreUnavailableError, match=r"refuses the registry's credentials \(AccessDenied\)"
        ):
            client.require()
    finally:
        told.close()


def test_an_object_that_is_cut_off_says_that_the_bucket_is_away(s3, tmp_path):
    told = ToldServer()
    try:
        told.answers = {"/adapters/of/prad/x/d/p/file": (200, {"content-length": "1000"}, b"x" * 100)}
        client = Bucket(parse(BUCKET), "x", told.url)
        with pytest.raises(StoreUnavailableError, match="cannot be used"):
            client.fetch(Entry("d/p/file", 1000, 0.0), tmp_path / "file")
    finally:
        told.close()


def test_a_store_or_bucket_that_goes_away_during_the_start_is_said(data_dir, bucket, monkeypatch):
    for kind, name in ((ArtefactBucket, "sweep"), (SqliteStore, "idle"), (SqliteStore, "revision")):
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, away)
            with pytest.raises(CannotStartError, match="gone again; start again once it can"):
                RegistryServer(settings(data_dir))
    server = RegistryServer(settings(data_dir))  # the refused ones left the folder free
    server.stop()
    server.run()


@pytest.mark.parametrize("files", ["folder", "oci://host/name", "s3://", "s3://B"])
def test_what_is_no_bucket(files):
    with pytest.raises(ValidationError, match="s3://BUCKET/FOLDER"):
        RegistrySettings(files=files)


def test_the_endpoint_may_be_a_setting(data_dir, bucket, s3_url, adapter, serving, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    with serving(settings(data_dir, files_endpoint=s3_url), bucket) as registry:
        pushed = registry.push(adapter(1))
        assert registry.stored == {pushed.digest}
    with pytest.raises(ValidationError, match="is no address of a service"):
        RegistrySettings(files_endpoint="127.0.0.1:9000")


def test_damage_in_the_bucket_is_never_served_and_mended_by_a_push(
    data_dir, bucket, adapter, serving, tmp_path
):
    with serving(settings(data_dir), bucket) as registry:
        digest = registry.push(adapter(1)).digest
        (weights,) = [key for key in bucket.find("adapters") if key.endswith(WEIGHTS)]
        spoilt = (adapter(1) / WEIGHTS).read_bytes()[:-1] + b"x"
        bucket.call_s3("put_object", Bucket="adapters", Key=weights.partition("/")[2], Body=spoilt)
        shutil.rmtree(data_dir / "copies" / digest)
        with pytest.raises(StoredFilesDamagedError, match=f"adapter {digest} is damaged in {BUCKET}/"):
            registry.client.pull("support", 1, tmp_path / "damaged")
        assert not registry.push(adapter(1)).created
        shutil.rmtree(data_dir / "copies" / digest)
        registry.client.pull("support", 1, tmp_path / "mended")
        bucket.rm("adapters/of/prad", recursive=True)
        shutil.rmtree(data_dir / "copies" / digest)
        with pytest.raises(StoredFilesDamagedError, match=f"adapter {digest} is gone from"):
            registry.client.pull("support", 1, tmp_path / "gone")


def test_registries_in_one_folder_of_a_bucket_keep_apart(tmp_path, bucket, adapter, serving):
    with serving(settings(tmp_path / "one"), bucket) as one:
        digest = one.push(adapter(1)).digest
    with serving(settings(tmp_path / "two"), bucket) as two:
        assert two.stored == {digest}, "it sees no digest of its own, and removes none of others"


def test_an_export_goes_from_a_folder_into_a_bucket_and_back(
    data_dir, bucket, redis, adapter, serving, tmp_path
):
    def prad(*arguments):
        return CliRunner().invoke(app, [str(each) for each in arguments])

    with serving(RegistrySettings(port=0, data_dir=data_dir, log_level="warning")) as registry:
        registry.verified(adapter(1))
        registry.push(adapter(2), "other")
        before = registry.client.state()
    assert prad("registry", "export", tmp_path / "a.tar", "--data-dir", data_dir).exit_code == 0
    there = ["--data-dir", tmp_path / "there", "--redis-url", redis.url, "--files", BUCKET]
    imported = prad("registry", "import", tmp_path / "a.tar", *there)
    assert f"read into {BUCKET}/" in imported.output, imported.exception
    back = prad("registry", "export", tmp_path / "b.tar", *there[:1], tmp_path / "elsewhere", *there[2:])
    assert back.exit_code == 0, back.exception
    with serving(settings(tmp_path / "there", redis_url=redis.url), bucket) as registry:
        assert registry.client.state() == before
        assert registry.staged == []
        registry.client.pull("support", 1, tmp_path / "pulled")
    again = prad("registry", "import", tmp_path / "b.tar", "--data-dir", tmp_path / "back")
    assert again.exit_code == 0, again.exception
    refused = prad("registry", "export", tmp_path / "c.tar", "--data-dir", data_dir, "--files", "nowhere")
    assert "files: " in str(refused.exception)
