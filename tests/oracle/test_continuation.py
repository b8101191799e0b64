"""A request is (adapted prefix, plain continuation): in one prompt pass, the continuation's tokens are
computed without the adapter, after the prompt's with it. A replay draws on under the next
index."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prad.adapters import load_adapter
from prad.core.sampling import SamplingParams
from prad.lm import LanguageModel
from prad.lm.kv import Pools
from prefill_service.passes import FirstTokens, run_prompt_pass
from prefill_service.prompt import Prompt, PromptRequest
from tests.conftest import random_artefact
from tests.oracle.reference import Fault, Reference


def first_tokens(model: LanguageModel, *items: Prompt) -> FirstTokens:
    """All in one pass, without blocks."""
    return run_prompt_pass(model, Pools(model.layout, 0, 16, "cpu"), [i.as_chunk() for i in items])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_continuation_is_the_plain_models(
    family: str,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    model = load_tiny(family)
    artefact = random_artefact(tmp_path / "red", model, 4)
    adapter = load_adapter(artefact, model)
    reference = Reference(tiny_model(family))
    prompt, output = [5, 9, 33, 80, 2], [7, 64, 12]
    params = SamplingParams(max_tokens=9, logprobs=20)
    request = PromptRequest(
        "replay", None, tuple(prompt), params, continuation_ids=tuple(output), output_offset=len(output)
    )
    neighbour = PromptRequest("other", None, (1, 2, 3), params)
    items = [Prompt(request, adapter), Prompt(neighbour, None)]
    (draw,) = first_tokens(model, *items)[items[0]] or ()
    expected = reference.logits(prompt, [*output, 0], artefact.folder)[-1]
    top = torch.tensor([logprob for _, logprob in draw.top])
    ids = [token for token, _ in draw.top]
    torch.testing.assert_close(top, expected.log_softmax(-1)[ids], atol=1e-3, rtol=0)
    assert draw.id == int(expected.argmax())
    leaking = reference.logits(prompt, [*output, 0], artefact.folder, Fault.ADAPTER_ON_ONE_GENERATED_TOKEN)[
        -1
    ]
    assert float((leaking.log_softmax(-1)[ids] - top).abs().max()) > 1e-2


def test_a_replay_draws_what_the_first_run_drew(load_tiny: Callable[[str], LanguageModel]) -> None:
    model = load_tiny("llama")
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=11)

    def draw(continuation: tuple[int, ...]) -> int:
        request = PromptRequest(
            "r", None, (4, 8, 15), params, continuation_ids=continuation, output_offset=len(continuation)
        )
        item = Prompt(request, None)
        (drawn,) = first_tokens(model, item)[item] or ()
        return drawn.id

    run: tuple[int, ...] = ()
    for _ in range(6):
        run += (draw(run),)
    assert draw(run[:3]) == run[3]
    assert draw(()) == run[0]
