"""One packed pass over ragged sequences equals each alone, equals transformers' eager attention."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import SIZES, eager_logits, packed_logits, save_random, some_ids

from prad.lm import LanguageModel, PackedBatch, PromptKV, Ragged

LENGTHS = (33, 1, 64, 31, 2, 65, 32, 33)  # around the edges at which sequences stop sharing a call
TOLERANCE = 1e-4  # of the logit range

OTHER_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2, windows in some layers": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma3, windows in turn": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 8}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 80}),
    "granite, its own scale": ("GraniteConfig", {"attention_multiplier": 0.3}),
    "deepseek-v3, values narrower than keys": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "first_k_dense_replace": 4,
        },
    ),
    "multi-query": ("GPTBigCodeConfig", {"n_head": 4, "n_embd": 48, "n_layer": 2}),
}


def assert_equal(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE * float(want.max() - want.min()))


def sequences() -> list[list[int]]:
    return [some_ids(length, seed) for seed, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_packed_equals_alone_equals_eager(
    family: str, tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel]
) -> None:
    model = load_tiny(family)
    packed = packed_logits(model, sequences())
    assert_equal(packed, [packed_logits(model, [s])[0] for s in sequences()])
    assert_equal(packed, eager_logits(tiny_model(family), sequences()))


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_other_families_equal_eager(family: str, tmp_path: Path) -> None:
    name, special = OTHER_FAMILIES[family]
    folder = save_random(getattr(transformers, name)(**SIZES | special), tmp_path)
    model = LanguageModel.load(folder, dtype=torch.float32)
    assert_equal(packed_logits(model, sequences()), eager_logits(folder, sequences()))


def test_the_window_matters(load_tiny: Callable[[str], LanguageModel]) -> None:
    """The Mistral fixture would not equal eager if its window of 24 were ignored."""
    model = load_tiny("mistral")
    first, second = some_ids(65, 1), some_ids(65, 1)
    second[0] = (second[0] + 1) % 100
    # 4 layers of 24 reach 93 positions back; one layer's keys do not
    keys: list[torch.Tensor] = []
    for ids in (first, second):
        batch = PackedBatch.of_sequences(
            [ids], layer_done=lambda layer, k, _: keys.append(k) if layer == 1 else None
        )
        with torch.inference_mode():
            model.forward(batch)
    assert not torch.equal(keys[0][23], keys[1][23])
    assert torch.equal(keys[0][24:], keys[1][24:])


def leaks(model: LanguageModel, make: Callable[[list[list[int]]], PackedBatch]) -> list[tuple[int, int]]:
    """(changed, affected): pairs of tenants of which one's tokens changed the other's logits by one bit."""
    prompts = [some_ids(length, seed) for seed, length in enumerate((5, 33, 1, 32, 33))]

    def last_logits(tenants: list[list[int]]) -> torch.Tensor:
        with torch.inference_mode():
            return model.forward(make(tenants))

    before = last_logits(prompts)
    found = []
    for changed, prompt in enumerate(prompts):
        for at in {0, len(prompt) // 2, len(prompt) - 1}:
            others = [list(p) for p in prompts]
            others[changed][at] = (prompt[at] + 1) % 100
            after = last_logits(others)
            assert not torch.equal(before[changed], after[changed])
            found += [
                (changed, i)
                for i in range(len(prompts))
                if i != changed and not torch.equal(before[i], after[i])
            ]
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_no_tenant_sees_another(family: str, load_tiny: Callable[[str], LanguageModel]) -> None:
    assert leaks(load_tiny(family), PackedBatch.of_sequences) == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_the_leak_check_notices_a_leak(family: str, load_tiny: Callable[[str], LanguageModel]) -> None:
    def one_long_sequence(tenants: list[list[int]]) -> PackedBatch:
        """What a server would do that lets packed prompts attend across their ends."""
        batch = PackedBatch.of_sequences(tenants)
        return replace(batch, kv=PromptKV(Ragged.of([sum(map(len, tenants))])))

    found = leaks(load_tiny(family), one_long_sequence)
    assert {(0, 1), (1, 2), (2, 3), (3, 4)} <= set(found)


def test_layers_are_handed_out_in_order_before_the_pass_ends(
    load_tiny: Callable[[str], LanguageModel],
) -> None:
    model = load_tiny("llama")
    seen: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
    batch = PackedBatch.of_sequences(
        [some_ids(3, 0), some_ids(40, 1)],
        layer_done=lambda layer, k, v: seen.append((layer, tuple(k.shape), tuple(v.shape))),
    )
    with torch.inference_mode():
        logits = model.forward(batch)
    assert seen == [(i, (43, 2, 8), (43, 2, 8)) for i in range(4)]
    assert model.layout.bytes_per_token == 4 * 2 * (8 + 8) * 4
    assert logits.shape == (2, 120)
