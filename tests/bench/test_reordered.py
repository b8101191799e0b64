"""Channels in another order: the same logits, keys and values of other weights, in other blocks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.own_engine import prompt_kv
from bench.reordered import reordered, with_made_blocks
from prad.lm import LanguageModel, attention
from prad.lm.kernels import Kernels

PROMPTS = [[3, 1, 4], list(range(20, 60))]


@pytest.fixture(params=[False, True], ids=["own head", "tied"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    torch.manual_seed(0)
    attention.register()
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=request.param,
        initializer_range=0.2,
    )
    return LanguageModel(
        AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention.NAME),
        "tiny",
    )


def test_it_is_the_same_model(model: LanguageModel) -> None:
    (right, keys_and_values), (found, others) = (
        prompt_kv(each, PROMPTS, None) for each in (model, reordered(model))
    )
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(others, keys_and_values, rtol=1e-4, atol=1e-4)


def test_every_matrix_lies_elsewhere_and_the_model_it_is_made_of_stays(model: LanguageModel) -> None:
    before = {name: weight.clone() for name, weight in model.module.named_parameters()}
    other = dict(reordered(model).module.named_parameters())
    for name, weight in model.module.named_parameters():
        assert torch.equal(weight, before[name])
        assert other[name].shape == weight.shape
        assert weight.dim() == 1 or not torch.equal(other[name], weight), name


def test_without_a_file_s_blocks_4_bits_are_made_anyway(
    tiny_model: Callable[[str], Path], kernels: Kernels
) -> None:
    folder = tiny_model("llama")
    model = LanguageModel.load(folder)
    model.accelerate(kernels)
    assert with_made_blocks(model, folder) is None
