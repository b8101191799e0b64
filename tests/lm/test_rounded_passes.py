"""A prompt pass with rounded weights: the products are those of numpy, and all else, the adapters of every
method too, is as it is without rounding.
"""

from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from near import ACTIVATIONS, by_blocks, by_bytes
from tiny import SIZES, save_random, some_ids
from torch import Tensor
from transformers import LlamaConfig

from prad.adapters import METHODS, Adapter, load_adapter
from prad.artefact import Artefact
from prad.core.sampling import SamplingParams
from prad.lm import LanguageModel
from prad.lm.blocks import Blocks
from prad.lm.kernels import Activation, Kernels, Out, PackedLinear, Precision
from prad.lm.kernels.build import built
from prad.lm.kv import Pools
from prefill_service.passes import prompt_logits
from prefill_service.prompt import Prompt, PromptRequest
from tests.cache import CACHE
from tests.conftest import random_artefact

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "tie_word_embeddings": False}
LENGTHS = (33, 1, 16, 17, 40, 5)
PRECISIONS: tuple[Precision, ...] = ("int8", "int4")


class ByNumpy(Kernels):
    """The kernels, but for products by weights: packed as the model's own, rounded where they are needed."""

    def __init__(self, precision: Precision) -> None:
        super().__init__(built(CACHE), 2)
        self._precision = precision

    def linear(
        self, weights: PackedLinear, x: Tensor, out: Tensor, mode: Out, act: Activation = Activation.NONE
    ) -> None:
        assert weights.bias is None
        products = self._products(x, _unpacked(weights))
        if mode is Out.ADD:
            out += products
        elif mode is Out.GATED:
            self.activate(products, out, act)
        else:
            out.copy_(ACTIVATIONS[act](products))

    def _products(self, x: Tensor, weight: Tensor) -> Tensor:
        if self._precision == "int8":
            return by_bytes(x, weight)
        return by_blocks(x, Blocks.rounded(weight, 8 if len(weight) == SIZES["vocab_size"] else 4))


def _unpacked(packed: PackedLinear) -> Tensor:
    """The weight [out, in] in bfloat16 of panels [n, in / 2, 16, 2]."""
    assert packed.panels.dtype is torch.bfloat16
    panels = packed.panels.view(-1, packed.struct.in_features // 2, 16, 2).transpose(1, 2).flatten(2)
    if packed.struct.paired:
        panels = panels.unflatten(0, (-1, 2)).transpose(0, 1)
    halves = panels.reshape(2 if packed.struct.paired else 1, -1, packed.struct.in_features)
    columns = packed.struct.out_features // len(halves)
    return halves[:, :columns].flatten(0, 1)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Artefact]]:
    """A model, and an adapter of every method for it."""
    root = tmp_path_factory.mktemp("rounded")
    save_random(LlamaConfig(**SIZES | WIDE), root / "model")
    model = LanguageModel.load(root / "model")
    return root / "model", [
        random_artefact(root / method, model, seed, method=method, config=_config(method))
        for seed, method in enumerate(METHODS)
    ]


def _config(method: str) -> dict[str, Any]:
    fields = METHODS[method].config_type.model_fields
    return {name: value for name, value in (("r", 8), ("virtual_tokens", 3)) if name in fields}


@pytest.fixture(scope="module")
def whole_passes() -> Kernels:
    return Kernels(built(CACHE), 2)


def loaded(folder: Path, kernels: Kernels, precision: Precision) -> LanguageModel:
    model = LanguageModel.load(folder)
    model.accelerate(kernels, precision)
    assert model.is_fused
    return model


def prompts(model: LanguageModel, artefacts: list[Artefact]) -> list[Prompt]:
    """Of every method, and of the plain model."""
    adapters: list[Adapter | None] = [*(load_adapter(each, model) for each in artefacts), None, None]
    return [
        Prompt(
            PromptRequest(
                f"p{seed}",
                None,
                tuple(some_ids(LENGTHS[seed % len(LENGTHS)], seed)),
                SamplingParams(max_tokens=1),
                continuation_ids=tuple(some_ids(seed % 3, seed)),
            ),
            adapter,
        )
        for seed, adapter in enumerate(adapters)
    ]


def computed(model: LanguageModel, asked: list[Prompt]) -> tuple[list[Tensor], Tensor]:
    """Of one pass: each layer's keys, and values [T, heads, dim], and the logits [R, vocab]."""
    kept: list[Tensor] = []
    pools = Pools(model.layout, 1, 16, "cpu", model.kernels)
    with torch.inference_mode():
        chunks = [prompt.as_chunk() for prompt in asked]
        logits, _ = prompt_logits(model, pools, chunks, lambda _, key, value: kept.extend((key, value)))
    return kept, logits


def off(found: list[Tensor], expected: list[Tensor], asked: list[Prompt]) -> list[float]:
    """Each prompt's largest difference, of the largest number in the tensor. Of all tensors but the last, the
    logits, a prompt has as many rows as tokens."""
    ends = list(accumulate((prompt.tokens for prompt in asked), initial=0))
    largest = [0.0] * len(asked)
    for a, b in zip(found, expected, strict=True):
        rows = ((a.float() - b.float()).abs() / b.float().abs().max()).flatten(1).amax(1)
        bounds = ends if len(rows) == ends[-1] else range(len(asked) + 1)
        largest = [
            max(so_far, float(rows[start:end].max()))
            for so_far, (start, end) in zip(largest, pairwise(bounds), strict=True)
        ]
    return largest


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_pass_is_that_of_rounded_products(
    precision: Precision, adapted: tuple[Path, list[Artefact]], whole_passes: Kernels
) -> None:
    """Keys, values and logits of prompts of every method. Numpy adds in another order: where that rounds a
    number to the next step of 8 bits, what follows in the same prompt is off by such steps."""
    folder, artefacts = adapted
    models = [
        loaded(folder, whole_passes, precision),
        loaded(folder, ByNumpy(precision), "full"),
        loaded(folder, whole_passes, "full"),
    ]
    found, expected, exact = (
        [*kept, logits] for kept, logits in (computed(each, prompts(each, artefacts)) for each in models)
    )
    asked = prompts(models[0], artefacts)
    differences = off(found, expected, asked)
    assert sum(difference < 1e-3 for difference in differences) >= len(asked) - 2, differences
    assert max(differences) < 5e-2, "more than steps: a method's part is wrong"
    assert min(off(exact, expected, asked)) > 1e-2, "nothing was rounded"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_prompt_has_the_same_bits_alone_and_beside_every_method(
    precision: Precision, adapted: tuple[Path, list[Artefact]], whole_passes: Kernels
) -> None:
    model = loaded(adapted[0], whole_passes, precision)
    asked = prompts(model, adapted[1])
    _, together = computed(model, asked)
    alone = torch.cat([computed(model, [each])[1] for each in asked])
    assert torch.equal(together, alone)
    plain = torch.cat([computed(model, [Prompt(each.request)])[1] for each in asked])
    moved = (together != plain).any(dim=1).tolist()
    assert moved == [True] * len(METHODS) + [False, False], "adapters act, and on their own rows only"
