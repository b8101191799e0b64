"""What a family's configuration can change, under every method: one prompt pass of all methods, with tokens
of the plain model behind the prompts, equals the reference. The families' usual form goes through the whole
stack in test_oracle.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from prad.adapters import METHODS, load_adapter
from prad.artefact import read_artefact
from prad.core.sampling import SamplingParams
from prad.lm import LanguageModel
from prad.lm.kernels import Kernels
from prad.lm.kv import Pools
from prefill_service.passes import run_prompt_pass
from prefill_service.prompt import Prompt, PromptRequest
from tests.conftest import CONFIGS, GROUPED, SIZES, random_artefact, randomised
from tests.oracle.comparing import TOLERANCE
from tests.oracle.reference import Fault, Reference

VARIANTS: dict[str, Callable[[], PreTrainedConfig]] = {
    **CONFIGS,
    "llama with biases, tied": lambda: LlamaConfig(
        **SIZES, **GROUPED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "gpt2, scaled by layer, narrow FFN, tied": lambda: GPT2Config(
        **SIZES, num_attention_heads=4, n_inner=80, scale_attn_by_inverse_layer_idx=True
    ),
    "mistral without a window": lambda: MistralConfig(**SIZES, **GROUPED, sliding_window=None),
    "qwen3 with windows in two layers": lambda: Qwen3Config(
        **SIZES, **GROUPED, head_dim=16, use_sliding_window=True, sliding_window=8, max_window_layers=2
    ),
    "gemma3 untied, soft cap on logits, biases": lambda: Gemma3TextConfig(
        **SIZES,
        **GROUPED,
        head_dim=8,
        attention_bias=True,
        final_logit_softcapping=30.0,
        tie_word_embeddings=False,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,  # windows alone would not reach the prompt
        pad_token_id=None,
    ),
    "opt that norms behind, projected embeddings": lambda: OPTConfig(
        **SIZES,
        num_attention_heads=4,
        ffn_dim=80,
        do_layer_norm_before=False,
        word_embed_proj_dim=32,
        pad_token_id=None,
    ),
    "opt without biases": lambda: OPTConfig(
        **SIZES, num_attention_heads=4, ffn_dim=80, enable_bias=False, pad_token_id=None
    ),
    "gpt-neox, one sublayer behind the other, no biases": lambda: GPTNeoXConfig(
        **SIZES,
        num_attention_heads=4,
        intermediate_size=96,
        use_parallel_residual=False,
        attention_bias=False,
    ),
}
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, {}) for method in METHODS},
    # choices beside the defaults, and not among those of test_oracle and test_request_state
    "pa, no bias": ("prad-pa", {"bias": False, "scale": 0.5}),
    "sa, no bias": ("prad-sa", {"bias": False, "scale": 2.0}),
    "mam, no bias": ("prad-mam", {"bias": False, "scale": 0.5, "virtual_tokens": 3}),
    "dora, rslora": ("prad-dora", {"r": 4, "alpha": 2, "rslora": True, "targets": ["k", "o", "up"]}),
    "ia3 elsewhere": ("prad-ia3", {"targets": ["down", "o", "q", "down_in", "up"]}),
    "bitfit in few": ("prad-bitfit", {"targets": ["down", "k"]}),
}
FUSED = {"gpt2", "llama", "mistral", "qwen3"}
LENGTHS = (30, 1, 150)  # of prompts; a kernel computes 64 rows at a time
OUTPUT = (7, 64, 12, 99, 3, 41)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_in_one_pass(variant: str, kernels: Kernels, tmp_path: Path) -> None:
    randomised(VARIANTS[variant](), seed=1).save_pretrained(tmp_path / "model")
    generic, fast = (LanguageModel.load(tmp_path / "model", dtype=torch.float32) for _ in range(2))
    fast.accelerate(kernels)
    assert fast.is_fused == (generic.config.model_type in FUSED)
    reference = Reference(tmp_path / "model")
    for seed, (task, (method, config)) in enumerate(TASKS.items()):
        random_artefact(tmp_path / task, generic, seed, method=method, config=config)
    prompts = [[(5 * i + 11 * j + j * j) % 119 for j in range(n)] for i, n in enumerate(LENGTHS)]
    expected = {
        (task, i): reference.logits(prompt, [*OUTPUT, 0], tmp_path / task)
        for task in TASKS
        for i, prompt in enumerate(prompts)
    }
    for model in (generic, fast):
        for key, (first, later) in last_logprobs(model, tmp_path, prompts).items():
            check(first, expected[key][0])
            check(later, expected[key][-1])
    for task in TASKS:
        for fault in (Fault.ADAPTER_ON_ONE_GENERATED_TOKEN, Fault.ADAPTER_MISSING_ON_LAST_PROMPT_TOKEN):
            wrong = reference.logits(prompts[0], [*OUTPUT, 0], tmp_path / task, fault)[-1]
            right = expected[task, 0][-1]
            assert float((wrong - right).abs().max()) > TOLERANCE * float(right.max() - right.min())


Logprobs = dict[int, float]


def last_logprobs(
    model: LanguageModel, adapters: Path, prompts: list[list[int]]
) -> dict[tuple[str, int], tuple[Logprobs, Logprobs]]:
    """By task and prompt: the likeliest ids behind the prompt, and behind OUTPUT; all from one pass."""
    params = SamplingParams(max_tokens=9, logprobs=20)
    items = {}
    for task in TASKS:
        adapter = load_adapter(read_artefact(adapters / task), model)
        for i, prompt in enumerate(prompts):
            for output in ((), OUTPUT):
                request = PromptRequest("r", None, tuple(prompt), params, continuation_ids=output)
                items[task, i, output] = Prompt(request, adapter)
    pools = Pools(model.layout, 0, 16, "cpu")
    tokens = run_prompt_pass(model, pools, [item.as_chunk() for item in items.values()])
    tops = {}
    for key, item in items.items():
        (draw,) = tokens[item] or ()
        tops[key] = dict(draw.top)
    return {(t, i): (tops[t, i, ()], tops[t, i, OUTPUT]) for t in TASKS for i in range(len(prompts))}


def check(found: Logprobs, logits: torch.Tensor) -> None:
    expected = logits.log_softmax(-1)
    scale = float(logits.max() - logits.min())
    assert max(abs(float(expected[i]) - p) for i, p in found.items()) < TOLERANCE * scale
