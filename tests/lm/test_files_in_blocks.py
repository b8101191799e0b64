"""A whole model from a `.gguf` whose tensors are in blocks, mixed as in the files that people have."""

from pathlib import Path

import pytest
import torch
import transformers
from gguf_files import Sizes, tensors, write_gguf
from near import assert_near, wide
from tiny import packed_logits
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from bench.reordered import with_made_blocks
from prad.lm import LanguageModel, resolve_model
from prad.lm.blocks import load_blocks
from prad.lm.fused import FusedModel
from prad.lm.kernels import Kernels, PackedLinear, Weights
from prad.lm.kernels.build import built
from prad.lm.packed import PackedModel
from prad.lm.serving import accelerated, load_served
from tests.cache import CACHE

SIZES = Sizes(hidden=256, ffn=512, heads=4, kv_heads=2)
SEQUENCES = [[1, 5, 9, 30, 7], [44], list(range(3, 40))]
OWN = {"attn_q": "Q4_K", "attn_k": "Q4_K", "attn_output": "Q4_K", "ffn_gate": "Q4_K", "ffn_up": "Q4_K"}
LAYERS = (OWN | {"attn_v": "Q4_K", "ffn_down": "Q4_K"}, OWN | {"attn_v": "Q6_K", "ffn_down": "Q6_K"})
"""As llama.cpp's Q4_K_M has them: half of the values and of what leads down in 6 bits."""


def kinds(*layers: dict[str, str], embedding: str) -> dict[str, str]:
    own = {f"blk.{i}.{name}.weight": kind for i, layer in enumerate(layers) for name, kind in layer.items()}
    return own | {"token_embd.weight": embedding}


def exact(path: Path) -> transformers.LlamaForCausalLM:
    """The same in float32, as gguf and transformers read it."""
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    module = transformers.LlamaForCausalLM(config)
    found = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=module)["tensors"]
    module.load_state_dict(found, strict=False)
    module.tie_weights()
    return module.eval()


def written(tmp_path: Path, sizes: Sizes, of: dict[str, str]) -> Path:
    return write_gguf(tmp_path / "model.gguf", tensors(sizes, spread=2 * sizes.hidden**-0.5), sizes, of)


def weights_of(kernels: Kernels, linear: PackedLinear) -> Tensor:
    """[out, in], by rows that are zeros but for one."""
    return wide(kernels, linear, torch.eye(linear.struct.in_features, dtype=torch.bfloat16)).T


def linears(fused: FusedModel) -> dict[str, PackedLinear]:
    own = {
        f"{i}.{name}": getattr(layer, name)
        for i, layer in enumerate(fused.layers)
        for name in ("qkv", "o", "up", "down")
    }
    return own | {"head": fused.head}


def weights_there(module: transformers.LlamaForCausalLM) -> dict[str, Tensor]:
    found = {"head": module.lm_head.weight}
    for i, layer in enumerate(module.model.layers):
        attention, ffn = layer.self_attn, layer.mlp
        parts = {
            "qkv": (attention.q_proj, attention.k_proj, attention.v_proj),
            "o": (attention.o_proj,),
            "up": (ffn.gate_proj, ffn.up_proj),
            "down": (ffn.down_proj,),
        }
        found |= {f"{i}.{name}": torch.cat([m.weight for m in own]) for name, own in parts.items()}
    return {name: weight.detach() for name, weight in found.items()}


def test_the_weights_are_exactly_the_files(tmp_path: Path, kernels: Kernels) -> None:
    """Through all that becomes of them: rows in another order, several kinds side by side, one file."""
    path = written(tmp_path, SIZES, kinds(*LAYERS, embedding="Q6_K"))
    expected = weights_there(exact(path))
    folder = resolve_model(str(path), tmp_path / "cache")
    for _ in ("packed", "mapped"):
        model = accelerated(folder, tmp_path / "cache", torch.bfloat16, kernels, "int4")
        assert isinstance(model, PackedModel)
        assert model._fused is not None
        own = linears(model._fused)
        assert own.keys() == expected.keys()
        for name, linear in own.items():
            assert_near(weights_of(kernels, linear), expected[name], 1e-6)
        ways = {name: linear.struct.weights for name, linear in own.items()}
        assert ways["0.qkv"] == ways["0.up"] == ways["0.down"] == ways["1.o"] == Weights.K_FOURS
        assert (ways["1.qkv"], ways["1.down"], ways["head"]) == (
            Weights.MIXED,
            Weights.K_SIXES,
            Weights.K_SIXES,
        )


def distances(found: list[Tensor], path: Path) -> Tensor:
    """Mean distances of logits from the exact model's, by their range."""
    module = exact(path)
    with torch.inference_mode():
        whole = [module(torch.tensor([s]), use_cache=False).logits[0] for s in SEQUENCES]
    pairs = zip(found, whole, strict=True)
    return torch.stack([(ours - its).abs().mean() / (its.max() - its.min()) for ours, its in pairs])


def test_logits_are_the_dequantised_models(tmp_path: Path, kernels: Kernels) -> None:
    """But for rows in bfloat16 and 8 bits; weights that were rounded again would be farther away."""
    path = written(tmp_path, SIZES, kinds(*LAYERS, embedding="Q6_K"))
    folder = resolve_model(str(path), tmp_path / "cache")
    kept, again = LanguageModel.load(folder), LanguageModel.load(folder)
    assert len(kept._blocks) == 7 * 2 + 1
    again._blocks = {}
    for model in (kept, again):
        model.accelerate(kernels, "int4")
    own, rounded_again = (distances(packed_logits(model, SEQUENCES), path) for model in (kept, again))
    assert own.max() < 0.01
    assert own.mean() < 0.6 * rounded_again.mean()


def test_what_stands_in_for_the_k_kinds_is_rounded_again(tmp_path: Path, kernels: Kernels) -> None:
    """llama.cpp's, where a width is no multiple of 256: beside Q8_0, which is kept, Q5_0, which is not."""
    sizes = Sizes(hidden=96, ffn=160, heads=3, kv_heads=3)
    of = dict.fromkeys((*OWN, "ffn_down"), "Q5_0") | {"attn_v": "Q8_0"}
    path = written(tmp_path, sizes, kinds(of, of, embedding="Q8_0"))
    folder = resolve_model(str(path), tmp_path / "cache")
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in load_blocks(folder)} == {
        "v_proj",
        "embed_tokens",
    }
    model = LanguageModel.load(folder)
    model.accelerate(kernels, "int4")
    assert model._fused is not None
    ways = {name: linear.struct.weights for name, linear in linears(model._fused).items()}
    assert (ways["0.qkv"], ways["0.up"], ways["head"]) == (Weights.EIGHTS, Weights.FOURS, Weights.EIGHTS)
    assert distances(packed_logits(model, SEQUENCES), path).max() < 0.05


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_gate_and_up_in_several_kinds(tmp_path: Path, kernels: Kernels, kind: str) -> None:
    layer = LAYERS[0] | {"ffn_gate": kind, "ffn_up": "Q8_0"}
    path = written(tmp_path, SIZES, kinds(layer, LAYERS[1], embedding="Q8_0"))
    model = LanguageModel.load(resolve_model(str(path), tmp_path / "cache"))
    model.accelerate(kernels, "int4")
    assert model._fused is not None
    up = model._fused.layers[0].up
    assert up.struct.weights == Weights.MIXED
    assert distances(packed_logits(model, SEQUENCES), path).max() < 0.01


@pytest.mark.parametrize(
    ("kind", "beside", "made"), [("Q4_1", "Q4_1", 0), ("F16", "F16", 1), ("Q5_0", "Q8_0", 1)]
)
def test_who_starts_on_made_blocks_is_told(
    tmp_path: Path, kind: str, beside: str, made: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where a few of them are the file's own, as llama.cpp mixes Q5_0 with Q8_0."""
    of = dict.fromkeys((*OWN, "ffn_down"), kind) | {"attn_v": beside}
    path = written(tmp_path, SIZES, kinds(of, of, embedding=beside))
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "kernels").symlink_to(built(CACHE).parent)
    load_served(str(path), cache, dtype="bfloat16", kernels="native", weights="int4")
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == made
    assert all("are rounded to 4 bits" in line and str(path) in line for line in told)


def test_blocks_that_a_benchmark_makes_are_not_the_files(tmp_path: Path, kernels: Kernels) -> None:
    """In another order of the channels; in its own, rounding would find the file's again."""
    of = dict.fromkeys((*OWN, "attn_v", "ffn_down"), "Q4_1")
    path = written(tmp_path, SIZES, kinds(of, of, embedding="Q8_0"))
    folder = resolve_model(str(path), tmp_path / "cache")
    model = LanguageModel.load(folder)
    model.accelerate(kernels)
    made = with_made_blocks(model, folder)
    assert made is not None
    model.accelerate(kernels, "int4")
    own, others = (distances(packed_logits(each, SEQUENCES), path) for each in (model, made))
    assert own.mean() < 0.5 * others.mean()
