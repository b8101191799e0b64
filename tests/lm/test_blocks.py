"""Weights in blocks that share a scale: read from a file, rounded to, and multiplied by rows in 8 bits."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from near import LESSER, assert_near, some, wide
from numpy.typing import NDArray
from safetensors.torch import save_file
from tiny import SIZES as SIZES_OF_TINY
from tiny import packed_logits, save_random
from torch import Tensor

from prad.lm import DEFAULT_MODEL, LanguageModel, ModelNotFoundError, resolve_model
from prad.lm.blocks import Bits, Blocks, _order, load_blocks, save_blocks
from prad.lm.kernels import Activation, Kernels, Out, PackedLinear
from tests.cache import CACHE

SIZES = ((1, 32), (16, 64), (17, 96), (40, 32), (80, 160), (336, 576), (50, 4128))  # columns, inputs
EDGES = (1, 2, 5, 6, 7, 11, 12, 13, 15, 16, 17, 24, 25, 59, 60, 61, 63, 64, 65)
BITS: tuple[Bits, ...] = (4, 8)
FOURS, EIGHTS = 3, 4
SIZES_OF_MODEL = SIZES_OF_TINY | {"hidden_size": 64, "num_attention_heads": 4}

Floats = NDArray[np.float32]


def numbers(blocks: Blocks) -> Floats:
    """[out, in / 32, 32] in float32."""
    found = blocks.unpacked().unflatten(1, (-1, 32)).float() * blocks.scale.float()[..., None]
    found += 0 if blocks.least is None else blocks.least.float()[..., None]
    return found.numpy()


def products(x: Tensor, blocks: Blocks) -> Tensor:
    """What blocks.h says, written out: 32 inputs of a row share a scale, sums in float64."""
    rows = x.float().unflatten(1, (-1, 32)).numpy()
    largest = np.maximum(np.abs(rows).max(axis=2, keepdims=True), np.float32(2.0**-100))
    steps = np.rint(rows * (np.float32(127) / largest)) * (largest / np.float32(127)).astype(np.float64)
    weight = numbers(blocks).astype(np.float64)
    return torch.from_numpy(steps.reshape(len(x), -1) @ weight.reshape(len(weight), -1).T).float()


def of(columns: int, depth: int, bits: Bits) -> Blocks:
    return Blocks.rounded(some(columns, depth, dtype=torch.bfloat16, seed=1), bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("columns", "depth"), SIZES)
def test_products_by_blocks(kernels: Kernels, columns: int, depth: int, bits: Bits) -> None:
    """Near float64, and the same bits for a row in every number of rows."""
    x, blocks = some(65, depth, dtype=torch.bfloat16), of(columns, depth, bits)
    packed = PackedLinear.of_blocks([blocks])
    expected, alone = products(x, blocks), torch.cat([wide(kernels, packed, row[None]) for row in x])
    assert_near(alone, expected, 1e-6)
    for rows in EDGES:
        assert torch.equal(wide(kernels, packed, x[:rows]), alone[:rows]), rows


@pytest.mark.parametrize("bits", BITS)
def test_long_batches_are_cut(kernels: Kernels, bits: Bits) -> None:
    x, blocks = some(517, 96, dtype=torch.bfloat16), of(400, 96, bits)
    assert_near(wide(kernels, PackedLinear.of_blocks([blocks]), x), products(x, blocks), 1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", LESSER)
def test_a_cpu_without_dot_products_comes_as_near(
    kernels_of: Callable[[str], Kernels], kind: str, bits: Bits
) -> None:
    x, blocks = some(65, 160, dtype=torch.bfloat16), of(50, 160, bits)
    packed, expected = PackedLinear.of_blocks([blocks]), products(x, blocks)
    for rows in EDGES:
        assert_near(wide(kernels_of(kind), packed, x[:rows]), expected[:rows], 1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 13, 65])
def test_what_becomes_of_the_products(kernels: Kernels, rows: int, bits: Bits) -> None:
    """Of two matrices side by side, with a bias; and as gate and up."""
    x, bias = some(rows, 96, dtype=torch.bfloat16), some(80, seed=2)
    parts = [of(30, 96, bits), Blocks.rounded(some(50, 96, seed=3), bits)]
    expected = torch.cat([products(x, part) for part in parts], dim=1) + bias
    packed = PackedLinear.of_blocks(parts, bias)
    assert_near(wide(kernels, packed, x), expected, 1e-6)
    added = torch.ones(rows, 80)
    kernels.linear(packed, x, added, Out.ADD)
    assert_near(added, 1 + expected, 1e-6)
    stored = torch.empty(rows, 80, dtype=torch.bfloat16)
    kernels.linear(packed, x, stored, Out.STORE)
    assert torch.equal(stored, wide(kernels, packed, x).bfloat16())
    pairs = PackedLinear.of_blocks([of(40, 96, bits), of(40, 96, bits)], bias, paired=True)
    both = wide(kernels, pairs, x)
    gate, up = both.chunk(2, dim=1)
    assert_near(gate - bias[:40], up - bias[40:], 1e-5)
    inner = torch.empty(rows, 40, dtype=torch.bfloat16)
    kernels.linear(pairs, x, inner, Out.GATED, Activation.RELU)
    assert_near(inner, gate.relu() * up, 8e-3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_spoils_its_own_row(kernels: Kernels, value: float, bits: Bits) -> None:
    for rows in (1, 7, 20):
        x, packed = some(rows, 96, dtype=torch.bfloat16), PackedLinear.of_blocks([of(80, 96, bits)])
        before = wide(kernels, packed, x)
        x[rows // 2, -2] = value
        after = wide(kernels, packed, x)
        assert after[rows // 2].isnan().all()
        others = torch.arange(rows) != rows // 2
        assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("bits", BITS)
def test_zeros_and_the_least_and_largest_numbers(kernels: Kernels, bits: Bits) -> None:
    x, blocks = torch.zeros(5, 64, dtype=torch.bfloat16), of(33, 64, bits)
    x[1, :40] = 1e-40
    x[2, 5] = 1e-25
    x[3, 40] = 1e37
    found, weight = wide(kernels, PackedLinear.of_blocks([blocks]), x), blocks.widened().float()
    assert (found[[0, 4]] == 0).all()
    assert found[1].abs().max() < 1e-28
    assert_near(found[2], x[2, 5].float() * weight[:, 5], 0.03)
    assert_near(found[3] / 1e37, weight[:, 40], 0.03)
    nothing = PackedLinear.of_blocks([Blocks.rounded(torch.zeros(33, 64), bits)])
    assert (wide(kernels, nothing, some(3, 64, dtype=torch.bfloat16)) == 0).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_file_is_read_as_others_read_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from prad.lm import blocks

    weight = some(33, 96).numpy()
    raw = quantize(weight, GGMLQuantizationType[kind])
    found = blocks._read(raw, GGMLQuantizationType[kind])
    assert found is not None
    right = torch.from_numpy(dequantize(raw, GGMLQuantizationType[kind]))
    assert torch.equal(torch.from_numpy(numbers(found)).flatten(1), right)
    assert torch.equal(found.widened(), right.bfloat16())


def test_the_default_model_keeps_its_files_blocks() -> None:
    """Of every linear layer and the head, in the order of rows that it has there: bit for bit."""
    folder = resolve_model(DEFAULT_MODEL, CACHE)
    kept, model = load_blocks(folder), LanguageModel.load(folder)
    layers = {name for name, weight in model.module.named_parameters() if weight.dim() == 2}
    assert kept.keys() == layers
    assert {blocks.bits for name, blocks in kept.items() if "layers" in name} == {4}
    for name, weight in model.module.named_parameters():
        assert name not in kept or torch.equal(kept[name].widened(), weight), name


def test_a_model_is_computed_from_its_files_blocks(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is rounded again; its logits are near, and not those of its bfloat16 weights."""
    model = LanguageModel.load(resolve_model(DEFAULT_MODEL, CACHE))
    (whole,) = packed_logits(model, [[1, 5, 9, 300, 7]])

    def refuse(*_: object) -> Blocks:
        raise AssertionError("rounded again")

    monkeypatch.setattr(Blocks, "rounded", refuse)
    model.accelerate(kernels, "int4")
    (found,) = packed_logits(model, [[1, 5, 9, 300, 7]])
    difference = (found - whole).abs()
    assert 0 < difference.mean() < 0.03 * float(whole.max() - whole.min())


def test_projections_of_different_kinds_become_one_of_eight_bits(tmp_path: Path, kernels: Kernels) -> None:
    folder = save_random(transformers.LlamaConfig(**SIZES_OF_MODEL), tmp_path)
    weights = dict(LanguageModel.load(folder).module.named_parameters())
    layer = "model.layers.0.self_attn."
    kept = {f"{layer}{name}.weight": bits for name, bits in (("q_proj", 8), ("k_proj", 4), ("o_proj", 8))}
    own: dict[str, Blocks] = {}
    for name, bits in kept.items():
        own[name] = Blocks.rounded(weights[name], 8 if bits == 8 else 4)
    save_blocks(own, folder)
    model = LanguageModel.load(folder)
    model.accelerate(kernels, "int4")
    assert model._fused is not None
    first, second = model._fused.layers[:2]
    assert [linear.struct.weights for linear in (first.qkv, first.o, first.up)] == [EIGHTS, EIGHTS, FOURS]
    assert (second.qkv.struct.weights, model._fused.head.struct.weights) == (FOURS, EIGHTS)


def test_what_a_processor_cannot_place_stays_as_it_is() -> None:
    class Strange:
        def process(self, weights: NDArray[np.int64], name: str, **more: Any) -> Any:
            if name == "listed":
                more["parsed_parameters"]["tensors"][name] = weights
                return SimpleNamespace(weights=weights[::-1])
            if name == "turned":
                return SimpleNamespace(weights=weights.T)
            raise KeyError(name)

    assert _order(Strange(), "listed", 3).tolist() == [2, 1, 0]
    assert _order(Strange(), "turned", 3).tolist() == [0, 1, 2]
    assert _order(Strange(), "other", 3).tolist() == [0, 1, 2]


def test_a_folder_without_blocks_has_none(tmp_path: Path) -> None:
    assert load_blocks(tmp_path) == {}


@pytest.mark.parametrize("damage", ["cut", "noise", "a part"])
def test_damaged_blocks_are_named(damage: str, tmp_path: Path) -> None:
    save_blocks({"layer.weight": Blocks.rounded(some(8, 64), 4)}, tmp_path)
    (file,) = (tmp_path / "blocks").iterdir()
    if damage == "a part":
        save_file({"layer.weight.numbers": torch.zeros(8, 32, dtype=torch.uint8)}, file)
    else:
        file.write_bytes(file.read_bytes()[:100] if damage == "cut" else bytes(range(256)))
    with pytest.raises(ModelNotFoundError, match=f"{file} cannot be read .* remove the folder {tmp_path}"):
        load_blocks(tmp_path)
