"""The loss and its gradient are those of the masked formula: the adapter acts on prompt rows only."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from prad.adapters import METHODS, find_method, load_adapter, new_adapter, placeholders, save_parameters
from prad.lm import LanguageModel
from prad.training.data import TokenisedExample, collate
from prad.training.objective import AdapterTuning
from tests.conftest import random_artefact
from tests.oracle.reference import Fault, Reference

EXAMPLES = [
    TokenisedExample((5, 6, 7), (8, 9, 119)),
    TokenisedExample((4,), (3, 119)),
    TokenisedExample(tuple(range(20, 60)), (1, 2, 3, 4, 5, 119)),
    TokenisedExample((9, 9), (119,)),
]

PRECISION = 5e-6  # relative, of the loss in float32


@pytest.fixture(
    params=[
        "llama",
        "gpt2",
        *(pytest.param(f, marks=pytest.mark.long) for f in ("mistral", "gemma3", "opt", "gpt-neox")),
    ]
)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_sums_are_of_each_example(load_tiny: Callable[[str], LanguageModel], tmp_path: Path) -> None:
    model = load_tiny("llama")
    module = AdapterTuning(model, load_adapter(random_artefact(tmp_path / "a", model, seed=3), model))
    with torch.no_grad():
        sums, counts = module.sums(**collate(EXAMPLES))
        alone = [float(module(**collate([e]))["loss"]) * len(e.completion) for e in EXAMPLES]
    assert counts.tolist() == [len(e.completion) for e in EXAMPLES]
    assert sums.tolist() == pytest.approx(alone, rel=1e-4)


def reference_loss(reference: Reference, folder: Path, fault: Fault | None = None) -> float:
    logits = [reference.logits(e.prompt, e.completion, folder, fault) for e in EXAMPLES]
    labels = torch.tensor([i for e in EXAMPLES for i in e.completion])
    return float(cross_entropy(torch.cat(logits).double(), labels))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_loss_and_gradient_are_the_references(
    method: str,
    family: str,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    model, reference = load_tiny(family), Reference(tiny_model(family))
    artefact = random_artefact(tmp_path / "adapter", model, seed=3, method=method, config={})
    stored = load_file(artefact.weights)
    fresh = new_adapter(find_method(method), find_method(method).configure({}), model, seed=0)
    parameters = {
        name: torch.stack([p for file, p in sorted(stored.items()) if f".{file}".endswith(f".{name}")])
        for name in fresh.parameters
    }
    module = AdapterTuning(model, replace(fresh, parameters=parameters))
    virtual = placeholders(fresh.virtual_tokens)
    loss = module(**collate([replace(e, prompt=virtual + e.prompt) for e in EXAMPLES]))["loss"]
    expected = reference_loss(reference, artefact.folder)
    assert float(loss.detach()) == pytest.approx(expected, rel=PRECISION)
    for fault in (Fault.ADAPTER_ON_ONE_GENERATED_TOKEN, Fault.ADAPTER_MISSING_ON_LAST_PROMPT_TOKEN):
        wrong = reference_loss(reference, artefact.folder, fault)
        assert abs(wrong - expected) > 4 * PRECISION * expected, "the check would notice"

    loss.backward()
    assert all(p.grad is None for p in model.module.parameters()), "nothing reaches the frozen model"
    step, directions = 2e-4, {}
    slope = 0.0
    for attribute, parameter in module.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.any()
        # DoRA's norm is a constant for the gradient, so only the magnitude's is the loss's own
        if method != "prad-dora" or "magnitude" in attribute:
            directions[attribute] = parameter.grad / parameter.grad.norm()
            slope += float(parameter.grad.norm())

    def moved(by: float) -> float:
        changed = {
            name: p + by * directions.get(name.replace(".", "_"), torch.zeros(()))
            for name, p in parameters.items()
        }
        save_parameters(changed, artefact.folder, torch.float32)
        return reference_loss(reference, artefact.folder)

    assert (moved(step) - moved(-step)) / (2 * step) == pytest.approx(slope, rel=0.05)


def test_the_order_of_examples_does_not_matter(
    load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model = load_tiny("llama")
    module = AdapterTuning(model, load_adapter(random_artefact(tmp_path / "a", model, seed=3), model))
    with torch.no_grad():
        losses = [float(module(**collate(e))["loss"]) for e in (EXAMPLES, EXAMPLES[::-1])]
        each = [float(module(**collate([e]))["loss"]) * len(e.completion) for e in EXAMPLES]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(sum(each) / sum(len(e.completion) for e in EXAMPLES), rel=1e-5)


def test_only_the_adapter_is_state(load_tiny: Callable[[str], LanguageModel], tmp_path: Path) -> None:
    model = load_tiny("gpt2")
    adapter = load_adapter(random_artefact(tmp_path / "a", model, seed=3), model)
    module = AdapterTuning(model, adapter)
    assert set(module.state_dict()) == {"ffn_down", "ffn_up", "ffn_bias"}
    assert all(p.dtype is torch.float32 for p in module.parameters())
