"""Methods with virtual tokens: how they begin, how training goes through an MLP, and what is refused."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prad.adapters import (
    METHODS,
    Adapter,
    AdapterError,
    ParameterMismatchError,
    PromptAdaptation,
    find_method,
    load_adapter,
    new_adapter,
    placeholders,
    reparametrised,
)
from prad.adapters.method import FrozenModel
from prad.adapters.virtual import first_ids
from prad.artefact import WEIGHTS, read_artefact, write_record
from prad.lm import LanguageModel, PackedBatch
from tests.conftest import random_artefact

NAMES = ("prad-prefix", "prad-prompt", "prad-mam")
PROMPT = [5, 80, 7, 33]


def behind(adapter: Adapter, model: LanguageModel, prompt: list[int]) -> Tensor:
    """Logits [vocab] after the prompt."""
    ids = [*placeholders(adapter.virtual_tokens), *prompt]
    adaptation = PromptAdaptation.of_prompts([adapter], [len(ids)], [len(ids)], "cpu")
    with torch.inference_mode():
        return model.forward(PackedBatch.of_sequences([ids]), adaptation)[0]


def test_these_are_all(load_tiny: Callable[[str], LanguageModel]) -> None:
    model = load_tiny("llama")
    fresh = {name: new_adapter(m, m.configure({}), model, 0) for name, m in METHODS.items()}
    assert {name for name, adapter in fresh.items() if adapter.virtual_tokens} == set(NAMES)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_one_is_the_plain_model_behind_tokens_of_its_own(
    name: str, family: str, load_tiny: Callable[[str], LanguageModel]
) -> None:
    model, method = load_tiny(family), find_method(name)
    config = method.configure({"virtual_tokens": 7})
    fresh = new_adapter(method, config, model, seed=2)
    first = first_ids(config, FrozenModel(model), torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = model.forward(PackedBatch.of_sequences([[*first, *PROMPT]]))[0]
        plain = model.forward(PackedBatch.of_sequences([PROMPT]))[0]
    torch.testing.assert_close(behind(fresh, model, PROMPT), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-2)


@pytest.mark.parametrize("name", ["prad-prefix", "prad-mam"])
def test_what_training_steps_begins_as_the_fresh_prefix_and_moves_all_of_it(
    name: str, load_tiny: Callable[[str], LanguageModel]
) -> None:
    model, method = load_tiny("llama"), find_method(name)
    fresh = new_adapter(method, method.configure({"virtual_tokens": 7, "projection": 16}), model, seed=2)
    module = reparametrised(fresh, model, seed=2)
    assert module is not None
    derived = module()
    assert set(derived) == {"prefix.key", "prefix.value"}
    for parameter, states in derived.items():
        assert torch.equal(states, fresh.parameters[parameter])
    sum(states.sum() for states in derived.values()).backward()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
        for parameter, states in module().items():
            assert (states != fresh.parameters[parameter]).all()
    directly = method.configure({"projection": None})
    assert reparametrised(new_adapter(method, directly, model, 0), model, 0) is None


def test_the_projection_keeps_token_layer_and_head_apart(load_tiny: Callable[[str], LanguageModel]) -> None:
    """What the MLP says of token t goes to token t, its columns to (layer, head, dim) in order."""
    model, method = load_tiny("llama"), find_method("prad-prefix")
    fresh = new_adapter(method, method.configure({"virtual_tokens": 3, "projection": 4}), model, seed=2)
    module = reparametrised(fresh, model, seed=2)
    assert module is not None
    columns = torch.arange(2 * 4 * 2 * 8, dtype=torch.float32)
    with torch.no_grad():
        module.up_bias.copy_(columns)
        change = {n: (p - fresh.parameters[n]).round() for n, p in module().items()}
    for half, name in enumerate(("prefix.key", "prefix.value")):
        expected = columns[half * 64 : half * 64 + 64].view(4, 1, 2, 8).expand(4, 3, 2, 8)
        assert torch.equal(change[name], expected)


@pytest.mark.parametrize(
    ("name", "field"), [("prad-prefix", "prefix.key"), ("prad-prompt", "input.embedding")]
)
def test_a_wrong_shape_quotes_both(
    name: str, field: str, load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model = load_tiny("llama")
    artefact = random_artefact(tmp_path / "a", model, 1, method=name, config={"virtual_tokens": 6})
    tensors = load_file(artefact.weights)
    file = field if field in tensors else f"layers.2.{field}"
    tensors[file] = tensors[file][:5].contiguous()
    save_file(tensors, artefact.folder / WEIGHTS)
    with pytest.raises(ParameterMismatchError, match=rf"{file}: expected \(6, .*, the file has \(5, "):
        load_adapter(read_artefact(artefact.folder), model)


def test_both_places_must_name_the_same_virtual_tokens(
    load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model = load_tiny("gpt2")
    for method, said, meant in (("prad-mam", 8, 9), ("prad-pa", 0, 3)):
        config: dict[str, Any] = {"virtual_tokens": said} if said else {}
        artefact = random_artefact(tmp_path / method, model, 1, method=method, config=config)
        write_record(artefact.folder, artefact.record.model_copy(update={"virtual_tokens": meant}))
        with pytest.raises(
            AdapterError, match=f"virtual tokens: {said} in .* {method}, {meant} in prad.json"
        ):
            load_adapter(read_artefact(artefact.folder), model)


@pytest.mark.parametrize("name", NAMES)
def test_more_than_the_context_holds_is_refused(
    name: str, load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model, method = load_tiny("gpt2"), find_method(name)
    most = random_artefact(tmp_path / "most", model, 1, method=name, config={"virtual_tokens": 508})
    assert load_adapter(most, model).virtual_tokens == 508
    with pytest.raises(AdapterError, match=r"509 virtual tokens leave no room .* context of 512"):
        new_adapter(method, method.configure({"virtual_tokens": 509}), model, 0)
    config = most.record.config | {"virtual_tokens": 512}
    write_record(most.folder, most.record.model_copy(update={"virtual_tokens": 512, "config": config}))
    with pytest.raises(AdapterError, match="512 virtual tokens leave no room"):
        load_adapter(read_artefact(most.folder), model)


@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        ("llama", r"model\.layers\.\*\.self_attn\.k_proj, model\.layers\.\*\.self_attn\.v_proj"),
        ("phi", "modules that adapters do not know"),
    ],
)
def test_layers_that_keep_other_shapes_are_refused_by_name(
    kind: str, modules: str, load_tiny: Callable[[str], LanguageModel]
) -> None:
    model = copy(load_tiny("llama"))
    one, two, *rest = model.layout.layers
    layers = (one, two, replace(one, heads=4), *rest[1:])
    model.fingerprint = replace(model.fingerprint, layout=replace(model.layout, layers=layers))
    model.config = SimpleNamespace(model_type=kind)
    method = find_method("prad-prefix")
    said = (
        rf"prad-prefix: a '{kind}' model's layers differ .* \({modules}\): "
        "layer 0 has 2 keys of 8 and values of 8, layer 2 has 4 keys of 8 and values of 8"
    )
    with pytest.raises(AdapterError, match=said):
        new_adapter(method, method.configure({}), model, 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", [{"virtual_tokens": 0}, {"tokens": 3}, {"virtual_tokens": "many"}])
def test_a_wrong_configuration_names_the_key(name: str, config: dict[str, object]) -> None:
    with pytest.raises(AdapterError, match=rf"configuration of {name}: (.|\n)*{next(iter(config))}"):
        find_method(name).configure(config)
