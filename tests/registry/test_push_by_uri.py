"""A push by URI: what is allowed, what is refused, folders; a refused one leaves nothing behind."""

import os
import threading
import time

import pytest
from pydantic import ValidationError

from adapter_registry.client import RegistryClient
from adapter_registry.errors import (
    AdapterRefusedError,
    InvalidRequestError,
    MissingExtraError,
    SourceNotAllowedError,
    UploadTooLargeError,
)
from adapter_registry.settings import RegistrySettings
from adapter_registry.sources import fetching
from adapter_registry.sources.places import Place, allowed_sources, parse

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("file:///srv/a%20b/c/", Place("file", "", ("srv", "a b", "c"))),
        ("file://localhost/srv", Place("file", "", ("srv",))),
        ("hf://org/repo", Place("hf", "", ("org", "repo"))),
        ("hf://org/repo@v1/deep/er", Place("hf", "", ("org", "repo", "deep", "er"), "v1")),
        ("hf://org/repo@refs%2Fpr%2F1", Place("hf", "", ("org", "repo"), "refs/pr/1")),
        ("s3://bucket", Place("s3", "bucket", ())),
        ("s3://bucket/deep/er/", Place("s3", "bucket", ("deep", "er"))),
        ("oci://ghcr.io/team/support:1.0", Place("oci", "ghcr.io", ("team", "support"), "1.0")),
        (f"oci://Localhost:5000/support@{DIGEST}", Place("oci", "localhost:5000", ("support",), DIGEST)),
        (f"oci://ghcr.io/support:1@{DIGEST}", Place("oci", "ghcr.io", ("support",), DIGEST)),
    ],
)
def test_a_uri_leads_to_a_place(uri, place):
    assert parse(uri) == place


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "nonsense",
        "http://ghcr.io/support",
        "ftp://x/y",
        "FILE:///srv",
        "file://host/srv",
        "file:relative",
        "file:///srv/../etc",
        "file:///srv/%2e%2e/etc",
        "file:///srv/a%00b",
        "file:///srv?x=1",
        "hf://org",
        "hf://datasets/org/repo",
        "hf://org/../other",
        "hf://org/repo/../x",
        "s3://",
        "s3://Bucket!/x",
        "s3://bucket/../other",
        "oci://",
        "oci://ghcr.io",
        "oci://ghcr/support:1",
        "oci://user@ghcr.io/x",
        "oci://ghcr.io/Support",
        "oci://ghcr.io/support:",
        "oci://ghcr.io/support@sha256:short",
        "oci://ghcr.io/team/../support",
        "oci://ghcr.io\\@evil/x",
        "oci://ghcr.io/x#y",
        "s3://bucket/a\nb",
        "s3://bucket/" + "a" * 3000,
    ],
)
def test_what_is_no_uri_is_refused_with_an_example(uri):
    with pytest.raises(ValueError, match=r"expected|must not|characters"):
        parse(uri)


def test_a_name_that_no_bucket_has_is_told_with_what_one_has():
    with pytest.raises(ValueError, match=r"a bucket's name has 3 to 63 .*; 'b' is none; expected"):
        parse("s3://b/x")


@pytest.mark.parametrize(
    ("text", "uri", "held"),
    [
        ("", "hf://org/repo", False),
        ("hf://org", "hf://org/repo", True),
        ("hf://org", "hf://organ/repo", False),
        ("hf://org/repo", "hf://org/repo@v2/deep", True),
        ("hf://", "hf://any/repo", True),
        ("s3://models/good", "s3://models/good/a", True),
        ("s3://models/good", "s3://models/goods", False),
        ("s3://models/good", "s3://other/good/a", False),
        ("oci://ghcr.io/team", "oci://ghcr.io/team/a:1", True),
        ("oci://ghcr.io", "oci://ghcr.io:444/team/a:1", False),
        ("oci://ghcr.io", "oci://sub.ghcr.io/team/a:1", False),
        ("file:///srv/a, hf://org", "file:///srv/a/b", True),
        ("file:///srv/a, hf://org", "file:///srv/ab", False),
        ("https://ghcr.io", "oci://ghcr.io/a:1", False),
    ],
)
def test_only_what_the_list_holds_is_fetched(text, uri, held):
    allowed = allowed_sources(text, any_folder=False)
    if held:
        assert allowed.find(uri)[0] == parse(uri)
        return
    with pytest.raises(SourceNotAllowedError, match="push_from"):
        allowed.find(uri)


@pytest.mark.parametrize(
    "text", ["nonsense", "http://x", "https://", "https://a/b", "hf://org/repo@v1", "file://x", "oci://"]
)
def test_a_list_that_cannot_be_read_is_an_error_at_the_start(text):
    with pytest.raises(ValidationError, match="push_from"):
        RegistrySettings(push_from=text)


def test_any_folder_is_for_loopback_and_not_where_folders_are_listed():
    assert RegistrySettings().sources.find("file:///anywhere")
    listed = RegistrySettings(push_from="file:///srv/a")
    assert not listed.local_paths_allowed
    with pytest.raises(SourceNotAllowedError, match="file:///srv/a"):
        listed.sources.find("file:///anywhere")
    with pytest.raises(SourceNotAllowedError, match="it takes none"):
        RegistrySettings(host="0.0.0.0").sources.find("file:///anywhere")
    assert RegistrySettings(push_from="file:///srv/a", allow_local_paths=True).sources.find("file:///any")


@pytest.fixture
def fenced(tmp_path, data_dir, serving):
    """A registry that takes folders below tmp_path/open only."""
    (tmp_path / "open").mkdir()
    settings = RegistrySettings(
        port=0, data_dir=data_dir, max_upload_mib=1, push_from=f"file://{tmp_path}/open", log_level="warning"
    )
    with serving(settings) as running:
        yield running


def placed(adapter, where, seed=1):
    """A good adapter, moved there; its URI."""
    adapter(seed).rename(where)
    return where.as_uri()


def nothing_is_left(registry):
    assert registry.client.state().revision == 0
    assert registry.stored == set()
    assert registry.staged == []


def test_a_folder_inside_is_fetched_and_remembered(fenced, adapter, tmp_path):
    uri = placed(adapter, tmp_path / "open" / "in side")
    pushed = fenced.client.push_uri("support", uri)
    assert (pushed.created, pushed.source) == (True, uri)
    assert fenced.client.version("support", 1).source == uri
    assert fenced.client.history("support").events[0].reason == uri
    again = fenced.client.push_uri("support", uri)
    assert (again.created, again.version) == (False, 1)


def test_a_folder_outside_is_not(fenced, adapter, tmp_path):
    uri = placed(adapter, tmp_path / "opened")
    with pytest.raises(SourceNotAllowedError, match=r"it takes what begins with file://.*/open \("):
        fenced.client.push_uri("support", uri)
    response = fenced.http.post("/v1/tasks/support/versions", json={"path": str(tmp_path / "opened")})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "source_not_allowed")
    nothing_is_left(fenced)


def test_no_link_leads_out_of_the_folder(fenced, adapter, tmp_path):
    placed(adapter, tmp_path / "outside")
    inside = tmp_path / "open"
    (inside / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(AdapterRefusedError, match=r"link is no folder, or a link"):
        fenced.client.push_uri("support", f"file://{inside}/link")
    (inside / "deep").mkdir()
    (inside / "deep" / "link").symlink_to(tmp_path)
    with pytest.raises(AdapterRefusedError, match=r"link is no folder, or a link"):
        fenced.client.push_uri("support", f"file://{inside}/deep/link/outside")
    (inside / "made").mkdir()
    for name in ("prad.json", "adapter_model.safetensors"):
        (inside / "made" / name).symlink_to(tmp_path / "outside" / name)
    with pytest.raises(AdapterRefusedError, match="is a link, not a plain file"):
        fenced.client.push_uri("support", f"file://{inside}/made")
    nothing_is_left(fenced)


def test_what_is_no_plain_file_is_refused_at_once(fenced, adapter, tmp_path):
    uri = placed(adapter, tmp_path / "open" / "a")
    os.mkfifo(tmp_path / "open" / "a" / "README.md")
    with pytest.raises(AdapterRefusedError, match=r"README\.md is not a plain file"):
        fenced.client.push_uri("support", uri)
    (tmp_path / "open" / "a" / "README.md").unlink()
    (tmp_path / "open" / "a" / "README.md").mkdir()
    with pytest.raises(AdapterRefusedError, match=r"README\.md is not a plain file"):
        fenced.client.push_uri("support", uri)
    nothing_is_left(fenced)


def test_the_same_checks_as_of_an_upload(fenced, adapter, tmp_path):
    uri = placed(adapter, tmp_path / "open" / "a")
    (tmp_path / "open" / "a" / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(AdapterRefusedError, match="not a safetensors file"):
        fenced.client.push_uri("support", uri)
    (tmp_path / "open" / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterRefusedError, match=r"holds no adapter_model\.safetensors"):
        fenced.client.push_uri("support", uri)
    adapter(2, values=100_000).rename(tmp_path / "open" / "large")
    with pytest.raises(UploadTooLargeError, match="more than the limit"):
        fenced.client.push_uri("support", f"file://{tmp_path}/open/large")
    with pytest.raises(AdapterRefusedError, match="there is no folder nowhere"):
        fenced.client.push_uri("support", f"file://{tmp_path}/open/nowhere")
    nothing_is_left(fenced)


def test_a_body_must_name_one_place(registry):
    for body in ({}, {"uri": "hf://a/b", "path": "/x"}, {"uri": ""}, {"uri": 3}):
        response = registry.http.post("/v1/tasks/support/versions", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "uri"), body
    with pytest.raises(InvalidRequestError, match=r"uri: .* is none; expected one of"):
        registry.client.push_uri("support", "http://169.254.169.254/latest")


def test_a_missing_extra_is_named(data_dir, serving, monkeypatch):
    monkeypatch.setattr(fetching, "find_spec", lambda _: None)
    settings = RegistrySettings(port=0, data_dir=data_dir, push_from="s3://models, oci://ghcr.io")
    with serving(settings) as running:
        for uri, extra in (("s3://models/x", "s3"), ("oci://ghcr.io/x:1", "oci")):
            with pytest.raises(MissingExtraError, match=rf"pip install 'prad-server\[{extra}\]'"):
                running.client.push_uri("support", uri)
        response = running.http.post("/v1/tasks/support/versions", json={"uri": "s3://models/x"})
        assert (response.status_code, response.json()["error"]["code"]) == (501, "missing_extra")
        nothing_is_left(running)


def test_a_push_that_waits_is_answered_when_it_is_ready(registry, adapter):
    def replica():
        with RegistryClient(registry.url) as client:
            while not client.state().tasks:
                time.sleep(0.01)
        registry.http.get("/v1/changes", params={"after": 0, "replica": "prefill-1", "wait": 0})
        registry.probe("support@1")
        registry.http.get("/v1/changes", params={"after": 3, "replica": "prefill-1", "wait": 0})

    thread = threading.Thread(target=replica)
    thread.start()
    pushed = registry.client.push_uri("support", adapter(1).as_uri(), ready_within=30)
    thread.join()
    assert (pushed.state, pushed.pending, pushed.created) == ("routable", (), True)


def test_a_push_waits_no_longer_than_it_is_told_to(registry, adapter):
    pushed = registry.client.push_uri("support", adapter(1).as_uri(), ready_within=0.05)
    assert (pushed.state, pushed.pending) == ("pushed", ())
    registry.http.get("/v1/changes", params={"after": 0, "replica": "behind", "wait": 0})
    registry.probe("support@1")
    pushed = registry.client.push_uri("support", adapter(1).as_uri(), ready_within=0.05)
    assert (pushed.state, pushed.pending, pushed.created) == ("routable", ("behind",), False)
    assert pushed.source == adapter(1).as_uri()


def test_the_parts_of_a_push_are_timed(registry, adapter):
    response = registry.http.post("/v1/tasks/support/versions", json={"uri": adapter(1).as_uri()})
    names = [part.partition(";")[0] for part in response.headers["server-timing"].split(", ")]
    assert names == ["receive", "check", "store"]


def test_a_key_that_is_not_kept_is_refused_where_repeating_does_more(registry, adapter):
    registry.verified(adapter(1))
    registry.verified(adapter(2))
    registry.client.promote("support", 2)
    path, key = "/v1/tasks/support/rollback", {"idempotency-key": "k"}
    refused = registry.http.post(path, headers=key)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "idempotency-key")
    seen = registry.client.task("support").routing.revision
    for status in (200, 412):
        assert registry.http.post(path, headers={**key, "if-match": f'"{seen}"'}).status_code == status
