"""A replay of PARA: the vectors are pooled over the original prompt only, and the continuation's rows get the
same ones as when they were decoded."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from prad.adapters import Adapter, PromptAdaptation, load_adapter
from prad.core.sampling import SamplingParams
from prad.lm import LanguageModel, SiteVectors
from prad.lm.kv import Pools
from prad.training.objective import AdapterTuning
from prefill_service.passes import run_prompt_pass
from prefill_service.prompt import Prompt, PromptRequest
from tests.conftest import random_artefact
from tests.generation import generate
from tests.oracle.comparing import TOP, OracleMismatchError, Served, check
from tests.oracle.reference import Fault, Reference

PROMPT, OUTPUT = [5, 9, 33, 80, 2, 61], [7, 64, 12, 100]


def replayed(model: LanguageModel, adapter: Adapter, output: list[int]) -> tuple[Served, SiteVectors]:
    """Beside a neighbour's prompt: what the next token is, and the state that goes along."""
    params = SamplingParams(max_tokens=20, logprobs=TOP)
    request = PromptRequest(
        "r", None, tuple(PROMPT), params, continuation_ids=tuple(output), output_offset=len(output)
    )
    neighbour = Prompt(PromptRequest("n", None, (1, 2, 3), params), adapter)
    item, states = Prompt(request, adapter), dict[Prompt, SiteVectors]()
    assert item.whole
    assert item.block_keys(4) == (), "nothing of it is cached"
    drawn = run_prompt_pass(
        model,
        Pools(model.layout, 0, 16, "cpu"),
        [neighbour.as_chunk(), item.as_chunk()],
        state_done=states.__setitem__,
    )
    (draw,) = drawn[item] or ()
    return Served([draw.id], [dict(draw.top)]), states[item]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_it_equals_the_reference_and_keeps_its_state(
    family: str,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    model, reference = load_tiny(family), Reference(tiny_model(family))
    artefact = random_artefact(tmp_path / "para", model, 4, method="para", config={"r": 5})
    adapter = load_adapter(artefact, model)
    _, first = replayed(model, adapter, [])
    answer, again = replayed(model, adapter, OUTPUT)
    expected = reference.logits(PROMPT, [*OUTPUT, *answer.tokens], artefact.folder)
    check(answer, expected[-1:])
    assert {str(site): tuple(v.shape) for site, v in again.items()} == {
        str(site): (model.num_layers, width) for site, width in adapter.state_widths.items()
    }
    for site, vectors in first.items():
        torch.testing.assert_close(again[site], vectors)
    pooled_over_more = reference.logits(
        PROMPT, [*OUTPUT, *answer.tokens], artefact.folder, Fault.ADAPTER_ON_ONE_GENERATED_TOKEN
    )
    with pytest.raises(OracleMismatchError):
        check(answer, pooled_over_more[-1:])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_generation_without_services_equals_the_reference(
    family: str,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    model, reference = load_tiny(family), Reference(tiny_model(family))
    artefact = random_artefact(tmp_path / "para", model, 4, method="para", config={"r": 5})
    adapters = [load_adapter(artefact, model), None, load_adapter(artefact, model)]
    prompts = [PROMPT, PROMPT[1:], OUTPUT]

    def adapt(lengths: Sequence[int]) -> PromptAdaptation | None:
        return PromptAdaptation.of_prompts(adapters, lengths, lengths, "cpu")

    outputs = generate(model, prompts, SamplingParams(max_tokens=9), adapt)
    for prompt, adapter, output in zip(prompts, adapters, outputs, strict=True):
        logits = reference.logits(prompt, output, None if adapter is None else artefact.folder)
        chosen = logits[torch.arange(len(output)), torch.tensor(output)]
        assert ((logits.max(dim=-1).values - chosen) <= 1e-4 * (logits.max() - logits.min())).all()


def test_training_scales_what_decode_scales(
    load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    """The same parameters under both names differ in the loss: PARA acts on the completion, PrAd-PARA not."""
    model = load_tiny("llama")
    losses = []
    for name in ("para", "prad-para"):
        artefact = random_artefact(tmp_path / name, model, 4, method=name, config={"r": 5})
        module = AdapterTuning(model, load_adapter(artefact, model))
        ids = torch.tensor([*PROMPT, *OUTPUT])
        with torch.no_grad():
            rows, labels = torch.arange(len(PROMPT), len(ids) - 1), torch.tensor(OUTPUT[1:])
            losses.append(
                float(
                    module(ids, torch.tensor([len(ids)]), torch.tensor([len(PROMPT)]), rows, labels)["loss"]
                )
            )
    assert abs(losses[0] - losses[1]) > 1e-3 * losses[0]
