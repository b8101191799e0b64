"""The whole registry in one file: `prad registry export` and `import`."""

import io
import tarfile

from typer.testing import CliRunner

from adapter_registry.settings import RegistrySettings
from prad_cli.app import app


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
    said = f"2 tasks with 3 versions, at revision {before.revision}, written to {file}, read from {data_dir}"
    assert " ".join(exported.output.split()).startswith(said)

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


def test_an_export_makes_no_registry(data_dir, serving, adapter, tmp_path, monkeypatch):
    with serving(RegistrySettings(port=0, data_dir=data_dir, log_level="warning")) as registry:
        registry.push(adapter(1))
    other = tmp_path / "mistyped"
    refused = prad("registry", "export", tmp_path / "a.tar", "--data-dir", other)
    assert f"{other} holds no registry" in str(refused.exception)
    assert not other.exists()
    (tmp_path / "of-serve").mkdir()
    data_dir.rename(tmp_path / "of-serve" / "registry")
    hinted = prad("registry", "export", tmp_path / "a.tar", "--data-dir", tmp_path / "of-serve")
    assert f"prad serve keeps its own in {tmp_path / 'of-serve' / 'registry'}" in str(hinted.exception)
    assert "named by --redis-url" in str(hinted.exception)
    monkeypatch.setenv("PRAD_DATA_DIR", str(tmp_path / "of-serve"))
    assert "1 task with 1 version," in prad("registry", "export", tmp_path / "a.tar").output


def test_an_empty_registry_is_no_backup(redis, tmp_path):
    file = tmp_path / "a.tar"
    refused = prad("registry", "export", file, "--data-dir", tmp_path / "there", "--redis-url", redis.url)
    assert f"Redis {redis.url.removeprefix('unix://')}" in str(refused.exception).replace("unix://", "")
    assert "holds nothing: no version, no routing, no key" in str(refused.exception)
    assert (refused.exit_code, file.exists()) == (1, False)


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
