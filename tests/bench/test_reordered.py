"""Channels in another order: the same logits, keys and values of other weights, in other blocks."""

from collections.abc import Callable
from pathlib import Path

import torch

from bench.own_engine import prompt_kv
from bench.reordered import reordered, with_made_blocks
from prad.lm import LanguageModel
from prad.lm.kernels import Kernels

PROMPTS = [[3, 1, 4], list(range(20, 60))]


def test_it_is_the_same_model(load_tiny: Callable[[str], LanguageModel]) -> None:
    model = load_tiny("llama")
    other = reordered(model)
    (right, keys_and_values), (found, others) = (prompt_kv(each, PROMPTS, None) for each in (model, other))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(others, keys_and_values, rtol=1e-4, atol=1e-4)


def test_every_weight_lies_elsewhere(load_tiny: Callable[[str], LanguageModel]) -> None:
    model = load_tiny("llama")
    weights = dict(model.module.named_parameters())
    for name, weight in reordered(model).module.named_parameters():
        assert weight.shape == weights[name].shape
        assert (weight != weights[name]).any() or (weight == weight.flatten()[0]).all(), name


def test_the_model_it_is_made_of_stays(load_tiny: Callable[[str], LanguageModel]) -> None:
    model = load_tiny("llama")
    before = {name: weight.clone() for name, weight in model.module.named_parameters()}
    reordered(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.module.named_parameters())


def test_without_a_file_s_blocks_4_bits_are_made_anyway(
    tiny_model: Callable[[str], Path], kernels: Kernels
) -> None:
    folder = tiny_model("llama")
    model = LanguageModel.load(folder)
    model.accelerate(kernels)
    assert with_made_blocks(model, folder) is None
