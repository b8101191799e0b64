"""Adapters fetched from a hub: a small server that speaks the two endpoints that are asked."""

import hashlib
import json

import pytest

from adapter_registry.errors import AdapterRefusedError, SourceNotAllowedError, SourceUnavailableError
from adapter_registry.settings import RegistrySettings
from tests.source_servers import ToldServer

COMMIT = "c" * 40


@pytest.fixture
def hub(monkeypatch):
    server = ToldServer()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.close()


@pytest.fixture
def cdn():
    server = ToldServer()
    yield server
    server.close()


@pytest.fixture
def start(data_dir, serving):
    def started(listed):
        return serving(
            RegistrySettings(port=0, data_dir=data_dir, push_from=listed, max_upload_mib=1, log_level="error")
        )

    return started


def git_blob(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def tell(hub, folder, where="", revision="main", repository="org/support"):
    """The files of `folder` in a repository: the weights as a large file, the others as git keeps them."""
    listed = [{"rfilename": "config.json", "size": 2, "blobId": git_blob(b"{}")}]
    for path in folder.iterdir():
        content, name = path.read_bytes(), f"{where}{path.name}"
        about = {"rfilename": name, "size": len(content), "blobId": git_blob(content)}
        if path.suffix == ".safetensors":
            lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            about |= {"blobId": "0" * 40, "lfs": lfs}
        listed.append(about)
        hub.answers[f"/{repository}/resolve/{COMMIT}/{name}"] = (200, {}, content)
    said = {"id": repository, "sha": COMMIT, "siblings": listed, "private": False}
    hub.answers[f"/api/models/{repository}/revision/{revision}"] = (200, {}, json.dumps(said).encode())


def nothing_is_left(registry):
    assert registry.client.state().revision == 0
    assert registry.stored == set()
    assert registry.staged == []


def test_a_repository_at_its_commit(hub, start, adapter):
    tell(hub, adapter(1))
    with start("hf://org") as registry:
        pushed = registry.client.push_uri("support", "hf://org/support")
        assert pushed.source == f"hf://org/support@{COMMIT}"
        assert {file.name for file in pushed.files} == {"prad.json", "adapter_model.safetensors"}
    assert hub.asked[0][0] == "/api/models/org/support/revision/main?blobs=true"
    assert {headers["authorization"] for _, headers in hub.asked} == {"Bearer hf_secret"}
    assert not any("config.json" in path for path, _ in hub.asked)


def test_a_folder_of_a_revision(hub, start, adapter):
    tell(hub, adapter(1), "deep/er/", "refs%2Fpr%2F1")
    with start("hf://org/support") as registry:
        pushed = registry.client.push_uri("support", "hf://org/support@refs%2Fpr%2F1/deep/er")
        assert pushed.source == f"hf://org/support@{COMMIT}/deep/er"
        with pytest.raises(AdapterRefusedError, match=r"holds no prad\.json"):
            registry.client.push_uri("support", "hf://org/support@refs%2Fpr%2F1/deep")


def test_what_is_not_listed_is_not_asked_for(hub, start, adapter):
    tell(hub, adapter(1))
    with start("hf://other") as registry:
        with pytest.raises(SourceNotAllowedError, match="hf://other"):
            registry.client.push_uri("support", "hf://org/support")
        nothing_is_left(registry)
    assert hub.asked == []


def test_large_files_may_lie_elsewhere_if_that_is_listed(hub, cdn, start, adapter):
    tell(hub, adapter(1))
    path = f"/org/support/resolve/{COMMIT}/adapter_model.safetensors"
    cdn.answers["/large"] = hub.answers[path]
    hub.answers[path] = (302, {"location": f"{cdn.url}/large"}, b"")
    with start("hf://org") as registry:
        with pytest.raises(SourceNotAllowedError, match=f"add https://{cdn.host}"):
            registry.client.push_uri("support", "hf://org/support")
        assert cdn.asked == []
        nothing_is_left(registry)
    with start(f"hf://org, https://{cdn.host}") as registry:
        assert registry.client.push_uri("support", "hf://org/support").created
    assert "authorization" not in cdn.asked[0][1]


@pytest.mark.parametrize("name", ["prad.json", "adapter_model.safetensors"])
def test_a_file_that_was_changed_on_its_way(hub, start, adapter, name):
    tell(hub, adapter(1))
    path = f"/org/support/resolve/{COMMIT}/{name}"
    content = hub.answers[path][2]
    hub.answers[path] = (200, {}, content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    with start("hf://org") as registry:
        with pytest.raises(AdapterRefusedError, match="changed or damaged on its way"):
            registry.client.push_uri("support", "hf://org/support")
        nothing_is_left(registry)


def test_what_the_hub_does_not_have(hub, start):
    with start("hf://org") as registry:
        with pytest.raises(AdapterRefusedError, match=r"no revision 'v9' there.*HF_TOKEN"):
            registry.client.push_uri("support", "hf://org/support@v9")
        hub.answers["/api/models/org/support/revision/v9"] = (200, {}, b"<html>")
        with pytest.raises(SourceUnavailableError, match="the hub's answer is none"):
            registry.client.push_uri("support", "hf://org/support@v9")
        hub.answers["/api/models/org/support/revision/v9"] = (503, {}, b"")
        with pytest.raises(SourceUnavailableError, match="answered with 503"):
            registry.client.push_uri("support", "hf://org/support@v9")
        nothing_is_left(registry)
