"""What an artefact's numbers are stored in, and what that leaves of them, in bf16 as everybody serves it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prad.adapters import (
    Adapter,
    PromptAdaptation,
    find_method,
    load_adapter,
    new_adapter,
    save_parameters,
)
from prad.artefact import AdapterRecord, Artefact, BaseModelRef, read_artefact, write_record
from prad.lm import DEFAULT_MODEL, LanguageModel, PackedBatch, Tokenizer, resolve_model

PROMPTS = ("a gripping , beautifully acted film", "name[The Eagle], eatType[coffee shop]", "two hours")
METHODS = ("prad-pa", "prad-sa", "prad-lora", "prad-dora", "prad-ia3", "prad-bitfit", "prad-para", "para")


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model(DEFAULT_MODEL, Path("~/.cache/prad"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return LanguageModel.load(folder, dtype=torch.bfloat16)


def stored(adapter: Adapter, model: LanguageModel, folder: Path) -> Artefact:
    """As `prad train` ends."""
    fingerprint = model.fingerprint
    record = AdapterRecord(
        method=adapter.method.name,
        config=adapter.config.model_dump(mode="json"),
        base=BaseModelRef(name="any", architecture=fingerprint.architecture, weights=fingerprint.weights),
    )
    save_parameters(adapter.parameters, folder, model.dtype)
    write_record(folder, record)
    return read_artefact(folder)


@pytest.mark.parametrize("name", METHODS)
def test_an_untrained_adapter_leaves_the_real_model_as_it_is(
    name: str, model: LanguageModel, folder: Path, tmp_path: Path
) -> None:
    method = find_method(name)
    fresh = new_adapter(method, method.configure({}), model, seed=1)
    adapter = load_adapter(stored(fresh, model, tmp_path), model)
    prompts = [Tokenizer(folder).encode_prompt(text) for text in PROMPTS]
    batch = PackedBatch.of_sequences(prompts)
    lengths = [len(p) for p in prompts]
    with torch.inference_mode():
        adaptation = PromptAdaptation.of_prompts([adapter] * len(prompts), lengths, lengths, "cpu")
        assert torch.equal(model.forward(batch, adaptation), model.forward(batch))


@pytest.mark.parametrize(
    ("name", "config", "vectors"),
    [
        ("prad-ia3", {}, ("k.ia3_l", "v.ia3_l", "down_in.ia3_l")),
        ("prad-dora", {}, ("q.lora_magnitude_vector", "v.lora_magnitude_vector")),
        ("prad-bitfit", {"targets": ["q", "down"]}, ("q.bias", "down.bias")),
        ("prad-pa", {}, ("ffn.bias",)),
    ],
)
def test_small_changes_of_vectors_are_kept(
    name: str,
    config: dict[str, Any],
    vectors: tuple[str, ...],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """In bf16, two neighbours near 1 lie 1/128 apart."""
    model = LanguageModel.load(tiny_model("llama"), dtype=torch.bfloat16)
    method = find_method(name)
    fresh = new_adapter(method, method.configure(config), model, seed=1)
    for vector in vectors:
        fresh.parameters[vector] += 0.001
    artefact = stored(fresh, model, tmp_path)
    tensors = load_file(artefact.weights)
    for parameter, stacked in fresh.parameters.items():
        in_file = torch.stack([tensors[f"layers.{i}.{parameter}"] for i in range(model.num_layers)])
        assert torch.equal(in_file, stacked if parameter in vectors else stacked.bfloat16())
    applied = load_adapter(artefact, model).parameters
    assert {p.dtype for p in applied.values() if p.dim() == 2} == {torch.float32}
    if name == "prad-dora":  # untouched, each gain is 1
        for site in ("q", "v"):
            expected = 1 + 0.001 / (fresh.parameters[f"{site}.lora_magnitude_vector"] - 0.001)
            torch.testing.assert_close(applied[f"{site}.gain"], expected, rtol=0, atol=1e-6)
