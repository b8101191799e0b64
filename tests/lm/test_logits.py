"""Logits are float32 in every model dtype and on every path, and finer than the model's dtype could say."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_fused import decode_steps
from tiny import SIZES, packed_logits, save_random, some_ids
from torch import Tensor

from prad.core.sampling import SamplingParams
from prad.lm import DEFAULT_MODEL, LanguageModel, Tokenizer, resolve_model
from prad.lm.kernels import Kernels, Precision
from tests.cache import CACHE
from tests.generation import generate

PATHS: dict[str, Precision | None] = {
    "torch": None,
    "kernels": "full",
    "kernels, int8": "int8",
    "kernels, int4": "int4",
}
FAMILIES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES | {"hidden_size": 64}),
    "gpt2, tied": lambda: transformers.GPT2Config(**SIZES | {"hidden_size": 64}),
    "gemma3, soft cap": lambda: transformers.Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=8, final_logit_softcapping=5.0
    ),
    "granite, scaled": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=3.0),
    "phi, head with a bias": lambda: transformers.PhiConfig(**SIZES),
}


def loaded(folder: Path, dtype: torch.dtype, kernels: Kernels, precision: Precision | None) -> LanguageModel:
    model = LanguageModel.load(folder, dtype=dtype)
    if precision is not None:
        model.accelerate(kernels, precision)
    return model


def is_finer_than_bf16(logits: Tensor) -> bool:
    return not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", ["llama", "gpt2, tied"])
def test_prompts_and_steps_have_float32_logits(
    family: str, path: str, tmp_path: Path, kernels: Kernels
) -> None:
    model = loaded(save_random(FAMILIES[family](), tmp_path), torch.bfloat16, kernels, PATHS[path])
    assert model.is_fused == (path != "torch")
    sequences = [some_ids(length, seed) for seed, length in enumerate((3, 70))]
    for logits in (*packed_logits(model, sequences), decode_steps(model)):
        assert logits.dtype is torch.float32
        assert is_finer_than_bf16(logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_generic_forward_keeps_what_the_head_sums(
    family: str, dtype: torch.dtype, tmp_path: Path, kernels: Kernels
) -> None:
    """Nearer to the same model with a float32 head than the dtype's own steps are wide."""
    folder = save_random(FAMILIES[family](), tmp_path)
    model = loaded(folder, dtype, kernels, None)
    exact = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    head = exact.get_output_embeddings()
    wide = torch.nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
    wide.weight = torch.nn.Parameter(head.weight.detach().float())
    if head.bias is not None:
        wide.bias = torch.nn.Parameter(head.bias.detach().float())
    exact.set_output_embeddings(wide)
    states: list[Tensor] = []
    module: Any = model.module
    module.get_output_embeddings().register_forward_pre_hook(lambda _, given: states.append(given[0]))
    (logits,) = packed_logits(model, [some_ids(40, 0)])
    # transformers' own code behind its own float32 head, on the states that our head got
    wide.register_forward_pre_hook(lambda *_: (states[0].float(),))
    with torch.inference_mode():
        expected = exact(torch.tensor([some_ids(40, 0)]), use_cache=False).logits[0]
    assert logits.dtype is torch.float32
    assert is_finer_than_bf16(logits)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_gradients_come_through_the_head(tmp_path: Path) -> None:
    model = LanguageModel.load(save_random(FAMILIES["llama"](), tmp_path), dtype=torch.bfloat16)
    module: Any = model.module
    head = module.get_output_embeddings()
    states = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    logits = head(states)
    logits.square().sum().backward()
    assert (logits.dtype, states.grad is not None) == (torch.float32, True)


@pytest.mark.parametrize(
    "path", sorted(PATHS.keys() - {"kernels, int4"})
)  # which moves logits further than that
def test_the_default_model_knows_the_capital_of_france(path: str, kernels: Kernels) -> None:
    """In float32 "The" leads "L" by 0.1 of 25; in bf16 both are 25.25, and "L" has the lower id."""
    folder = resolve_model(DEFAULT_MODEL, CACHE)
    tokenizer = Tokenizer(folder)
    model = loaded(folder, torch.bfloat16, kernels, PATHS[path])
    chat = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    best = packed_logits(model, [chat])[0][-1].topk(2)
    assert [tokenizer.decode([i]) for i in best.indices.tolist()] == ["The", "L"]
    assert best.values[0] > best.values[1]
    (answer,) = generate(model, [chat], SamplingParams(max_tokens=7))
    assert tokenizer.decode(answer) == "The capital of France is Paris."
