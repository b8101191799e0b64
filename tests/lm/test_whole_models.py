"""A model is whole or it is refused: no tensor becomes random numbers, and none is lost."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import tensors, write_gguf
from safetensors.torch import load_file, save_file

from prad.lm import LanguageModel, ModelNotFoundError, Tokenizer, resolve_model


def refused(path: Path, cache: Path) -> str:
    """What is said of it; and the cache stays empty."""
    with pytest.raises(ModelNotFoundError) as raised:
        resolve_model(str(path), cache)
    assert [kept.name for kept in (cache / "models").iterdir() if kept.suffix != ".lock"] == []
    assert str(path) in str(raised.value)
    return str(raised.value)


def test_a_whole_file_is_converted(tmp_path: Path) -> None:
    held = tensors()
    folder = resolve_model(str(write_gguf(tmp_path / "whole.gguf", held)), tmp_path / "cache")
    model = LanguageModel.load(folder)
    up = model.module.get_submodule("model.layers.1.mlp.up_proj").weight
    assert torch.equal(up, torch.from_numpy(held["blk.1.ffn_up.weight"]).bfloat16())


@pytest.mark.parametrize("name", sorted(set(tensors())))
def test_a_file_that_lacks_a_tensor_is_refused(name: str, tmp_path: Path) -> None:
    held = tensors()
    del held[name]
    said = refused(write_gguf(tmp_path / "part.gguf", held), tmp_path / "cache")
    assert "missing: " in said


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    """Llama 3.1's factors of RoPE, for one: without them every position would be another."""
    held = tensors() | {"rope_freqs.weight": np.ones(8, dtype=np.float32)}
    said = refused(write_gguf(tmp_path / "more.gguf", held), tmp_path / "cache")
    assert "a LlamaForCausalLM has no place for its tensors rope_freqs.weight" in said


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    held = tensors()
    held["blk.0.ffn_up.weight"] = held["blk.0.ffn_up.weight"][:-1]
    said = refused(write_gguf(tmp_path / "short.gguf", held), tmp_path / "cache")
    assert "model.layers.0.mlp.up_proj.weight [63, 32] (expected [64, 32])" in said


def test_one_part_of_several_is_refused_as_such(tmp_path: Path) -> None:
    part = write_gguf(
        tmp_path / "model-00002-of-00003.gguf",
        tensors(),
        number=lambda writer: writer.add_uint16("split.no", 1),
        count=lambda writer: writer.add_uint16("split.count", 3),
    )
    assert "it is part 2 of 3, expected a whole model; join them" in refused(part, tmp_path / "cache")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.05, 0.1, 0.3, 0.6, 0.95, 0.9999])
def test_a_file_that_is_cut_off_is_refused(kept: float, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "cut.gguf", tensors())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    refused(path, tmp_path / "cache")


def test_every_end_that_the_file_names_ends_generation(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "chat.gguf",
        tensors(),
        eot=lambda w: w.add_eot_token_id(1),
        eom=lambda w: w.add_uint32("tokenizer.ggml.eom_token_id", 2),
    )
    folder = resolve_model(str(path), tmp_path / "cache")
    assert LanguageModel.load(folder).stop_ids(folder) == {0, 1, 2}
    assert Tokenizer(folder).eos_id == 0


@pytest.fixture
def folder(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_bytes((tiny_model("llama") / "config.json").read_bytes())
    return tmp_path


def save(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_with_a_tensor_of_nobody_is_refused(tiny_model: Callable[[str], Path], folder: Path) -> None:
    save(folder, load_file(tiny_model("llama") / "model.safetensors") | {"model.extra.weight": torch.ones(2)})
    with pytest.raises(ModelNotFoundError, match=r"not the model's: model\.extra\.weight"):
        LanguageModel.load(folder)


def test_a_folder_with_a_tensor_of_another_shape_is_refused(
    tiny_model: Callable[[str], Path], folder: Path
) -> None:
    weights = load_file(tiny_model("llama") / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] = torch.ones(3, 48)
    save(folder, weights)
    with pytest.raises(ModelNotFoundError, match=r"another shape .*model\.layers\.2\.mlp\.up_proj\.weight"):
        LanguageModel.load(folder)


def test_a_folder_that_lacks_a_file_of_its_index_is_refused(
    tiny_model: Callable[[str], Path], folder: Path
) -> None:
    weights = load_file(tiny_model("llama") / "model.safetensors")
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(files.values()) - {"model-00002-of-00002.safetensors"}:
        own = {name: tensor for name, tensor in weights.items() if files[name] == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelNotFoundError, match=r"model-00002-of-00002\.safetensors"):
        LanguageModel.load(folder)
