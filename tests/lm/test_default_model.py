"""The default model as it is converted: its tokenizer's rule for digits, and no second conversion."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prad.lm import DEFAULT_MODEL, ModelNotFoundError, Tokenizer, gguf, resolve_model
from tests.cache import CACHE


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model(DEFAULT_MODEL, CACHE)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a 12", ["a", " ", "1", "2"]),
        ("a  12", ["a", "  ", "1", "2"]),
        ("less than £20", ["less", " than", " £", "2", "0"]),
        ("x3 y", ["x", "3", " y"]),
        ("two  words", ["two", " ", " words"]),
        ("1999", ["1", "9", "9", "9"]),
    ],
)
def test_digits_are_split_off_first(text: str, expected: list[str], tokenizer: Tokenizer) -> None:
    """GPT-2's rule alone would keep " 12" together and leave one of two spaces in front of it."""
    assert [tokenizer.decode([i]) for i in tokenizer.encode_continuation(text)] == expected


def test_prompts_get_no_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_prompt("Hello") == tokenizer.encode_continuation("Hello")
    assert tokenizer.decode(tokenizer.encode_prompt("Hello, £2  3!")) == "Hello, £2  3!"


def test_the_chat_template_is_there(tokenizer: Tokenizer) -> None:
    assert tokenizer.has_chat_template
    text = tokenizer.token_text(tokenizer.encode_chat([{"role": "user", "content": "Hi"}])[0])
    assert text == "<|im_start|>"


def test_a_second_start_converts_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(*_: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(gguf, "_convert", convert)
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert resolve_model(DEFAULT_MODEL, CACHE) == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= before.keys()


def test_a_conversion_takes_the_place_of_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other = tmp_path / "some.gguf", tmp_path / "other.gguf"
    source.write_bytes(b"GGUF")
    other.write_bytes(b"GGUF 2")
    monkeypatch.setattr(gguf, "_convert", lambda path, folder: folder.mkdir())
    with monkeypatch.context() as before:
        before.setattr(gguf, "_FORMAT", gguf._FORMAT - 1)
        for path in (source, other):
            resolve_model(str(path), tmp_path / "cache")
    now, beside = resolve_model(str(source), tmp_path / "cache"), tmp_path / "cache" / "models"
    left = sorted(path.name for path in beside.iterdir() if path.is_dir())
    assert (len(left), now.name in left) == (2, True)
    assert left[0].startswith("other-")
    assert left[0].endswith(f"-v{gguf._FORMAT - 1}")


def test_an_interrupted_conversion_is_started_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, calls = tmp_path / "some.gguf", []
    source.write_bytes(b"GGUF")

    def convert(path: Path, folder: Path) -> None:
        calls.append(folder)
        folder.mkdir()
        (folder / f"part{len(calls)}").write_text("", encoding="utf-8")
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        resolve_model(str(source), tmp_path / "cache")
    folder = resolve_model(str(source), tmp_path / "cache")
    assert [p.name for p in folder.iterdir()] == ["part2"]
    assert resolve_model(str(source), tmp_path / "cache") == folder
    assert len(calls) == 2


def test_a_conversion_that_was_damaged_since_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "some.gguf"
    source.write_bytes(b"GGUF")

    def convert(path: Path, folder: Path) -> None:
        for place in (folder, folder / "blocks"):
            place.mkdir()
            save_file({"weight": torch.ones(64)}, place / "model.safetensors")

    monkeypatch.setattr(gguf, "_convert", convert)
    folder = resolve_model(str(source), tmp_path / "cache")
    for weights in (folder / "model.safetensors", folder / "blocks" / "model.safetensors"):
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-8])
        assert resolve_model(str(source), tmp_path / "cache") == folder
        assert weights.read_bytes() == whole
        assert f"{folder} is damaged" in caplog.messages[-1]
    monkeypatch.setattr(gguf, "FileLock", None)
    assert resolve_model(str(source), tmp_path / "cache") == folder, "a cache that can only be read will do"
    assert len(caplog.messages) == 2


def test_a_cache_that_takes_nothing_is_said_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, taken = tmp_path / "some.gguf", tmp_path / "taken"
    source.write_bytes(b"GGUF")
    taken.touch()
    with pytest.raises(ModelNotFoundError, match=r"can be kept in .*models.*choose another --cache-dir"):
        resolve_model(str(source), taken)

    def convert(path: Path, folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf, "_convert", convert)
    with pytest.raises(ModelNotFoundError, match=r"some\.gguf cannot be converted: .*; free some room there"):
        resolve_model(str(source), tmp_path / "cache")


def test_a_page_counts_the_tokens_of_its_example(tokenizer: Tokenizer) -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "chat.md").read_text(encoding="utf-8")
    asked = re.search(r"/tokenize .* -d '(.+)'\n\{\"count\":(\d+),", page)
    assert asked is not None
    body = json.loads(asked[1])
    record = root / "examples" / "adapters" / body["task"] / "prad.json"
    template = json.loads(record.read_text(encoding="utf-8"))["template"]
    whole = template.format(prompt=body["prompt"])
    assert len(tokenizer.encode_continuation(whole)) == int(asked[2])
