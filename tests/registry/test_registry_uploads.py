"""What is no adapter is refused with a reason, and nothing of it is stored."""

import itertools
import json

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

PUSH = "/v1/tasks/support/versions"


@pytest.fixture
def files(adapter):
    """The files of a good adapter, to be spoilt."""
    return {path.name: path.read_bytes() for path in sorted(adapter(1).iterdir())}


def refused(registry, response: httpx.Response, status: int, code: str, says: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert says in error["message"]
    assert registry.client.state().revision == 0
    assert registry.stored == set()
    assert registry.staged == []


def upload(registry, parts, task="support"):
    return registry.http.post(f"/v1/tasks/{task}/versions", files=[("files", part) for part in parts])


@pytest.mark.parametrize("missing", ["prad.json", "adapter_model.safetensors"])
def test_a_missing_file(registry, files, missing):
    del files[missing]
    response = upload(registry, files.items())
    refused(registry, response, 400, "adapter_refused", f"the adapter holds no {missing}")


def test_garbage_weights(registry, files):
    files["adapter_model.safetensors"] = b"\xff" * 100
    refused(registry, upload(registry, files.items()), 400, "adapter_refused", "not a safetensors file")


def test_truncated_weights(registry, files):
    files["adapter_model.safetensors"] = files["adapter_model.safetensors"][:-1]
    refused(registry, upload(registry, files.items()), 400, "adapter_refused", "not a safetensors file")


def test_a_bad_record(registry, files):
    record = json.loads(files["prad.json"])
    files["prad.json"] = json.dumps({**record, "template": "no prompt"}).encode()
    refused(registry, upload(registry, files.items()), 400, "adapter_refused", "prad.json: template")
    files["prad.json"] = b"{"
    refused(registry, upload(registry, files.items()), 400, "adapter_refused", "prad.json")


@pytest.mark.parametrize(
    "name", ["evil.py", "../prad.json", "/etc/passwd", "..", "prad.json/../../x", "PRAD.JSON", "prad.json\0"]
)
def test_other_file_names(registry, files, name):
    response = upload(registry, [*files.items(), (name, b"x")])
    assert response.status_code == 400
    assert registry.client.state().revision == 0
    assert (registry.stored, registry.staged) == (set(), [])


def test_a_file_twice(registry, files):
    parts = [*files.items(), ("prad.json", files["prad.json"])]
    refused(registry, upload(registry, parts), 400, "adapter_refused", "prad.json was sent twice")


def test_a_field_that_is_no_file(registry, files):
    parts = [("files", part) for part in files.items()]
    response = registry.http.post(PUSH, files=parts, data={"comment": "hello"})
    refused(registry, response, 400, "invalid_request", "'comment' is not a file")


def test_too_large(registry, adapter):
    folder = adapter(1, values=100_000)
    parts = [(path.name, path.read_bytes()) for path in folder.iterdir()]
    refused(registry, upload(registry, parts), 413, "upload_too_large", "larger than the limit")
    response = registry.http.post(PUSH, json={"path": str(folder)})
    refused(registry, response, 413, "upload_too_large", "limit")


def test_too_large_without_a_length(registry):
    def endless():
        for _ in range(100):
            yield b"x" * 65536

    headers = {"content-type": "multipart/form-data; boundary=b"}
    response = registry.http.post(PUSH, content=endless(), headers=headers)
    assert response.status_code in (400, 413)
    assert registry.client.state().revision == 0


@pytest.mark.parametrize("body", ["{", "[]", '{"path": 3}', '{"path": "/x", "more": 1}', ""])
def test_bad_json(registry, body):
    response = registry.http.post(PUSH, content=body, headers={"content-type": "application/json"})
    refused(registry, response, 400, "invalid_request", "expected")


def test_headers_of_a_part_are_bounded(registry):
    part = (
        b"--b\r\ncontent-disposition: form-data; name=files; filename=README.md\r\nx: %s\r\n\r\n\r\n--b--\r\n"
    )
    headers = {"content-type": "multipart/form-data; boundary=b"}
    response = registry.http.post(PUSH, content=part % (b"a" * 500_000), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "bad_request")


def test_neither_files_nor_json(registry):
    response = registry.http.post(PUSH, content=b"x", headers={"content-type": "text/plain"})
    refused(registry, response, 400, "invalid_request", "multipart/form-data")
    response = registry.http.post(PUSH, content=b"x", headers={"content-type": "multipart/form-data"})
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("task", ["Support", "a@1", "-a", "a" * 65, "a b", "%2e%2e"])
def test_bad_task_names(registry, files, task):
    response = upload(registry, files.items(), task)
    assert response.status_code in (400, 404)
    assert registry.client.state().revision == 0


def test_from_a_local_folder(registry, adapter):
    folder = adapter(1)
    (folder / "notes.txt").write_text("stays where it is", encoding="utf-8")
    response = registry.http.post(PUSH, json={"path": str(folder)})
    assert response.status_code == 201
    assert registry.stored == {response.json()["digest"]}
    assert registry.files == {"prad.json", "adapter_model.safetensors"}


def test_bad_local_folders(registry, adapter, tmp_path):
    response = registry.http.post(PUSH, json={"path": "relative"})
    refused(registry, response, 400, "adapter_refused", "must be absolute")
    response = registry.http.post(PUSH, json={"path": str(tmp_path / "nowhere")})
    refused(registry, response, 400, "adapter_refused", "holds no prad.json")
    folder = adapter(1)
    (folder / "README.md").symlink_to("/etc/hostname")
    response = registry.http.post(PUSH, json={"path": str(folder)})
    refused(registry, response, 400, "adapter_refused", "not a plain file")


def test_a_web_page_of_another_origin_changes_nothing(registry, files):
    parts = [("files", part) for part in files.items()]
    response = registry.http.post(PUSH, files=parts, headers={"origin": "https://evil.example"})
    refused(registry, response, 403, "forbidden", "evil.example")


def test_a_large_body_of_a_command_is_not_taken(registry, adapter):
    registry.push(adapter(1))
    body = b'{"ok": true, "reason": "' + b"x" * (100 << 10) + b'"}'
    kinds = ("application/json", "multipart/form-data; boundary=b", "text/plain", None)
    for command, kind in itertools.product(("probe", "retire", "promote"), kinds):
        headers = {} if kind is None else {"content-type": kind}
        path = f"/v1/tasks/support/versions/1/{command}"
        response = registry.http.post(path, content=body, headers=headers)
        assert (command, kind, response.status_code) == (command, kind, 413)
        assert response.json()["error"]["code"] == "upload_too_large"
        assert "larger than the limit of 65536 bytes" in response.json()["error"]["message"]
        assert registry.client.version("support", 1).state == "pushed"


def test_hundreds_of_thousands_of_tensors(registry, files):
    header = {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(12_000)}
    text = json.dumps(header).encode()
    files["adapter_model.safetensors"] = len(text).to_bytes(8, "little") + text
    response = upload(registry, files.items())
    refused(registry, response, 400, "adapter_refused", "expected at most 10000")
    text = b" " * (3 << 20)
    files["adapter_model.safetensors"] = len(text).to_bytes(8, "little") + text
    response = upload(registry, files.items())
    refused(registry, response, 413, "upload_too_large", "larger than the limit")


@pytest.mark.parametrize(
    "generation",
    [
        {"stop": [""]},
        {"stop": ["x" * 1001]},
        {"stop": ["x"] * 17},
        {"temperature": -1},
        {"temperature": 3},
        {"top_p": 0},
        {"top_k": -5},
        {"min_p": 2},
        {"max_tokens": 0},
        {"max_tokens": 2**31},
    ],
)
def test_generation_defaults_that_no_request_may_have(registry, files, generation):
    record = json.loads(files["prad.json"])
    files["prad.json"] = json.dumps({**record, "generation": generation}).encode()
    response = upload(registry, files.items())
    refused(registry, response, 400, "adapter_refused", f"generation.{next(iter(generation))}")


def test_a_check_that_takes_too_long(registry, files, monkeypatch):
    monkeypatch.setattr("adapter_registry.registry.CHECK_SECONDS", 0.0)
    refused(registry, upload(registry, files.items()), 400, "adapter_refused", "not read and checked")


def test_tensors_that_are_no_numbers_or_of_no_base(registry, files):
    weights = np.ones((64, 4), np.float32)
    weights[5, 1] = np.nan
    files["adapter_model.safetensors"] = save({"layers.0.down": weights})
    refused(
        registry, upload(registry, files.items()), 400, "adapter_refused", "layers.0.down: expected finite"
    )
    files["adapter_model.safetensors"] = save({"layers.1.down": weights[:5]})
    response = upload(registry, files.items())
    refused(registry, response, 400, "adapter_refused", "tensor layers.0.down is missing")
