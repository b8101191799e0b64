"""Adapters fetched from an S3: moto's, over HTTP, by s3fs."""

import base64
import hashlib

import pytest

from adapter_registry.errors import (
    AdapterRefusedError,
    SourceNotAllowedError,
    SourceUnavailableError,
    UploadTooLargeError,
)
from adapter_registry.settings import RegistrySettings
from adapter_registry.sources import buckets
from adapter_registry.sources.arrival import Promised
from tests.source_servers import free_port


@pytest.fixture
def s3(s3):
    s3.call_s3("create_bucket", Bucket="models")
    yield s3
    s3.rm("models", recursive=True)


@pytest.fixture
def registry(data_dir, serving):
    settings = RegistrySettings(
        port=0, data_dir=data_dir, push_from="s3://models/good", max_upload_mib=1, log_level="warning"
    )
    with serving(settings) as running:
        yield running


def put(s3, folder, where):
    for path in folder.iterdir():
        s3.call_s3("put_object", Bucket="models", Key=f"{where}/{path.name}", Body=path.read_bytes())


def nothing_is_left(registry):
    assert registry.client.state().revision == 0
    assert registry.stored == set()
    assert registry.staged == []


def test_a_folder_of_a_bucket(s3, registry, adapter):
    folder = adapter(1)
    put(s3, folder, "good/support")
    s3.call_s3("put_object", Bucket="models", Key="good/support/notes.txt", Body=b"stays where it is")
    pushed = registry.client.push_uri("support", "s3://models/good/support/")
    tag = hashlib.md5((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert pushed.source == f"s3://models/good/support (adapter_model.safetensors: ETag {tag})"
    assert {file.name for file in pushed.files} == {"prad.json", "adapter_model.safetensors"}
    assert not registry.client.push_uri("support", "s3://models/good/support").created


def test_of_a_versioned_bucket_the_version_is_told(s3, registry, adapter):
    enabled = {"Status": "Enabled"}
    s3.call_s3("put_bucket_versioning", Bucket="models", VersioningConfiguration=enabled)
    put(s3, adapter(1), "good/versioned")
    pushed = registry.client.push_uri("support", "s3://models/good/versioned")
    assert "(adapter_model.safetensors: version " in pushed.source


def test_what_is_refused(s3, registry, adapter):
    put(s3, adapter(1), "other")
    for uri in ("s3://models/other", "s3://private/good", "s3://models"):
        with pytest.raises(SourceNotAllowedError, match="push_from"):
            registry.client.push_uri("support", uri)
    with pytest.raises(AdapterRefusedError, match=r"holds no prad\.json"):
        registry.client.push_uri("support", "s3://models/good/nowhere")
    put(s3, adapter(2, values=100_000), "good/large")
    with pytest.raises(UploadTooLargeError, match="more than the limit"):
        registry.client.push_uri("support", "s3://models/good/large")
    s3.call_s3("put_object", Bucket="models", Key="good/bad/prad.json", Body=b"{")
    with pytest.raises(AdapterRefusedError, match=r"prad\.json"):
        registry.client.push_uri("support", "s3://models/good/bad")
    nothing_is_left(registry)


def test_a_digest_that_does_not_hold(s3, registry, adapter, monkeypatch):
    put(s3, adapter(1), "good/support")
    promise = Promised.sha256("0" * 64, None)
    monkeypatch.setattr(buckets, "_promised", lambda head: promise)
    with pytest.raises(AdapterRefusedError, match="changed or damaged on its way"):
        registry.client.push_uri("support", "s3://models/good/support")
    nothing_is_left(registry)


def test_what_s3_says_of_a_file():
    content = b"weights"
    md5, sha = hashlib.md5(content).hexdigest(), hashlib.sha256(content)
    encoded = base64.b64encode(sha.digest()).decode()

    def promised(**head):
        found = buckets._promised({"ContentLength": 7, "ETag": f'"{md5}"'} | head)
        return found.size, "" if found.hasher is None else f"{found.hasher.name} {found.digest}"

    assert promised() == (7, f"md5 {md5}")
    assert promised(ChecksumSHA256=encoded) == (7, f"sha256 {sha.hexdigest()}")
    assert promised(ChecksumSHA256=f"{encoded}-2", ChecksumType="COMPOSITE") == (7, f"md5 {md5}")
    assert promised(ETag=f'"{md5}-2"') == (7, "")
    assert promised(ServerSideEncryption="aws:kms") == (7, "")
    assert promised(ServerSideEncryption="AES256") == (7, f"md5 {md5}")
    assert promised(SSECustomerAlgorithm="AES256") == (7, "")


def test_an_s3_that_is_away(s3, registry, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(SourceUnavailableError, match="cannot be read"):
        registry.client.push_uri("support", "s3://models/good/support")
    nothing_is_left(registry)


def test_an_answer_that_is_cut_off(s3, registry, monkeypatch):
    import aiohttp

    def cut_off(*_, **__):
        raise aiohttp.ClientPayloadError("not enough data")

    with monkeypatch.context() as patch:
        patch.setattr(type(s3), "call_s3", cut_off)
        with pytest.raises(SourceUnavailableError, match="cannot be read: not enough data"):
            registry.client.push_uri("support", "s3://models/good/support")
    nothing_is_left(registry)
