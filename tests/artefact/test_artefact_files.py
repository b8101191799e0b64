"""An adapter folder: written, read, digested; every complaint names the file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save_file

from prad.artefact import (
    FILES,
    AdapterRecord,
    Artefact,
    ArtefactError,
    BaseModelRef,
    GenerationDefaults,
    files_digest,
    read_artefact,
    write_record,
)

BASE = BaseModelRef(name="tiny", architecture="llama layers=2", weights="ab" * 32)
RECORD = AdapterRecord(
    method="prad-pa",
    config={"r": 4},
    base=BASE,
    template="Q: {prompt} {x} A:",
    generation=GenerationDefaults(temperature=0.0, max_tokens=9, stop=("\n", "£")),
    training={"steps": 3, "data": "straße"},
    licence="CC BY-SA 4.0",
    description="what it does",
)


def write(folder: Path, record: AdapterRecord = RECORD) -> Path:
    folder.mkdir()
    save_file({"layers.0.ffn.up": np.ones((4, 6), np.float32)}, folder / "adapter_model.safetensors")
    write_record(folder, record)
    return folder


def with_json(folder: Path, **changes: Any) -> Path:
    path = folder / "prad.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return folder


def test_round_trip(tmp_path: Path) -> None:
    artefact = read_artefact(write(tmp_path / "a"))
    assert artefact.record == RECORD
    assert {n: (i.dtype, i.shape) for n, i in artefact.tensors.items()} == {
        "layers.0.ffn.up": ("F32", (4, 6))
    }
    assert {p.name for p in artefact.files} == {"adapter_model.safetensors", "prad.json"}
    text = (tmp_path / "a" / "prad.json").read_text(encoding="utf-8")
    assert "straße" in text, "people read this file"
    assert "£" in text


def test_the_digest_depends_on_every_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    digests = [files_digest(folder)]
    for name in FILES:
        path = folder / name
        before = path.read_bytes() if path.exists() else b""
        path.write_bytes(before + b" ")
        digests.append(files_digest(folder))
    assert len(set(digests)) == len(FILES) + 1
    assert read_artefact(write(tmp_path / "b")).digest == digests[0], "where it lies does not matter"


def test_the_digest_depends_on_which_file_holds_what(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a"), write(tmp_path / "b")
    (one / "README.md").write_text("same", encoding="utf-8")
    (two / "adapter_config.json").write_text("same", encoding="utf-8")
    assert files_digest(one) != files_digest(two)


def test_other_files_are_none_of_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    before = files_digest(folder)
    (folder / "notes.txt").write_text("x", encoding="utf-8")
    (folder / "checkpoints").mkdir()
    assert files_digest(folder) == before
    assert {p.name for p in read_artefact(folder).files} <= set(FILES)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "prad.json"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / name).unlink()
    with pytest.raises(ArtefactError, match=f"{folder} holds no {name}"):
        read_artefact(folder)


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=str(tmp_path / "none")):
        read_artefact(tmp_path / "none")


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}", b"PK\x03\x04 a pickle in a zip"],
)
def test_garbage_weights_name_the_file(content: bytes, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"adapter_model\.safetensors is not a safetensors file"):
        read_artefact(folder)


def test_weights_that_are_cut_off_name_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ArtefactError, match=r"adapter_model\.safetensors"):
        read_artefact(tmp_path / "a")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"method": "x"}', b"\xff\xfe", b"{} {}"])
def test_garbage_json_names_the_file(content: bytes, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / "prad.json").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"^prad\.json: ") as caught:
        read_artefact(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"methods": "x"}, "methods"),
        ({"format": 2}, "format"),
        ({"method": None}, "method"),
        ({"base": {"name": "x", "architecture": "y"}}, r"base\.weights"),
        ({"base": BASE.model_dump() | {"extra": 1}}, r"base\.extra"),
        ({"generation": {"temperature": 3}}, r"generation\.temperature"),
        ({"generation": {"temperature": float("nan")}}, r"generation\.temperature"),
        ({"generation": {"top_p": 0}}, r"generation\.top_p"),
        ({"generation": {"max_tokens": 0}}, r"generation\.max_tokens"),
        ({"generation": {"top_k": -1}}, r"generation\.top_k"),
        ({"generation": {"seed": 1}}, r"generation\.seed"),
        ({"generation": {"stop": [3]}}, r"generation\.stop\.0"),
        ({"virtual_tokens": -1}, "virtual_tokens"),
    ],
)
def test_a_wrong_value_names_file_and_key(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=rf"^prad\.json: {key}: "):
        read_artefact(with_json(write(tmp_path / "a"), **changes))


@pytest.mark.parametrize("template", ["", "no field", "{prompt} and {prompt}", "{Prompt}", "{ prompt }"])
def test_a_template_holds_the_prompt_exactly_once(template: str, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"prad\.json: template: .*\{prompt\} exactly once"):
        read_artefact(with_json(write(tmp_path / "a"), template=template))
    with pytest.raises(ValidationError):
        AdapterRecord(method="m", config={}, base=BASE, template=template)


@pytest.mark.parametrize("prompt", ["plain", "{prompt}", "{x} %s $1 \\1", "", "a\nb", "£ {", "{{double}}"])
def test_the_prompt_goes_in_as_it_is(prompt: str) -> None:
    assert RECORD.wrap(prompt) == "Q: " + prompt + " {x} A:"


def test_the_default_template_is_the_papers() -> None:
    record = AdapterRecord(method="m", config={}, base=BASE)
    assert record.wrap("a film") == "#INPUT: a film #OUTPUT:"


def test_records_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RECORD.method = "other"


def test_artefact_needs_no_torch() -> None:
    import subprocess
    import sys

    program = "import sys, prad.artefact; print('torch' in sys.modules, 'transformers' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert ended.stdout.split() == ["False", "False"]
    assert Artefact.__module__ == "prad.artefact.files"


def test_a_header_or_record_beyond_its_bounds_is_not_parsed(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes((3 << 20).to_bytes(8, "little") + b" " * (3 << 20))
    with pytest.raises(ArtefactError, match="its header has 3145728 bytes, expected at most 2097152"):
        read_artefact(folder)
    many = {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(10_003)}
    text = json.dumps(many).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ArtefactError, match="expected at most 10000"):
        read_artefact(folder)
    (folder / "prad.json").write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(ArtefactError, match=r"prad\.json has 1048578 bytes, expected at most 1048576"):
        read_artefact(folder)
    with pytest.raises(ArtefactError, match="task_tokens: Tuple should have at most 1024 items"):
        read_artefact(with_json(write(tmp_path / "b"), task_tokens=["<|a|>"] * 1025))
