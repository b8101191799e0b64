"""What an artefact's numbers are stored in, and what that leaves of them, in bf16 as everybody serves it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prad.adapters import (
    AdaptedSpan,
    Adapter,
    PromptAdaptation,
    find_method,
    load_adapter,
    new_adapter,
    save_parameters,
    stored_parameters,
)
from prad.artefact import AdapterRecord, Artefact, BaseModelRef, read_artefact, write_record
from prad.lm import DEFAULT_MODEL, LanguageModel, PackedBatch, Site, Tokenizer, resolve_model
from prad.lm.kernels import Kernels
from tests.cache import CACHE
from tests.conftest import random_artefact

PROMPTS = ("a gripping , beautifully acted film", "name[The Eagle], eatType[coffee shop]", "two hours")
METHODS = ("prad-pa", "prad-sa", "prad-lora", "prad-dora", "prad-ia3", "prad-bitfit", "prad-para", "para")


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model(DEFAULT_MODEL, CACHE)


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


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    return [Tokenizer(folder).encode_prompt(text) for text in PROMPTS]


@pytest.fixture(scope="module")
def plain(model: LanguageModel, prompts: list[list[int]]) -> torch.Tensor:
    """The logits without adapters."""
    with torch.inference_mode():
        return model.forward(PackedBatch.of_sequences(prompts))


@pytest.mark.parametrize("native", [False, True], ids=["torch", "native"])
@pytest.mark.parametrize("name", METHODS)
def test_an_untrained_adapter_leaves_the_real_model_as_it_is(
    name: str,
    native: bool,
    model: LanguageModel,
    prompts: list[list[int]],
    plain: torch.Tensor,
    kernels: Kernels,
    tmp_path: Path,
) -> None:
    method = find_method(name)
    fresh = new_adapter(method, method.configure({}), model, seed=1)
    adapter = load_adapter(stored(fresh, model, tmp_path), model)
    batch = PackedBatch.of_sequences(prompts)
    lengths = [len(p) for p in prompts]
    with torch.inference_mode():
        adaptation = PromptAdaptation.of_prompts(
            [adapter] * len(prompts), lengths, lengths, "cpu", kernels if native else None
        )
        assert torch.equal(model.forward(batch, adaptation), plain)


@pytest.mark.parametrize("native", [False, True], ids=["torch", "native"])
@pytest.mark.parametrize("name", METHODS)
def test_in_bf16_an_adapter_does_what_it_does_in_float32(
    name: str,
    native: bool,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    kernels: Kernels,
    tmp_path: Path,
) -> None:
    """Within what bf16 rounds, which is far less than what the adapter changes."""
    exact = load_tiny("llama")
    rounding = LanguageModel.load(tiny_model("llama"), dtype=torch.bfloat16)
    artefact = random_artefact(tmp_path / "a", exact, seed=3, method=name, config={})
    prompts = [[(7 * i + 11 * j) % 119 for j in range(9 + 8 * i)] for i in range(4)]
    batch, lengths = PackedBatch.of_sequences(prompts), [len(p) for p in prompts]

    def logits(model: LanguageModel, kernels: Kernels | None) -> torch.Tensor:
        adapter = load_adapter(artefact, model, allow_other_weights=True)
        adaptation = PromptAdaptation.of_prompts([adapter] * 4, lengths, lengths, "cpu", kernels)
        return model.forward(batch, adaptation).float()

    with torch.inference_mode():
        expected, plain = logits(exact, None), exact.forward(batch)
        found = logits(rounding, kernels if native else None)
    scale = float(expected.max() - expected.min())
    assert float((found - expected).abs().max()) < 0.04 * scale
    assert float((plain - expected).abs().max()) > 0.2 * scale


@pytest.mark.parametrize("native", [False, True], ids=["torch", "native"])
def test_a_vectors_small_change_arrives_in_bf16(
    native: bool, tiny_model: Callable[[str], Path], kernels: Kernels
) -> None:
    """A product with 1.003 in float32, rounded once: some of what is scaled changes, by a bf16 step each."""
    model = LanguageModel.load(tiny_model("llama"), dtype=torch.bfloat16)
    method = find_method("prad-ia3")
    fresh = new_adapter(method, method.configure({"targets": ["v"]}), model, seed=1)
    adapter = replace(fresh, parameters={"v.ia3_l": fresh.parameters["v.ia3_l"] * 1.003})
    value = torch.randn(40, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = torch.cat(((value[:30].float() * 1.003).bfloat16(), value[30:]))
    assert not torch.equal(expected, value)
    adaptation = PromptAdaptation([AdaptedSpan(adapter, 0, 30)], "cpu", kernels if native else None)
    with torch.inference_mode():
        adaptation.apply(0, Site.V, value, value)
    assert torch.equal(value, expected)


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
    in_file = stored_parameters(artefact, fresh.parameters, model.num_layers)
    for parameter, stacked in fresh.parameters.items():
        assert torch.equal(in_file[parameter], stacked if parameter in vectors else stacked.bfloat16())
    applied = load_adapter(artefact, model).parameters
    assert {p.dtype for p in applied.values() if p.dim() == 2} == {torch.float32}
    if name == "prad-dora":  # untouched, each gain is 1
        for site in ("q", "v"):
            expected = 1 + 0.001 / (fresh.parameters[f"{site}.lora_magnitude_vector"] - 0.001)
            torch.testing.assert_close(applied[f"{site}.gain"], expected, rtol=0, atol=1e-6)
