"""generate() with its KV cache equals running the whole sequence again at every token."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tiny import SIZES, packed_logits, save_random, some_ids

from prad.core.sampling import SampleKey, SamplingParams
from prad.lm import LanguageModel, sample
from tests.generation import generate

LENGTHS = (1, 31, 33, 7, 64)


def by_full_forwards(
    model: LanguageModel, prompts: list[list[int]], params: SamplingParams
) -> list[list[int]]:
    outputs: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    while running:
        every = packed_logits(model, [p + out for p, out in zip(prompts, outputs, strict=True)])
        for i in list(running):
            key = SampleKey(params.seed, i, 0, len(outputs[i]))
            token = sample(every[i][-1:], [params], [key])[0].id
            if token not in params.stop_ids:
                outputs[i].append(token)
            if token in params.stop_ids or len(outputs[i]) == params.max_tokens:
                running.discard(i)
    return outputs


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=16),
        SamplingParams(max_tokens=16, temperature=1.5, top_p=0.95, seed=5),
        SamplingParams(max_tokens=1),
        SamplingParams(max_tokens=16, temperature=2.0, seed=1, stop_ids=frozenset(range(0, 120, 8))),
        SamplingParams(max_tokens=8, temperature=2.0, min_tokens=5, stop_ids=frozenset(range(0, 120, 4))),
    ],
    ids=["greedy", "sampled", "one token", "stops", "stops after five"],
)
def test_it_equals_full_forwards(
    family: str, params: SamplingParams, load_tiny: Callable[[str], LanguageModel]
) -> None:
    model = load_tiny(family)
    prompts = [some_ids(length, seed) for seed, length in enumerate(LENGTHS)]
    outputs = generate(model, prompts, params)
    assert outputs == by_full_forwards(model, prompts, params)
    assert all(params.min_tokens <= len(out) <= params.max_tokens for out in outputs)
    if params.stop_ids:
        assert len({len(out) for out in outputs}) > 1, "the fixture's sequences end at different steps"


def test_values_may_be_narrower_than_keys(tmp_path: Path) -> None:
    config = transformers.DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
        first_k_dense_replace=4,
    )
    model = LanguageModel.load(save_random(config, tmp_path), dtype=torch.float32)
    prompts, params = [some_ids(5, 0), some_ids(33, 1)], SamplingParams(max_tokens=6)
    assert generate(model, prompts, params) == by_full_forwards(model, prompts, params)
