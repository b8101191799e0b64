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
from gguf.quants import dequantize
from k_blocks import rounded
from near import LESSER, assert_near, some, wide
from numpy.typing import NDArray
from safetensors.torch import save_file
from tiny import SIZES as SIZES_OF_TINY
from tiny import packed_logits, save_random
from torch import Tensor

from prad.lm import DEFAULT_MODEL, LanguageModel, ModelNotFoundError, resolve_model
from prad.lm import blocks as blocks_of_files
from prad.lm.blocks import Bits, Blocks, _order, load_blocks, save_blocks
from prad.lm.kernels import Activation, Kernels, Out, PackedLinear, Weights, can_pack_blocks
from tests.cache import CACHE

SIZES = ((1, 32), (16, 64), (17, 96), (40, 32), (80, 160), (336, 576), (50, 4128))  # columns, inputs
EDGES = (1, 2, 5, 6, 7, 11, 12, 13, 15, 16, 17, 24, 25, 59, 60, 61, 63, 64, 65)
KINDS = ("Q4_1", "Q8_0", "Q4_K", "Q6_K")
SIZES_OF_MODEL = SIZES_OF_TINY | {"hidden_size": 64, "num_attention_heads": 4}


class Rounded:
    """A random weight as a file keeps it; the K kinds with as many more inputs as they want."""

    def __init__(self, columns: int, depth: int, kind: str, seed: int = 1) -> None:
        self.depth = -(-depth // 256) * 256 if kind.endswith("K") else depth
        weight = some(columns, self.depth, dtype=torch.bfloat16, seed=seed).float()
        raw, number = rounded(weight.numpy(), kind), GGMLQuantizationType[kind]
        found = blocks_of_files._read(raw, number)
        assert found is not None
        self.blocks = found
        self.weight = torch.from_numpy(dequantize(raw, number)).double()

    def rows(self, rows: int, seed: int = 0) -> Tensor:
        return some(rows, self.depth, dtype=torch.bfloat16, seed=seed)

    def products(self, x: Tensor) -> Tensor:
        """What blocks.h says, written out: 32 inputs of a row share a scale, sums in float64."""
        rows = x.float().unflatten(1, (-1, 32)).numpy()
        largest = np.maximum(np.abs(rows).max(axis=2, keepdims=True), np.float32(2.0**-100))
        steps = np.rint(rows * (np.float32(127) / largest)) * (largest / np.float32(127)).astype(np.float64)
        return (torch.from_numpy(steps.reshape(len(x), -1)) @ self.weight.T).float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("columns", "depth"), SIZES)
def test_products_by_blocks(kernels: Kernels, columns: int, depth: int, kind: str) -> None:
    """Near float64, and the same bits for a row in every number of rows."""
    own = Rounded(columns, depth, kind)
    x, packed = own.rows(65), PackedLinear.of_blocks([own.blocks])
    alone = torch.cat([wide(kernels, packed, row[None]) for row in x])
    assert_near(alone, own.products(x), 1e-6)
    for rows in EDGES:
        assert torch.equal(wide(kernels, packed, x[:rows]), alone[:rows]), rows


@pytest.mark.parametrize("kind", KINDS)
def test_long_batches_are_cut(kernels: Kernels, kind: str) -> None:
    own = Rounded(400, 96, kind)
    x = own.rows(517)
    assert_near(wide(kernels, PackedLinear.of_blocks([own.blocks]), x), own.products(x), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cpu", LESSER)
def test_a_cpu_without_dot_products_comes_as_near(
    kernels_of: Callable[[str], Kernels], cpu: str, kind: str
) -> None:
    own = Rounded(50, 160, kind)
    x, packed = own.rows(65), PackedLinear.of_blocks([own.blocks])
    expected = own.products(x)
    for rows in EDGES:
        assert_near(wide(kernels_of(cpu), packed, x[:rows]), expected[:rows], 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 13, 65])
def test_what_becomes_of_the_products(kernels: Kernels, rows: int, kind: str) -> None:
    """Of two matrices side by side, with a bias; and as gate and up."""
    parts, bias = [Rounded(30, 96, kind), Rounded(50, 96, kind, seed=3)], some(80, seed=2)
    x = parts[0].rows(rows)
    expected = torch.cat([part.products(x) for part in parts], dim=1) + bias
    packed = PackedLinear.of_blocks([part.blocks for part in parts], bias)
    assert_near(wide(kernels, packed, x), expected, 1e-6)
    added = torch.ones(rows, 80)
    kernels.linear(packed, x, added, Out.ADD)
    assert_near(added, 1 + expected, 1e-6)
    stored = torch.empty(rows, 80, dtype=torch.bfloat16)
    kernels.linear(packed, x, stored, Out.STORE)
    assert torch.equal(stored, wide(kernels, packed, x).bfloat16())
    pairs = PackedLinear.of_blocks(2 * [Rounded(40, 96, kind).blocks], bias, paired=True)
    both = wide(kernels, pairs, x)
    gate, up = both.chunk(2, dim=1)
    assert_near(gate - bias[:40], up - bias[40:], 1e-5)
    inner = torch.empty(rows, 40, dtype=torch.bfloat16)
    kernels.linear(pairs, x, inner, Out.GATED, Activation.RELU)
    assert_near(inner, gate.relu() * up, 8e-3)


@pytest.mark.parametrize("paired", [False, True])
def test_blocks_of_several_kinds_stay_as_they_are_side_by_side(kernels: Kernels, paired: bool) -> None:
    """Bit for bit what each of them is alone."""
    kinds = ("Q6_K", "Q4_K") if paired else ("Q4_K", "Q8_0", "Q8_0", "Q6_K", "Q4_0", "Q4_K")
    parts = [Rounded(40 if paired else 48, 512, kind, seed=i) for i, kind in enumerate(kinds)]
    parts += [] if paired else [Rounded(33, 512, "Q4_1")]
    packed = PackedLinear.of_blocks([part.blocks for part in parts], paired=paired)
    assert packed.struct.weights == Weights.MIXED
    for rows in (1, 6, 7, 13, 65):
        x = parts[0].rows(rows)
        apart = [wide(kernels, PackedLinear.of_blocks([part.blocks]), x) for part in parts]
        assert torch.equal(wide(kernels, packed, x), torch.cat(apart, dim=1)), rows
        if paired:
            inner = torch.empty(rows, 40, dtype=torch.bfloat16)
            kernels.linear(packed, x, inner, Out.GATED, Activation.RELU)
            assert torch.equal(inner, (apart[0].relu() * apart[1]).bfloat16())


def test_no_panel_is_of_two_kinds() -> None:
    """Nor are panels placed over or beside each other."""
    parts = [Rounded(columns, 256, kind).blocks for columns, kind in ((24, "Q4_K"), (24, "Q6_K"))]
    assert can_pack_blocks(parts, paired=True)
    assert not can_pack_blocks(parts, paired=False)
    packed = PackedLinear.of_blocks(parts, paired=True)
    assert packed.places is not None
    sizes = {"in_features": 256, "out_features": 48, "kind": Weights.MIXED, "paired": True}
    PackedLinear.placed(**packed.tensors, **sizes)  # type: ignore[arg-type]
    for places in (packed.places + torch.tensor([64, 0]), packed.places[:-1], packed.places[[0, 1, 3, 2]]):
        with pytest.raises(ValueError, match="mixed weights"):
            PackedLinear.placed(**packed.tensors | {"places": places}, **sizes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no weights of kind"):
        PackedLinear.placed(**packed.tensors | {"places": None}, **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_spoils_its_own_row(kernels: Kernels, value: float, kind: str) -> None:
    own = Rounded(80, 96, kind)
    for rows in (1, 7, 20):
        x, packed = own.rows(rows), PackedLinear.of_blocks([own.blocks])
        before = wide(kernels, packed, x)
        x[rows // 2, -2] = value
        after = wide(kernels, packed, x)
        assert after[rows // 2].isnan().all()
        others = torch.arange(rows) != rows // 2
        assert torch.equal(after[others], before[others])


@pytest.mark.usefixtures("denormals")
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_the_least_and_largest_numbers(kernels: Kernels, kind: str) -> None:
    own = Rounded(33, 64, kind)
    x = torch.zeros(5, own.depth, dtype=torch.bfloat16)
    x[1, :40] = 1e-40
    x[2, 5] = 1e-25
    x[3, 40] = 1e37
    found, weight = wide(kernels, PackedLinear.of_blocks([own.blocks]), x), own.weight.float()
    assert (found[[0, 4]] == 0).all()
    assert found[1].abs().max() < 1e-28
    assert_near(found[2], x[2, 5].float() * weight[:, 5], 0.03)
    assert_near(found[3] / 1e37, weight[:, 40], 0.03)
    raw, number = rounded(np.zeros((33, own.depth), dtype=np.float32), kind), GGMLQuantizationType[kind]
    nothing = blocks_of_files._read(raw, number)
    assert nothing is not None
    assert (wide(kernels, PackedLinear.of_blocks([nothing]), own.rows(3)) == 0).all()


@pytest.mark.parametrize("kind", ["Q4_0", *KINDS])
def test_a_file_is_read_as_others_read_it(kind: str) -> None:
    number = GGMLQuantizationType[kind]
    raw = rounded(some(33, 512).numpy(), kind)
    found = blocks_of_files._read(raw, number)
    assert found is not None
    right = torch.from_numpy(dequantize(raw, number))
    assert torch.equal(found.widened(), right.bfloat16())
    found = found.in_order(np.arange(33)[::-1].copy())
    assert torch.equal(found.widened(), right.flip(0).bfloat16())


@pytest.mark.parametrize(("kind", "halves"), [("Q4_K", slice(0, 4)), ("Q6_K", slice(208, 210))])
def test_steps_and_numbers_may_be_any(kind: str, halves: slice) -> None:
    draw, number = np.random.default_rng(0), GGMLQuantizationType[kind]
    raw = draw.integers(0, 256, (40, 3, 144 if kind == "Q4_K" else 210), dtype=np.uint8)
    raw[..., halves] = (
        draw.normal(size=(40, 3, 2)).astype(np.float16).view(np.uint8)[..., : halves.stop - halves.start]
    )
    raw = raw.reshape(40, -1)
    found = blocks_of_files._read(raw, number)
    assert found is not None
    assert torch.equal(found.widened(), torch.from_numpy(dequantize(raw, number)).bfloat16())


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


def test_projections_of_different_kinds_keep_them(tmp_path: Path, kernels: Kernels) -> None:
    folder = save_random(transformers.LlamaConfig(**SIZES_OF_MODEL), tmp_path)
    weights = dict(LanguageModel.load(folder).module.named_parameters())
    layer = "model.layers.0.self_attn."
    parts: tuple[tuple[str, Bits], ...] = (("q_proj", 8), ("k_proj", 4), ("o_proj", 8))
    kept = {f"{layer}{name}.weight": bits for name, bits in parts}
    save_blocks({name: Blocks.rounded(weights[name], bits) for name, bits in kept.items()}, folder)
    model = LanguageModel.load(folder)
    model.accelerate(kernels, "int4")
    assert model._fused is not None
    first, second = model._fused.layers[:2]
    ways = [linear.struct.weights for linear in (first.qkv, first.o, first.up)]
    assert ways == [Weights.MIXED, Weights.EIGHTS, Weights.FOURS]
    assert first.qkv.places is not None
    assert first.qkv.places[:, 1].tolist() == 4 * [Weights.EIGHTS] + 2 * [Weights.FOURS] + 2 * [
        Weights.EIGHTS
    ]
    assert (second.qkv.struct.weights, model._fused.head.struct.weights) == (Weights.FOURS, Weights.EIGHTS)


def test_projections_that_would_share_a_panel_become_one_of_eight_bits(
    tmp_path: Path, kernels: Kernels
) -> None:
    few = {"num_attention_heads": 8, "num_key_value_heads": 1}  # keys of 8 outputs
    folder = save_random(transformers.LlamaConfig(**SIZES_OF_MODEL | few), tmp_path)
    weights = dict(LanguageModel.load(folder).module.named_parameters())
    layer = "model.layers.0.self_attn."
    parts: tuple[tuple[str, Bits], ...] = (("k_proj", 8), ("v_proj", 4))
    names = {f"{layer}{name}.weight": bits for name, bits in parts}
    save_blocks({name: Blocks.rounded(weights[name], bits) for name, bits in names.items()}, folder)
    model = LanguageModel.load(folder)
    model.accelerate(kernels, "int4")
    assert model._fused is not None
    ways = [layer.qkv.struct.weights for layer in model._fused.layers[:2]]
    assert ways == [Weights.EIGHTS, Weights.FOURS]


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
