"""Sites in every family: a tap changes its own place and nothing else; one never reached is an error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIZES, save_random
from torch import Tensor, nn
from transformers import OPTConfig

from prad.lm import (
    LanguageModel,
    MissingSiteError,
    PackedBatch,
    Site,
    placements,
    projection,
    require_sites,
)

FAMILIES = ("llama", "gpt2", "mistral", "qwen3", "gemma3", "opt", "gpt-neox")
BATCH = [[5, 6, 7, 8], [9], [3, 4]]


class Tapping:
    """Multiplies the sites' values by `factor`; keeps what it saw, by layer and site."""

    def __init__(self, *sites: Site, factor: float = 1.0) -> None:
        self.sites = frozenset(sites)
        self.factor = factor
        self.seen: dict[tuple[int, Site], tuple[Tensor, Tensor]] = {}

    def apply(self, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        self.seen[layer, site] = value.clone(), source.clone()
        value.mul_(self.factor)


def logits(model: LanguageModel, adaptation: Any = None) -> Tensor:
    with torch.inference_mode():
        return model.forward(PackedBatch.of_sequences(BATCH), adaptation)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [BATCH, [[9]]])
def test_what_the_ffn_reads_is_the_source_of_what_it_says(
    batch: list[list[int]], family: str, load_tiny: Callable[[str], LanguageModel]
) -> None:
    """Equation 4's x, whether or not a module is the FFN; one token alone is a row as well."""
    model, rows = load_tiny(family), sum(map(len, batch))
    looking = Tapping(Site.FFN_IN, Site.UP, Site.DOWN_IN, Site.DOWN, Site.FFN_OUT)
    with torch.inference_mode():
        model.forward(PackedBatch.of_sequences(batch), looking)
    for layer in range(model.num_layers):
        read, _ = looking.seen[layer, Site.FFN_IN]
        said, source = looking.seen[layer, Site.FFN_OUT]
        assert read.shape == said.shape == (rows, model.hidden_size)
        assert torch.equal(read, source)
        assert torch.equal(read, looking.seen[layer, Site.UP][1])
        assert torch.equal(said, looking.seen[layer, Site.DOWN][0])
        assert torch.equal(looking.seen[layer, Site.DOWN_IN][0], looking.seen[layer, Site.DOWN][1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_projections_outputs_are_its_rows(family: str, load_tiny: Callable[[str], LanguageModel]) -> None:
    """Fused or not: what `placements` counts is what `projection` shows, and together they are all."""
    model = load_tiny(family)
    counted: dict[str, list[int]] = {}
    for layer, site, name, outputs in placements(model.module, model.config.model_type):
        if outputs is None:
            assert site in (Site.DOWN_IN, Site.FFN_IN, Site.FFN_OUT)
            continue
        module = model.module.get_submodule(name)
        stored = module.weight if isinstance(module, nn.Linear) else module.weight.T
        weight, bias = projection(model.module, model.config.model_type, layer, site)
        assert torch.equal(weight, stored[outputs])
        assert bias is None or torch.equal(bias, module.bias[outputs])
        counted.setdefault(name, []).extend(outputs.tolist())
        assert sorted(counted[name]) == sorted(set(counted[name])), "no output is two sites'"
    for name, outputs in counted.items():
        weight = model.module.get_submodule(name).weight
        assert len(outputs) in weight.shape


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_ffns_input_is_changed_and_the_residual_stream_is_not(norm_first: bool, tmp_path: Path) -> None:
    config = OPTConfig(**SIZES, ffn_dim=80, do_layer_norm_before=norm_first)
    model = LanguageModel.load(save_random(config, tmp_path), dtype=torch.float32)
    ours = logits(model, Tapping(Site.FFN_IN, factor=2.0))
    for name, module in model.module.named_modules():
        if name.endswith("fc1"):
            module.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    torch.testing.assert_close(ours, logits(model))


def test_a_pass_that_leaves_a_site_out_is_an_error(tiny_model: Callable[[str], Path]) -> None:
    """As would a release of transformers that computes the FFN without its modules."""
    model = LanguageModel.load(tiny_model("llama"), dtype=torch.float32)
    ffn: Any = model.module.get_submodule("model.layers.2.mlp")
    ffn.forward = lambda x: nn.functional.linear(
        nn.functional.silu(ffn.gate_proj(x)) * ffn.up_proj(x), ffn.down_proj.weight
    )
    logits(model, Tapping(Site.UP, Site.FFN_OUT))
    with pytest.raises(MissingSiteError, match=r"never called mlp\.down_proj of layer 2 \(down_in\)"):
        logits(model, Tapping(Site.UP, Site.DOWN_IN))


@pytest.mark.parametrize(
    ("model_type", "module"), [("gpt2", "mlp.c_fc"), ("gpt_neox", "mlp.dense_h_to_4h"), ("opt", "fc1")]
)
def test_what_a_family_lacks_is_refused_by_method_and_module(model_type: str, module: str) -> None:
    with pytest.raises(MissingSiteError, match=f"prad-x: a '{model_type}' model has no site gate .*{module}"):
        require_sites(model_type, frozenset({Site.GATE, Site.UP}), "prad-x")
