"""Who signed an adapter: signed by a command, admitted or refused by the registry, kept to the end."""

import json
import stat
import subprocess
import sys
import tarfile

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)
from typer.testing import CliRunner

from adapter_registry.errors import CannotStartError, SignatureRefusedError
from adapter_registry.server import RegistryServer
from adapter_registry.settings import RegistrySettings
from prad.artefact import read_artefact
from prad.artefact.signatures import SIGNATURES, pushed_files, read_signatures
from prad.artefact.signing import SigningError, generate, public_keys, sign, verifies
from prad_cli.app import app

MAIN = "import sys, prad_cli.app as c\ntry: c.main()\nexcept SystemExit as e: sys.exit(e.code)"


@pytest.fixture
def keys(tmp_path):
    """Private keys of ada and bob, whose public ones the registry has in the folder `known`, and eve's."""
    found = {name: tmp_path / "own" / name for name in ("ada", "bob", "eve")}
    (tmp_path / "known").mkdir()
    for name, path in found.items():
        generate(path, f"{name}@desk")
    for name in ("ada", "bob"):
        found[name].with_name(f"{name}.pub").rename(tmp_path / "known" / f"{name}.pub")
    return found


@pytest.fixture
def strict(tmp_path, keys, data_dir):
    return RegistrySettings(
        port=0, data_dir=data_dir, signing_keys=tmp_path / "known", max_upload_mib=1, log_level="warning"
    )


def push(registry, folder, task="support"):
    files = [(path.name, path.open("rb")) for path in pushed_files(read_artefact(folder))]
    try:
        return registry.client.push(task, files)
    finally:
        for _, file in files:
            file.close()


def refused(registry, folder, *says):
    with pytest.raises(SignatureRefusedError) as raised:
        push(registry, folder)
    for words in says:
        assert words in raised.value.message
    assert raised.value.param == SIGNATURES
    assert registry.client.state().revision == 0
    for name in ("artefacts", "staging"):
        assert list((registry.data / name).iterdir()) == []


def prad(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_only_what_a_known_key_signed_is_taken(serving, strict, keys, adapter, tmp_path):
    folder = adapter(1)
    with serving(strict) as registry:
        refused(registry, folder, "is not signed", "prad adapter sign FOLDER --key FILE", "ada@desk SHA256:")
        eve = sign(folder, keys["eve"])
        refused(registry, folder, f"signed by {eve.fingerprint}", "does not know", "bob@desk SHA256:")
        sign(folder, keys["ada"])
        pushed = push(registry, folder)
        assert [each.name for each in pushed.signatures] == ["ada@desk", ""]
        stored = registry.data / "artefacts" / pushed.digest
        assert {path.name for path in stored.iterdir()} == {"prad.json", "adapter_model.safetensors"}
        (tmp_path / "known" / "ada.pub").unlink()
        with pytest.raises(SignatureRefusedError, match="does not know"):
            push(registry, folder, "other")
        (tmp_path / "known" / "bob.pub").unlink()
        answer = registry.http.post("/v1/tasks/other/versions", json={"path": str(folder)})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "signing_keys_unreadable")


@pytest.mark.parametrize("signing_keys", [True, False])
def test_a_bad_signature_is_refused_by_every_registry(serving, strict, keys, adapter, signing_keys):
    asked = strict if signing_keys else strict.model_copy(update={"signing_keys": None})
    with serving(asked) as registry:
        folder = adapter(1)
        sign(folder, keys["ada"])
        (folder / "README.md").write_text("changed since", encoding="utf-8")
        refused(registry, folder, "was changed after it was signed", read_artefact(folder).digest)
        sign(folder, keys["ada"])
        (folder / "README.md").unlink()
        told = json.loads((folder / SIGNATURES).read_text(encoding="utf-8"))
        (folder / SIGNATURES).write_text(
            json.dumps(told | {"digest": read_artefact(folder).digest}), encoding="utf-8"
        )
        refused(registry, folder, "is not one of SHA256:", "damaged, or made up")
        for text, says in (
            ("{", "cannot be read"),
            (json.dumps(told | {"signatures": []}), "signatures"),
            (json.dumps(told | {"digest": "x"}), "digest"),
            (" " * (65 << 10), "expected at most 65536"),
        ):
            (folder / SIGNATURES).write_text(text, encoding="utf-8")
            refused(registry, folder, "signature.json", says, "sign it again")


def test_a_path_on_the_registrys_machine_is_checked_alike(serving, strict, keys, adapter):
    folder = adapter(1)
    with serving(strict) as registry:
        answer = registry.http.post("/v1/tasks/support/versions", json={"path": str(folder)})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "signature_refused")
        sign(folder, keys["bob"])
        answer = registry.http.post("/v1/tasks/support/versions", json={"path": str(folder)})
        assert answer.status_code == 201
        assert answer.json()["signatures"][0]["name"] == "bob@desk"


def test_who_signed_goes_through_push_show_pull_export_and_import(
    serving, strict, keys, adapter, tmp_path, redis
):
    folder = adapter(1)
    with serving(strict) as registry:
        at = ("--registry", registry.url)
        assert "signed by SHA256:" in prad("adapter", "sign", folder, "--key", keys["ada"]).stdout
        pushed = prad("adapter", "push", folder, "--task", "support", "--no-wait", *at)
        assert "signed by ada@desk (SHA256:" in pushed.stdout
        shown = prad("adapter", "show", "support@1", *at).stdout
        assert "ada@desk (SHA256:" in shown
        assert prad("adapter", "pull", "support@1", tmp_path / "back", *at).exit_code == 0
        assert read_signatures(tmp_path / "back") == read_signatures(folder)
        assert read_artefact(tmp_path / "back").digest == read_artefact(folder).digest
        before = registry.client.version("support", 1)
    file = tmp_path / "all.tar"
    assert prad("registry", "export", file, "--data-dir", strict.data_dir).exit_code == 0
    elsewhere = ("--data-dir", tmp_path / "elsewhere", "--redis-url", redis.url)
    assert prad("registry", "import", file, *elsewhere).exit_code == 0
    moved = strict.model_copy(update={"data_dir": tmp_path / "elsewhere", "redis_url": redis.url})
    with serving(moved) as registry:
        assert registry.client.version("support", 1) == before
        assert push(registry, tmp_path / "back").created is False


def test_an_export_with_a_made_up_signature_is_refused(serving, strict, keys, adapter, tmp_path):
    folder = adapter(1)
    sign(folder, keys["ada"])
    with serving(strict) as registry:
        push(registry, folder)
    file = tmp_path / "all.tar"
    prad("registry", "export", file, "--data-dir", strict.data_dir)
    with tarfile.open(file) as tar:
        tar.extractall(tmp_path / "out", filter="data")
    index = tmp_path / "out" / "registry.json"
    found = json.loads(index.read_text(encoding="utf-8"))
    found["tasks"][0]["versions"][0]["signatures"][0]["key"] = "A" * 43 + "="
    index.write_text(json.dumps(found), encoding="utf-8")
    with tarfile.open(file, "w") as tar:
        tar.add(index, "registry.json")
        for path in (tmp_path / "out" / "artefacts").rglob("*.*"):
            tar.add(path, path.relative_to(tmp_path / "out"))
    ended = prad("registry", "import", file, "--data-dir", tmp_path / "elsewhere")
    assert ended.exit_code == 1
    assert "support@1 has a signature that SHA256:" in str(ended.exception)


def test_a_key_is_made_for_its_owner_alone(tmp_path, adapter):
    key = tmp_path / "keys" / "ada"
    ended = prad("adapter", "sign", adapter(1), "--generate", "--key", key)
    assert ended.exit_code == 0, ended.output
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    (named,) = public_keys(key.with_name("ada.pub")).values()
    assert "@" in named
    before = key.read_bytes()
    again = prad("adapter", "sign", "--generate", "--key", key)
    assert "is there already" in str(again.exception)
    assert key.read_bytes() == before
    assert prad("adapter", "sign", "--key", key).exit_code == 2


def test_signing_needs_no_torch(tmp_path, adapter, keys):
    asked = [
        sys.executable,
        "-c",
        f"{MAIN.rsplit('sys.exit', 1)[0]}sys.exit(e.code or 'torch' in sys.modules)",
    ]
    ended = subprocess.run(
        [*asked, "adapter", "sign", str(adapter(1)), "--key", str(keys["ada"])],
        capture_output=True,
        check=False,
        encoding="utf-8",
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_keys_of_other_kinds_are_said_to_be_so(tmp_path, adapter, keys):
    folder, path = adapter(1), tmp_path / "key"
    for text, says in (
        (b"no key", "holds no private key"),
        (
            generate_private_key(SECP256R1()).private_bytes(
                Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
            ),
            "of another kind",
        ),
    ):
        path.write_bytes(text)
        with pytest.raises(SigningError, match=says):
            sign(folder, path)
    own = load_ssh_private_key(keys["ada"].read_bytes(), None)
    path.write_bytes(own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
    with pytest.raises(SigningError, match="locked with a passphrase"):
        sign(folder, path)
    with pytest.raises(SigningError, match="cannot read the key"):
        sign(folder, tmp_path / "nowhere")
    path.write_bytes(own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    signed = sign(folder, path)
    assert verifies(signed, read_artefact(folder).digest)
    assert not verifies(signed, "0" * 64)
    path.write_bytes(own.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    assert public_keys(path) == {signed.key: "key"}


def test_a_registry_whose_keys_cannot_be_read_does_not_start(strict, keys, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, says in (
        (tmp_path / "nowhere", "cannot read the public keys"),
        (tmp_path / "empty", "holds no public key"),
        (keys["ada"], "holds a private key"),
    ):
        with pytest.raises(CannotStartError, match=says):
            RegistryServer(strict.model_copy(update={"signing_keys": path}))
    (tmp_path / "cut").write_text("-----BEGIN PUBLIC KEY-----\nMCow\n", encoding="utf-8")
    with pytest.raises(CannotStartError, match="holds no whole public key in PEM"):
        RegistryServer(strict.model_copy(update={"signing_keys": tmp_path / "cut"}))
    (tmp_path / "list").write_text("# those who may\nssh-rsa AAAA x\n", encoding="utf-8")
    with pytest.raises(CannotStartError, match="is no public key"):
        RegistryServer(strict.model_copy(update={"signing_keys": tmp_path / "list"}))
