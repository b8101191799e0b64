"""Adapters fetched from a real OCI registry (Debian's docker-registry), and what a hostile one may answer."""

import base64
import hashlib
import json

import httpx
import pytest

from adapter_registry.errors import (
    AdapterRefusedError,
    SourceNotAllowedError,
    SourceUnavailableError,
    UploadTooLargeError,
)
from adapter_registry.settings import RegistrySettings
from adapter_registry.sources.oci import MANIFEST
from tests.source_servers import ToldServer, docker_registry, require_packages

RAW = "application/vnd.cncf.model.weight.v1.raw"
CONFIG = "application/vnd.cncf.model.config.v1+json"
PASSWORD_LINE = "ada:$2b$05$abcdefghijklmnopqrstuupx2xBUC4954936wVIjyyPHmUBFu0wCW\n"  # of "open sesame"


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def layer(name, content, kind=RAW, annotation="org.cncf.model.filepath"):
    about = {"mediaType": kind, "digest": sha256(content), "size": len(content)}
    return about | {"annotations": {annotation: name}}


def manifest(layers) -> bytes:
    """As ModelPack has it."""
    config = {"mediaType": CONFIG, "digest": sha256(b"{}"), "size": 2}
    kind = "application/vnd.cncf.model.manifest.v1+json"
    head = {"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": kind, "config": config}
    return json.dumps(head | {"layers": layers}).encode()


def store(host, repository, tag, files, auth=None):
    """By the distribution specification; the manifest's digest."""
    with httpx.Client(base_url=f"http://{host}/v2/{repository}/", auth=auth, trust_env=False) as http:
        for content in (b"{}", *files.values()):
            where = httpx.URL(http.post("blobs/uploads/").headers["location"])
            where = where.copy_merge_params({"digest": sha256(content)})
            answer = http.put(where, content=content)
            assert answer.status_code == 201, answer.text
        body = manifest([layer(name, content) for name, content in files.items()])
        answer = http.put(f"manifests/{tag}", content=body, headers={"content-type": MANIFEST})
        assert answer.status_code == 201, answer.text
    return sha256(body)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Where no credentials are."""
    require_packages("oras")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / ".docker").mkdir(parents=True)
    return tmp_path / "home"


@pytest.fixture
def files(adapter):
    return {path.name: path.read_bytes() for path in sorted(adapter(1).iterdir())}


@pytest.fixture
def running(data_dir, serving):
    """running(HOST...): a registry that fetches from there."""

    def start(*hosts, **more):
        listed = ", ".join(host if "://" in host else f"oci://{host}" for host in hosts)
        return serving(
            RegistrySettings(port=0, data_dir=data_dir, push_from=listed, max_upload_mib=1, **more)
        )

    return start


def nothing_is_left(registry):
    assert registry.client.state().revision == 0
    assert registry.stored == set()
    assert registry.staged == []


def test_by_tag_and_by_digest(tmp_path, running, files):
    more = {"README.md": b"# a card", "notes.txt": b"stays where it is"}
    with docker_registry(tmp_path) as host, running(host) as registry:
        digest = store(host, "team/support", "1.0", files | more)
        pushed = registry.client.push_uri("support", f"oci://{host}/team/support:1.0")
        assert pushed.source == f"oci://{host}/team/support@{digest}"
        assert [file.name for file in pushed.files] == ["README.md", "adapter_model.safetensors", "prad.json"]
        again = registry.client.push_uri("support", f"oci://{host}/team/support@{digest}")
        assert (again.version, again.created) == (1, False)
        store(host, "team/support", "latest", files)
        assert registry.client.push_uri("support", f"oci://{host}/team/support").version == 2
        with pytest.raises(AdapterRefusedError, match=r"there is no 2\.0"):
            registry.client.push_uri("support", f"oci://{host}/team/support:2.0")
        with pytest.raises(AdapterRefusedError, match=r"there is no 1\.0"):
            registry.client.push_uri("support", f"oci://{host}/nobody:1.0")


def test_as_oras_pushes_it(tmp_path, running, adapter, monkeypatch):
    from oras.provider import Registry

    monkeypatch.chdir(adapter(1))
    with docker_registry(tmp_path) as host, running(host) as registry:
        named = [f"adapter_model.safetensors:{RAW}", f"prad.json:{RAW}"]
        Registry(insecure=True).push(f"{host}/support:1", files=named)
        assert registry.client.push_uri("support", f"oci://{host}/support:1").created


def test_only_below_what_is_listed(tmp_path, running, files):
    with docker_registry(tmp_path) as host, running(f"{host}/team") as registry:
        store(host, "other/support", "1", files)
        with pytest.raises(SourceNotAllowedError, match="push_from"):
            registry.client.push_uri("support", f"oci://{host}/other/support:1")
        nothing_is_left(registry)


def test_credentials_are_those_of_docker_login(tmp_path, running, files, home):
    passwords = tmp_path / "htpasswd"
    passwords.write_text(PASSWORD_LINE, encoding="utf-8")
    with docker_registry(tmp_path, {"htpasswd": passwords}) as host, running(host) as registry:
        store(host, "support", "1", files, auth=("ada", "open sesame"))
        with pytest.raises(AdapterRefusedError, match=r"asks for credentials.*docker login"):
            registry.client.push_uri("support", f"oci://{host}/support:1")
        nothing_is_left(registry)
        known = base64.b64encode(b"ada:open sesame").decode()
        config = json.dumps({"auths": {host: {"auth": known}}})
        (home / ".docker" / "config.json").write_text(config, encoding="utf-8")
        assert registry.client.push_uri("support", f"oci://{host}/support:1").created


@pytest.fixture
def told():
    server = ToldServer()
    yield server
    server.close()


@pytest.fixture
def other():
    server = ToldServer()
    yield server
    server.close()


def tell(server, files, layers=None):
    """What a registry has under support:1; `layers`: what its manifest says instead of the truth."""
    listed = [layer(name, content) for name, content in files.items()] if layers is None else layers
    server.answers["/v2/support/manifests/1"] = (200, {}, manifest(listed))
    for content in files.values():
        server.answers[f"/v2/support/blobs/{sha256(content)}"] = (200, {}, content)


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda each: each | {"digest": "sha256:" + "0" * 64}, AdapterRefusedError, "there is no"),
        (lambda each: each | {"size": each["size"] + 1}, AdapterRefusedError, "were announced"),
        (lambda each: each | {"size": 2 << 20}, UploadTooLargeError, "more than the limit"),
        (lambda each: each | {"digest": "md5:abc"}, AdapterRefusedError, "no manifest of an artefact"),
        (lambda each: each | {"mediaType": RAW + ".tar"}, AdapterRefusedError, "expected the raw file"),
        (lambda each: each | {"annotations": None}, AdapterRefusedError, r"holds no prad\.json"),
    ],
)
def test_a_manifest_that_lies(told, running, files, spoil, error, says):
    tell(told, files, [spoil(layer(name, content)) for name, content in files.items()])
    with running(told.host) as registry:
        with pytest.raises(error, match=says):
            registry.client.push_uri("support", f"oci://{told.host}/support:1")
        nothing_is_left(registry)


def test_a_file_that_was_changed_on_its_way(told, running, files):
    tell(told, files)
    weights = files["adapter_model.safetensors"]
    changed = weights[:-1] + bytes([weights[-1] ^ 1])
    told.answers[f"/v2/support/blobs/{sha256(weights)}"] = (200, {}, changed)
    with running(told.host) as registry:
        with pytest.raises(AdapterRefusedError, match="changed or damaged on its way"):
            registry.client.push_uri("support", f"oci://{told.host}/support:1")
        told.answers[f"/v2/support/blobs/{sha256(weights)}"] = (200, {}, weights)
        other = f"oci://{told.host}/support@sha256:{'0' * 64}"
        told.answers[f"/v2/support/manifests/sha256:{'0' * 64}"] = told.answers["/v2/support/manifests/1"]
        with pytest.raises(AdapterRefusedError, match="the manifest that came has digest"):
            registry.client.push_uri("support", other)
        nothing_is_left(registry)


def test_a_file_twice_and_a_manifest_that_is_none(told, running, files):
    listed = [layer(name, content) for name, content in files.items()]
    with running(told.host) as registry:
        tell(told, files, [*listed, listed[0]])
        with pytest.raises(AdapterRefusedError, match="is there twice"):
            registry.client.push_uri("support", f"oci://{told.host}/support:1")
        for body in (b"{", b"[]", b'{"manifests": []}'):
            told.answers["/v2/support/manifests/1"] = (200, {}, body)
            with pytest.raises(AdapterRefusedError, match="no manifest of an artefact"):
                registry.client.push_uri("support", f"oci://{told.host}/support:1")
        told.answers["/v2/support/manifests/1"] = (500, {}, b"")
        with pytest.raises(SourceUnavailableError, match="answered with 500"):
            registry.client.push_uri("support", f"oci://{told.host}/support:1")
        nothing_is_left(registry)


def test_blobs_may_lie_elsewhere_if_that_is_listed(told, other, running, files):
    tell(told, files)
    for content in files.values():
        path = f"/v2/support/blobs/{sha256(content)}"
        other.answers[path] = told.answers[path]
        told.answers[path] = (307, {"location": f"{other.url}{path}"}, b"")
    with running(told.host) as registry:
        with pytest.raises(SourceNotAllowedError, match=f"add https://{other.host} to its setting"):
            registry.client.push_uri("support", f"oci://{told.host}/support:1")
        assert other.asked == []
        nothing_is_left(registry)
    with running(told.host, f"https://{other.host}") as registry:
        assert registry.client.push_uri("support", f"oci://{told.host}/support:1").created


def test_tokens_are_asked_for_at_listed_hosts_only(told, other, running, files, home):
    known = base64.b64encode(b"ada:open sesame").decode()
    (home / ".docker" / "config.json").write_text(
        json.dumps({"auths": {told.host: {"auth": known}}}), encoding="utf-8"
    )
    tell(told, files)
    right = told.answers["/v2/support/manifests/1"]
    challenge = f'Bearer realm="{other.url}/token",service="s",scope="repository:support:pull"'
    told.answers["/v2/support/manifests/1"] = (401, {"www-authenticate": challenge}, b"")
    with running(told.host) as registry:
        with pytest.raises(SourceNotAllowedError, match=f"add https://{other.host}"):
            registry.client.push_uri("support", f"oci://{told.host}/support:1")
        assert other.asked == [], "the password went nowhere"
        nothing_is_left(registry)

    class Granting(dict):
        def get(self, path, default=None):
            if path == "/token":
                told.answers["/v2/support/manifests/1"] = right
                return (200, {}, b'{"token": "granted"}')
            return super().get(path, default)

    other.answers = Granting()
    with running(told.host, f"https://{other.host}") as registry:
        assert registry.client.push_uri("support", f"oci://{told.host}/support:1").created
    assert other.asked[0][0] == "/token?service=s&scope=repository%3Asupport%3Apull"
    assert other.asked[0][1]["authorization"] == f"Basic {known}"
    assert {headers["authorization"] for _, headers in told.asked[-3:]} == {"Bearer granted"}
