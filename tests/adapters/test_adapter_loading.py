"""From files to an adapter, and what is said when they do not fit the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from prad.adapters import (
    AdapterError,
    BaseMismatchError,
    ParameterMismatchError,
    UnknownMethodError,
    find_method,
    load_adapter,
    new_adapter,
)
from prad.artefact import WEIGHTS, Artefact, read_artefact, write_record
from prad.lm import LanguageModel, MissingSiteError
from tests.conftest import random_artefact


@pytest.fixture
def model(load_tiny: Callable[[str], LanguageModel]) -> LanguageModel:
    return load_tiny("llama")


@pytest.fixture
def artefact(model: LanguageModel, tmp_path: Path) -> Artefact:
    return random_artefact(tmp_path / "adapter", model, seed=1, r=6)


def with_record(artefact: Artefact, **changes: Any) -> Artefact:
    write_record(artefact.folder, artefact.record.model_copy(update=changes))
    return read_artefact(artefact.folder)


def with_tensors(artefact: Artefact, change: Callable[[dict[str, torch.Tensor]], None]) -> Artefact:
    tensors = load_file(artefact.weights)
    change(tensors)
    save_file(tensors, artefact.folder / WEIGHTS)
    return read_artefact(artefact.folder)


def test_what_was_saved_is_loaded(artefact: Artefact, model: LanguageModel) -> None:
    loaded = load_adapter(artefact, model)
    tensors = load_file(artefact.weights)
    assert len(tensors) == 3 * 4
    for name, stacked in loaded.parameters.items():
        for layer in range(4):
            assert torch.equal(stacked[layer], tensors[f"layers.{layer}.{name}"])
    assert loaded.config.model_dump() == {"r": 6, "scale": 1.0, "bias": True}
    assert loaded.nbytes == 4 * 4 * (48 * 6 + 6 + 6 * 48)


def test_matrices_take_the_models_dtype_and_vectors_float32(
    artefact: Artefact, tiny_model: Callable[[str], Path]
) -> None:
    loaded = load_adapter(artefact, LanguageModel.load(tiny_model("llama"), dtype=torch.bfloat16))
    assert {name: p.dtype for name, p in loaded.parameters.items()} == {
        "ffn.down": torch.bfloat16,
        "ffn.bias": torch.float32,
        "ffn.up": torch.bfloat16,
    }


def test_another_architecture_is_always_refused(
    artefact: Artefact, load_tiny: Callable[[str], LanguageModel]
) -> None:
    for allowed in (False, True):
        with pytest.raises(BaseMismatchError, match=r"\[llama layers=4 .*the model is \[gpt2 layers=4"):
            load_adapter(artefact, load_tiny("gpt2"), allow_other_weights=allowed)


def test_other_weights_are_refused_unless_allowed(artefact: Artefact, model: LanguageModel) -> None:
    base = artefact.record.base.model_copy(update={"weights": "0" * 64})
    other = with_record(artefact, base=base)
    with pytest.raises(BaseMismatchError, match=f"0{{12}} .*{model.fingerprint.weights[:12]}"):
        load_adapter(other, model)
    assert load_adapter(other, model, allow_other_weights=True).parameters


def test_unknown_methods_are_named_with_the_known(artefact: Artefact, model: LanguageModel) -> None:
    with pytest.raises(UnknownMethodError, match=r"unknown method 'prad-xyz'; known: .*prad-pa"):
        load_adapter(with_record(artefact, method="prad-xyz"), model)
    with pytest.raises(UnknownMethodError):
        find_method("")


@pytest.mark.parametrize(
    ("config", "message"),
    [({"r": 0}, "r"), ({"r": 6, "rank": 6}, "rank"), ({"r": "many"}, "r"), ({"r": 6, "bias": 3}, "bias")],
)
def test_a_wrong_configuration_names_the_key(
    config: dict[str, object], message: str, artefact: Artefact, model: LanguageModel
) -> None:
    with pytest.raises(AdapterError, match=rf"configuration of prad-pa: (.|\n)*{message}"):
        load_adapter(with_record(artefact, config=config), model)


def test_a_wrong_shape_quotes_both(artefact: Artefact, model: LanguageModel) -> None:
    wrong = with_record(artefact, config={"r": 7})
    with pytest.raises(ParameterMismatchError) as caught:
        load_adapter(wrong, model)
    assert "layers.0.ffn.bias" in str(caught.value)
    assert "(7,)" in str(caught.value)
    assert "(6,)" in str(caught.value)


def test_a_transposed_tensor_is_no_match(artefact: Artefact, model: LanguageModel) -> None:
    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.2.ffn.up"] = tensors["layers.2.ffn.up"].T.contiguous()

    with pytest.raises(ParameterMismatchError, match=r"layers\.2\.ffn\.up: expected \(6, 48\), .* \(48, 6\)"):
        load_adapter(with_tensors(artefact, transpose), model)


def test_missing_and_extra_tensors_are_named(artefact: Artefact, model: LanguageModel) -> None:
    saved = load_file(artefact.weights)
    with pytest.raises(ParameterMismatchError, match=r"layers\.3\.ffn\.down: expected \(48, 6\), .* none"):
        load_adapter(with_tensors(artefact, lambda t: t.__delitem__("layers.3.ffn.down")), model)
    save_file(saved, artefact.folder / WEIGHTS)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.4.ffn.down"] = torch.ones(48, 6)

    with pytest.raises(ParameterMismatchError, match=r"layers\.4\.ffn\.down: expected none, .* \(48, 6\)"):
        load_adapter(with_tensors(artefact, add), model)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(number: float, artefact: Artefact, model: LanguageModel) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.1.ffn.up"][2, 3] = number

    with pytest.raises(ParameterMismatchError, match=r"layers\.1\.ffn\.up: expected finite"):
        load_adapter(with_tensors(artefact, spoil), model)


def test_integer_weights_are_refused(artefact: Artefact, model: LanguageModel) -> None:
    def round_off(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.1.ffn.up"] = tensors["layers.1.ffn.up"].to(torch.int32)

    with pytest.raises(ParameterMismatchError, match=r"layers\.1\.ffn\.up"):
        load_adapter(with_tensors(artefact, round_off), model)


def test_a_family_without_sites_is_refused_by_name(artefact: Artefact, tmp_path: Path) -> None:
    config = transformers.PhiConfig(
        vocab_size=120, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.PhiForCausalLM(config).save_pretrained(tmp_path / "phi")
    phi = LanguageModel.load(tmp_path / "phi", dtype=torch.float32)
    method = find_method("prad-pa")
    with pytest.raises(
        MissingSiteError, match=r"prad-pa: adapters know no sites in a 'phi' model .*llama, mistral"
    ):
        new_adapter(method, method.config_type(), phi, seed=0)
    base = artefact.record.base.model_copy(
        update={"architecture": phi.fingerprint.architecture, "weights": phi.fingerprint.weights}
    )
    with pytest.raises(MissingSiteError, match="phi"):
        load_adapter(with_record(artefact, base=base), phi)
